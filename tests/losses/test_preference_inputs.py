"""LD-DPO's sum and WPO's weights against loops over tokens, and their limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax.losses import preference_inputs as inputs


@st.composite
def ragged(draw):
    """Log-probs [4, 6] and squared sums [4, 6] with garbage outside a mask [4, 6] that may have holes, and lengths."""
    mask = draw(hnp.arrays(np.bool_, (4, 6)))
    log_probs = draw(hnp.arrays(np.float32, (4, 6), elements=st.floats(-20, 0, width=32)))
    sums = draw(hnp.arrays(np.float32, (4, 6), elements=st.floats(0.0625, 1, width=32)))
    lengths = draw(hnp.arrays(np.int32, 4, elements=st.integers(0, 7)))
    return np.where(mask, log_probs, np.nan), np.where(mask, sums, -np.inf), mask, lengths


@given(case=ragged(), alpha=st.sampled_from([0.0, 0.5, 1.0, 0.3]))
def test_length_desensitised_sum_equals_a_loop(case, alpha):
    log_probs, _, mask, lengths = case
    expected = []
    for row, kept, limit in zip(log_probs, mask, lengths, strict=True):
        tokens = [float(v) for v, keep in zip(row, kept, strict=True) if keep]
        expected.append(sum(v if t < limit else alpha * v for t, v in enumerate(tokens)))
    got = inputs.length_desensitised_sum(log_probs, mask, lengths, alpha=alpha)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_length_desensitised_sum_limits():
    rng = np.random.default_rng(0)
    log_probs, mask = -rng.random((3, 5)).astype(np.float32), np.arange(5) < np.array([[5], [3], [0]])
    plain = np.where(mask, log_probs, 0).sum(-1)
    np.testing.assert_allclose(inputs.length_desensitised_sum(log_probs, mask, np.array([1, 1, 1]), alpha=1.0), plain)
    np.testing.assert_allclose(inputs.length_desensitised_sum(log_probs, mask, np.array([5, 3, 0]), alpha=0.0), plain)
    cut = inputs.length_desensitised_sum(log_probs, mask, np.array([2, 2, 2]), alpha=0.0)
    np.testing.assert_allclose(cut, np.where(mask, log_probs, 0)[:, :2].sum(-1), rtol=1e-6)
    default = inputs.length_desensitised_sum(log_probs, mask, np.array([2, 2, 2]))
    np.testing.assert_allclose(default, (plain + cut) / 2, rtol=1e-6)


@given(case=ragged())
def test_wpo_weights_equal_a_loop(case):
    log_probs, sums, mask, _ = case
    expected = []
    for row, squares, kept in zip(log_probs, sums, mask, strict=True):
        logs = [float(v) - math.log(s) for v, s, keep in zip(row, squares, kept, strict=True) if keep]
        expected.append(math.exp(sum(logs) / len(logs)) if logs else 1.0)
    np.testing.assert_allclose(inputs.wpo_weights(log_probs, sums, mask), expected, rtol=1e-5)


def test_wpo_weights_limits():
    mask = jnp.array([[True, True, False]])
    uniform = jnp.full((1, 3), -math.log(8.0))
    np.testing.assert_allclose(inputs.wpo_weights(uniform, jnp.full((1, 3), 1 / 8), mask), [1.0], rtol=1e-6)
    geometric = inputs.wpo_weights(jnp.log(jnp.array([[0.5, 0.125, 0.9]])), jnp.ones((1, 3)), mask)
    np.testing.assert_allclose(geometric, [0.25], rtol=1e-6)


def test_gradients_flow_into_the_sum_and_not_through_the_weights():
    rng = np.random.default_rng(1)
    mask = np.array([[True, False, True, True], [False, False, False, False]])
    log_probs = np.where(mask, -rng.random((2, 4)), np.nan)
    with jax.enable_x64(True):
        clean = jnp.where(mask, log_probs, 0.0)
        check_grads(
            lambda x, a: inputs.length_desensitised_sum(x, mask, jnp.array([2, 2]), alpha=a),
            (clean, 0.3),
            order=1,
            modes=["rev"],
        )
    gradient = jax.grad(lambda x: inputs.length_desensitised_sum(x, mask, jnp.array([2, 2])).sum())
    np.testing.assert_array_equal(gradient(jnp.float32(log_probs)), np.where(mask, [1.0, 1.0, 1.0, 0.5], 0.0))
    sums = jnp.float32(np.where(mask, 0.5, np.nan))
    weights = jax.grad(lambda x, s: inputs.wpo_weights(x, s, mask).sum(), argnums=(0, 1))
    for gradient in weights(jnp.float32(log_probs), sums):
        np.testing.assert_array_equal(gradient, np.zeros((2, 4)))


def test_dtypes_sweeps_and_refusals():
    log_probs, mask = jnp.full((2, 3), -80.0, jnp.bfloat16), jnp.ones((2, 3), bool)
    assert inputs.length_desensitised_sum(log_probs, mask, jnp.array([1, 2])).dtype == jnp.float32
    weights = inputs.wpo_weights(log_probs, jnp.ones_like(log_probs), mask)
    assert weights.dtype == jnp.float32
    assert np.isfinite(weights).all()
    alphas = jnp.array([0.0, 1.0])
    swept = jax.jit(jax.vmap(lambda a: inputs.length_desensitised_sum(log_probs, mask, jnp.array([1, 2]), alpha=a)))
    np.testing.assert_allclose(swept(alphas), [[-80.0, -160.0], [-240.0, -240.0]])
    with pytest.raises(TypeError, match="mask must be bool"):
        inputs.length_desensitised_sum(log_probs, mask.astype(int), jnp.array([1, 2]))
    with pytest.raises(TypeError, match="mask must be bool"):
        inputs.wpo_weights(log_probs, log_probs, mask.astype(int))
    with pytest.raises(TypeError, match="squared_probability_sums must be floating"):
        inputs.wpo_weights(log_probs, jnp.ones((2, 3), int), mask)
