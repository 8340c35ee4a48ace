"""advantages.py against float64 loops over the valid tokens of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages


def ragged(seed=0, rows=5, tokens=7, *, holes=True):
    """Rewards and values [B, T] with NaN outside a bool mask that has an empty row, a full row and, if asked, holes."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, tokens + 1, rows)
    mask = np.arange(tokens) < lengths[:, None]
    if holes:
        mask &= rng.random((rows, tokens)) < 0.7
    mask[0], mask[1] = False, True
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), np.nan).astype(np.float32) for _ in range(2))
    return rewards, values, mask


def gae_loop(rewards, values, mask, final, discounts, lambdas):
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        slots, advantage, value = np.flatnonzero(mask[b]), 0.0, float(final[b])
        for t in slots[::-1]:
            g = float(discounts[b, t])
            delta = float(rewards[b, t]) + g * value - float(values[b, t])
            advantage = delta + g * float(lambdas[b, t]) * advantage
            value = float(values[b, t])
            out[b, t] = advantage
    return out


@pytest.mark.parametrize("seed", range(5))
def test_gae_equals_loop(seed):
    rewards, values, mask = ragged(seed)
    rng = np.random.default_rng(seed)
    discounts, lambdas = rng.random(mask.shape).astype(np.float32), rng.random(mask.shape).astype(np.float32)
    final = rng.normal(size=len(mask)).astype(np.float32)
    got = jax.jit(advantages.gae)(rewards, values, mask, bootstrap_value=final, discount=discounts, gae_lambda=lambdas)
    expected = gae_loop(rewards, values, mask, final, discounts, lambdas)
    np.testing.assert_allclose(got.advantages, expected, 1e-4, 1e-5)
    np.testing.assert_allclose(got.returns, np.where(mask, expected + np.nan_to_num(values), 0), 1e-4, 1e-5)
