"""evaluation.py against plain counting; the interval's coverage on simulated judges."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.evaluation import ReliabilityBin, distinct_n, reliability, win_rate

SMALL_SCORES = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=30)


def rate_of(pairs, **knobs):
    ours, theirs = np.array(pairs, np.float64).T
    return win_rate(ours, theirs, np.random.default_rng(0), **knobs)


# --- win rate ---------------------------------------------------------------------------------------------------------


@given(SMALL_SCORES)
def test_a_win_rate_counts_wins_and_half_the_ties(pairs):
    points = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    found = rate_of(pairs, resamples=200)
    assert found.rate == pytest.approx(points / len(pairs), abs=1e-12)
    assert 0 <= found.low <= found.high <= 1
    assert isinstance(found.rate, float)


@given(SMALL_SCORES)
def test_swapping_the_two_mirrors_the_rate(pairs):
    mirrored = rate_of([(b, a) for a, b in pairs], resamples=10)
    assert mirrored.rate == pytest.approx(1 - rate_of(pairs, resamples=10).rate, abs=1e-12)


def test_only_the_order_of_scores_counts():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(2, 50))
    plain = win_rate(ours, theirs, np.random.default_rng(0))
    assert plain == win_rate(np.exp(3 * ours), np.exp(3 * theirs), np.random.default_rng(0))
    assert plain == win_rate(ours, theirs, np.random.default_rng(0))  # the generator alone decides


def test_sure_results_have_no_interval_and_infinite_scores_compare():
    ones = np.ones(7)
    assert win_rate(ones, 0 * ones, np.random.default_rng(0)) == (1.0, 1.0, 1.0)
    assert win_rate(ones, ones, np.random.default_rng(0)) == (0.5, 0.5, 0.5)
    endless = win_rate(np.array([np.inf, -np.inf]), np.array([np.inf, 0.0]), np.random.default_rng(0))
    assert endless.rate == 0.25


def test_the_interval_is_that_of_resampled_prompts():
    rng = np.random.default_rng(2)
    ours, theirs = rng.integers(0, 4, (2, 80)).astype(float)
    points = (ours > theirs) + 0.5 * (ours == theirs)
    means = points[np.random.default_rng(3).integers(0, 80, (20_000, 80))].mean(axis=-1)
    for level in (0.5, 0.8, 0.95):
        found = win_rate(ours, theirs, np.random.default_rng(4), level=level, resamples=20_000)
        np.testing.assert_allclose(found[1:], np.quantile(means, [(1 - level) / 2, (1 + level) / 2]), atol=0.013)


@pytest.mark.parametrize(("advantage", "ties"), [(0.0, 0.0), (0.3, 0.0), (0.8, 0.3)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(advantage, ties, level):
    """1000 judges of 150 prompts; the truth is Φ(advantage / √2) with ties counted half."""
    rng = np.random.default_rng(5)
    better = 0.5 * (1 + math.erf(advantage / 2))
    truth = (1 - ties) * better + ties / 2
    covered = 0
    for _ in range(1000):
        ours, theirs = rng.normal(advantage, 1, 150), rng.normal(size=150)
        theirs = np.where(rng.random(150) < ties, ours, theirs)
        found = win_rate(ours, theirs, rng, level=level, resamples=1000)
        covered += found.low <= truth <= found.high
    error = math.sqrt(level * (1 - level) / 1000)
    assert abs(covered / 1000 - level) < 4 * error + 0.015  # a percentile interval is a little narrow


def test_a_wider_level_and_fewer_prompts_widen_the_interval():
    rng = np.random.default_rng(6)
    ours, theirs = rng.normal(size=(2, 400))

    def width(number, level):
        found = win_rate(ours[:number], theirs[:number], np.random.default_rng(0), level=level)
        return found.high - found.low

    assert width(400, 0.5) < width(400, 0.95) < width(400, 0.99)
    assert 1.6 < width(100, 0.95) / width(400, 0.95) < 2.4


@pytest.mark.parametrize(
    ("ours", "theirs", "knobs", "words"),
    [
        ([1.0], [1.0, 2.0], {}, r"equal length, got \(1,\) and \(2,\)"),
        ([], [], {}, "equal length"),
        ([[1.0]], [[2.0]], {}, "two vectors"),
        ([math.nan], [1.0], {}, "NaN"),
        ([1.0], [math.nan], {}, "NaN"),
        ([1.0], [0.0], {"level": 95}, "level must lie in .* got 95"),
        ([1.0], [0.0], {"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_win_rates_that_mean_nothing_are_refused(ours, theirs, knobs, words):
    with pytest.raises(ValueError, match=words):
        win_rate(np.array(ours), np.array(theirs), np.random.default_rng(0), **knobs)


# --- diversity --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5), st.integers(1, 4))
def test_distinct_n_counts_grams_within_sequences(sequences, n):
    seen, total = [], 0
    for sequence in sequences:
        for start in range(len(sequence)):
            gram = sequence[start : start + n]
            if len(gram) == n:
                total += 1
                if gram not in seen:
                    seen.append(gram)
    assert distinct_n(sequences, n) == (len(seen) / total if total else 0.0)


def test_distinct_n_shows_a_collapse():
    rng = np.random.default_rng(0)
    varied = rng.integers(0, 1000, (50, 10)).tolist()
    collapsed = [varied[0]] * 50
    assert distinct_n(varied, 2) > 0.95
    assert distinct_n(collapsed, 2) == 1 / 50
    assert distinct_n([[1]], 2) == 0.0
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_n(varied, 0)


# --- calibration ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 32), st.booleans()), max_size=40), st.sampled_from([1, 2, 4, 8]))
def test_a_reliability_diagram_counts_each_bin(pairs, bins):
    """Probabilities are 32nds, so that bins of a power of two have exact edges."""
    probabilities, outcomes = [a / 32 for a, _ in pairs], [b for _, b in pairs]
    expected = []
    for place in range(bins):
        inside = [
            (p, o)
            for p, o in zip(probabilities, outcomes, strict=True)
            if place / bins <= p < (place + 1) / bins or (place == bins - 1 and p == 1)
        ]
        if inside:
            mean, share = sum(p for p, _ in inside) / len(inside), sum(o for _, o in inside) / len(inside)
            expected.append((mean, share, len(inside)))
    found = reliability(np.array(probabilities), np.array(outcomes, bool), bins=bins)
    assert [b.count for b in found] == [count for _, _, count in expected]
    np.testing.assert_allclose(np.array(found).reshape(-1, 3), np.array(expected).reshape(-1, 3), atol=1e-11)


def test_calibrated_predictions_lie_on_the_diagonal_and_bold_ones_do_not():
    rng = np.random.default_rng(7)
    truth = rng.random(40_000)
    outcomes = rng.random(40_000) < truth
    bins = reliability(truth, outcomes)
    assert len(bins) == 10
    assert sum(b.count for b in bins) == 40_000
    for b in bins:
        assert isinstance(b, ReliabilityBin)
        assert abs(b.predicted - b.observed) < 4 * math.sqrt(0.25 / b.count)
    bold = reliability(np.where(truth > 0.5, 0.99, 0.01), outcomes)
    assert [b.count > 0 for b in bold] == [True, True]
    assert abs(bold[-1].observed - 0.75) < 0.02


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "bins", "words"),
    [
        ([0.5], [True, False], 10, "must match"),
        ([1.5], [True], 10, r"lie in \[0, 1\]"),
        ([-0.1], [True], 10, r"lie in \[0, 1\]"),
        ([math.nan], [True], 10, r"lie in \[0, 1\]"),
        ([0.5], [True], 0, "bins must be at least 1, got 0"),
    ],
)
def test_diagrams_that_mean_nothing_are_refused(probabilities, outcomes, bins, words):
    with pytest.raises(ValueError, match=words):
        reliability(np.array(probabilities), np.array(outcomes), bins=bins)
