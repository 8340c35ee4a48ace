"""AOT against sorting by hand, its alignment with the pairs it came from, garbage, and the sort across devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax.losses import distributional_preference as aot
from rlhf_jax.losses import preference

BOTH = pytest.mark.parametrize("function", [aot.aot_paired, aot.aot_unpaired])


def oracle(x, others, mask, beta=0.01, label_smoothing=0.0):
    """Rank by rank over the kept pairs; the loss of rank i is written where the x of rank i stands."""
    kept = [i for i, keep in enumerate(mask) if keep]
    by_rank = sorted(kept, key=lambda i: x[i])
    partners = sorted(others[i] for i in kept)
    losses = [0.0] * len(x)
    for i, partner in zip(by_rank, partners, strict=True):
        z = beta * (float(x[i]) - float(partner))
        losses[i] = (1 - label_smoothing) * math.log1p(math.exp(-z)) + label_smoothing * math.log1p(math.exp(z))
    return losses


@st.composite
def batches(draw):
    values = hnp.arrays(np.float32, 6, elements=st.floats(-80, 80, width=32, allow_subnormal=False))
    mask = draw(hnp.arrays(np.bool_, 6))
    x, others = draw(values), draw(values)
    return np.where(mask, x, np.nan).astype(np.float32), np.where(mask, others, -np.inf).astype(np.float32), mask


@BOTH
@given(case=batches(), beta=st.sampled_from([0.01, 0.5]), label_smoothing=st.sampled_from([0.0, 0.2]))
def test_equals_sorting_by_hand(function, case, beta, label_smoothing):
    got = function(*case, beta=beta, label_smoothing=label_smoothing)
    np.testing.assert_allclose(got, oracle(*case, beta, label_smoothing), rtol=1e-5, atol=1e-5)


def data(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    mask = rng.random(rows) < 0.7
    mask[0] = True
    return *(rng.normal(size=rows).astype(np.float32) * 20 for _ in range(2)), mask


@BOTH
def test_permuting_one_side_alone_changes_nothing_but_the_order(function):
    x, others, _ = data()
    every, order = np.ones(8, bool), np.random.default_rng(3).permutation(8)
    loss = function(x, others, every)
    np.testing.assert_array_equal(function(x, others[order], every), loss)
    np.testing.assert_array_equal(function(x[order], others, every), loss[order])


@BOTH
def test_one_pair_is_dpo_and_none_is_zero(function):
    x, others, _ = data()
    one, none = np.arange(8) == 5, np.zeros(8, bool)
    expected = preference.dpo(jnp.asarray(x), jnp.asarray(others), beta=0.01)
    np.testing.assert_allclose(function(x, others, one)[5], expected[5], rtol=1e-6)
    assert not function(x, others, none).any()


@BOTH
def test_garbage_changes_no_value_and_no_gradient(function):
    x, others, mask = data()

    def total(x, others):
        return jnp.sum(function(x, others, mask, beta=0.3))

    clean = [jnp.where(mask, a, 0) for a in (x, others)]
    expected, expected_gradients = jax.value_and_grad(total, argnums=(0, 1))(*clean)
    for garbage in (np.nan, np.inf, -np.inf, 1e9):
        dirty = [jnp.where(mask, a, garbage) for a in (x, others)]
        value, gradients = jax.value_and_grad(total, argnums=(0, 1))(*dirty)
        np.testing.assert_array_equal(value, expected)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_array_equal(gradient, wanted)
            assert not np.asarray(gradient)[~mask].any()


def test_gradients_and_that_the_reference_gets_none():
    x, others, mask = data()
    with jax.enable_x64(True):
        wide = jnp.float64(x), jnp.float64(others)
        check_grads(lambda x: aot.aot_paired(x, wide[1], mask, beta=0.05), wide[:1], order=1, modes=["rev"])
        check_grads(lambda x, y: aot.aot_unpaired(x, y, mask, beta=0.05), wide, order=1, modes=["rev"])
    assert not jax.grad(lambda y: aot.aot_paired(x, y, mask).sum())(others).any()
    chosen, rejected = jax.grad(lambda x, y: aot.aot_unpaired(x, y, mask).sum(), argnums=(0, 1))(x, others)
    assert (chosen[mask] < 0).all()
    assert (rejected[mask] > 0).all()


@BOTH
def test_extremes_and_narrow_inputs(function):
    x = jnp.float32([80.0, -80.0, 80.0, 0.0])
    value, gradient = jax.value_and_grad(lambda x: function(x, -x, jnp.ones(4, bool), beta=1.0).sum())(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert function(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), jnp.ones(4, bool)).dtype == jnp.float32


@BOTH
def test_devices_sort_together(function):
    x, others, mask = data()
    split = [a.reshape(4, 2) for a in (x, others, mask)]
    whole = function(x, others, mask, beta=0.3)
    for mapped in (jax.vmap, jax.pmap):
        sharded = mapped(lambda *a: function(*a, beta=0.3, axis_name="data"), axis_name="data")
        np.testing.assert_allclose(sharded(*split).reshape(8), whole, rtol=1e-5, atol=1e-6)
    alone = jax.vmap(lambda *a: function(*a, beta=0.3))(*split).reshape(8)
    assert not np.allclose(alone, whole)  # why axis_name is there


def test_gradients_cross_devices():
    x, others, mask = data()
    sharded = jax.vmap(lambda *a: aot.aot_unpaired(*a, beta=0.3, axis_name="data"), axis_name="data")
    split = jax.grad(lambda x, y: sharded(x, y, mask.reshape(4, 2)).sum(), argnums=(0, 1))
    whole = jax.grad(lambda x, y: aot.aot_unpaired(x, y, mask, beta=0.3).sum(), argnums=(0, 1))
    for got, wanted in zip(split(x.reshape(4, 2), others.reshape(4, 2)), whole(x, others), strict=True):
        np.testing.assert_allclose(got.reshape(8), wanted, rtol=1e-5, atol=1e-6)


@BOTH
def test_sweeps_and_refusals(function):
    x, others, mask = data()
    swept = jax.jit(jax.vmap(lambda beta: function(x, others, mask, beta=beta)))(jnp.array([0.1, 0.9]))
    np.testing.assert_allclose(swept[1], function(x, others, mask, beta=0.9), rtol=1e-5)
    with pytest.raises(TypeError, match="mask must be bool"):
        function(x, others, mask.astype(np.float32))
    with pytest.raises(TypeError, match="must be floating"):
        function(x.astype(int), others, mask)
    with pytest.raises(AssertionError):
        function(x.reshape(2, 4), others.reshape(2, 4), mask.reshape(2, 4))
