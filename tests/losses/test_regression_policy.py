"""Policies as weighted regression: weights against loops, duals against their optimum, DRO against its fixed point."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import masking
from rlhf_jax.losses import policy
from rlhf_jax.losses import regression_policy as rp

rng = np.random.default_rng(3)
B, K = 8, 6
MASK = rng.random((B, K)) < 0.7
MASK[1] = False
MASK[2] = [True, False, False, False, False, False]
Q = np.where(MASK, 2 * rng.normal(size=(B, K)), np.nan).astype(np.float32)


def softmax(values):
    peak = max(values)
    total = sum(math.exp(v - peak) for v in values)
    return [math.exp(v - peak) / total for v in values]


def kept(row):
    return [float(q) for q, keep in zip(Q[row], MASK[row], strict=True) if keep]


def test_awr_weights_equal_python_and_its_loss_is_weighted_cloning():
    advantages = rng.normal(size=50).astype(np.float32) * 3
    expected = [min(math.exp(a / 0.5), 20.0) for a in advantages]
    weights = rp.awr_weights(advantages, temperature=0.5)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    log_probs = -rng.random(50).astype(np.float32)
    np.testing.assert_allclose(
        rp.weighted_log_likelihood(log_probs, weights), -np.array(expected) * log_probs, rtol=1e-5
    )
    np.testing.assert_allclose(rp.awr_weights(advantages, temperature=jnp.inf), np.ones(50))
    np.testing.assert_allclose(
        rp.weighted_log_likelihood(log_probs, advantages), policy.reinforce(log_probs, advantages), rtol=1e-6
    )
    assert np.isfinite(rp.awr_weights(jnp.array([80.0, 1e6, -1e6]), temperature=0.05)).all()


def test_awac_weights_are_a_softmax_of_mean_one():
    flat = [float(q) / 0.7 for q in Q[MASK]]
    expected = np.zeros((B, K))
    expected[MASK] = np.array(softmax(flat)) * len(flat)
    weights = rp.awac_weights(Q, MASK, temperature=0.7)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(masking.masked_mean(weights, jnp.asarray(MASK)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(rp.awac_weights(Q + 500, MASK, temperature=0.7), expected, rtol=1e-3)
    np.testing.assert_allclose(rp.awac_weights(Q, MASK, temperature=jnp.inf), MASK, rtol=1e-6)


def test_mpo_weights_are_a_softmax_per_state():
    expected = np.zeros((B, K))
    for row in range(B):
        if MASK[row].any():
            expected[row, MASK[row]] = softmax([q / 0.7 for q in kept(row)])
    weights = rp.mpo_weights(Q, MASK, temperature=0.7)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(weights, -1), MASK.any(-1), rtol=1e-5)


def test_mpo_temperature_loss_equals_python():
    expected = []
    for row in range(B):
        values = kept(row)
        mean = sum(math.exp(q / 0.7) for q in values) / max(len(values), 1)
        expected.append(0.7 * 0.2 + 0.7 * math.log(mean) if values else 0.0)
    np.testing.assert_allclose(rp.mpo_temperature_loss(0.7, Q, MASK, epsilon=0.2), expected, rtol=1e-4, atol=1e-5)


def divergence(weights):
    """KL of the weights from the uniform distribution over what they weigh."""
    positive = [float(w) for w in weights if w > 0]
    return sum(w * math.log(w * len(positive)) for w in positive)


def test_the_minimum_of_the_temperature_dual_spends_exactly_epsilon():
    q = np.asarray(2 * rng.normal(size=(20, 12)), np.float32)
    mask = np.ones_like(q, bool)
    loss = jax.jit(lambda log_eta: jnp.mean(rp.mpo_temperature_loss(jnp.exp(log_eta), q, mask, epsilon=0.3)))
    slope = jax.jit(jax.grad(loss))
    low, high = -3.0, 3.0
    for _ in range(40):  # bisection on the sign of the slope
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    weights = rp.mpo_weights(q, mask, temperature=math.exp(low))
    np.testing.assert_allclose(np.mean([divergence(w) for w in np.asarray(weights)]), 0.3, rtol=1e-3)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_better_half_takes_the_larger_half_rounded_up(count):
    advantages = rng.normal(size=(2, 5)).astype(np.float32)
    mask = np.zeros(10, bool)
    mask[rng.permutation(10)[:count]] = True
    mask = mask.reshape(2, 5)
    selected = np.asarray(rp.better_half(np.where(mask, advantages, np.nan), mask))
    threshold = sorted(advantages[mask], reverse=True)[: math.ceil(count / 2)]
    np.testing.assert_array_equal(np.sort(advantages[selected])[::-1], threshold)
    assert not (selected & ~mask).any()


def test_vmpo_weights_and_dual_equal_python_and_mpo_for_one_state():
    flat = [float(q) for q in Q[MASK]]
    weights = np.asarray(rp.vmpo_weights(Q, MASK, temperature=0.7))
    np.testing.assert_allclose(weights[MASK], softmax([q / 0.7 for q in flat]), rtol=1e-4)
    assert not weights[~MASK].any()
    expected = 0.7 * 0.2 + 0.7 * math.log(sum(math.exp(q / 0.7) for q in flat) / len(flat))
    np.testing.assert_allclose(rp.vmpo_temperature_loss(0.7, Q, MASK, epsilon=0.2), expected, rtol=1e-5)
    one, mask = Q[:1], MASK[:1]
    np.testing.assert_allclose(
        rp.vmpo_temperature_loss(0.7, one, mask), rp.mpo_temperature_loss(0.7, one, mask)[0], rtol=1e-6
    )
    np.testing.assert_allclose(
        rp.vmpo_weights(one, mask, temperature=0.7), rp.mpo_weights(one, mask, temperature=0.7), rtol=1e-6
    )


@pytest.mark.parametrize("function", [rp.mpo_temperature_loss, rp.vmpo_temperature_loss])
def test_temperature_losses_have_the_finite_difference_gradient_in_the_temperature(function):
    with jax.enable_x64(True):
        value = jax.jit(lambda eta: jnp.sum(function(eta, jnp.asarray(Q, jnp.float64), MASK)))
        for eta in (0.2, 1.0, 5.0):
            slope = (value(eta + 1e-6) - value(eta - 1e-6)) / 2e-6
            np.testing.assert_allclose(jax.grad(value)(eta), slope, rtol=1e-6)


def test_weights_and_temperatures_are_finite_for_q_values_of_80_and_small_temperatures():
    q, mask = jnp.array([[80.0, -80.0, 80.0]]), jnp.ones((1, 3), bool)
    for weights in (rp.mpo_weights(q, mask, temperature=0.01), rp.vmpo_weights(q, mask, temperature=0.01)):
        np.testing.assert_allclose(weights, [[0.5, 0.0, 0.5]], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda eta: rp.vmpo_temperature_loss(eta, q, mask))(0.01))


def test_the_temperature_of_the_weights_is_stopped():
    for function in (rp.mpo_weights, rp.vmpo_weights):
        assert jax.grad(lambda eta, f=function: f(Q, MASK, temperature=eta)[0, 0])(0.7) == 0.0


def test_four_devices_weigh_as_one():
    shards = Q.reshape(4, 2, K), MASK.reshape(4, 2, K)
    for function in (
        lambda *x, **k: rp.awac_weights(*x, temperature=0.7, **k),
        lambda *x, **k: rp.vmpo_weights(*x, temperature=0.7, **k),
        lambda *x, **k: rp.better_half(*x, **k),
    ):
        mapped = jax.pmap(lambda *x, f=function: f(*x, axis_name="data"), axis_name="data")(*shards)
        np.testing.assert_allclose(np.asarray(mapped).reshape(B, K), function(Q, MASK), rtol=1e-5)
    mapped = jax.pmap(lambda *x: rp.vmpo_temperature_loss(0.7, *x, axis_name="data"), axis_name="data")(*shards)
    np.testing.assert_allclose(mapped, [rp.vmpo_temperature_loss(0.7, Q, MASK)] * 4, rtol=1e-5)


def test_kl_constraint_descends_the_divergence_and_raises_the_multiplier_beyond_epsilon():
    loss = lambda alpha, kl: rp.kl_constraint(alpha, kl, epsilon=0.1)
    kl = jnp.array(0.3)
    np.testing.assert_allclose(loss(2.0, kl), 2.0 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss, (0, 1))(2.0, kl), (0.1 - 0.3, 2.0), rtol=1e-5)


def test_dro_is_zero_at_the_regularised_optimum_and_halves_to_the_policy_gradient():
    reference, rewards, tau = np.log([0.5, 0.3, 0.2]), np.array([1.0, -1.0, 2.0]), 0.8
    value = tau * math.log(sum(math.exp(x + r / tau) for r, x in zip(rewards, reference, strict=True)))
    optimum = reference + rewards / tau - value / tau
    ratios = jnp.asarray(optimum - reference, jnp.float32)
    losses = rp.dro(ratios, jnp.full(3, value, jnp.float32), jnp.asarray(rewards, jnp.float32), temperature=tau)
    np.testing.assert_allclose(losses, np.zeros(3), atol=1e-10)

    x, v, r = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(3))
    np.testing.assert_allclose(rp.dro(x, v, r, temperature=tau), 0.5 * (r - v - tau * x) ** 2, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(rp.dro(x, v, r, temperature=tau)))(x) / tau
    direct = jax.grad(lambda x: jnp.sum(-(r - v) * x + tau / 2 * x**2))(x)
    np.testing.assert_allclose(slope, direct, rtol=1e-5, atol=1e-6)
