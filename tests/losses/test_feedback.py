"""COACH, traces, Deep COACH, human returns and policy shaping against loops, and what equals what."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import masking
from rlhf_jax.losses import feedback, policy

rng = np.random.default_rng(9)
MASK = np.array(list(itertools.product([False, True], repeat=4)))
B, T = MASK.shape
LOG_PROBS = np.where(MASK, -rng.exponential(size=(B, T)), np.nan).astype(np.float32)
OLD = np.where(MASK, LOG_PROBS - rng.normal(0, 0.3, (B, T)), np.nan).astype(np.float32)
SIGNALS = np.where(MASK, rng.choice([-1.0, 0.0, 1.0], (B, T)), np.nan).astype(np.float32)
JUDGED = rng.choice([-1.0, 1.0], B).astype(np.float32)
ENTROPIES = rng.random(B).astype(np.float32)


def test_coach_is_reinforce_with_feedback_as_the_advantage():
    log_probs, signals = -rng.random(20).astype(np.float32), rng.choice([-1.0, 0.0, 1.0], 20).astype(np.float32)
    expected = [-float(f) * float(x) for f, x in zip(signals, log_probs, strict=True)]
    np.testing.assert_allclose(feedback.coach(log_probs, signals), expected, rtol=1e-6)
    np.testing.assert_array_equal(feedback.coach(log_probs, signals), policy.reinforce(log_probs, signals))
    slope = jax.grad(lambda x: jnp.sum(feedback.coach(x, signals)))(jnp.asarray(log_probs))
    np.testing.assert_array_equal(slope, -signals)


@pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
def test_human_returns_equal_loops_and_skip_holes(discount):
    expected = np.zeros((B, T))
    for b in range(B):
        total = 0.0
        for t in reversed(range(T)):
            if MASK[b, t]:
                total = float(SIGNALS[b, t]) + discount * total
                expected[b, t] = total
    np.testing.assert_allclose(feedback.human_returns(SIGNALS, MASK, discount=discount), expected, rtol=1e-6, atol=1e-7)


def test_traces_add_up_to_coach_with_human_returns():
    """Backward view (a trace and the feedback at each step) = forward view (each step and its feedback to come)."""
    decay, steps = 0.7, 6
    params = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "b": jnp.zeros(2)}
    states, actions = jnp.asarray(rng.normal(size=(steps, 3)), jnp.float32), rng.integers(0, 2, steps)
    signals = jnp.asarray(rng.choice([-1.0, 0.0, 1.0], steps), jnp.float32)

    def log_prob(params, state, action):
        return jax.nn.log_softmax(state @ params["w"] + params["b"])[action]

    def walk(trace, step):
        state, action, signal = step
        trace = feedback.update_eligibility(trace, jax.grad(log_prob)(params, state, action), decay=decay)
        return trace, feedback.eligibility_gradient(trace, signal)

    _, gradients = jax.lax.scan(walk, feedback.init_eligibility(params), (states, actions, signals))
    backward = jax.tree.map(lambda x: x.sum(0), gradients)

    def forward(params):
        log_probs = jax.vmap(log_prob, (None, 0, 0))(params, states, actions)
        returns = feedback.human_returns(signals, jnp.ones(steps, bool), discount=decay)
        return jnp.sum(feedback.coach(log_probs, returns))

    for found, expected in zip(jax.tree.leaves(backward), jax.tree.leaves(jax.grad(forward)(params)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_trace_forgets_by_decay_at_once_or_at_a_restart():
    first, second = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([10.0, 0.0])}
    state = feedback.update_eligibility(feedback.init_eligibility(first), first)
    np.testing.assert_allclose(feedback.update_eligibility(state, second, decay=0.5).trace["w"], [10.5, 1.0])
    np.testing.assert_allclose(feedback.update_eligibility(state, second, decay=0.0).trace["w"], [10.0, 0.0])
    np.testing.assert_allclose(feedback.update_eligibility(state, second, restart=True).trace["w"], [10.0, 0.0])
    poisoned = feedback.Eligibility({"w": jnp.array([jnp.nan, jnp.inf])})
    np.testing.assert_allclose(feedback.update_eligibility(poisoned, second, restart=True).trace["w"], [10.0, 0.0])
    np.testing.assert_allclose(feedback.eligibility_gradient(state, -2.0)["w"], [2.0, 4.0])


def test_traces_of_narrow_parameters_are_float32():
    state = feedback.init_eligibility({"w": jnp.ones(2, jnp.bfloat16)})
    for _ in range(300):
        state = feedback.update_eligibility(state, {"w": jnp.ones(2, jnp.bfloat16)}, decay=1.0)
    assert state.trace["w"].dtype == jnp.float32
    assert state.trace["w"].tolist() == [300.0, 300.0]  # bfloat16 would stop at 256


def test_shifted_feedback_judges_the_step_that_lies_the_delay_back():
    for delay in range(T + 2):
        expected = np.zeros((B, T))
        for b, t in itertools.product(range(B), range(T)):
            if t + delay < T and MASK[b, t] and MASK[b, t + delay]:
                expected[b, t] = SIGNALS[b, t + delay]
        np.testing.assert_array_equal(feedback.shift_feedback(SIGNALS, MASK, delay=delay), expected)
    with pytest.raises(ValueError, match="delay must be 0 or a positive number of steps, got -1"):
        feedback.shift_feedback(SIGNALS, MASK, delay=-1)


@pytest.mark.parametrize("decay", [0.0, 0.35, 1.0])
def test_deep_coach_equals_loops(decay):
    expected = []
    for b in range(B):
        steps = [(float(x), float(o)) for x, o, k in zip(LOG_PROBS[b], OLD[b], MASK[b], strict=True) if k]
        credit = sum(decay ** (len(steps) - 1 - i) * math.exp(x - o) for i, (x, o) in enumerate(steps))
        expected.append(-float(JUDGED[b]) * credit - 0.8 * float(ENTROPIES[b]))
    found = feedback.deep_coach(LOG_PROBS, OLD, MASK, JUDGED, ENTROPIES, decay=decay, entropy_coefficient=0.8)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_deep_coach_is_that_of_the_paper_and_of_coach_on_the_last_step():
    total = lambda x, old, **knobs: jnp.sum(feedback.deep_coach(x, old, MASK, JUDGED, ENTROPIES, **knobs))
    found = jax.grad(total)(jnp.asarray(LOG_PROBS), OLD, decay=0.5)
    ages = np.cumsum(MASK[:, ::-1], -1)[:, ::-1] - 1
    ratios = np.exp(np.where(MASK, LOG_PROBS - OLD, 0))
    np.testing.assert_allclose(found, np.where(MASK, -JUDGED[:, None] * 0.5**ages * ratios, 0), rtol=1e-5, atol=1e-7)
    last = jax.grad(total)(jnp.asarray(LOG_PROBS), LOG_PROBS, decay=0.0)
    np.testing.assert_array_equal(last, np.where(MASK & (ages == 0), -JUDGED[:, None], 0))
    with pytest.raises(ValueError, match="feedback must be one per window"):
        feedback.deep_coach(LOG_PROBS, OLD, MASK, JUDGED[:2], ENTROPIES[:2])


def test_advise_equals_its_formula():
    labels = np.arange(-5, 6).astype(np.float32)
    for consistency in (0.2, 0.5, 0.8, 0.99):
        c = consistency
        expected = [c**d / (c**d + (1 - c) ** d) for d in map(float, labels)]
        found = jnp.exp(feedback.advise_log_probs(labels, consistency=consistency))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        np.testing.assert_allclose(found + found[::-1], np.ones(11), rtol=1e-5)
    assert np.isfinite(feedback.advise_log_probs(jnp.array([80.0, -80.0]), consistency=0.999)).all()


def test_shaped_policy_is_the_normalised_product():
    logits, labels = rng.normal(size=(5, 4)).astype(np.float32), rng.integers(-3, 4, (5, 4)).astype(np.float32)
    own = np.exp(logits.astype(np.float64))
    advice = 0.8**labels / (0.8**labels + 0.2**labels)
    product = own * advice
    found = np.exp(feedback.shape_policy(logits, labels, consistency=0.8))
    np.testing.assert_allclose(found, product / product.sum(-1, keepdims=True), rtol=1e-4)
    for same in (
        feedback.shape_policy(logits, labels, consistency=0.5),
        feedback.shape_policy(logits, 0 * labels, consistency=0.8),
    ):
        np.testing.assert_allclose(same, jax.nn.log_softmax(logits), rtol=1e-5, atol=1e-6)


def test_an_actor_and_a_critic_taught_by_a_person_find_the_judged_action():
    """AC-HF on a bandit: feedback prefers arm 2; the critic learns the mean judgement and the actor climbs it."""
    verdicts = jnp.array([-1.0, 0.0, 1.0])

    def step(state, key):
        logits, baseline = state
        actions = jax.random.categorical(key, logits, shape=(64,))
        signals = verdicts[actions]
        returns = feedback.human_returns(signals[:, None], jnp.ones((64, 1), bool))[:, 0]
        mask = jnp.ones(64, bool)

        def loss(logits):
            return masking.masked_mean(feedback.coach(jax.nn.log_softmax(logits)[actions], returns - baseline), mask)

        return (logits - jax.grad(loss)(logits), baseline + 0.2 * (jnp.mean(returns) - baseline)), None

    (logits, baseline), _ = jax.lax.scan(step, (jnp.zeros(3), 0.0), jax.random.split(jax.random.key(0), 100))
    assert float(jax.nn.softmax(logits)[2]) > 0.9
    assert float(baseline) > 0.8
