"""Every paired preference loss in one table: oracles, shifts, gradient signs, extremes, knobs, refusals, limits."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax.losses import _pairs, online_preference
from rlhf_jax.losses import anchored_preference as anchored
from rlhf_jax.losses import divergence_preference as divergence
from rlhf_jax.losses import preference as pref
from rlhf_jax.losses import reference_free_preference as free


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def nll(x):
    """-log sigmoid(x)."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def odds(mean):
    mean = min(mean, -float(np.finfo(np.float32).eps))
    return mean - math.log(-math.expm1(mean))


def kl(q, p):
    return sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss, its oracle (w, l, n, m, **knobs) per pair with lengths n and m, and what its docstring promises."""

    function: Callable
    oracle: Callable
    knobs: Mapping[str, tuple[float, float]]  # two values each, swept by vmap
    lengths: bool = False  # takes the two lengths
    free: bool = False  # takes log-probs, at most 0
    shift: str | None = "sum"  # what may be added to both: the same total ("sum"), the same per token, or nothing
    chosen: bool = True  # raising the chosen never raises the loss
    rejected: bool = True  # raising the rejected never lowers it
    equal: float | None = math.log(2)  # the value for equal pairs, whatever they are
    span: float = 80.0  # range in which float32 can be held against float64

    def __call__(self, w, lo, n, m, **knobs):
        return self.function(w, lo, n, m, **knobs) if self.lengths else self.function(w, lo, **knobs)


def gold(function):
    """A triple loss as a pair loss, with gold log-probs of -3."""
    return lambda w, lo, *lengths, **knobs: function(w, lo, jnp.full_like(w, -3.0), *lengths, **knobs)


def exploring(w, lo, **knobs):
    return online_preference.xpo(w, lo, jnp.full_like(w, -3.0), **knobs)


LOSSES = {
    "dpo": Loss(pref.dpo, lambda w, lo, n, m, beta=0.1: nll(beta * (w - lo)), {"beta": (0.05, 0.7)}),
    "dpo_mean": Loss(
        pref.dpo_mean,
        lambda w, lo, n, m, beta=5.0: nll(beta * (w / n - lo / m)),
        {"beta": (1.0, 5.0)},
        lengths=True,
        shift="token",
    ),
    "conservative_dpo": Loss(
        pref.conservative_dpo,
        lambda w, lo, n, m, beta=0.1, label_smoothing=0.1: (
            (1 - label_smoothing) * nll(beta * (w - lo)) + label_smoothing * nll(beta * (lo - w))
        ),
        {"beta": (0.05, 0.7), "label_smoothing": (0.0, 0.3)},
        chosen=False,
        rejected=False,
    ),
    "robust_dpo": Loss(
        pref.robust_dpo,
        lambda w, lo, n, m, beta=0.1, label_smoothing=0.1: (
            ((1 - label_smoothing) * nll(beta * (w - lo)) - label_smoothing * nll(beta * (lo - w)))
            / (1 - 2 * label_smoothing)
        ),
        {"beta": (0.05, 0.7), "label_smoothing": (0.0, 0.3)},
    ),
    "hinge": Loss(
        pref.hinge, lambda w, lo, n, m, beta=0.05: max(0.0, 1 - beta * (w - lo)), {"beta": (0.05, 0.7)}, equal=1.0
    ),
    "ipo_sum": Loss(
        pref.ipo_sum,
        lambda w, lo, n, m, beta=0.1: (w - lo - 1 / (2 * beta)) ** 2,
        {"beta": (0.1, 0.5)},
        chosen=False,
        rejected=False,
        equal=25.0,
    ),
    "ipo_mean": Loss(
        pref.ipo_mean,
        lambda w, lo, n, m, beta=0.1: (w / n - lo / m - 1 / (2 * beta)) ** 2,
        {"beta": (0.1, 0.5)},
        lengths=True,
        shift="token",
        chosen=False,
        rejected=False,
        equal=25.0,
    ),
    "exo": Loss(
        pref.exo,
        lambda w, lo, n, m, beta=0.1, label_smoothing=1e-3: kl(sigmoid(beta * (w - lo)), 1 - label_smoothing),
        {"beta": (0.05, 0.7), "label_smoothing": (0.01, 0.3)},
        chosen=False,
        rejected=False,
        equal=kl(0.5, 1e-3),
    ),
    "discopop": Loss(
        pref.discopop,
        lambda w, lo, n, m, beta=0.05, tau=0.05: (
            sigmoid(-beta * (w - lo) / tau) * nll(beta * (w - lo))
            + sigmoid(beta * (w - lo) / tau) * math.exp(-beta * (w - lo))
        ),
        {"beta": (0.05, 0.7), "tau": (0.05, 2.0)},
        chosen=False,
        rejected=False,
        equal=(math.log(2) + 1) / 2,
    ),
    "nca": Loss(
        anchored.nca,
        lambda w, lo, n, m, beta=0.01: nll(beta * w) + 0.5 * nll(-beta * w) + 0.5 * nll(-beta * lo),
        {"beta": (0.01, 0.7)},
        shift=None,
        chosen=False,
        equal=None,
    ),
    "bco_pair": Loss(
        anchored.bco_pair,
        lambda w, lo, n, m, beta=0.01, reward_shift=0.0: nll(beta * w - reward_shift) + nll(reward_shift - beta * lo),
        {"beta": (0.01, 0.7), "reward_shift": (-0.3, 1.0)},
        shift=None,
        equal=None,
    ),
    "sppo": Loss(
        anchored.sppo,
        lambda w, lo, n, m, beta=0.001, chosen_win_probability=1.0, rejected_win_probability=0.0: (
            (w - (chosen_win_probability - 0.5) / beta) ** 2 + (lo - (rejected_win_probability - 0.5) / beta) ** 2
        ),
        {"beta": (0.1, 0.5), "chosen_win_probability": (0.6, 0.8), "rejected_win_probability": (0.1, 0.5)},
        shift=None,
        chosen=False,
        rejected=False,
        equal=None,
    ),
    "apo_zero": Loss(
        anchored.apo_zero,
        lambda w, lo, n, m, beta=0.1: 1 - sigmoid(beta * w) + sigmoid(beta * lo),
        {"beta": (0.05, 0.7)},
        shift=None,
        equal=1.0,
    ),
    "apo_down": Loss(
        anchored.apo_down,
        lambda w, lo, n, m, beta=0.1: sigmoid(beta * w) + 1 - sigmoid(beta * (w - lo)),
        {"beta": (0.05, 0.7)},
        shift=None,
        chosen=False,
        equal=None,
    ),
    "forward_kl_dpo": Loss(
        divergence.forward_kl_dpo,
        lambda w, lo, n, m, beta=0.1: nll(beta * (math.exp(-lo) - math.exp(-w))),
        {"beta": (0.05, 0.7)},
        shift=None,
        span=6.0,
    ),
    "jensen_shannon_dpo": Loss(
        divergence.jensen_shannon_dpo,
        lambda w, lo, n, m, beta=0.1: nll(beta * (nll(lo) - nll(w))),
        {"beta": (0.05, 0.7)},
        shift=None,
    ),
    "alpha_divergence_dpo": Loss(
        divergence.alpha_divergence_dpo,
        lambda w, lo, n, m, beta=0.1, alpha=0.5: nll(beta * (math.exp(-alpha * lo) - math.exp(-alpha * w)) / alpha),
        {"beta": (0.05, 0.7), "alpha": (-0.5, 1.5)},
        shift=None,
        span=6.0,
    ),
    "cpo": Loss(
        free.cpo,
        lambda w, lo, n, m, beta=0.1, label_smoothing=0.0: (
            (1 - label_smoothing) * nll(beta * (w - lo)) + label_smoothing * nll(beta * (lo - w))
        ),
        {"beta": (0.05, 0.7), "label_smoothing": (0.0, 0.3)},
        free=True,
    ),
    "cpo_hinge": Loss(
        free.cpo_hinge,
        lambda w, lo, n, m, beta=0.1: max(0.0, 1 - beta * (w - lo)),
        {"beta": (0.05, 0.7)},
        free=True,
        equal=1.0,
    ),
    "simpo": Loss(
        free.simpo,
        lambda w, lo, n, m, beta=2.5, gamma=1.375: nll(beta * w / n - beta * lo / m - gamma),
        {"beta": (1.0, 2.5), "gamma": (0.0, 1.0)},
        lengths=True,
        free=True,
        shift="token",
        equal=nll(-1.375),
    ),
    "alphapo": Loss(
        free.alphapo,
        lambda w, lo, n, m, alpha=0.25, beta=2.5, gamma=0.1: nll(
            beta * (math.exp(-alpha * lo / m) - math.exp(-alpha * w / n)) / alpha - gamma
        ),
        {"alpha": (-0.5, 0.5), "beta": (1.0, 2.5), "gamma": (0.0, 1.0)},
        lengths=True,
        free=True,
        shift=None,
        equal=nll(-0.1),
        span=12.0,
    ),
    "odds_ratio": Loss(
        free.odds_ratio,
        lambda w, lo, n, m: nll(odds(w / n) - odds(lo / m)),
        {},
        lengths=True,
        free=True,
        shift=None,
    ),
    "orpo": Loss(
        free.orpo,
        lambda w, lo, n, m, beta=0.1: -w / n + beta * nll(odds(w / n) - odds(lo / m)),
        {"beta": (0.1, 0.7)},
        lengths=True,
        free=True,
        shift=None,
        equal=None,
    ),
    "tpo": Loss(
        gold(free.tpo),
        lambda w, lo, n, m, beta=0.01, alpha=1.0: nll(beta * (w - lo)) + 3 * alpha,
        {"beta": (0.05, 0.7), "alpha": (0.0, 0.5)},
        free=True,
        equal=math.log(2) + 3,
    ),
    "tpo_length_controlled": Loss(
        gold(free.tpo_length_controlled),
        lambda w, lo, n, m, beta=10.0, gamma=3.0, alpha=0.05: nll(beta * (w / n - lo / m) - gamma) + 3 * alpha,
        {"beta": (1.0, 2.5), "gamma": (0.0, 1.0), "alpha": (0.0, 0.5)},
        lengths=True,
        free=True,
        shift="token",
        equal=nll(-3.0) + 0.15,
    ),
    "xpo": Loss(
        exploring,
        lambda w, lo, n, m, beta=0.1, alpha=1e-5: nll(beta * (w - lo)) - 3 * alpha,
        {"beta": (0.05, 0.7), "alpha": (0.0, 0.5)},
        equal=math.log(2) - 3e-5,
    ),
}
TABLE = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
N, M = np.array([1, 3, 7, 2]), np.array([2, 3, 1, 5])  # lengths of the four pairs of a test case


def domain(loss):
    return (-loss.span, -(2.0**-4)) if loss.free else (-loss.span, loss.span)


def generic(loss, dtype=np.float32):
    """Four unremarkable pairs away from every kink."""
    w, lo = np.array([0.3, -2.0, 1.5, -0.7]), np.array([-1.1, -0.4, 2.2, -3.0])
    return (w - 4, lo - 4) if loss.free else (w, lo)


@TABLE
@given(data=st.data())
def test_equals_float64_formula(loss, data):
    pairs = hnp.arrays(np.float32, 4, elements=st.floats(*domain(loss), width=32))
    w, lo = data.draw(pairs), data.draw(pairs)
    expected = [loss.oracle(*map(float, case)) for case in zip(w, lo, N, M, strict=True)]
    np.testing.assert_allclose(loss(jnp.asarray(w), jnp.asarray(lo), N, M), expected, rtol=5e-5, atol=1e-4)


@TABLE
def test_knobs_enter_as_in_the_formula_and_sweep_by_vmap(loss):
    w, lo = (jnp.float32(x) for x in generic(loss))
    for index in (0, 1):
        knobs = {name: values[index] for name, values in loss.knobs.items()}
        expected = [loss.oracle(*map(float, case), **knobs) for case in zip(w, lo, N, M, strict=True)]
        np.testing.assert_allclose(loss(w, lo, N, M, **knobs), expected, rtol=2e-5, atol=1e-5)
    for name, values in loss.knobs.items():
        swept = jax.jit(jax.vmap(lambda value, name=name: loss(w, lo, N, M, **{name: value})))(jnp.array(values))
        np.testing.assert_allclose(swept, [loss(w, lo, N, M, **{name: v}) for v in values], rtol=1e-5, atol=1e-6)


@TABLE
def test_shifting_both_sides(loss):
    w, lo = (jnp.float32(x) for x in generic(loss))
    before = loss(w, lo, N, M)
    by_total, by_token = loss(w - 2, lo - 2, N, M), loss(w - 2 * N, lo - 2 * M, N, M)
    if loss.shift == "sum":
        np.testing.assert_allclose(by_total, before, rtol=1e-5)
    elif loss.shift == "token":
        np.testing.assert_allclose(by_token, before, rtol=1e-5, atol=1e-6)
    else:
        assert (np.abs(by_total - before) > 2e-5).all()
        assert (np.abs(by_token - before) > 2e-5).all()


@TABLE
def test_equal_pairs(loss):
    if loss.equal is None:
        return
    x = jnp.float32([-7.0, -2.0, -0.5, -0.1])
    np.testing.assert_allclose(loss(x, x, N, N), [loss.equal] * 4, rtol=1e-5)


@TABLE
def test_gradients_equal_finite_differences(loss):
    with jax.enable_x64(True):
        w, lo = (jnp.asarray(x, jnp.float64) for x in generic(loss))
        assert loss(w, lo, N, M).dtype == jnp.float64
        check_grads(lambda w, lo: loss(w, lo, N, M), (w, lo), order=1, modes=["rev"])
        for name, values in loss.knobs.items():
            check_grads(lambda v, name=name: loss(w, lo, N, M, **{name: v}), (values[1],), order=1, modes=["rev"])


@TABLE
def test_gradient_signs_and_finiteness_up_to_80_nats(loss):
    ends = (-80.0, -40.0, -1.0, -1e-3, 0.0) if loss.free else (-80.0, -3.0, 0.0, 3.0, 80.0)
    w, lo = (jnp.float32(x) for x in zip(*itertools.product(ends, ends), strict=True))
    gradients = jax.jit(jax.value_and_grad(lambda w, lo, n: jnp.sum(loss(w, lo, n, n)), argnums=(0, 1)))
    for n in (1, 4, 0) if loss.lengths else (1,):
        value, (chosen, rejected) = gradients(w, lo, jnp.full(w.shape, n))
        assert np.isfinite(value)
        assert np.isfinite(chosen).all()
        assert np.isfinite(rejected).all()
        assert not loss.chosen or (chosen <= 0).all()
        assert not loss.rejected or (rejected >= 0).all()


@TABLE
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_give_float32(loss, dtype):
    w, lo = (jnp.asarray(x, dtype) for x in generic(loss))
    values = loss(w, lo, N, M)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, loss(w.astype(jnp.float32), lo.astype(jnp.float32), N, M), rtol=1e-6)


@TABLE
def test_numpy_float64_inputs_are_float32_like_the_rest_of_jax(loss):
    w, lo = generic(loss)
    values = loss(w, lo, N, M)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, loss(jnp.float32(w), jnp.float32(lo), N, M))


@TABLE
def test_leading_axes_and_permutation(loss):
    w, lo = (jnp.float32(x) for x in generic(loss))
    order = np.array([2, 0, 3, 1])
    flat = loss(w, lo, N, M)
    np.testing.assert_array_equal(loss(w[order], lo[order], N[order], M[order]), flat[order])
    square = [x.reshape(2, 2) for x in (w, lo, N, M)]
    np.testing.assert_array_equal(loss(*square), flat.reshape(2, 2))


@TABLE
def test_refusals_name_the_argument(loss):
    with pytest.raises(TypeError, match="must be floating, got dtype int32"):
        loss(jnp.zeros(4, jnp.int32), jnp.zeros(4), N, M)
    with pytest.raises(AssertionError):
        loss(jnp.zeros(4), jnp.zeros(3), N, M)


def dpo_at(beta):
    return lambda w, lo, n, m: pref.dpo(w, lo, beta=beta)


ONE = jnp.ones(4, jnp.int32)
LIMITS = {
    "dpo_mean of one token is dpo": (lambda w, lo, n, m: pref.dpo_mean(w, lo, ONE, ONE, beta=0.1), dpo_at(0.1)),
    "cDPO without smoothing is dpo": (
        lambda w, lo, n, m: pref.conservative_dpo(w, lo, label_smoothing=0.0),
        dpo_at(0.1),
    ),
    "robust without smoothing is dpo": (lambda w, lo, n, m: pref.robust_dpo(w, lo, label_smoothing=0.0), dpo_at(0.1)),
    "robust averaged over flips is dpo": (
        lambda w, lo, n, m: (
            0.8 * pref.robust_dpo(w, lo, label_smoothing=0.2) + 0.2 * pref.robust_dpo(lo, w, label_smoothing=0.2)
        ),
        dpo_at(0.1),
    ),
    "ipo_mean of one token is ipo_sum": (
        lambda w, lo, n, m: pref.ipo_mean(w, lo, ONE, ONE),
        lambda w, lo, n, m: pref.ipo_sum(w, lo),
    ),
    "ipo_mean of equal lengths is ipo_sum of means": (
        lambda w, lo, n, m: pref.ipo_mean(w, lo, n, n),
        lambda w, lo, n, m: pref.ipo_sum(w / n, lo / n),
    ),
    "discopop of infinite tau is the mean of two losses": (
        lambda w, lo, n, m: pref.discopop(w, lo, beta=0.3, tau=jnp.inf),
        lambda w, lo, n, m: (pref.dpo(w, lo, beta=0.3) + jnp.exp(-0.3 * (w - lo))) / 2,
    ),
    "sppo of even odds pulls to the reference": (
        lambda w, lo, n, m: anchored.sppo(w, lo, chosen_win_probability=0.5, rejected_win_probability=0.5),
        lambda w, lo, n, m: w**2 + lo**2,
    ),
    "alpha 0 is dpo": (lambda w, lo, n, m: divergence.alpha_divergence_dpo(w, lo, alpha=0.0), dpo_at(0.1)),
    "alpha 1 is forward KL": (
        lambda w, lo, n, m: divergence.alpha_divergence_dpo(w, lo, alpha=1.0),
        lambda w, lo, n, m: divergence.forward_kl_dpo(w, lo),
    ),
    "Jensen-Shannon far below the reference is dpo": (
        lambda w, lo, n, m: divergence.jensen_shannon_dpo(w - 60, lo - 60),
        dpo_at(0.1),
    ),
    "simpo of one token without margin is cpo": (
        lambda w, lo, n, m: free.simpo(w, lo, ONE, ONE, beta=0.1, gamma=0.0),
        lambda w, lo, n, m: free.cpo(w, lo),
    ),
    "cpo is dpo": (lambda w, lo, n, m: free.cpo(w, lo), dpo_at(0.1)),
    "alphapo of alpha 0 is simpo": (
        lambda w, lo, n, m: free.alphapo(w, lo, n, m, alpha=0.0),
        lambda w, lo, n, m: free.simpo(w, lo, n, m, gamma=0.1),
    ),
    "odds ratio of unlikely completions is simpo": (
        lambda w, lo, n, m: free.odds_ratio(w - 20 * n, lo - 20 * m, n, m),
        lambda w, lo, n, m: free.simpo(w, lo, n, m, beta=1.0, gamma=0.0),
    ),
    "orpo of beta 0 is fine-tuning": (
        lambda w, lo, n, m: free.orpo(w - 9, lo - 9, n, m, beta=0.0),
        lambda w, lo, n, m: (9 - w) / n,
    ),
    "tpo of alpha 0 is cpo": (
        lambda w, lo, n, m: free.tpo(w, lo, lo, alpha=0.0),
        lambda w, lo, n, m: free.cpo(w, lo, beta=0.01),
    ),
    "tpo_length_controlled of alpha 0 is simpo": (
        lambda w, lo, n, m: free.tpo_length_controlled(w, lo, lo, n, m, beta=2.5, gamma=1.375, alpha=0.0),
        lambda w, lo, n, m: free.simpo(w, lo, n, m),
    ),
    "xpo of alpha 0 is dpo": (lambda w, lo, n, m: online_preference.xpo(w, lo, lo, alpha=0.0), dpo_at(0.1)),
}


@pytest.mark.parametrize(("left", "right"), LIMITS.values(), ids=LIMITS)
def test_limits(left, right):
    rng = np.random.default_rng(0)
    w, lo = (jnp.float32(rng.normal(size=4) * 2) for _ in range(2))
    np.testing.assert_allclose(left(w, lo, N, M), right(w, lo, N, M), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "optimum"),
    [
        (lambda x: pref.conservative_dpo(x, 0 * x, label_smoothing=0.2), math.log(4) / 0.1),
        (lambda x: pref.conservative_dpo(x, 0 * x, label_smoothing=0.5), 0.0),
        (lambda x: pref.exo(x, 0 * x, label_smoothing=0.2), math.log(4) / 0.1),
        (lambda x: pref.ipo_sum(x, 0 * x, beta=0.25), 2.0),
        (lambda x: anchored.nca(x, 0 * x, beta=0.1), math.log(2) / 0.1),
        (lambda x: anchored.sppo(x, 0 * x, beta=0.25), 2.0),
        (lambda x: anchored.sppo(0 * x, x, beta=0.25), -2.0),
    ],
)
def test_minima_are_where_the_docstrings_say(loss, optimum):
    near = jnp.float32([optimum - 1.0, optimum, optimum + 1.0])
    values, slope = loss(near), jax.grad(lambda x: loss(x))(jnp.float32(optimum))
    assert values[0] > values[1] < values[2]
    assert abs(slope) < 1e-6


def test_exo_is_zero_at_its_target_and_never_below():
    x = jnp.linspace(-80, 80, 161)
    values = pref.exo(x, jnp.zeros_like(x), beta=1.0, label_smoothing=0.2)
    assert (values > -1e-6).all()
    assert abs(pref.exo(jnp.log(4.0), jnp.zeros(()), beta=1.0, label_smoothing=0.2)) < 1e-6


@pytest.mark.parametrize("loss", [anchored.apo_zero, anchored.apo_down])
def test_apo_lies_between_0_and_2(loss):
    w, lo = (jnp.float32(x) for x in zip(*itertools.product((-80, 0, 80), repeat=2), strict=True))
    values = loss(w, lo, beta=1.0)
    assert values.min() >= 0
    assert values.max() <= 2
    assert loss(0 * w, 0 * w).tolist() == [1.0] * 9


def test_bco_pair_bounds_dpo_whatever_the_shift():
    w, lo = generic(LOSSES["dpo"])
    for shift in (-2.0, 0.0, 3.0):
        bound = anchored.bco_pair(jnp.float32(w), jnp.float32(lo), beta=0.1, reward_shift=shift)
        assert (bound >= pref.dpo(jnp.float32(w), jnp.float32(lo))).all()


def test_discopop_keeps_value_and_gradient_where_its_exponential_overflows():
    x = jnp.float32([-80.0, 80.0])
    value, gradient = jax.vmap(jax.value_and_grad(lambda w: pref.discopop(w, -w, beta=1.0)))(x)
    np.testing.assert_allclose(value, [160.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-2.0, 0.0], rtol=1e-6)


def test_empty_completions_give_finite_losses_and_certain_ones_too():
    zero = jnp.zeros(1)
    for loss in (free.odds_ratio, free.orpo, free.simpo, free.alphapo, pref.ipo_mean, pref.dpo_mean):
        value, gradient = jax.value_and_grad(lambda w, f=loss: f(w, zero, jnp.zeros(1, int), jnp.ones(1, int))[0])(zero)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_accuracy_counts_ties_half_and_has_no_gradient():
    w = jnp.float32([1.0, 0.0, -1.0, -jnp.inf])
    assert pref.accuracy(w, jnp.zeros(4)).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert not jax.grad(lambda w: pref.accuracy(w, jnp.zeros(3)).sum())(w[:3]).any()


# --- what the losses share --------------------------------------------------------------------------------------------


def test_bounded_exp_is_exp_then_its_tangent():
    x = jnp.float32([-200.0, -1.0, 0.0, 79.0, 79.9])
    np.testing.assert_allclose(_pairs.bounded_exp(x), np.exp(np.float64(x)), rtol=1e-5, atol=1e-30)
    slope = jax.vmap(jax.grad(_pairs.bounded_exp))(jnp.float32([79.9, 85.0, 500.0]))
    np.testing.assert_allclose(slope, np.exp([79.9, 80.02, 80.02]), rtol=0.01)
    value = _pairs.bounded_exp(jnp.float32([81.0, 300.0]))
    np.testing.assert_allclose(value, np.exp(80.02) * (1 + np.array([0.98, 219.98])), rtol=0.02)
    with jax.enable_x64(True):
        np.testing.assert_allclose(_pairs.bounded_exp(jnp.float64(600.0)), np.exp(600.0), rtol=1e-12)


@pytest.mark.parametrize("alpha", [-2.0, -1e-4, 0.0, 1e-7, 9e-4, 1.1e-3, 0.3, 1.0])
def test_power_scores_are_smooth_through_alpha_zero(alpha):
    x = np.array([-3.0, -0.5, 0.0, 1e-3, 0.7, 4.0])
    with jax.enable_x64(True):
        got = _pairs.power_scores(jnp.asarray(x), alpha)
        expected = -np.expm1(-alpha * x) / alpha if alpha else x
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        slope = jax.vmap(jax.grad(_pairs.power_scores), (0, None))(jnp.asarray(x), alpha)
        np.testing.assert_allclose(slope, np.exp(-alpha * x), rtol=1e-9)
        by_alpha = jax.vmap(jax.grad(_pairs.power_scores, argnums=1), (0, None))(jnp.asarray(x), alpha)
        step = 1e-3
        if abs(alpha) < 1e-2:  # the series -x²/2 + α x³/3 - α² x⁴/8
            np.testing.assert_allclose(by_alpha, -(x**2) / 2 + alpha * x**3 / 3 - alpha**2 * x**4 / 8, atol=1e-6)
        else:
            around = [-np.expm1(-(alpha + s) * x) / (alpha + s) for s in (-step, step)]
            np.testing.assert_allclose(by_alpha, (around[1] - around[0]) / (2 * step), rtol=1e-4, atol=1e-7)


def test_power_scores_stay_finite_far_out():
    x = jnp.float32([-300.0, -85.0, 300.0])
    value, gradient = jax.vmap(jax.value_and_grad(lambda x: _pairs.power_scores(x, 1.0)))(x)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    assert (np.diff(value) > 0).all()
    assert (gradient[:2] > 1e34).all()
