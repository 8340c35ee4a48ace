"""Bradley-Terry, its additions and its ties: formulas in probabilities, limits, and what gradients may reach."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax.losses import reward_model as rm

SCORES = hnp.arrays(np.float32, 4, elements=st.floats(-20, 20, width=32))
TIED = np.array([True, False, True, False])
P = np.float32([0.0, 0.25, 0.9, 1.0])


def bt(first, second, margin=0.0, label_smoothing=0.0):
    """The likelihood in strengths π = exp(s), as the papers write it."""
    won = math.exp(first - margin) / (math.exp(first - margin) + math.exp(second))
    lost = math.exp(second) / (math.exp(first - margin) + math.exp(second))
    return -(1 - label_smoothing) * math.log(won) - label_smoothing * math.log(lost)


def rao_kupper(first, second, theta):
    a, b = math.exp(first), math.exp(second)
    tie = (theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b))
    return a / (a + theta * b), tie, b / (theta * a + b)


def davidson(first, second, nu):
    a, b = math.exp(first), math.exp(second)
    total = a + b + nu * math.sqrt(a * b)
    return a / total, nu * math.sqrt(a * b) / total, b / total


def tie_loss(model):
    def oracle(first, second, tied, **knobs):
        win, tie, _ = model(first, second, **knobs)
        return -math.log(tie if tied else win)

    return oracle


LOSSES = {  # function, oracle, third argument if any, knobs
    "bradley_terry": (rm.bradley_terry, bt, None, {"margin": 0.7, "label_smoothing": 0.2}),
    "soft_bradley_terry": (
        rm.soft_bradley_terry,
        lambda first, second, p: bt(first, second, label_smoothing=1 - p),
        P,
        {},
    ),
    "centring": (rm.centring, lambda first, second: (first + second) ** 2, None, {}),
    "rao_kupper": (rm.rao_kupper, tie_loss(rao_kupper), TIED, {"theta": 1.5}),
    "davidson": (rm.davidson, tie_loss(davidson), TIED, {"nu": 0.8}),
}
TABLE = pytest.mark.parametrize(("function", "oracle", "third", "knobs"), LOSSES.values(), ids=LOSSES)


def arguments(first, second, third):
    return (first, second) if third is None else (first, second, third)


@TABLE
@given(first=SCORES, second=SCORES)
def test_equals_float64_formula(function, oracle, third, knobs, first, second):
    columns = arguments(first.astype(float), second.astype(float), third)
    expected = [oracle(*case, **knobs) for case in zip(*columns, strict=True)]
    np.testing.assert_allclose(function(*arguments(first, second, third), **knobs), expected, rtol=1e-5, atol=1e-5)


@TABLE
def test_gradients_equal_finite_differences(function, oracle, third, knobs):
    first, second = np.array([0.3, -2.0, 1.5, 0.0]), np.array([-1.1, -0.4, 2.2, 0.5])
    with jax.enable_x64(True):
        pair = jnp.float64(first), jnp.float64(second)
        check_grads(lambda w, lo: function(*arguments(w, lo, third), **knobs), pair, order=1, modes=["rev"])
        for name, value in knobs.items():
            check_grads(
                lambda v, name=name: function(*arguments(*pair, third), **{**knobs, name: v}),
                (value,),
                order=1,
                modes=["rev"],
            )


@TABLE
def test_knobs_sweep_by_vmap(function, oracle, third, knobs):
    first, second = jnp.float32([0.3, -2.0, 1.5, 0.0]), jnp.float32([-1.1, -0.4, 2.2, 0.5])
    for name, value in knobs.items():

        def run(v, name=name):
            return function(*arguments(first, second, third), **{**knobs, name: v})

        swept = jax.jit(jax.vmap(run))(jnp.array([value, 1.3 * value]))
        np.testing.assert_allclose(swept, jnp.stack([run(value), run(1.3 * value)]), rtol=1e-5, atol=1e-6)


@TABLE
def test_extremes_dtypes_and_refusals(function, oracle, third, knobs):
    ends = jnp.float32(list(itertools.product((-80, 0, 80), repeat=2))[:8]).T.reshape(2, 2, 4)
    for first, second in zip(*ends, strict=True):
        value, gradients = jax.value_and_grad(
            lambda a, b: function(*arguments(a, b, third), **knobs).sum(), argnums=(0, 1)
        )(first, second)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradients)
    narrow = jnp.ones(4, jnp.bfloat16)
    assert function(*arguments(narrow, narrow, third), **knobs).dtype == jnp.float32
    with pytest.raises(TypeError, match="_scores must be floating"):
        function(*arguments(jnp.ones(4, int), jnp.ones(4), third), **knobs)
    with pytest.raises(AssertionError):
        function(*arguments(jnp.ones(4), jnp.ones(3), third), **knobs)


@TABLE
def test_only_the_difference_matters_except_for_centring(function, oracle, third, knobs):
    first, second = jnp.float32([0.3, -2.0, 1.5, 0.0]), jnp.float32([-1.1, -0.4, 2.2, 0.5])
    shifted = function(*arguments(first + 3, second + 3, third), **knobs)
    same = np.allclose(shifted, function(*arguments(first, second, third), **knobs), rtol=1e-5)
    assert same == (function is not rm.centring)


def test_bradley_terry_limits():
    first, second = jnp.float32([0.3, -2.0, 1.5]), jnp.float32([-1.1, -0.4, 2.2])
    np.testing.assert_allclose(rm.bradley_terry(first, first), [math.log(2)] * 3, rtol=1e-6)
    per_pair = rm.bradley_terry(first, second, margin=first - second)
    np.testing.assert_allclose(per_pair, [math.log(2)] * 3, rtol=1e-6)
    x = jnp.float32([-1.0, 0.0, 1.0])
    smooth = rm.bradley_terry(x, 0 * x, label_smoothing=0.5)
    assert smooth[0] > smooth[1] < smooth[2]
    np.testing.assert_allclose(smooth[1], math.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        rm.soft_bradley_terry(first, second, jnp.full(3, 0.8)),
        rm.bradley_terry(first, second, label_smoothing=0.2),
        rtol=1e-6,
    )
    slope = jax.grad(lambda s: rm.soft_bradley_terry(s, 0 * s, jnp.array(0.8)))(jnp.log(4.0))
    assert abs(slope) < 1e-6
    assert jax.grad(lambda p: rm.soft_bradley_terry(first, second, p).sum())(jnp.full(3, 0.8)).tolist() == [0.0] * 3
    assert rm.centring(first, -first).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("log_probs", "model", "knobs"),
    [
        (rm.rao_kupper_log_probs, rao_kupper, [{"theta": t} for t in (1.01, 1.5, 20.0)]),
        (rm.davidson_log_probs, davidson, [{"nu": n} for n in (0.01, 0.8, 20.0)]),
    ],
)
@given(first=SCORES, second=SCORES)
def test_outcome_probabilities_equal_the_papers_and_sum_to_one(log_probs, model, knobs, first, second):
    for each in knobs:
        got = np.exp(np.float64(log_probs(first, second, **each)))
        expected = np.transpose([model(float(a), float(b), **each) for a, b in zip(first, second, strict=True)])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(got.sum(0), 1.0, rtol=1e-5)


def test_without_ties_both_models_are_bradley_terry_with_clean_gradients():
    first, second, never = jnp.float32([0.3, -2.0, 80.0]), jnp.float32([-1.1, -0.4, -80.0]), jnp.zeros(3, bool)
    for loss, log_probs, knob in (
        (rm.rao_kupper, rm.rao_kupper_log_probs, {"theta": 1.0}),
        (rm.davidson, rm.davidson_log_probs, {"nu": 0.0}),
    ):
        np.testing.assert_allclose(loss(first, second, never, **knob), rm.bradley_terry(first, second), rtol=1e-6)
        outcomes = log_probs(first, second, **knob)
        np.testing.assert_allclose(outcomes.win, -rm.bradley_terry(first, second), rtol=1e-6)
        np.testing.assert_allclose(outcomes.loss, -rm.bradley_terry(second, first), rtol=1e-6)
        assert outcomes.tie.tolist() == [-np.inf] * 3
        (name, value), *_ = knob.items()
        total = jax.grad(lambda s, v, f=loss, n=name: f(s, second, never, **{n: v}).sum(), argnums=(0, 1))
        for gradient in total(first, value):
            assert np.isfinite(gradient).all()
    chosen = rm.rao_kupper(first, second, never, theta=3.0)
    np.testing.assert_allclose(chosen, rm.bradley_terry(first, second, margin=math.log(3.0)), rtol=1e-6)


def test_what_the_tie_parameters_mean():
    edge = rm.rao_kupper_log_probs(jnp.log(3.0), jnp.zeros(()), theta=3.0)
    np.testing.assert_allclose(jnp.exp(edge.win), 0.5, rtol=1e-6)
    equals = rm.davidson_log_probs(jnp.zeros(()), jnp.zeros(()), nu=3.0)
    np.testing.assert_allclose(jnp.exp(equals.tie - equals.win), 3.0, rtol=1e-6)


def test_in_a_tie_the_order_does_not_matter_and_equals_are_likeliest():
    x, always = jnp.float32([-2.0, 0.0, 2.0]), jnp.ones(3, bool)
    for loss in (lambda a, b: rm.rao_kupper(a, b, always, theta=2.0), lambda a, b: rm.davidson(a, b, always, nu=1.0)):
        np.testing.assert_allclose(loss(x, 0 * x), loss(0 * x, x), rtol=1e-6)
        assert loss(x, 0 * x).argmin() == 1


def test_tied_must_be_bool():
    for loss in (
        lambda t: rm.rao_kupper(jnp.ones(2), jnp.ones(2), t, theta=2.0),
        lambda t: rm.davidson(jnp.ones(2), jnp.ones(2), t, nu=1.0),
    ):
        with pytest.raises(TypeError, match="tied must be bool"):
            loss(jnp.ones(2))
        with pytest.raises(AssertionError):
            loss(jnp.ones(3, bool))
