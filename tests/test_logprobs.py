"""logprobs.py against float64 sums, and what its docstrings say about shifts, forbidden tokens and widths."""

import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax import logprobs

TEMPERATURES = (0.3, 1.0, 2.5)


@st.composite
def distributions(draw, rows=4, vocabulary=5):
    """logits [4, 5], finite or -inf with at least one finite per row, and tokens [4]."""
    finite = st.floats(-40, 40, width=32)
    logits = [[draw(st.one_of(finite, st.just(-math.inf))) for _ in range(vocabulary)] for _ in range(rows)]
    for row in logits:
        row[draw(st.integers(0, vocabulary - 1))] = draw(finite)
    tokens = [draw(st.integers(0, vocabulary - 1)) for _ in range(rows)]
    return np.array(logits, np.float32), np.array(tokens, np.int32)


def log_probs_of(row, temperature):
    """Exact log-probs of one row of logits."""
    scaled = [float(z) / temperature for z in row]
    top = max(scaled)
    log_z = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - log_z for z in scaled]


def entropy_of(row, temperature):
    return -math.fsum(math.exp(x) * x for x in log_probs_of(row, temperature) if x > -math.inf)


def concentration_of(row, temperature):
    return math.fsum(math.exp(x) ** 2 for x in log_probs_of(row, temperature))


def log_normaliser_of(row, temperature):
    index = int(np.argmax(row))
    return float(row[index]) / temperature - log_probs_of(row, temperature)[index]


STATISTICS = {
    logprobs.entropy: entropy_of,
    logprobs.sum_of_squared_probs: concentration_of,
    logprobs.log_normaliser: log_normaliser_of,
}


@given(case=distributions(), temperature=st.sampled_from(TEMPERATURES))
def test_token_log_probs_equal_float64(case, temperature):
    logits, tokens = case
    expected = [log_probs_of(row, temperature)[token] for row, token in zip(logits, tokens, strict=True)]
    np.testing.assert_allclose(
        logprobs.token_log_probs(logits, tokens, temperature=temperature), expected, rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda f: f.__name__)
@given(case=distributions(), temperature=st.sampled_from(TEMPERATURES))
def test_statistics_equal_float64(statistic, case, temperature):
    expected = [STATISTICS[statistic](row, temperature) for row in case[0]]
    np.testing.assert_allclose(statistic(case[0], temperature=temperature), expected, rtol=2e-5, atol=2e-5)


@given(case=distributions(), shift=st.floats(-20, 20, width=32))
def test_adding_a_constant_to_the_logits_moves_only_the_normaliser(case, shift):
    logits, tokens = case
    moved = logits + np.float32(shift)
    for function in (lambda z: logprobs.token_log_probs(z, tokens), logprobs.entropy, logprobs.sum_of_squared_probs):
        np.testing.assert_allclose(function(moved), function(logits), rtol=1e-4, atol=1e-4)
    difference = logprobs.log_normaliser(moved, temperature=2.0) - logprobs.log_normaliser(logits, temperature=2.0)
    np.testing.assert_allclose(difference, shift / 2, atol=1e-4)


@given(case=distributions())
def test_bounds(case):
    logits, _ = case
    every = jnp.arange(5)[:, None] * jnp.ones(4, jnp.int32)[None]
    probs = jnp.exp(jax.vmap(lambda tokens: logprobs.token_log_probs(logits, tokens))(every))
    np.testing.assert_allclose(probs.sum(0), 1.0, rtol=1e-5)
    assert (logprobs.entropy(logits) >= -1e-6).all()
    assert (logprobs.entropy(logits) <= math.log(5) + 1e-5).all()
    squares = logprobs.sum_of_squared_probs(logits)
    assert (squares >= 1 / 5 - 1e-6).all()
    assert (squares <= 1 + 1e-6).all()


def test_an_endless_temperature_gives_the_uniform_distribution():
    logits, tokens = jnp.array([[3.0, -2.0, 0.5]]), jnp.array([1])
    np.testing.assert_allclose(logprobs.token_log_probs(logits, tokens, temperature=jnp.inf), -math.log(3), rtol=1e-6)
    np.testing.assert_allclose(logprobs.entropy(logits, temperature=1e9), math.log(3), rtol=1e-6)
    np.testing.assert_allclose(logprobs.sum_of_squared_probs(logits, temperature=1e9), 1 / 3, rtol=1e-6)


