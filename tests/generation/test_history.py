"""generation/history.py against plain Python over lists of tokens."""

import collections

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rlhf_jax.generation import history as h

V, P, R = 5, 4, 6


@st.composite
def rows(draw, count=3, most=P + R, least=0):
    """Right-aligned rows of few different tokens: (lists, tokens [B, T], mask [B, T])."""
    lists = [draw(st.lists(st.integers(0, V - 1), min_size=least, max_size=most)) for _ in range(count)]
    tokens, mask = np.full((count, most), 3, np.int32), np.zeros((count, most), bool)
    for i, row in enumerate(lists):
        tokens[i, most - len(row) :], mask[i, most - len(row) :] = row, True
    return lists, jnp.asarray(tokens), jnp.asarray(mask)


LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)), jnp.float32)
ngram = jax.jit(h.no_repeated_ngram, static_argnums=3)


@given(prompts=rows(most=P, least=1), steps=st.lists(st.tuples(*[st.integers(0, V - 1)] * 3), max_size=R))
def test_history_is_what_was_written(prompts, steps):
    lists, tokens, mask = prompts
    stops = np.array([2, 4, R])  # each row writes at most so many
    history = h.init_history(tokens, mask, length=R, vocab_size=V)
    for t, step in enumerate(steps):
        history = jax.jit(h.update_history)(history, jnp.asarray(step, jnp.int32), jnp.asarray(t < stops))
    for i, prompt in enumerate(lists):
        response = [step[i] for step in steps[: stops[i]]]
        assert history.tokens[i][history.mask[i]].tolist() == prompt + response
        assert history.tokens[i][history.response_mask[i]].tolist() == response
        for counts, written in ((history.counts, prompt + response), (history.response_counts, response)):
            occurrences = collections.Counter(written)
            assert counts[i].tolist() == [occurrences[v] for v in range(V)]
        if len(steps) <= stops[i]:
            assert history.tokens[i, -1] == (prompt + response)[-1]


@given(counts=st.lists(st.integers(0, 3), min_size=V, max_size=V), penalty=st.floats(0.5, 2.0))
def test_penalties(counts, penalty):
    logits = np.asarray(LOGITS[0], np.float64)
    seen = np.array(counts) > 0
    expected = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    np.testing.assert_allclose(h.repetition_penalty(LOGITS[0], jnp.array(counts), penalty), expected, rtol=1e-5)
    expected = logits - penalty * seen - 0.3 * np.array(counts)
    actual = h.occurrence_penalty(LOGITS[0], jnp.array(counts), presence=penalty, frequency=0.3)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_neutral_penalties_change_nothing():
    counts = jnp.ones((3, V), jnp.int32)
    np.testing.assert_array_equal(h.repetition_penalty(LOGITS, counts, 1.0), LOGITS)
    np.testing.assert_array_equal(h.occurrence_penalty(LOGITS, counts), LOGITS)


def test_penalties_are_traced():
    counts, knobs = jnp.array([[0, 1, 2, 3, 0]]), jnp.array([0.5, 1.0, 2.0])
    for rule in (
        lambda x: h.repetition_penalty(LOGITS[:1], counts, x),
        lambda x: h.minimum_length(LOGITS, counts > 0, 1, x),
    ):
        swept = jax.vmap(rule)(knobs)
        np.testing.assert_array_equal(swept, jnp.stack([rule(x) for x in knobs]))


@given(written=rows(), n=st.integers(1, P))
def test_no_repeated_ngram(written, n):
    lists, tokens, mask = written
    for row, warped in zip(lists, np.asarray(ngram(jnp.zeros((3, V)), tokens, mask, n)), strict=True):
        seen = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        prefix = tuple(row[len(row) - n + 1 :])
        banned = [len(row) >= n - 1 and (*prefix, v) in seen for v in range(V)]
        np.testing.assert_array_equal(warped == -np.inf, banned)


def test_ngrams_longer_than_the_history_forbid_nothing():
    tokens = jnp.zeros((3, 2), jnp.int32)
    np.testing.assert_array_equal(h.no_repeated_ngram(LOGITS, tokens, tokens == 0, 3), LOGITS)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        h.no_repeated_ngram(LOGITS, tokens, tokens == 0, 0)


SEQUENCES = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)


@given(written=rows(), sequences=SEQUENCES)
def test_sequences_are_found_and_forbidden(written, sequences):
    lists, tokens, mask = written
    found = h.ends_with(tokens, mask, sequences)
    warped = np.asarray(h.forbid_sequences(LOGITS, tokens, mask, sequences))
    for i, row in enumerate(lists):
        endswith = lambda text, end: len(text) >= len(end) and tuple(text[len(text) - len(end) :]) == tuple(end)
        assert bool(found[i]) == any(endswith(row, s) for s in sequences)
        banned = [any(endswith([*row, v], s) for s in sequences) for v in range(V)]
        np.testing.assert_array_equal(warped[i], np.where(banned, -np.inf, LOGITS[i]))


def test_sequences_must_lie_within_the_mask_and_the_history():
    tokens = jnp.array([[1, 2], [1, 2]])
    response = jnp.array([[True, True], [False, True]])
    assert h.ends_with(tokens, response, ((1, 2),)).tolist() == [True, False]
    assert h.ends_with(tokens, response, ((0, 1, 2),)).tolist() == [False, False]
    for refuse in (h.ends_with, lambda *args: h.forbid_sequences(LOGITS[:2], *args)):
        with pytest.raises(ValueError, match="empty"):
            refuse(tokens, response, ((1,), ()))


@pytest.mark.parametrize("length", [0, 2, 5])
def test_no_end_before_the_minimum_length(length):
    mask = jnp.array([[False] * 3, [False, False, True], [True] * 3])
    warped = h.minimum_length(LOGITS, mask, 1, length)
    early = np.array([0, 1, 3]) < length
    np.testing.assert_array_equal(warped[:, 1], np.where(early, -np.inf, LOGITS[:, 1]))
    np.testing.assert_array_equal(np.delete(warped, 1, axis=1), np.delete(LOGITS, 1, axis=1))
