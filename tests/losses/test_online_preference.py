"""Online DPO, XPO's optimism and Nash-MD: ordering, and the expected gradient by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses import online_preference as online
from rlhf_jax.losses import preference


def draw(seed, *shape):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape) * 3)


def test_order_pairs_and_online_dpo():
    first, second, wins = draw(0, 5), draw(1, 5), jnp.array([True, False, True, False, False])
    pairs = online.order_pairs(first, second, wins)
    for i, won in enumerate(wins):
        assert (pairs.chosen[i], pairs.rejected[i]) == ((first[i], second[i]) if won else (second[i], first[i]))
    loss = online.online_dpo(first, second, wins, beta=0.3)
    np.testing.assert_array_equal(loss, preference.dpo(*pairs, beta=0.3))
    np.testing.assert_array_equal(loss, online.online_dpo(second, first, ~wins, beta=0.3))
    np.testing.assert_array_equal(online.online_dpo(first, second, wins), preference.dpo(*pairs))
    gradient = jax.grad(lambda x: online.online_dpo(x, second, wins).sum())(first)
    assert (np.where(wins, -1, 1) * gradient > 0).all()
    swept = jax.vmap(lambda b: online.online_dpo(first, second, wins, beta=b))(jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(swept[1], loss, rtol=1e-6)


def test_xpo_pushes_probability_off_the_reference_sample():
    gradient = jax.grad(lambda x: online.xpo(draw(0, 3), draw(1, 3), x, alpha=0.2).sum())(draw(2, 3))
    np.testing.assert_allclose(gradient, [0.2] * 3, rtol=1e-6)


def test_geometric_mixture_equals_powers_of_probabilities():
    logits, reference = np.asarray(draw(0, 3, 4), np.float64), np.asarray(draw(1, 3, 4), np.float64)
    for mixture in (0.0, 0.3, 1.0):
        powers = np.exp(logits) ** (1 - mixture) * np.exp(reference) ** mixture
        got = online.geometric_mixture(jnp.float32(logits), jnp.float32(reference), mixture=mixture)
        np.testing.assert_allclose(np.exp(got), powers / powers.sum(-1, keepdims=True), rtol=1e-5)
    half = online.geometric_mixture(jnp.float32(logits), jnp.float32(reference))
    np.testing.assert_allclose(half, online.geometric_mixture(jnp.float32(reference), jnp.float32(logits)), rtol=1e-5)
    extreme = online.geometric_mixture(jnp.float32([80.0, -80.0]), jnp.float32([-80.0, 80.0]), mixture=0.25)
    assert np.isfinite(extreme).all()


def test_nash_md_expected_gradient_is_that_of_the_regularised_game():
    """Over an enumerable set of completions: E_π[∇ loss] = ∇ (β KL(π ‖ μ) - P(π ≻ π_mix)), the mixture fixed."""
    with jax.enable_x64(True):
        logits, reference = jnp.float64(draw(0, 5)), jax.nn.log_softmax(jnp.float64(draw(1, 5)))
        wins = jax.nn.sigmoid(jnp.float64(draw(2, 5, 5)))
        beta = 0.3
        mixed = jnp.exp(online.geometric_mixture(jax.nn.log_softmax(logits), reference, mixture=0.4))

        def sampled(logits):
            log_probs = jax.nn.log_softmax(logits)
            weights = jnp.exp(jax.lax.stop_gradient(log_probs))[:, None] * mixed[None, :]
            columns = [online.nash_md(log_probs, reference, wins[:, j], beta=beta) for j in range(5)]
            return jnp.sum(weights * jnp.stack(columns, axis=1))

        def exact(logits):
            log_probs = jax.nn.log_softmax(logits)
            probs = jnp.exp(log_probs)
            return beta * jnp.sum(probs * (log_probs - reference)) - probs @ wins @ mixed

        np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(exact)(logits), rtol=1e-9, atol=1e-12)


def test_nash_md_stops_everything_but_the_policy():
    policy, reference, wins = draw(0, 4), draw(1, 4), jnp.array([1.0, 0.0, 0.7, 0.5])
    gradients = jax.grad(lambda *a: online.nash_md(*a).sum(), argnums=(0, 1, 2))(policy, reference, wins)
    advantage = wins - 0.5 - 0.1 * (policy - reference)
    np.testing.assert_allclose(gradients[0], -advantage, rtol=1e-6)
    np.testing.assert_allclose(online.nash_md(policy, reference, wins), -advantage * policy, rtol=1e-6)
    assert not gradients[1].any()
    assert not gradients[2].any()
    swept = jax.vmap(lambda b: online.nash_md(policy, reference, wins, beta=b))(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(swept[0], (0.5 - wins) * policy, rtol=1e-6)


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        first, second, wins = jnp.float64(draw(0, 4)), jnp.float64(draw(1, 4)), jnp.arange(4) % 2 == 0
        check_grads(lambda x, y: online.online_dpo(x, y, wins), (first, second), order=1, modes=["rev"])
        check_grads(lambda x, y, z: online.xpo(x, y, z, alpha=0.1), (first, second, first), order=1, modes=["rev"])
        check_grads(lambda x, y: online.geometric_mixture(x, y), (first, second), order=1, modes=["rev"])


def test_dtypes_and_refusals():
    x, wins = jnp.ones(3, jnp.bfloat16), jnp.ones(3, bool)
    assert online.online_dpo(x, x, wins).dtype == jnp.float32
    assert online.nash_md(x, x, x).dtype == jnp.float32
    assert online.geometric_mixture(x, x).dtype == jnp.float32
    with pytest.raises(TypeError, match="first_wins must be bool"):
        online.online_dpo(x, x, jnp.ones(3))
    with pytest.raises(TypeError, match="win_probabilities must be floating"):
        online.nash_md(x, x, wins)
    with pytest.raises(TypeError, match="reference_sample_log_probs must be floating"):
        online.xpo(x, x, jnp.ones(3, int))
    with pytest.raises(AssertionError):
        online.order_pairs(x, jnp.ones(2), wins)
    with pytest.raises(AssertionError):
        online.order_pairs(jnp.ones(2), x, wins)