def test_index_t_of_shifted_log_probs_belongs_to_token_t_plus_1():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 4, 5)).astype(np.float32), rng.integers(0, 5, (2, 4))
    shifted = logprobs.shifted_log_probs(logits, tokens, temperature=0.7)
    assert shifted.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            np.testing.assert_allclose(shifted[b, t], log_probs_of(logits[b, t], 0.7)[tokens[b, t + 1]], rtol=1e-5)
    states, following = logprobs.predictions(logits, tokens)
    np.testing.assert_array_equal(states, logits[:, :3])
    np.testing.assert_array_equal(following, tokens[:, 1:])


def test_response_states_predict_the_response():
    tokens = jnp.arange(6) % 5
    logits = jax.random.normal(jax.random.key(0), (6, 5))
    for prompt in (1, 2, 5):
        states = logprobs.response_states(logits, prompt_length=prompt)
        expected = logprobs.shifted_log_probs(logits, tokens)[prompt - 1 :]
        np.testing.assert_array_equal(logprobs.token_log_probs(states, tokens[prompt:]), expected)
    assert logprobs.response_states(logits, prompt_length=6).shape == (0, 5)


@pytest.mark.parametrize("token", [-1, -100, 5, 2**30])
def test_a_token_outside_the_vocabulary_is_nan_in_its_own_slot_only(token):
    logits = jax.random.normal(jax.random.key(0), (2, 5))
    tokens = jnp.array([token, 3])

    def loss(z):
        return jnp.sum(jnp.where(jnp.array([False, True]), logprobs.token_log_probs(z, tokens), 0.0))

    values = logprobs.token_log_probs(logits, tokens)
    assert np.isnan(values[0])
    assert np.isfinite(values[1])
    gradient = jax.grad(loss)(logits)
    assert np.isfinite(gradient).all()
    assert not gradient[0].any()


FUNCTIONS = [lambda z, **kw: logprobs.token_log_probs(z, jnp.array([1, 0, 3]), **kw), *STATISTICS]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_equal_finite_differences(function):
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) * 2)
        assert function(logits).dtype == jnp.float64
        jax.test_util.check_grads(lambda z, t: function(z, temperature=t), (logits, 0.7), order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forbidden_tokens_and_extreme_logits_have_finite_gradients(function):
    forbidden = jnp.array([[0.0, 1.0, -jnp.inf, 2.0], [3.0, -jnp.inf, -jnp.inf, -jnp.inf], [-jnp.inf, 0.0, 0.0, 0.0]])
    extreme = jnp.array([[80.0, -80.0, 0.0, 80.0], [1e4, 1e4, -1e4, 0.0], [-1e30, 0.0, 0.0, 1e30]])
    for logits in (forbidden, extreme):
        value, gradient = jax.value_and_grad(lambda z: jnp.sum(function(z)))(logits)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    assert not jax.grad(lambda z: jnp.sum(function(z)))(forbidden)[0, 2].any()  # no way back to what cannot happen


@pytest.mark.parametrize("function", FUNCTIONS)
def test_narrow_logits_are_widened_and_knobs_are_traced(function):
    narrow = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.bfloat16)
    result = function(narrow)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, function(narrow.astype(jnp.float32)))
    swept = jax.jit(jax.vmap(lambda t: function(narrow, temperature=t)))(jnp.array(TEMPERATURES))
    np.testing.assert_allclose(swept, jnp.stack([function(narrow, temperature=t) for t in TEMPERATURES]), rtol=1e-5)


def test_mistakes_are_refused_in_words():
    logits = jnp.zeros((2, 3, 4))
    with pytest.raises(TypeError, match="tokens must be integers, got dtype float32"):
        logprobs.token_log_probs(logits, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"tokens must have shape \(2, 3\)"):
        logprobs.token_log_probs(logits, jnp.zeros((2, 2), int))
    with pytest.raises(ValueError, match="tokens must have shape"):
        logprobs.shifted_log_probs(logits, jnp.zeros((3,), int))
    for length in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match="prompt_length must be an int between 1 and 3"):
            logprobs.response_states(logits, prompt_length=length)
