"""kl.py against float64 formulas, and against the exact divergence by enumerating a vocabulary."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax import kl, masking

LOG_PROBS = hnp.arrays(np.float32, (6,), elements=st.floats(-20, 0, width=32))
LOGITS = hnp.arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32))

K1 = lambda x: x
K2 = lambda x: x * x / 2
K3 = lambda x: math.exp(-x) - 1 + x

# name: (estimator, value of the log-ratio, derivative by log π)
ESTIMATORS = {
    "k1": (kl.k1, K1, lambda x: 1.0),
    "k2": (kl.k2, K2, lambda x: x),
    "k3": (kl.k3, K3, lambda x: 1 - math.exp(-x)),
    "k1_with_k2_gradient": (kl.k1_with_k2_gradient, K1, lambda x: x),
    "k3_with_k2_gradient": (kl.k3_with_k2_gradient, K3, lambda x: x),
}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def value_and_slope(estimate, log_probs, reference, **knobs):
    """Values [...] and their derivatives by log_probs [...]; the estimators are elementwise."""
    total = lambda x: jnp.sum(estimate(x, reference, **knobs))
    return estimate(log_probs, reference, **knobs), jax.grad(total)(log_probs)


COMPILED = {name: jax.jit(functools.partial(value_and_slope, row[0])) for name, row in ESTIMATORS.items()}


@each_estimator
@given(log_probs=LOG_PROBS, reference=LOG_PROBS)
def test_values_and_derivatives_equal_the_formula(name, log_probs, reference):
    _, value, slope = ESTIMATORS[name]
    x = log_probs.astype(np.float64) - reference.astype(np.float64)
    values, slopes = COMPILED[name](log_probs, reference)
    np.testing.assert_allclose(values, [value(v) for v in x], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slopes, [slope(v) for v in x], rtol=1e-4, atol=1e-5)


@given(log_probs=LOG_PROBS, reference=LOG_PROBS)
def test_k2_is_never_negative_and_k3_up_to_rounding(log_probs, reference):
    assert (COMPILED["k2"](log_probs, reference)[0] >= 0).all()
    assert (COMPILED["k3"](log_probs, reference)[0] >= -1e-6).all()


def test_small_log_ratios_make_k3_equal_to_k2():
    x = jnp.array([-0.02, 0.01, 0.02])
    np.testing.assert_allclose(kl.k3(x, jnp.zeros(3)), kl.k2(x, jnp.zeros(3)), rtol=0.01)


@each_estimator
def test_clamp_bounds_the_log_ratio_and_cuts_the_gradient(name):
    estimate, value, slope = ESTIMATORS[name]
    x = np.array([-50.0, -3.0, -0.5, 0.0, 0.5, 3.0, 50.0])
    values, slopes = value_and_slope(estimate, jnp.float32(x), jnp.zeros(7), clamp=2.0)
    np.testing.assert_allclose(values, [value(v) for v in np.clip(x, -2, 2)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slopes, [slope(v) if abs(v) < 2 else 0.0 for v in x], rtol=1e-5, atol=1e-6)


def test_value_clamp_bounds_the_number_and_its_own_gradient_alone():
    x = jnp.array([-5.0, -1.0, 1.0])
    values, slopes = value_and_slope(kl.k3, x, jnp.zeros(3), value_clamp=10.0)
    np.testing.assert_allclose(values, [10.0, math.e - 2, math.exp(-1)], rtol=1e-5)
    np.testing.assert_allclose(slopes, [0.0, 1 - math.e, 1 - math.exp(-1)], rtol=1e-5)
    values, slopes = value_and_slope(kl.k3_with_k2_gradient, x, jnp.zeros(3), value_clamp=10.0)
    np.testing.assert_allclose(values, [10.0, math.e - 2, math.exp(-1)], rtol=1e-5)
    np.testing.assert_allclose(slopes, x, rtol=1e-5)


@each_estimator
def test_the_reference_is_a_constant(name):
    estimate = ESTIMATORS[name][0]
    slope = jax.grad(lambda r: jnp.sum(estimate(jnp.array([-1.0, -5.0]), r)))(jnp.array([-2.0, -1.0]))
    assert not slope.any()


@each_estimator
@pytest.mark.parametrize("x", [-80.0, 80.0])
def test_extreme_log_ratios_are_finite(name, x):
    values, slopes = value_and_slope(ESTIMATORS[name][0], jnp.array([min(x, 0.0)]), jnp.array([min(-x, 0.0)]))
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(values, ESTIMATORS[name][1](x), rtol=1e-4)


@each_estimator
def test_bfloat16_is_subtracted_in_float32_and_float64_stays(name):
    estimate = ESTIMATORS[name][0]
    narrow = jnp.array([-1.2, -100.0], jnp.bfloat16), jnp.array([-1.3, -99.5], jnp.bfloat16)
    values = estimate(*narrow)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, estimate(*(x.astype(jnp.float32) for x in narrow)))
    with jax.enable_x64():
        assert estimate(jnp.zeros(2, jnp.float64), jnp.ones(2, jnp.float64)).dtype == jnp.float64


@each_estimator
def test_estimators_refuse_shapes_sweep_their_clamp_and_ignore_what_a_mask_hides(name):
    estimate = ESTIMATORS[name][0]
    with pytest.raises(AssertionError):
        estimate(jnp.zeros((2, 3)), jnp.zeros(3))
    x, clamps = jnp.array([-4.0, 1.0]), jnp.array([0.5, 3.0])
    swept = jax.vmap(lambda c: estimate(x, jnp.zeros(2), clamp=c))(clamps)
    np.testing.assert_allclose(swept, [estimate(x, jnp.zeros(2), clamp=c) for c in (0.5, 3.0)], rtol=1e-6)

    mask = jnp.array([True, False])

    def loss(log_probs, reference):
        return masking.token_mean(estimate(*masking.zero_outside(mask, log_probs, reference)), mask)

    for garbage in (jnp.nan, jnp.inf, -1e9):
        value, slope = jax.value_and_grad(loss)(x.at[1].set(garbage), jnp.zeros(2).at[1].set(-garbage))
        assert np.isfinite(value)
        np.testing.assert_allclose(slope, [ESTIMATORS[name][2](-4.0), 0.0], rtol=1e-5)


# --- enumeration ------------------------------------------------------------------------------------------------------


def distribution(logits):
    z = np.exp(logits.astype(np.float64) - logits.max())
    return z / z.sum()


def exact_kl(logits, reference_logits):
    p, q = distribution(logits), distribution(reference_logits)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


full_kl = jax.jit(kl.full_kl)


@given(logits=LOGITS, reference=LOGITS)
def test_full_kl_equals_enumeration(logits, reference):
    expected = [exact_kl(*row) for row in zip(logits, reference, strict=True)]
    np.testing.assert_allclose(full_kl(logits, reference), expected, rtol=1e-4, atol=2e-5)


def test_means_over_drawn_tokens_are_the_divergence_and_mean_gradients_what_the_table_says():
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        logits, reference_logits = jnp.asarray(rng.normal(size=(2, 6)))
        reference = jax.nn.log_softmax(reference_logits)
        probabilities = jax.nn.softmax(logits)

        def mean_estimate(logits, estimate):  # of tokens drawn from the policy, whose probabilities stay fixed
            return jnp.sum(probabilities * estimate(jax.nn.log_softmax(logits), reference))

        exact, gradient = jax.value_and_grad(kl.full_kl)(logits, reference_logits)
        forward_kl = lambda x: jnp.sum(jnp.exp(reference) * (reference - jax.nn.log_softmax(x)))
        forward = jax.grad(forward_kl)(logits)
        expected = {
            "k1": (exact, jnp.zeros(6)),
            "k2": (None, gradient),
            "k3": (exact, forward),
            "k1_with_k2_gradient": (exact, gradient),
            "k3_with_k2_gradient": (exact, gradient),
        }
        for name, (mean, slope) in expected.items():
            value, mean_slope = jax.value_and_grad(mean_estimate)(logits, ESTIMATORS[name][0])
            if mean is not None:
                np.testing.assert_allclose(value, mean, rtol=1e-10, err_msg=name)
            np.testing.assert_allclose(mean_slope, slope, atol=1e-12, err_msg=name)
        variance = {
            name: jnp.sum(probabilities * (ESTIMATORS[name][0](jax.nn.log_softmax(logits), reference) - exact) ** 2)
            for name in ("k1", "k3")
        }
        assert variance["k3"] < variance["k1"]


def test_full_kl_ignores_a_constant_and_the_order_of_the_vocabulary():
    rng = np.random.default_rng(1)
    logits, reference = rng.normal(size=(2, 4, 7)).astype(np.float32)
    order = rng.permutation(7)
    value = kl.full_kl(logits, reference)
    np.testing.assert_allclose(kl.full_kl(logits + 50, reference - 9), value, rtol=1e-3)
    np.testing.assert_allclose(kl.full_kl(logits[:, order], reference[:, order]), value, rtol=1e-5)
    np.testing.assert_allclose(kl.full_kl(logits, logits + 1), 0.0, atol=1e-6)


def test_full_kl_is_finite_where_tokens_are_forbidden():
    inf = jnp.inf
    logits = jnp.array([[0.3, -inf, 1.0], [0.3, -inf, 1.0], [0.0, -200.0, 1.0]])
    reference = jnp.array([[0.1, 5.0, 0.0], [0.1, -inf, 0.0], [0.0, -inf, 1.0]])
    values, gradient = jax.value_and_grad(lambda x: kl.full_kl(x, reference).sum())(logits)
    assert np.isfinite(values)
    assert np.isfinite(gradient).all()
    for row in range(2):
        p = distribution(np.array([0.3, 1.0]))
        q = np.exp([0.1, 0.0]) / sum(np.exp([v for v in np.asarray(reference[row], np.float64) if v > -inf]))
        np.testing.assert_allclose(kl.full_kl(logits, reference)[row], sum(p * np.log(p / q)), rtol=1e-5)
    assert kl.full_kl(jnp.array([0.0, 0.0]), jnp.array([0.0, -inf])) == inf


def test_full_kl_gradient_extremes_dtypes_and_errors():
    rng = np.random.default_rng(2)
    with jax.enable_x64():
        logits, reference = jnp.asarray(rng.normal(size=(2, 3, 5)))
        check_grads(lambda x: kl.full_kl(x, reference), (logits,), order=2, modes=["rev"])
        assert kl.full_kl(logits, reference).dtype == jnp.float64
    far = jnp.array([80.0, -80.0, 0.0])
    value, gradient = jax.value_and_grad(kl.full_kl)(far, -far)
    np.testing.assert_allclose(value, 160.0, rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert not jax.grad(kl.full_kl, argnums=1)(far, jnp.zeros(3)).any()
    assert kl.full_kl(far.astype(jnp.bfloat16), far.astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(AssertionError):
        kl.full_kl(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


# --- controllers ------------------------------------------------------------------------------------------------------


update_adaptive_kl = jax.jit(kl.update_adaptive_kl)


@given(
    measured=st.lists(st.floats(0, 60, width=32), min_size=1, max_size=8),
    target=st.floats(0.5, 20),
    horizon=st.floats(100, 20_000),
    batch_size=st.integers(1, 400),
)
def test_adaptive_kl_equals_a_loop(measured, target, horizon, batch_size):
    state, beta = kl.init_adaptive_kl(0.2), 0.2
    for value in measured:
        state = update_adaptive_kl(state, value, batch_size=batch_size, target=target, horizon=horizon)
        beta *= 1 + min(max(value / target - 1, -0.2), 0.2) * batch_size / horizon
    np.testing.assert_allclose(state.coefficient, beta, rtol=1e-4)
    assert (state.coefficient > 0) or batch_size >= 5 * horizon


def test_adaptive_kl_limits():
    start = kl.init_adaptive_kl()
    np.testing.assert_allclose(start.coefficient, 0.15)
    step = lambda value, **knobs: float(
        kl.update_adaptive_kl(start, value, **{"batch_size": 1000, **knobs}).coefficient
    )
    np.testing.assert_allclose(step(6.0), 0.15, rtol=1e-6)  # the default target is a fixed point
    np.testing.assert_allclose(step(1e9), 0.15 * 1.02, rtol=1e-6)  # saturated, horizon 10,000
    np.testing.assert_allclose(step(0.0), 0.15 * 0.98, rtol=1e-6)
    np.testing.assert_allclose(step(1e9, horizon=jnp.inf), 0.15, rtol=1e-6)
    assert math.isnan(step(jnp.nan))
    swept = jax.vmap(lambda t: kl.update_adaptive_kl(start, 6.3, batch_size=1000, target=t))(jnp.array([6.0, 7.0]))
    np.testing.assert_allclose(swept.coefficient, [step(6.3, target=6.0), step(6.3, target=7.0)], rtol=1e-6)


def test_fixed_kl_never_moves():
    state = kl.init_fixed_kl()
    np.testing.assert_allclose(state.coefficient, 0.05)
    assert kl.update_fixed_kl(state, 1e9) is state
    assert state.coefficient.dtype == kl.init_adaptive_kl(1).coefficient.dtype == jnp.float32
