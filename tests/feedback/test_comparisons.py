"""feedback/comparisons.py against enumeration of every pair and every rater."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.feedback.comparisons import Comparisons, comparison_quality, mean_comparisons, single_rater_comparisons
from rlhf_jax.feedback.ratings import RatedText

RATED = st.lists(
    st.tuples(st.sampled_from(["a", "A!", "bb", "ccc", "dd d"]), st.lists(st.integers(-4, 4), min_size=1, max_size=4)),
    min_size=2,
    max_size=8,
)


def items_of(rated):
    return [RatedText("tweets", str(i), text, tuple(ratings)) for i, (text, ratings) in enumerate(rated)]


def possible_outcomes(items):
    """(chosen, rejected, margin) of every pair of different texts and every pair of their raters."""
    outcomes = set()
    for i, j in itertools.permutations(range(len(items)), 2):
        if items[i].key != items[j].key:
            outcomes |= {(i, j, a - b) for a in items[i].ratings for b in items[j].ratings if a > b}
    return outcomes


@given(rated=RATED, seed=st.integers(0, 5), n=st.integers(0, 30))
def test_every_comparison_is_what_one_rater_of_each_said(rated, seed, n):
    items = items_of(rated)
    possible = possible_outcomes(items)
    if n and not possible:
        with pytest.raises(ValueError, match="two different texts with different ratings"):
            single_rater_comparisons(np.random.default_rng(seed), items, n)
        return
    drawn = single_rater_comparisons(np.random.default_rng(seed), items, n)
    assert len(drawn.chosen) == len(drawn.rejected) == len(drawn.margin) == n
    found = set(zip(drawn.chosen.tolist(), drawn.rejected.tolist(), drawn.margin.tolist(), strict=True))
    assert found <= possible
    again = single_rater_comparisons(np.random.default_rng(seed), items, n)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_noise_and_ties_are_those_of_single_raters():
    """Win and tie rates equal the exact shares over all pairs of raters (six standard errors)."""
    items = items_of([("a", [2, 2, -1]), ("b", [2, 0])])
    draws = [np.sign(a - b) for a in items[0].ratings for b in items[1].ratings]
    n = 20_000
    drawn = single_rater_comparisons(np.random.default_rng(0), items, n)
    wins = draws.count(1) / (draws.count(1) + draws.count(-1))
    assert abs(np.mean(drawn.chosen == 0) - wins) < 6 * math.sqrt(wins * (1 - wins) / n)
    ties = draws.count(0) / len(draws)
    assert abs(drawn.ties / (drawn.ties + n) - ties) < 6 * math.sqrt(ties * (1 - ties) / n)


def test_every_text_is_drawn_alike():
    items = items_of([(str(i), [i % 5 - 2]) for i in range(10)])
    drawn = single_rater_comparisons(np.random.default_rng(0), items, 20_000)
    counts = np.bincount(np.concatenate([drawn.chosen, drawn.rejected]), minlength=10)
    assert counts.max() / counts.min() < 1.15


@given(rated=RATED, seed=st.integers(0, 5), gap=st.sampled_from([0.5, 1.0, 2.0]))
def test_mean_comparisons_are_exactly_the_pairs_that_qualify(rated, seed, gap):
    items = items_of(rated)
    expected = {
        (i, j)
        for i, j in itertools.permutations(range(len(items)), 2)
        if items[i].key != items[j].key and items[i].mean - items[j].mean >= gap - 1e-9
    }
    drawn = mean_comparisons(np.random.default_rng(seed), items, len(expected), min_gap=gap)
    pairs = list(zip(drawn.chosen.tolist(), drawn.rejected.tolist(), strict=True))
    assert len(pairs) == len(expected)
    assert set(pairs) == expected
    np.testing.assert_allclose(drawn.margin, [items[i].mean - items[j].mean for i, j in pairs], rtol=1e-6)
    assert drawn.ties == 0
    some = mean_comparisons(np.random.default_rng(seed), items, len(expected) // 2, min_gap=gap)
    assert len({*zip(some.chosen.tolist(), some.rejected.tolist(), strict=True)} & expected) == len(expected) // 2
    with pytest.raises(ValueError, match=rf"^{len(expected)} pairs .* but n is {len(expected) + 1}"):
        mean_comparisons(np.random.default_rng(seed), items, len(expected) + 1, min_gap=gap)


def test_qualifying_pairs_are_drawn_alike():
    items = items_of([("a", [3]), ("b", [1]), ("c", [0]), ("d", [-2])])
    rng = np.random.default_rng(0)
    drawn = [mean_comparisons(rng, items, 1, min_gap=1.0) for _ in range(3000)]
    pairs = [(int(d.chosen[0]), int(d.rejected[0])) for d in drawn]
    shares = np.array([pairs.count(pair) / 3000 for pair in set(pairs)])
    assert len(shares) == 6
    assert np.abs(shares - 1 / 6).max() < 6 * math.sqrt(1 / 6 * 5 / 6 / 3000)


def quality_by_hand(pairs, items, ties):
    means = [item.mean for item in items]
    agree = [1.0 if means[i] > means[j] else 0.5 if means[i] == means[j] else 0.0 for i, j in pairs]
    longer = [len(items[i].text) > len(items[j].text) for i, j in pairs if len(items[i].text) != len(items[j].text)]
    sets = {frozenset(pair) for pair in pairs}
    return {
        "count": len(pairs),
        "distinct_texts": len({index for pair in pairs for index in pair}),
        "tie_rate": ties / (ties + len(pairs)) if ties + len(pairs) else math.nan,
        "mean_agreement": sum(agree) / len(agree) if agree else math.nan,
        "duplicates": len(pairs) - len(sets),
        "contradictions": sum(1 for a, b in {(min(p), max(p)) for p in pairs} if (a, b) in pairs and (b, a) in pairs),
        "longer_wins": sum(longer) / len(longer) if longer else math.nan,
        "mean_margin": (len(pairs) + 1) / 2 if pairs else math.nan,
    }


@given(rated=RATED, data=st.data(), ties=st.integers(0, 3))
def test_quality_equals_counting_by_hand(rated, data, ties):
    items = items_of(rated)
    index = st.integers(0, len(items) - 1)
    pairs = data.draw(st.lists(st.tuples(index, index).filter(lambda pair: pair[0] != pair[1]), max_size=12))
    chosen, rejected = (np.array([pair[side] for pair in pairs], np.int32) for side in (0, 1))
    margin = np.arange(1, len(pairs) + 1, dtype=np.float32)
    found = comparison_quality(Comparisons(chosen, rejected, margin, ties), items)._asdict()
    expected = quality_by_hand(pairs, items, ties)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_mistakes_are_named():
    items, rng = items_of([("a", [1]), ("b", [2])]), np.random.default_rng(0)
    for draw in (single_rater_comparisons, mean_comparisons):
        with pytest.raises(ValueError, match="n must not be negative, got -1"):
            draw(rng, items, -1)
        with pytest.raises(ValueError, match=r"pairs|two different texts"):
            draw(rng, [], 1)
    with pytest.raises(ValueError, match="min_gap must be more than 0"):
        mean_comparisons(rng, items, 1, min_gap=0.0)
