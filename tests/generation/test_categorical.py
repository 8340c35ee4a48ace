"""generation/categorical.py: exact probabilities (chi-square), excluded tokens, vocabularies of any size, extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.generation.categorical import categorical

DRAWS = 20_000
SIGNIFICANCE = 1e-3  # of each chi-square test; keys are fixed, so that a test passes or fails for good


@jax.jit
def draws(logits, key):
    keys = jax.random.split(key, DRAWS)
    return categorical(keys, jnp.broadcast_to(logits, (DRAWS, logits.shape[-1])))


def chi_square(tokens, probs):
    """p-value of the counts, with rare tokens put together so that every cell expects at least ten."""
    counts = np.bincount(np.asarray(tokens), minlength=len(probs)).astype(float)
    assert not counts[probs == 0].any()
    counts, expected = counts[probs > 0], probs[probs > 0] * len(tokens)
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    cells = np.cumsum(expected) // 10
    merge = lambda x: np.bincount(np.unique(cells, return_inverse=True)[1], weights=x)
    seen, due = merge(counts), merge(expected)
    return stats.chisquare(seen, due * seen.sum() / due.sum()).pvalue


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def random_logits(vocabulary, spread, seed=0):
    return np.random.default_rng(seed).normal(size=vocabulary) * spread


@pytest.mark.parametrize("vocabulary", [2, 7, 255, 256, 257, 1000])
def test_frequencies_are_the_probabilities(vocabulary, key):
    logits = random_logits(vocabulary, 2.0)
    tokens = draws(jnp.asarray(logits, jnp.float32), key)
    assert tokens.dtype == jnp.int32
    assert chi_square(tokens, softmax(logits)) > SIGNIFICANCE


def test_the_test_would_notice_a_wrong_distribution(key):
    logits = random_logits(257, 2.0)
    tokens = draws(jnp.asarray(logits * 1.1, jnp.float32), key)
    assert chi_square(tokens, softmax(logits)) < SIGNIFICANCE


def test_excluded_tokens_are_never_drawn(key):
    rng = np.random.default_rng(1)
    logits = random_logits(600, 1.0)
    logits[rng.random(600) < 0.9] = -np.inf
    logits[256:512] = -np.inf  # a whole block
    logits[0] = logits[-1] = -np.inf
    tokens = np.asarray(draws(jnp.asarray(logits, jnp.float32), key))
    assert np.isfinite(logits[tokens]).all()
    assert chi_square(tokens, softmax(logits)) > SIGNIFICANCE


@pytest.mark.parametrize("only", [0, 255, 256, 299])
def test_a_single_allowed_token_is_always_drawn(only, key):
    logits = jnp.full(300, -jnp.inf).at[only].set(-50.0)
    assert (draws(logits, key) == only).all()


def test_a_vocabulary_of_one_token(key):
    assert (draws(jnp.array([3.0]), key) == 0).all()


def test_extreme_logits(key):
    tokens = draws(jnp.array([-1e30, 1e30, 1e30, -1e4]), key)
    assert set(tokens.tolist()) == {1, 2}
    assert chi_square(tokens - 1, np.array([0.5, 0.5])) > SIGNIFICANCE
    assert chi_square(draws(jnp.full(300, -1e30), key), np.full(300, 1 / 300)) > SIGNIFICANCE


def test_bfloat16_logits_are_widened(key):
    logits = jnp.asarray(random_logits(64, 2.0), jnp.bfloat16)
    assert chi_square(draws(logits, key), softmax(logits)) > SIGNIFICANCE


def test_rows_are_drawn_with_their_own_key_and_logits(key):
    keys = jax.random.split(key, 5)
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(5, 40)), jnp.float32)
    together = categorical(keys, logits)
    for i in range(5):
        assert categorical(keys[i : i + 1], logits[i : i + 1])[0] == together[i]


def test_neighbouring_rows_are_independent(key):
    keys = jax.random.split(key, DRAWS)
    tokens = np.asarray(jax.jit(categorical)(keys, jnp.zeros((DRAWS, 4)))).reshape(-1, 2)
    pairs = tokens[:, 0] * 4 + tokens[:, 1]
    assert chi_square(pairs, np.full(16, 1 / 16)) > SIGNIFICANCE
