"""Policy losses per token against plain Python, and what equals what."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import gated_policy, policy

rng = np.random.default_rng(0)
N = 600
LOG_PROBS = np.log(rng.choice([0.001, 0.02, 0.3, 0.6, 0.97, 1.0], N) * rng.uniform(0.9, 1.0, N)).astype(np.float32)
OLD = np.where(
    rng.random(N) < 0.2, LOG_PROBS, np.minimum(LOG_PROBS + rng.normal(0, 0.6, N), 0.0)
).astype(np.float32)  # fmt: skip
ADVANTAGES = np.where(rng.random(N) < 0.1, 0.0, rng.normal(size=N)).astype(np.float32)
TOKENS = (LOG_PROBS, OLD, ADVANTAGES)


def clip(x, low, high):
    return min(max(x, low), high)


def ppo(r, a, low, high):
    return -min(r * a, clip(r, 1 - low, 1 + high) * a)


def dual(r, a, low, high, c):
    return ppo(r, a, low, high) if a >= 0 else -max(min(r * a, clip(r, 1 - low, 1 + high) * a), c * a)


def two_sided(r, a, low, high, delta):
    return -min(min(r, delta) * a, clip(r, 1 - low, 1 + high) * a)


def sapo(r, a, positive, negative):
    tau = positive if a > 0 else negative
    return -(4 / tau) / (1 + math.exp(-tau * (r - 1))) * a


def dppo_tv(lp, old, a, low, high):
    rise = math.exp(lp) - math.exp(old)
    closed = (a > 0 and rise > high) or (a < 0 and -rise > low)
    return 0.0 if closed else -math.exp(lp - old) * a


def binary_kl(old, lp):
    p, q = math.exp(old), math.exp(lp)
    return p * math.log(p / q) + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)


def dppo_kl(lp, old, a, low, high):
    closed = (a > 0 and lp > old and binary_kl(old, lp) > high) or (a < 0 and lp < old and binary_kl(old, lp) > low)
    return 0.0 if closed else -math.exp(lp - old) * a


ORACLES = {
    "reinforce": (lambda lp, old, a: policy.reinforce(lp, a), lambda lp, old, a: -a * lp),
    "a2c": (lambda lp, old, a: policy.a2c(lp, a, old), lambda lp, old, a: -(a - old) * lp),
    "surrogate": (policy.surrogate, lambda lp, old, a: -math.exp(lp - old) * a),
    "clipped": (
        lambda *x: policy.clipped_surrogate(*x, clip_low=0.1, clip_high=0.3).loss,
        lambda lp, old, a: ppo(math.exp(lp - old), a, 0.1, 0.3),
    ),
    "dual_clip": (
        lambda *x: policy.dual_clip_surrogate(*x, clip_low=0.1, clip_high=0.3, dual_clip=1.8).loss,
        lambda lp, old, a: dual(math.exp(lp - old), a, 0.1, 0.3, 1.8),
    ),
    "two_sided": (
        lambda *x: policy.two_sided_surrogate(*x, clip_low=0.1, clip_high=0.3, delta=1.8).loss,
        lambda lp, old, a: two_sided(math.exp(lp - old), a, 0.1, 0.3, 1.8),
    ),
    "two_sided below the clip": (
        lambda *x: policy.two_sided_surrogate(*x, clip_low=0.1, clip_high=0.8, delta=1.2).loss,
        lambda lp, old, a: two_sided(math.exp(lp - old), a, 0.1, 0.8, 1.2),
    ),
    "cispo": (
        lambda *x: gated_policy.cispo(*x, clip_low=0.5, clip_high=1.0).loss,
        lambda lp, old, a: -clip(math.exp(lp - old), 0.5, 2.0) * a * lp,
    ),
    "sapo": (
        lambda *x: gated_policy.sapo(*x, positive_temperature=0.7, negative_temperature=1.5),
        lambda lp, old, a: sapo(math.exp(lp - old), a, 0.7, 1.5),
    ),
    "dppo_tv": (
        lambda *x: gated_policy.dppo_tv(*x, threshold_low=0.07, threshold_high=0.11).loss,
        lambda lp, old, a: dppo_tv(lp, old, a, 0.07, 0.11),
    ),
    "dppo_kl": (
        lambda *x: gated_policy.dppo_kl(*x, threshold_low=0.02, threshold_high=0.05).loss,
        lambda lp, old, a: dppo_kl(lp, old, a, 0.02, 0.05),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_plain_python(name):
    function, oracle = ORACLES[name]
    expected = [oracle(*map(float, item)) for item in zip(*TOKENS, strict=True)]
    np.testing.assert_allclose(function(*TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_dppo_kl_closes_where_the_old_policy_could_do_otherwise_and_the_new_cannot():
    certain, likely = jnp.zeros(2), jnp.log(jnp.array([0.9, 1.0]))
    loss, closed = gated_policy.dppo_kl(certain, likely, jnp.ones(2))
    assert closed.tolist() == [True, False]
    assert loss.tolist() == [0.0, -1.0]


SURROGATES = {
    "surrogate": lambda *x: policy.surrogate(*x),
    "clipped": lambda *x: policy.clipped_surrogate(*x).loss,
    "dual_clip": lambda *x: policy.dual_clip_surrogate(*x).loss,
    "two_sided": lambda *x: policy.two_sided_surrogate(*x).loss,
    "cispo": lambda *x: gated_policy.cispo(*x).loss,
    "sapo": lambda *x: gated_policy.sapo(*x),
    "dppo_tv": lambda *x: gated_policy.dppo_tv(*x).loss,
    "dppo_kl": lambda *x: gated_policy.dppo_kl(*x).loss,
    "reinforce": lambda lp, old, a: policy.reinforce(lp, a),
}


def slope(function, log_probs, *rest):
    return jax.grad(lambda x: jnp.sum(function(x, *rest)))(jnp.asarray(log_probs))


@pytest.mark.parametrize("name", SURROGATES)
def test_on_policy_the_gradient_is_minus_the_advantage(name):
    found = slope(SURROGATES[name], LOG_PROBS, LOG_PROBS, ADVANTAGES)
    np.testing.assert_allclose(found, -ADVANTAGES, rtol=1e-5, atol=1e-7)


EQUAL = {
    "clipped with infinite clips is the surrogate": (
        lambda *x: policy.clipped_surrogate(*x, clip_low=jnp.inf, clip_high=jnp.inf).loss, policy.surrogate),
    "dual clip of infinity is the clip": (
        lambda *x: policy.dual_clip_surrogate(*x, dual_clip=jnp.inf).loss, SURROGATES["clipped"]),
    "two-sided of infinity is the clip": (
        lambda *x: policy.two_sided_surrogate(*x, delta=jnp.inf).loss, SURROGATES["clipped"]),
    "two-sided is dual clip above 1 + clip_high": (
        lambda *x: policy.two_sided_surrogate(*x, delta=1.7).loss,
        lambda *x: policy.dual_clip_surrogate(*x, dual_clip=1.7).loss),
    "a2c is reinforce": (lambda lp, old, a: policy.a2c(lp, a, old), lambda lp, old, a: policy.reinforce(lp, a - old)),
    "cispo without room is reinforce": (
        lambda *x: gated_policy.cispo(*x, clip_low=0.0, clip_high=0.0).loss, SURROGATES["reinforce"]),
    "dppo_tv of threshold 1 is the surrogate": (
        lambda *x: gated_policy.dppo_tv(*x, threshold_low=1.0, threshold_high=1.0).loss, policy.surrogate),
    "dppo_kl of infinite threshold is the surrogate": (
        lambda *x: gated_policy.dppo_kl(*x, threshold_low=jnp.inf, threshold_high=jnp.inf).loss, policy.surrogate),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_what_equals_what(name):
    left, right = EQUAL[name]
    np.testing.assert_allclose(left(*TOKENS), right(*TOKENS), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope(left, *TOKENS), slope(right, *TOKENS), rtol=1e-5, atol=1e-6)


def test_gates_that_open_wide_have_the_gradient_of_the_surrogate():
    expected = slope(policy.surrogate, *TOKENS)
    unbounded = functools.partial(gated_policy.cispo, clip_low=jnp.inf, clip_high=jnp.inf)
    np.testing.assert_allclose(slope(lambda *x: unbounded(*x).loss, *TOKENS), expected, rtol=1e-5, atol=1e-6)
    soft = functools.partial(gated_policy.sapo, positive_temperature=1e-3, negative_temperature=1e-3)
    np.testing.assert_allclose(slope(soft, *TOKENS), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [policy.clipped_surrogate, policy.dual_clip_surrogate, policy.two_sided_surrogate, gated_policy.dppo_tv,
     gated_policy.dppo_kl],
)  # fmt: skip
def test_clipped_marks_exactly_the_tokens_whose_gradient_is_cut(function):
    clipped = np.asarray(function(*TOKENS).clipped)
    cut = np.asarray(slope(lambda *x: function(*x).loss, *TOKENS)) == 0
    np.testing.assert_array_equal(cut & (ADVANTAGES != 0), clipped)
    assert clipped.any()
    assert not clipped.all()


def test_cispo_marks_bounded_weights_and_keeps_their_gradient():
    ratios = jnp.array([-0.1, 0.1, 3.0])
    loss = lambda x: gated_policy.cispo(x, jnp.zeros(3), jnp.ones(3), clip_low=0.05, clip_high=1.0)
    assert loss(ratios).clipped.tolist() == [True, False, True]
    np.testing.assert_allclose(slope(lambda x: loss(x).loss, ratios), [-0.95, -math.exp(0.1), -2.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["clipped", "dual_clip", "two_sided", "sapo", "cispo", "dppo_tv", "dppo_kl"])
def test_a_bounded_token_overflows_neither_in_value_nor_in_gradient(name):
    log_probs, advantages = jnp.array([0.0, 0.0, -300.0]), jnp.array([2.0, 0.0, -3.0])
    old = jnp.array([-300.0, -300.0, 0.0])
    assert np.isfinite(SURROGATES[name](log_probs, old, advantages)).all()
    assert np.isfinite(slope(SURROGATES[name], log_probs, old, advantages)).all()


def test_a_ratio_on_its_bound_is_not_marked():
    x = jnp.array([-1.0])
    for advantage in (jnp.ones(1), -jnp.ones(1)):
        for function in (policy.clipped_surrogate, gated_policy.cispo):
            assert not function(x, x, advantage, clip_low=0.0, clip_high=0.0).clipped.any()


def test_entropy_bonus_raises_entropy():
    np.testing.assert_allclose(policy.entropy_bonus(jnp.array([0.5, 2.0]), coefficient=0.1), [-0.05, -0.2], rtol=1e-6)
    np.testing.assert_allclose(slope(policy.entropy_bonus, jnp.ones(2)), [-0.01, -0.01], rtol=1e-6)


def test_clip_higher_lets_a_rising_token_rise_further():
    log_probs, old, advantages = jnp.log(jnp.array([1.25])), jnp.zeros(1), jnp.ones(1)
    assert policy.clipped_surrogate(log_probs, old, advantages).clipped.all()
    assert not policy.clipped_surrogate(log_probs, old, advantages, clip_high=0.28).clipped.any()
