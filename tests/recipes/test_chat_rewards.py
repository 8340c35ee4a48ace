"""Scorers of replies: the scores of the formula; one kind rewards length, the other is blind to it, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.recipes.chat_rewards import Scorer, calibrated, score, token_rewards


@pytest.fixture(scope="module")
def replies():
    """[200, 12, 3] states whose first feature grows along a reply, and masks of 1 to 12 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 13, size=200)
    states = rng.normal(size=(200, 12, 3)) + np.arange(12)[None, :, None] * np.array([0.1, 0.0, 0.0])
    return jnp.asarray(states, jnp.float32), jnp.asarray(np.arange(12) < lengths[:, None])


def scorer(replies, *, summed, level=0.0):
    parts = (jnp.array([1.0, -0.5, 0.2]), 3.0, level, summed, jnp.zeros(2), 1.0)
    return calibrated(Scorer(*(jnp.asarray(part) for part in parts)), *replies)


def by_hand(found, states, mask, row):
    """The score of one reply, in plain Python."""
    n = int(mask[row].sum())
    worth = [float(states[row, t] @ found.weights + found.bias) for t in range(n)]
    raw = sum(worth) if bool(found.summed) else sum(worth) / n
    return (raw - float(found.line[0]) - float(found.line[1]) * np.log(n)) / float(found.scale)


@pytest.mark.parametrize("summed", [True, False])
def test_scores_are_those_of_the_formula_in_standard_deviations(replies, summed):
    found = scorer(replies, summed=summed, level=0.4)
    scores = np.asarray(score(found, *replies))
    np.testing.assert_allclose(scores[:9], [by_hand(found, *replies, row) for row in range(9)], rtol=1e-4, atol=1e-5)
    assert abs(scores.mean()) < 1e-4
    assert abs(scores.std() - 1) < 1e-3
    states, mask = replies
    worth = np.asarray(states @ found.weights + found.bias)[np.asarray(mask)]
    np.testing.assert_allclose(worth.mean(), 0.4, atol=1e-4)  # a mean token of a chat's worth


def test_only_the_summing_scorer_rewards_length(replies):
    lengths = np.log(np.asarray(replies[1].sum(-1)))
    pull = lambda **kind: np.corrcoef(np.asarray(score(scorer(replies, **kind), *replies)), lengths)[0, 1]
    assert pull(summed=True, level=1.0) > 0.5
    assert abs(pull(summed=False)) < 1e-3


def test_as_collected_tokens_earn_what_the_reply_is_worth(replies):
    found = scorer(replies, summed=True, level=0.4)
    totals = np.asarray(token_rewards(found, *replies)).sum(-1)
    np.testing.assert_allclose(totals - totals.mean(), score(found, *replies), atol=1e-3)


def test_without_length_no_place_earns_anything_on_average(replies):
    found, (states, mask) = scorer(replies, summed=False), replies
    earned, inner = np.asarray(token_rewards(found, *replies)), np.asarray(mask).copy()
    inner[np.arange(len(inner)), inner.sum(-1) - 1] = False
    assert (earned[~inner] == 0).all()  # the last token too
    assert inner[:, -2].any()
    np.testing.assert_allclose(earned.sum(0), 0, atol=1e-3)
    best = int(np.argmax(np.where(inner[:, 3], np.asarray(states[:, 3] @ found.weights), -np.inf)))
    assert earned[best, 3] == earned[:, 3].max() > 0
    worth, lengths = np.asarray(states @ found.weights), np.asarray(mask).sum(-1)
    for row in range(9):
        for t in range(lengths[row] - 1):
            others = [worth[other, t] for other in range(200) if t < lengths[other] - 1]
            wanted = (worth[row, t] - sum(others) / len(others)) / lengths.mean() / float(found.scale)
            np.testing.assert_allclose(earned[row, t], wanted, atol=1e-4)


@pytest.mark.parametrize("summed", [True, False])
def test_what_padding_holds_changes_nothing(replies, summed):
    states, mask = replies
    dirty = jnp.where(mask[..., None], states, jnp.nan)
    found = scorer(replies, summed=summed)
    for function in (score, token_rewards):
        np.testing.assert_array_equal(jax.jit(function)(found, dirty, mask), jax.jit(function)(found, states, mask))
