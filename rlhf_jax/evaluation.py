"""How good is it, and how sure are we: win rates with intervals, diversity, calibration. NumPy, on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["ReliabilityBin", "WinRate", "distinct_n", "reliability", "win_rate"]


class WinRate(NamedTuple):
    """A share of wins with the ends of its bootstrap interval."""

    rate: float
    low: float
    high: float


def win_rate(
    scores: np.ndarray,
    baseline_scores: np.ndarray,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
) -> WinRate:
    """How often the first of two answers to the same prompt scores higher, ties counting half.

    Args:
      scores: [N] the judge's scores, one per prompt.
      baseline_scores: [N] its scores of the other policy's answers to the same prompts.
      rng: random generator of the bootstrap.
      level: coverage of the interval.
      resamples: bootstrap resamples of the prompts.
    Returns:
      The share and its percentile-bootstrap interval. Equal scores everywhere give 0.5; swapping the two gives
      1 - rate.
    Raises: ValueError if the arrays differ in shape, are empty or hold NaN, or a knob is out of range.
    Reference: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3

    >>> win_rate(np.array([1.0, 2.0]), np.array([0.0, 2.0]), np.random.default_rng(0)).rate
    0.75
    """
    scores, baseline_scores = np.asarray(scores, np.float64), np.asarray(baseline_scores, np.float64)
    if scores.shape != baseline_scores.shape or scores.ndim != 1 or not scores.size:
        raise ValueError(f"scores must be two vectors of equal length, got {scores.shape} and {baseline_scores.shape}")
    if np.isnan(scores).any() or np.isnan(baseline_scores).any():
        raise ValueError("scores hold NaN: every answer needs a score")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    wins = (scores > baseline_scores) + 0.5 * (scores == baseline_scores)
    # Wins take three values, so a resample of the prompts is a draw of how often each value occurs.
    counts = np.array([(wins == value).sum() for value in (0.0, 0.5, 1.0)])
    drawn = rng.multinomial(wins.size, counts / wins.size, size=resamples)
    rates = drawn @ np.array([0.0, 0.5, 1.0]) / wins.size
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return WinRate(float(wins.mean()), float(low), float(high))


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the sequences together (Li et al. 2016); 0 if there are none.

    Near 1 nothing repeats. A policy that has collapsed onto a few phrases has a small one.

    >>> distinct_n([[1, 2, 3], [1, 2]], 2)
    0.6666666666666666
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


class ReliabilityBin(NamedTuple):
    """Predictions of similar confidence, and how often they came true."""

    predicted: float  # mean predicted probability
    observed: float  # share that came true
    count: int


def reliability(probabilities: np.ndarray, outcomes: np.ndarray, *, bins: int = 10) -> list[ReliabilityBin]:
    """The bins of a reliability diagram (Niculescu-Mizil and Caruana 2005); empty bins are left out.

    Args:
      probabilities: [N] in [0, 1], predicted.
      outcomes: [N] bool, what happened.
      bins: number of equal-width bins, the last one closed.
    Raises: ValueError if the arrays differ in shape, a probability is none, or bins < 1.

    >>> reliability(np.array([0.9, 0.7]), np.array([True, False]), bins=2)
    [ReliabilityBin(predicted=0.8, observed=0.5, count=2)]
    """
    probabilities, outcomes = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    if probabilities.shape != outcomes.shape:
        raise ValueError(f"probabilities and outcomes must match, got {probabilities.shape} and {outcomes.shape}")
    if probabilities.size and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("probabilities must lie in [0, 1]")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    chosen = [places == place for place in range(bins)]
    return [
        ReliabilityBin(round(float(probabilities[c].mean()), 12), float(outcomes[c].mean()), int(c.sum()))
        for c in chosen
        if c.any()
    ]
