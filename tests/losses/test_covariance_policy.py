"""Clip-Cov and KL-Cov against loops over the batch, the draw, and four devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import _selection, covariance_policy, policy

rng = np.random.default_rng(2)
B, T = 8, 25
MASK = rng.random((B, T)) < 0.7
MASK[2] = False
LOG_PROBS = np.where(MASK, -rng.gamma(1.0, 2.0, (B, T)), np.nan).astype(np.float32)
OLD = np.where(MASK, np.minimum(LOG_PROBS + rng.normal(0, 0.2, (B, T)), 0), np.nan).astype(np.float32)
ADVANTAGES = np.where(MASK, rng.normal(size=(B, T)), np.nan).astype(np.float32)
BATCH = (LOG_PROBS, OLD, ADVANTAGES, MASK)
KEY = jax.random.key(5)
N = int(MASK.sum())


def covariances():
    lp, a = LOG_PROBS[MASK].astype(np.float64), ADVANTAGES[MASK].astype(np.float64)
    out = np.zeros((B, T))
    out[MASK] = (lp - lp.mean()) * (a - a.mean())
    return out


def surrogates():
    ratio = np.exp(np.where(MASK, LOG_PROBS - OLD, 0).astype(np.float64))
    a = np.where(MASK, ADVANTAGES, 0).astype(np.float64)
    return ratio, a


def test_covariances_equal_numpy_and_average_to_the_covariance_of_the_batch():
    found = np.asarray(covariance_policy.token_covariances(LOG_PROBS, ADVANTAGES, MASK))
    np.testing.assert_allclose(found, covariances(), rtol=1e-4, atol=1e-5)
    expected = np.cov(LOG_PROBS[MASK], ADVANTAGES[MASK], ddof=0)[0, 1]
    np.testing.assert_allclose(found[MASK].mean(), expected, rtol=1e-4)
    shifted = covariance_policy.token_covariances(LOG_PROBS - 3, ADVANTAGES + 5, MASK)
    np.testing.assert_allclose(shifted, found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 1.0])
def test_kl_cov_penalises_the_tokens_of_largest_covariance(fraction):
    count = max(1, int(fraction * N))
    ratio, a = surrogates()
    ranked = sorted(zip(*np.nonzero(MASK), strict=True), key=lambda at: -covariances()[at])
    expected = -ratio * a
    for at in ranked[:count]:
        expected[at] += 0.3 * abs(np.log(ratio[at]))
    found = covariance_policy.kl_cov(*BATCH, fraction=fraction, coefficient=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kl_cov_of_coefficient_zero_is_the_surrogate():
    found = covariance_policy.kl_cov(*BATCH, coefficient=0.0)
    clean = [np.where(MASK, x, 0).astype(np.float32) for x in BATCH[:3]]
    np.testing.assert_allclose(found, policy.surrogate(*clean), rtol=1e-6)


KNOBS = {"clip_low": 0.1, "clip_high": 0.2, "covariance_low": 0.2, "covariance_high": 3.0}


@pytest.mark.parametrize("fraction", [1e-9, 0.04, 1.0])
def test_clip_cov_detaches_a_random_share_of_the_eligible_tokens(fraction):
    ratio, a = surrogates()
    bounded = np.clip(ratio, 0.9, 1.2)
    ppo, by_ppo = -np.minimum(ratio * a, bounded * a), bounded * a < ratio * a
    eligible = MASK & ~by_ppo & (covariances() > 0.2) & (covariances() < 3.0)
    count = min(max(1, int(fraction * N)), int(eligible.sum()))
    loss, clipped = covariance_policy.clip_cov(*BATCH, KEY, fraction=fraction, **KNOBS)
    drawn = np.asarray(clipped) & ~by_ppo
    assert drawn.sum() == count
    assert not (drawn & ~eligible).any()
    np.testing.assert_allclose(loss, np.where(drawn, 0.0, ppo), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(
        lambda x: jnp.sum(covariance_policy.clip_cov(x, *BATCH[1:], KEY, fraction=fraction, **KNOBS).loss)
    )
    np.testing.assert_array_equal((np.asarray(gradient(jnp.asarray(LOG_PROBS))) == 0) & MASK, clipped)


def test_clip_cov_draws_anew_for_every_key_and_alike_for_the_same():
    draw = jax.jit(lambda key: covariance_policy.clip_cov(*BATCH, key, fraction=0.04, **KNOBS).clipped)
    masks = [np.asarray(draw(jax.random.key(i))) for i in range(40)]
    np.testing.assert_array_equal(draw(jax.random.key(3)), masks[3])
    by_ppo = np.asarray(
        policy.clipped_surrogate(*(np.where(MASK, x, 0) for x in BATCH[:3]), clip_low=0.1, clip_high=0.2)[1]
    )
    often = np.mean([m & ~by_ppo for m in masks], axis=0)
    covariance = covariances()
    eligible = MASK & ~by_ppo & (covariance > 0.2) & (covariance < 3.0)
    assert eligible.sum() > 20
    assert (often[eligible] > 0).mean() > 0.9  # every eligible token has its turn, none comes always
    assert often.max() < 0.8


def test_clip_cov_without_eligible_tokens_is_ppo():
    loss, clipped = covariance_policy.clip_cov(*BATCH, KEY, covariance_low=jnp.inf)
    expected = policy.clipped_surrogate(*(np.where(MASK, x, 0).astype(np.float32) for x in BATCH[:3]))
    np.testing.assert_allclose(loss, expected.loss, rtol=1e-6)
    np.testing.assert_array_equal(clipped, expected.clipped)


def test_four_devices_choose_as_one():
    shards = [x.reshape(4, B // 4, T) for x in BATCH]
    for function in (
        lambda *x, **k: covariance_policy.clip_cov(*x, KEY, fraction=0.05, **KNOBS, **k),
        lambda *x, **k: covariance_policy.kl_cov(*x, fraction=0.05, **k),
    ):
        mapped = jax.pmap(lambda *x, f=function: f(*x, axis_name="data"), axis_name="data")(*shards)
        for many, one in zip(jax.tree.leaves(mapped), jax.tree.leaves(function(*BATCH)), strict=True):
            np.testing.assert_allclose(np.asarray(many).reshape(B, T), one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_largest_equals_sorting(count):
    scores = rng.integers(0, 4, (5, 6)).astype(np.float32)  # with ties
    mask = rng.random((5, 6)) < 0.6
    ranked = sorted(zip(*np.nonzero(mask), strict=True), key=lambda at: (-scores[at], at))
    expected = np.zeros((5, 6), bool)
    for at in ranked[:count]:
        expected[at] = True
    found = _selection.largest(jnp.where(mask, scores, jnp.nan), jnp.asarray(mask), count)
    np.testing.assert_array_equal(found, expected)
