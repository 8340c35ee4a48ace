"""Sequence-level policy losses against loops over ragged rows, and what equals what."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import masking
from rlhf_jax.losses import policy, sequence_policy

rng = np.random.default_rng(1)
MASK = np.array(list(itertools.product([False, True], repeat=4)) * 3)  # every pattern: empty, holes, both pad sides
B, T = MASK.shape
LOG_PROBS = np.where(MASK, -rng.exponential(size=(B, T)), np.nan).astype(np.float32)
OLD = np.where(MASK, LOG_PROBS - rng.normal(0, 0.25, (B, T)), np.nan).astype(np.float32)
ADVANTAGES = np.where(rng.random(B) < 0.1, 0.0, rng.normal(size=B)).astype(np.float32)
BATCH = (LOG_PROBS, OLD, ADVANTAGES, MASK)


def rows():
    """Per row: the log-probs and log-ratios of its tokens, and the advantage."""
    for lp, old, a, kept in zip(*BATCH, strict=True):
        chosen = [float(x) for x, keep in zip(lp, kept, strict=True) if keep]
        yield chosen, [x - float(o) for x, o in zip(chosen, old[kept], strict=True)], float(a)


def mean(x):
    return sum(x) / len(x)


def gspo(ratios, a, low=0.05, high=0.1):
    s = math.exp(mean(ratios))
    return -min(s * a, min(max(s, 1 - low), 1 + high) * a)


def gmpo(ratios, a, low=0.2, high=0.3):
    sign = (a > 0) - (a < 0)
    return -a * math.exp(mean([sign * min(sign * x, sign * min(max(x, -low), high)) for x in ratios]))


def phi(ratios, a):
    power, decay = (1.5, 2.5) if a >= 0 else (3.5, 2.2)
    w = math.exp(sum(ratios))
    return w**power * math.exp(decay * (1 - w))


KERNEL = {"positive_power": 1.5, "positive_decay": 2.5, "negative_power": 3.5, "negative_decay": 2.2}
ORACLES = {
    "gspo": (
        lambda *x: sequence_policy.gspo(*x, clip_low=0.05, clip_high=0.1).loss,
        lambda lp, r, a: gspo(r, a)),
    "luspo": (
        lambda *x: sequence_policy.luspo(*x, clip_low=0.05, clip_high=0.1).loss,
        lambda lp, r, a: len(r) * gspo(r, a)),
    "gmpo": (
        lambda *x: sequence_policy.gmpo(*x, clip_low=0.2, clip_high=0.3).loss,
        lambda lp, r, a: gmpo(r, a)),
    "vespo": (
        lambda *x: jnp.sum(sequence_policy.vespo(*x, **KERNEL), -1),
        lambda lp, r, a: sum(-phi(r, a) * a * x for x in lp)),
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
def test_equals_loops_over_rows(name):
    function, oracle = ORACLES[name]
    expected = [oracle(lp, r, a) if lp else 0.0 for lp, r, a in rows()]
    np.testing.assert_allclose(function(*BATCH), expected, rtol=1e-4, atol=1e-5)


def slope(function, log_probs, *rest):
    return jax.grad(lambda x: jnp.sum(function(x, *rest)))(jnp.asarray(log_probs))


PER_TOKEN = {
    "gspo": (lambda *x: sequence_policy.gspo(*x).loss, lambda n: 1 / n),
    "luspo": (lambda *x: sequence_policy.luspo(*x).loss, lambda n: 1.0),
    "gmpo": (lambda *x: sequence_policy.gmpo(*x).loss, lambda n: 1 / n),
    "vespo": (sequence_policy.vespo, lambda n: 1.0),
    "gspo_token": (
        lambda lp, old, a, m: sequence_policy.gspo_token(lp, old, jnp.broadcast_to(a[:, None], m.shape), m).loss,
        lambda n: 1.0,
    ),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_on_policy_the_gradient_is_minus_the_advantage_times_the_length_rule(name):
    function, share = PER_TOKEN[name]
    expected = np.zeros((B, T))
    for i, j in zip(*np.nonzero(MASK), strict=True):
        expected[i, j] = -ADVANTAGES[i] * share(MASK[i].sum())
    found = slope(function, LOG_PROBS, LOG_PROBS, ADVANTAGES, MASK)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_on_policy_vespo_is_reinforce():
    found = sequence_policy.vespo(LOG_PROBS, LOG_PROBS, ADVANTAGES, MASK)
    expected = policy.reinforce(jnp.asarray(np.where(MASK, LOG_PROBS, 0)), ADVANTAGES[:, None] * jnp.ones((B, T)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    flat = dict.fromkeys(KERNEL, 0.0)
    np.testing.assert_allclose(sequence_policy.vespo(*BATCH, **flat), expected, rtol=1e-6)


def test_gspo_token_has_the_value_and_gradient_of_gspo_for_one_advantage_per_row():
    knobs = {"clip_low": 0.05, "clip_high": 0.1}
    mask = jnp.asarray(MASK)

    def per_row(x):
        loss = sequence_policy.gspo(x, OLD, ADVANTAGES, MASK, **knobs).loss
        return masking.masked_mean(loss, jnp.any(mask, -1))

    def per_token(x):
        tokens = jnp.broadcast_to(jnp.asarray(ADVANTAGES)[:, None], MASK.shape)
        return masking.sequence_mean(sequence_policy.gspo_token(x, OLD, tokens, MASK, **knobs).loss, mask)

    left = jax.value_and_grad(per_row)(jnp.asarray(LOG_PROBS))
    right = jax.value_and_grad(per_token)(jnp.asarray(LOG_PROBS))
    np.testing.assert_allclose(left[0], right[0], rtol=1e-5)
    np.testing.assert_allclose(left[1], right[1], rtol=1e-5, atol=1e-7)


def test_gspo_token_weighs_every_token_by_the_ratio_of_its_row():
    tokens = rng.normal(size=(B, T)).astype(np.float32)
    function = lambda x: sequence_policy.gspo_token(x, OLD, tokens, MASK, clip_low=jnp.inf, clip_high=jnp.inf).loss
    expected = np.zeros((B, T))
    for i, (lp, ratios, _) in enumerate(rows()):
        if lp:
            expected[i] = np.where(MASK[i], -math.exp(mean(ratios)) * tokens[i], 0.0)
    np.testing.assert_allclose(function(LOG_PROBS), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope(function, LOG_PROBS), expected, rtol=1e-5, atol=1e-6)


def test_gspo_token_cuts_each_token_by_the_sign_of_its_own_advantage():
    log_probs, mask = jnp.array([[0.5, 0.5]]), jnp.ones((1, 2), bool)
    clipped = sequence_policy.gspo_token(log_probs, jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]]), mask).clipped
    assert clipped.tolist() == [[True, False]]


def test_gmpo_without_bounds_is_gspo_without_bounds():
    bounds = {"clip_low": jnp.inf, "clip_high": jnp.inf}
    left = lambda *x: sequence_policy.gmpo(*x, **bounds).loss
    right = lambda *x: sequence_policy.gspo(*x, **bounds).loss
    np.testing.assert_allclose(left(*BATCH), right(*BATCH), rtol=1e-5)
    np.testing.assert_allclose(slope(left, *BATCH), slope(right, *BATCH), rtol=1e-5, atol=1e-6)


def test_gmpo_cuts_the_gradient_of_exactly_the_clipped_tokens():
    function = lambda *x: sequence_policy.gmpo(*x, clip_low=0.2, clip_high=0.1)
    clipped = np.asarray(function(*BATCH).clipped)
    cut = np.asarray(slope(lambda *x: function(*x).loss, *BATCH)) == 0
    np.testing.assert_array_equal(cut & MASK & (ADVANTAGES != 0)[:, None], clipped)
    assert clipped.any()


@pytest.mark.parametrize("function", [sequence_policy.gspo, sequence_policy.luspo])
def test_one_token_is_ppo_and_clipped_rows_lose_their_gradient(function):
    log_probs, old = jnp.array([[0.3], [-0.4], [0.01]]), jnp.zeros((3, 1))
    advantages, mask = jnp.array([1.0, -2.0, 3.0]), jnp.ones((3, 1), bool)
    knobs = {"clip_low": 0.2, "clip_high": 0.1}
    expected = policy.clipped_surrogate(log_probs[:, 0], old[:, 0], advantages, **knobs)
    found = function(log_probs, old, advantages, mask, **knobs)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    assert found.clipped.tolist() == expected.clipped.tolist() == [True, True, False]
    cut = slope(lambda x: function(x, old, advantages, mask, **knobs).loss, log_probs) == 0
    assert cut[:, 0].tolist() == [True, True, False]


def test_vespo_kernel_peaks_at_power_over_decay_and_vanishes_far_away():
    def weight(log_ratio, **knobs):
        """φ(W) of one token at log π = -1 with advantage 1."""
        lp, a, mask = jnp.array([[-1.0]]), jnp.ones(1), jnp.ones((1, 1), bool)
        return float(sequence_policy.vespo(lp, lp - log_ratio, a, mask, **knobs)[0, 0])

    assert weight(0.0) == 1.0
    shape = {"positive_power": 4.0, "positive_decay": 2.0}
    peak = weight(math.log(4 / 2), **shape)
    assert peak > weight(math.log(4 / 2) - 0.05, **shape)
    assert peak > weight(math.log(4 / 2) + 0.05, **shape)
    assert weight(80.0) == 0.0
    assert weight(-80.0) < 1e-15
    assert weight(30.0, positive_decay=0.0) == pytest.approx(math.exp(2 * 20), rel=1e-5)  # log W is limited to 20


def test_advantages_must_be_one_per_sequence():
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    for function in (sequence_policy.gspo, sequence_policy.luspo, sequence_policy.gmpo, sequence_policy.vespo):
        with pytest.raises(ValueError, match=r"one value per sequence, \(2,\), got \(2, 3\)"):
            function(x, x, x, mask)
