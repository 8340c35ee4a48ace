"""enumerable.py: the known optima are optima, by brute force and by independent float64 loops."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.testing import enumerable, oracles

RNG = np.random.default_rng(0)
V, R = 3, 3
SEQUENCES = list(itertools.product(range(V), repeat=R))
TABLE = jnp.asarray(RNG.normal(size=(enumerable.table_size(V, R), V)), jnp.float32)


def test_sequences_are_all_of_them():
    assert [tuple(s) for s in enumerable.sequences(V, R).tolist()] == SEQUENCES


def test_a_table_is_an_autoregressive_policy():
    prefixes = [p for t in range(R) for p in itertools.product(range(V), repeat=t)]
    expected = [[oracles.log_softmax(TABLE[prefixes.index(s[:t])])[s[t]] for t in range(R)] for s in SEQUENCES]
    tokens = jnp.asarray(SEQUENCES)
    np.testing.assert_allclose(enumerable.token_log_probs_of_table(TABLE, tokens), expected, rtol=1e-5)
    log_p = enumerable.sequence_log_probs(TABLE, R)
    np.testing.assert_allclose(log_p, np.sum(expected, -1), rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(log_p).sum(), 1.0, rtol=1e-5)


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match="V=3, R=2 has 4 rows"):
        enumerable.token_log_probs_of_table(TABLE, jnp.zeros((2,), jnp.int32))


def test_expectations_and_distances_equal_loops():
    log_p, log_q = (oracles.log_softmax(RNG.normal(size=6)) for _ in range(2))
    x = RNG.normal(size=6)
    p, q = np.exp(log_p), np.exp(log_q)
    as_jax = [jnp.asarray(a, jnp.float32) for a in (log_p, log_q, x)]
    np.testing.assert_allclose(enumerable.expectation(as_jax[0], as_jax[2]), sum(p * x), rtol=1e-4)
    np.testing.assert_allclose(enumerable.kl_divergence(*as_jax[:2]), oracles.kl_divergence(log_p, log_q), rtol=1e-4)
    best_event = max(sum(p[list(e)]) - sum(q[list(e)]) for n in range(7) for e in itertools.combinations(range(6), n))
    np.testing.assert_allclose(enumerable.total_variation(*as_jax[:2]), best_event, rtol=1e-4)
    sure = jnp.array([0.0, -jnp.inf])
    assert float(enumerable.expectation(sure, jnp.array([2.0, jnp.inf]))) == 2.0
    assert float(enumerable.kl_divergence(sure, jnp.log(jnp.array([0.5, 0.5])))) == pytest.approx(math.log(2))


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_no_policy_beats_the_regularised_optimum(beta):
    reference = jnp.asarray(oracles.log_softmax(RNG.normal(size=6)), jnp.float32)
    rewards = jnp.asarray(RNG.normal(size=6), jnp.float32)
    best, value = enumerable.regularised_optimum(reference, rewards, beta=beta)
    np.testing.assert_allclose(jnp.exp(best).sum(), 1.0, rtol=1e-5)

    def objective(logits):
        return enumerable.regularised_objective(jax.nn.log_softmax(logits), reference, rewards, beta=beta)

    np.testing.assert_allclose(objective(best), value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.grad(objective)(best), 0.0, atol=1e-5 * max(1, beta))
    others = best[None] + jnp.asarray(RNG.normal(size=(50, 6)), jnp.float32)
    assert (jax.vmap(objective)(others) < value).all()


def test_a_weak_reward_leaves_the_reference_and_a_strong_one_takes_the_best():
    reference, rewards = jnp.log(jnp.array([0.2, 0.8])), jnp.array([1.0, 0.0])
    far, _ = enumerable.regularised_optimum(reference, rewards, beta=1e6)
    np.testing.assert_allclose(far, reference, atol=1e-4)
    greedy, value = enumerable.regularised_optimum(reference, rewards, beta=1e-2)
    np.testing.assert_allclose([float(jnp.exp(greedy)[0]), float(value)], [1.0, 1.0], atol=0.05)


def chain(discount=0.9):
    """Three states and two actions, with random transitions, and an end after action 1 in state 2."""
    rng = np.random.default_rng(3)
    transitions = rng.dirichlet(np.ones(3), size=(3, 2))
    discounts = np.full((3, 2), discount)
    discounts[2, 1] = 0.0
    arrays = transitions, rng.normal(size=(3, 2)), discounts
    return enumerable.MDP(*(jnp.asarray(a, jnp.float32) for a in arrays))


def test_policy_values_are_what_rolling_the_distribution_forward_earns():
    mdp = chain()
    policy = RNG.dirichlet(np.ones(2), size=3)
    for start in range(3):
        weights, earned = np.eye(3)[start], 0.0
        for _ in range(400):
            taken = weights[:, None] * policy
            earned += float((taken * np.asarray(mdp.rewards, np.float64)).sum())
            weights = np.einsum("sa,sa,sat->t", taken, np.asarray(mdp.discounts), np.asarray(mdp.transitions))
        values = enumerable.policy_values(mdp, jnp.asarray(policy, jnp.float32))
        np.testing.assert_allclose(values[start], earned, rtol=1e-4)
        quality = enumerable.action_values(mdp, values)
        np.testing.assert_allclose((policy * np.asarray(quality)).sum(-1), values, rtol=1e-4, atol=1e-5)


def test_the_soft_optimum_is_greedy_without_kl_and_the_bandit_optimum_with_one_state():
    mdp = chain()
    uniform = jnp.full((3, 2), jnp.log(0.5))
    log_policy, values = enumerable.soft_optimum(mdp, uniform, beta=1e-3)
    earned = {
        choice: np.asarray(enumerable.policy_values(mdp, jax.nn.one_hot(jnp.array(choice), 2)))
        for choice in itertools.product(range(2), repeat=3)
    }
    best = max(earned, key=lambda choice: earned[choice].sum())
    assert tuple(np.argmax(log_policy, -1)) == best
    np.testing.assert_allclose(values, earned[best], rtol=1e-2, atol=1e-2)

    bandit = enumerable.MDP(jnp.ones((1, 2, 1)), jnp.array([[0.3, 1.0]]), jnp.zeros((1, 2)))
    reference = jnp.log(jnp.array([[0.7, 0.3]]))
    log_policy, values = enumerable.soft_optimum(bandit, reference, beta=0.5, steps=1)
    expected, value = enumerable.regularised_optimum(reference[0], bandit.rewards[0], beta=0.5)
    np.testing.assert_allclose(log_policy[0], expected, atol=1e-6)
    np.testing.assert_allclose(values[0], value, atol=1e-6)


def test_the_soft_optimum_beats_other_policies_on_regularised_return():
    mdp, beta = chain(), 0.3
    reference = jnp.asarray([oracles.log_softmax(RNG.normal(size=2)) for _ in range(3)], jnp.float32)
    best, soft_values = enumerable.soft_optimum(mdp, reference, beta=beta)

    def regularised_return(logits):
        log_policy = jax.nn.log_softmax(logits)
        penalised = mdp._replace(rewards=mdp.rewards - beta * (log_policy - reference))
        return enumerable.policy_values(penalised, jnp.exp(log_policy))

    np.testing.assert_allclose(regularised_return(best), soft_values, rtol=1e-4, atol=1e-4)
    others = jax.vmap(regularised_return)(best[None] + jnp.asarray(RNG.normal(size=(50, 3, 2)), jnp.float32))
    assert (others <= soft_values[None] + 1e-5).all()
