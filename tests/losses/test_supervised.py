"""losses/supervised.py against float64 loops, its limits and its gradients."""

import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.logprobs import log_normaliser, token_log_probs
from rlhf_jax.losses import supervised

LOGITS = hnp.arrays(np.float32, (3, 4), elements=st.floats(-30, 30, width=32))
TOKENS = hnp.arrays(np.int32, (3,), elements=st.integers(0, 3))


def log_probs_of(row):
    top = max(row)
    log_z = top + math.log(math.fsum(math.exp(z - top) for z in row))
    return [z - log_z for z in row]


@given(logits=LOGITS, tokens=TOKENS, smoothing=st.floats(0, 1, width=32))
def test_losses_equal_float64(logits, tokens, smoothing):
    log_probs = token_log_probs(logits, tokens)
    smoothed = supervised.smoothed_cross_entropy(logits, tokens, smoothing=smoothing)
    cooled = supervised.smoothed_cross_entropy(logits, tokens, smoothing=smoothing, temperature=2.0)
    penalty = supervised.z_loss(log_normaliser(logits), coefficient=0.01)
    for i, (row, token) in enumerate(zip(logits.astype(np.float64), tokens, strict=True)):
        exact = log_probs_of(row)
        target = [smoothing / 4 + (1 - smoothing) * (v == token) for v in range(4)]
        close = {"rtol": 1e-5, "atol": 2e-5}
        np.testing.assert_allclose(supervised.negative_log_likelihood(log_probs)[i], -exact[token], **close)
        np.testing.assert_allclose(
            supervised.dynamic_fine_tuning(log_probs)[i], -math.exp(exact[token]) * exact[token], **close
        )
        np.testing.assert_allclose(smoothed[i], -math.fsum(map(math.prod, zip(target, exact, strict=True))), **close)
        halved = log_probs_of(row / 2)
        np.testing.assert_allclose(cooled[i], -math.fsum(map(math.prod, zip(target, halved, strict=True))), **close)
        np.testing.assert_allclose(penalty[i], 0.01 * (row[0] - exact[0]) ** 2, **close)


@given(logits=LOGITS, tokens=TOKENS)
def test_limits_of_smoothing(logits, tokens):
    likelihood = supervised.negative_log_likelihood(token_log_probs(logits, tokens))
    np.testing.assert_allclose(
        supervised.smoothed_cross_entropy(logits, tokens, smoothing=0.0), likelihood, rtol=1e-5, atol=1e-5
    )
    every = jnp.stack([supervised.negative_log_likelihood(token_log_probs(logits, tokens * 0 + v)) for v in range(4)])
    np.testing.assert_allclose(
        supervised.smoothed_cross_entropy(logits, tokens, smoothing=1.0), every.mean(0), rtol=1e-4, atol=1e-4
    )


def test_the_smoothed_minimum_is_the_targets_entropy():
    target = jnp.array([0.925, 0.025, 0.025, 0.025])
    at_target = supervised.smoothed_cross_entropy(jnp.log(target), jnp.array(0), smoothing=0.1)
    np.testing.assert_allclose(at_target, -jnp.sum(target * jnp.log(target)), rtol=1e-6)
    gradient = jax.grad(lambda z: supervised.smoothed_cross_entropy(z, jnp.array(0), smoothing=0.1))(jnp.log(target))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


@given(logits=LOGITS, tokens=TOKENS)
def test_dynamic_fine_tuning_follows_the_gradient_of_the_probability(logits, tokens):
    gradient = jax.grad(lambda z: jnp.sum(supervised.dynamic_fine_tuning(token_log_probs(z, tokens))))(logits)
    expected = jax.grad(lambda z: -jnp.sum(jax.nn.softmax(z)[jnp.arange(3), tokens]))(logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_dynamic_fine_tuning_is_bounded_where_likelihood_is_not():
    log_probs = jnp.array([0.0, -1.0, -80.0, -1e4])
    values, gradient = jax.vjp(supervised.dynamic_fine_tuning, log_probs)
    assert (values >= 0).all()
    np.testing.assert_allclose(values.max(), 1 / math.e, rtol=1e-6)
    np.testing.assert_allclose(gradient(jnp.ones(4))[0], [-1.0, -1 / math.e, 0.0, 0.0], rtol=1e-5, atol=1e-30)


def test_the_normaliser_of_log_probs_costs_nothing():
    logits = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (3, 4)))
    np.testing.assert_allclose(supervised.z_loss(log_normaliser(logits), coefficient=1.0), 0.0, atol=1e-12)


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
        tokens = jnp.array([0, 3, 1])

        def total(z, knob):
            return jnp.sum(
                supervised.smoothed_cross_entropy(z, tokens, smoothing=knob, temperature=1.3)
                + supervised.negative_log_likelihood(token_log_probs(z, tokens))
                + supervised.z_loss(log_normaliser(z), coefficient=knob)
            )

        assert total(logits, 0.2).dtype == jnp.float64
        jax.test_util.check_grads(total, (logits, 0.2), order=1, modes=["rev"])


FUNCTIONS = [
    supervised.negative_log_likelihood,
    supervised.dynamic_fine_tuning,
    supervised.z_loss,
    lambda x: supervised.smoothed_cross_entropy(x, jnp.array([1, 0])),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_narrow_inputs_are_widened(function):
    narrow = -jax.random.uniform(jax.random.key(0), (2, 3), jnp.bfloat16)
    assert function(narrow).dtype == jnp.float32
    np.testing.assert_array_equal(function(narrow), function(narrow.astype(jnp.float32)))


def test_knobs_are_swept():
    logits, tokens, knobs = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([1]), jnp.array([0.0, 0.1, 1.0])
    for function in (
        lambda k: supervised.smoothed_cross_entropy(logits, tokens, smoothing=k),
        lambda k: supervised.z_loss(logits, coefficient=k),
    ):
        np.testing.assert_allclose(jax.vmap(function)(knobs), jnp.stack([function(k) for k in knobs]), rtol=1e-6)


def test_mistakes_are_refused_in_words():
    with pytest.raises(TypeError, match="log_probs must be floating, got dtype int32"):
        supervised.negative_log_likelihood(jnp.array([1]))
    with pytest.raises(TypeError, match="tokens must be integers"):
        supervised.smoothed_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2))
