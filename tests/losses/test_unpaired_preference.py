"""KTO, APO-zero and BCO over single completions: formulas, what pairs they add up to, statistics across devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax.losses import anchored_preference, unpaired_preference


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kto_oracle(ratio, good, point, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    if good:
        return desirable_weight * (1 - sigmoid(beta * (ratio - point)))
    return undesirable_weight * (1 - sigmoid(beta * (point - ratio)))


def bco_oracle(ratio, good, shift, beta=0.01):
    z = beta * ratio - shift
    return -math.log(sigmoid(z if good else -z))


LOSSES = {
    "kto": (
        unpaired_preference.kto,
        kto_oracle,
        {"beta": (0.05, 0.7), "desirable_weight": (0.5, 2.0), "undesirable_weight": (0.5, 2.0)},
    ),
    "bco": (unpaired_preference.bco, bco_oracle, {"beta": (0.05, 0.4)}),
    "apo_zero_unpaired": (
        lambda x, good, point, **kw: unpaired_preference.apo_zero_unpaired(x, good, **kw),
        lambda x, good, point, **kw: kto_oracle(x, good, 0.0, **kw),
        {"beta": (0.05, 0.7)},
    ),
}
TABLE = pytest.mark.parametrize(("function", "oracle", "knobs"), LOSSES.values(), ids=LOSSES)


@TABLE
@given(
    ratios=hnp.arrays(np.float32, 5, elements=st.floats(-80, 80, width=32)),
    good=hnp.arrays(np.bool_, 5),
    point=st.floats(0, 20, width=32),
)
def test_equals_float64_formula(function, oracle, knobs, ratios, good, point):
    expected = [oracle(float(x), bool(flag), point) for x, flag in zip(ratios, good, strict=True)]
    np.testing.assert_allclose(function(ratios, good, jnp.float32(point)), expected, rtol=1e-5, atol=1e-6)


RATIOS, GOOD = np.float32([-2.0, -2.0, 0.5, 7.0]), np.array([True, False, True, False])


@TABLE
def test_knobs_sweep_by_vmap(function, oracle, knobs):
    for name, values in knobs.items():
        swept = jax.jit(jax.vmap(lambda v, name=name: function(RATIOS, GOOD, jnp.array(0.3), **{name: v})))
        expected = [
            [oracle(float(x), flag, 0.3, **{name: v}) for x, flag in zip(RATIOS, GOOD, strict=True)] for v in values
        ]
        np.testing.assert_allclose(swept(jnp.array(values)), expected, rtol=1e-5)


@TABLE
def test_gradients_signs_and_what_is_stopped(function, oracle, knobs):
    with jax.enable_x64(True):
        check_grads(lambda x: function(x, GOOD, jnp.array(0.3)), (jnp.float64(RATIOS),), order=1, modes=["rev"])
    gradient = jax.grad(lambda x: function(x, GOOD, jnp.array(0.3)).sum())
    assert (np.where(GOOD, -1, 1) * gradient(jnp.asarray(RATIOS)) > 0).all()
    assert not jax.grad(lambda p: function(RATIOS, GOOD, p).sum())(jnp.float32(0.3)).any()
    extremes = gradient(jnp.float32([-80, -80, 80, 80]))
    assert np.isfinite(extremes).all()
    assert np.isfinite(function(jnp.float32([-80, -80, 80, 80]), GOOD, jnp.array(80.0), beta=1.0)).all()


@TABLE
def test_dtypes_and_refusals(function, oracle, knobs):
    assert function(jnp.asarray(RATIOS, jnp.bfloat16), GOOD, jnp.array(0.3)).dtype == jnp.float32
    with pytest.raises(TypeError, match="desirable must be bool"):
        function(RATIOS, GOOD.astype(int), jnp.array(0.3))
    with pytest.raises(TypeError, match="log_ratios must be floating"):
        function(RATIOS.astype(int), GOOD, jnp.array(0.3))
    with pytest.raises(AssertionError):
        function(RATIOS, GOOD[:2], jnp.array(0.3))


def test_two_completions_add_up_to_their_pair():
    w, lo = jnp.float32([0.3, -4.0]), jnp.float32([1.0, 2.0])
    good, bad = jnp.ones(2, bool), jnp.zeros(2, bool)
    apo = unpaired_preference.apo_zero_unpaired(w, good) + unpaired_preference.apo_zero_unpaired(lo, bad)
    np.testing.assert_allclose(apo, anchored_preference.apo_zero(w, lo), rtol=1e-6)
    shift = jnp.array(0.4)
    bco = unpaired_preference.bco(w, good, shift) + unpaired_preference.bco(lo, bad, shift)
    np.testing.assert_allclose(bco, anchored_preference.bco_pair(w, lo, reward_shift=shift), rtol=1e-6)
    kto = unpaired_preference.kto(w, good, jnp.zeros(()))
    np.testing.assert_array_equal(kto, unpaired_preference.apo_zero_unpaired(w, good))


@given(
    x=hnp.arrays(np.float32, (2, 4), elements=st.floats(-80, 80, width=32)),
    mask=hnp.arrays(np.bool_, (2, 4)),
)
def test_reference_point_is_the_clipped_mean(x, mask):
    kept = [float(v) for v in x[mask]]
    expected = max(0.0, sum(kept) / len(kept)) if kept else 0.0
    dirty = np.where(mask, x, np.nan)
    np.testing.assert_allclose(unpaired_preference.kto_reference_point(dirty, mask), expected, rtol=1e-5, atol=1e-5)


def test_reference_point_has_no_gradient_and_crosses_devices():
    x, mask = np.arange(8, dtype=np.float32), np.arange(8) % 3 > 0
    point = unpaired_preference.kto_reference_point
    assert not jax.grad(lambda x: point(x, mask))(jnp.asarray(x)).any()
    for mapped in (jax.vmap, jax.pmap):
        sharded = mapped(lambda *a: point(*a, axis_name="data"), axis_name="data")
        np.testing.assert_allclose(sharded(x.reshape(4, 2), mask.reshape(4, 2)), [point(x, mask)] * 4, rtol=1e-6)


def test_reward_shift_is_the_mean_of_all_rewards_seen():
    rng = np.random.default_rng(0)
    moments, seen = unpaired_preference.init_reward_shift(), []
    for _ in range(3):
        x, mask = rng.normal(size=6).astype(np.float32) * 30, rng.random(6) < 0.5
        moments = unpaired_preference.update_reward_shift(moments, np.where(mask, x, np.nan), mask, beta=0.2)
        seen += [0.2 * float(v) for v in x[mask]]
    np.testing.assert_allclose(moments.mean, np.mean(seen), rtol=1e-5)
    np.testing.assert_allclose(moments.variance(), np.var(seen), rtol=1e-4)
    assert int(moments.count) == len(seen)


def test_reward_shift_has_no_gradient_and_crosses_devices():
    x, mask = np.arange(8, dtype=np.float32), np.arange(8) % 3 > 0

    def shift(x, mask, **kw):
        return unpaired_preference.update_reward_shift(unpaired_preference.init_reward_shift(), x, mask, **kw).mean

    assert not jax.grad(lambda x: shift(x, mask))(jnp.asarray(x)).any()
    np.testing.assert_allclose(shift(x, mask), 0.01 * x[mask].mean(), rtol=1e-6)
    sharded = jax.vmap(lambda *a: shift(*a, axis_name="data"), axis_name="data")
    np.testing.assert_allclose(sharded(x.reshape(4, 2), mask.reshape(4, 2)), [shift(x, mask)] * 4, rtol=1e-6)


def test_density_ratio_weights():
    p = jnp.float32([0.0, 1 / 3, 0.4, 0.5, 0.8, 0.95, 1.0])
    weights = unpaired_preference.density_ratio_weights
    np.testing.assert_allclose(weights(p), [0.5, 0.5, 2 / 3, 1.0, 4.0, 10.0, 10.0], rtol=1e-5)
    np.testing.assert_allclose(weights(p[4:5], minimum=1.0, maximum=2.0), [2.0])
    assert not jax.grad(lambda p: weights(p).sum())(p).any()
