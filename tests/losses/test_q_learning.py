"""Temporal-difference losses against loops, terminal steps, ILQL, and a small MDP whose optimum is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import offline_q_learning, q_learning, value

rng = np.random.default_rng(8)
B, T, A = 4, 5, 3
Q, NEXT_Q, OTHER_Q = (rng.normal(size=(B, T, A)).astype(np.float32) for _ in range(3))
ACTIONS, NEXT_ACTIONS = (rng.integers(0, A, (B, T)) for _ in range(2))
REWARDS = rng.normal(size=(B, T)).astype(np.float32)
DISCOUNTS = np.where(rng.random((B, T)) < 0.3, 0.0, 0.9).astype(np.float32)
POLICY = rng.dirichlet(np.ones(A), (B, T)).astype(np.float32)
VALUES, NEXT_VALUES = (rng.normal(size=(B, T)).astype(np.float32) for _ in range(2))


def each(oracle):
    return np.array([[oracle(b, t) for t in range(T)] for b in range(B)])


BOOTSTRAPS = {
    "q_learning": ((), lambda b, t: max(map(float, NEXT_Q[b, t]))),
    "double_q": ((OTHER_Q,), lambda b, t: float(NEXT_Q[b, t, int(np.argmax(OTHER_Q[b, t]))])),
    "sarsa": ((NEXT_ACTIONS,), lambda b, t: float(NEXT_Q[b, t, NEXT_ACTIONS[b, t]])),
    "expected_sarsa": ((POLICY,), lambda b, t: sum(float(POLICY[b, t, a] * NEXT_Q[b, t, a]) for a in range(A))),
}  # fmt: skip
LOSSES = {
    "q_learning": (q_learning.q_learning, q_learning.q_learning_target),
    "double_q": (q_learning.double_q_learning, q_learning.double_q_target),
    "sarsa": (q_learning.sarsa, q_learning.sarsa_target),
    "expected_sarsa": (q_learning.expected_sarsa, q_learning.expected_sarsa_target),
}


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_targets_and_losses_equal_loops(name):
    extra, bootstrap = BOOTSTRAPS[name]
    loss, target = LOSSES[name]
    expected = each(lambda b, t: float(REWARDS[b, t]) + float(DISCOUNTS[b, t]) * bootstrap(b, t))
    np.testing.assert_allclose(target(REWARDS, DISCOUNTS, NEXT_Q, *extra), expected, rtol=1e-5, atol=1e-6)
    errors = each(lambda b, t: (float(Q[b, t, ACTIONS[b, t]]) - expected[b, t]) ** 2)
    found = loss(Q, ACTIONS, REWARDS, DISCOUNTS, NEXT_Q, *extra)
    np.testing.assert_allclose(found, errors, rtol=1e-4, atol=1e-5)
    robust = value.huber(q_learning.action_values(Q, ACTIONS), target(REWARDS, DISCOUNTS, NEXT_Q, *extra))
    assert (robust <= found / 2 + 1e-6).all()


@pytest.mark.parametrize("name", BOOTSTRAPS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_a_terminal_step_does_not_look_at_the_next_state(name, garbage):
    extra, _ = BOOTSTRAPS[name]
    dirty = np.where(DISCOUNTS[..., None] == 0, garbage, NEXT_Q).astype(np.float32)
    clean = LOSSES[name][1](REWARDS, DISCOUNTS, NEXT_Q, *extra)
    found = LOSSES[name][1](REWARDS, DISCOUNTS, dirty, *extra)
    np.testing.assert_array_equal(found, clean)


def test_what_equals_what():
    greedy = np.argmax(NEXT_Q, -1)
    expected = q_learning.q_learning_target(REWARDS, DISCOUNTS, NEXT_Q)
    step = (REWARDS, DISCOUNTS, NEXT_Q)
    np.testing.assert_allclose(q_learning.sarsa_target(*step, greedy), expected, rtol=1e-6)
    np.testing.assert_allclose(q_learning.double_q_target(*step, NEXT_Q), expected, rtol=1e-6)
    certain = np.eye(A, dtype=np.float32)[greedy]
    np.testing.assert_allclose(q_learning.expected_sarsa_target(*step, certain), expected, rtol=1e-6)
    assert (q_learning.double_q_target(*step, OTHER_Q) <= expected).all()
    each_action = [q_learning.sarsa_target(*step, np.full((B, T), a)) for a in range(A)]
    average = sum(np.asarray(x) * POLICY[..., a] for a, x in enumerate(each_action))
    np.testing.assert_allclose(q_learning.expected_sarsa_target(*step, POLICY), average, rtol=1e-4, atol=1e-5)


def test_ilql_equals_loops():
    found = offline_q_learning.ilql(Q, VALUES, NEXT_VALUES, OTHER_Q, ACTIONS, REWARDS, DISCOUNTS, expectile=0.8)
    taken = lambda q, b, t: float(q[b, t, ACTIONS[b, t]])
    target = lambda b, t: float(REWARDS[b, t]) + float(DISCOUNTS[b, t]) * float(NEXT_VALUES[b, t])
    np.testing.assert_allclose(found.q, each(lambda b, t: (taken(Q, b, t) - target(b, t)) ** 2), rtol=1e-4, atol=1e-5)

    def expectile(b, t):
        u = taken(OTHER_Q, b, t) - float(VALUES[b, t])
        return abs(0.8 - (u < 0)) * u * u

    np.testing.assert_allclose(found.value, each(expectile), rtol=1e-4, atol=1e-5)
    cql = each(lambda b, t: math.log(sum(math.exp(float(q)) for q in Q[b, t])) - taken(Q, b, t))
    np.testing.assert_allclose(found.conservative, cql, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(offline_q_learning.conservative_penalty(Q + 7, ACTIONS), cql, rtol=1e-4, atol=1e-4)
    assert (cql >= 0).all()


def test_ilql_policy_tilts_the_base_model():
    logits = rng.normal(size=(B, A)).astype(np.float32)
    q, v = Q[:, 0], VALUES[:, 0]
    shifted = offline_q_learning.ilql_logits(logits, q, v, beta=2.0)
    weights = np.exp(logits.astype(np.float64)) * np.exp(2 * (q - v[:, None]))
    np.testing.assert_allclose(jax.nn.softmax(shifted), weights / weights.sum(-1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(offline_q_learning.ilql_logits(logits, q, v, beta=0.0), logits)
    sharp = jnp.argmax(offline_q_learning.ilql_logits(logits, q, v, beta=1e6), -1)
    np.testing.assert_array_equal(sharp, np.argmax(q, -1))
    with pytest.raises(ValueError, match=rf"one per state, \(1, {len(v)}\), got \({len(v)},\)"):
        offline_q_learning.ilql_logits(logits[None], q[None], v)


def test_actions_are_checked_in_words():
    with pytest.raises(TypeError, match="actions must be integer, got dtype float32"):
        q_learning.action_values(Q, ACTIONS.astype(np.float32))
    with pytest.raises(ValueError, match=r"actions.shape \+ \(A,\)"):
        q_learning.action_values(Q, ACTIONS[:2])


GAMMA = 0.8
REWARD = np.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.0]], np.float32)  # 3 states, 2 actions, deterministic moves
MOVE = np.array([[1, 0], [2, 0], [0, 1]])


def optimal_q():
    q = np.zeros((3, 2))
    for _ in range(400):
        q = REWARD + GAMMA * q.max(-1)[MOVE]
    return q


@pytest.mark.parametrize("name", ["q_learning", "double_q", "sarsa", "expected_sarsa", "ilql"])
def test_descent_on_every_transition_reaches_the_known_values_of_a_small_mdp(name):
    states, actions = (x.ravel() for x in np.mgrid[0:3, 0:2])
    rewards, after = jnp.asarray(REWARD[states, actions]), MOVE[states, actions]
    discounts = jnp.full(6, GAMMA)
    behaviour = np.full((6, 2), 0.5, np.float32)

    def loss(tables):
        q, v = tables
        if name == "ilql":
            return offline_q_learning.ilql(
                q[states], v[states], v[after], q[states], actions, rewards, discounts, expectile=0.999
            )[:2]
        step = (q[states], actions, rewards, discounts, q[after])
        greedy = jnp.argmax(q[after], -1)
        extra = {"double_q": (q[after],), "sarsa": (greedy,), "expected_sarsa": (behaviour,)}.get(name, ())
        return LOSSES[name][0](*step, *extra)

    rate = 0.4
    step = jax.jit(lambda tables: jax.tree.map(
        lambda x, g: x - rate * g, tables, jax.grad(lambda y: sum(map(jnp.sum, jax.tree.leaves(loss(y)))))(tables)
    ))  # fmt: skip
    tables = (jnp.zeros((3, 2)), jnp.zeros(3))
    for _ in range(150):
        tables = step(tables)
    expected = optimal_q()
    if name == "expected_sarsa":  # evaluates the uniform policy instead
        expected = np.zeros((3, 2))
        for _ in range(400):
            expected = REWARD + GAMMA * expected.mean(-1)[MOVE]
    np.testing.assert_allclose(tables[0], expected, atol=2e-2 if name == "ilql" else 1e-3)
