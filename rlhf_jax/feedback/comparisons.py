"""Pairs from human ratings: which of two texts a person rated higher, and what a set of such pairs is worth.

People rated single texts, not pairs. A comparison here is "a person rated this text above that one": one rater is drawn
for each text, so that it carries the noise of single people. Raters are anonymous, so the two ratings of a pair mostly
come from two people. Comparisons hold indices, not texts: the features of a text are computed once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.feedback.ratings import RatedText

__all__ = ["ComparisonQuality", "Comparisons", "comparison_quality", "mean_comparisons", "single_rater_comparisons"]


class Comparisons(NamedTuple):
    """N pairs of texts of one list of items."""

    chosen: np.ndarray  # [N] int32, index of the text that was rated higher
    rejected: np.ndarray  # [N] int32, index of the other
    margin: np.ndarray  # [N] float32, how much higher, in points of the rating scale
    ties: int = 0  # draws that were dropped because both ratings were equal


class ComparisonQuality(NamedTuple):
    """Facts about a set of comparisons. Shares lie in [0, 1] and are NaN where nothing counts."""

    count: int  # comparisons
    distinct_texts: int  # texts that appear in any
    tie_rate: float  # share of draws that were ties
    mean_agreement: float  # share that agree with the texts' mean ratings; equal means count half
    duplicates: int  # comparisons beyond the first of the same two texts, whichever won
    contradictions: int  # pairs of texts of which each won at least once
    longer_wins: float  # share won by the text with more characters, among those of different length
    mean_margin: float  # mean of the margins


def single_rater_comparisons(rng: np.random.Generator, items: Sequence[RatedText], n: int) -> Comparisons:
    """Draw two texts and one of the raters of each until n comparisons are no ties.

    Pairs are drawn with replacement. Two records of the same text are never compared with each other.

    Args:
      rng: advanced by the draw.
      items: rated texts.
      n: comparisons wanted.
    Returns: n comparisons; `ties` counts the draws with equal ratings on the way.
    Raises: ValueError if no two different texts have different ratings, or n is negative.

    >>> items = [RatedText("tweets", "1", "Good", (3,)), RatedText("tweets", "2", "Bad", (-2,))]
    >>> single_rater_comparisons(np.random.default_rng(0), items, 2).chosen.tolist()
    [0, 0]
    """
    _check_count(n)
    same = _same_text(items)
    offsets = np.cumsum([0, *(len(item.ratings) for item in items)])
    ratings = np.array([rating for item in items for rating in item.ratings], np.int32)
    if n and not _some_pair_differs(items, same):
        raise ValueError(f"items must hold two different texts with different ratings, got {len(items)} texts without")
    chosen, rejected, margin, ties, missing = [], [], [], 0, n
    while missing:
        pairs = rng.integers(len(items), size=(2 * missing + 16, 2))
        raters = offsets[pairs] + rng.integers(offsets[pairs + 1] - offsets[pairs])
        pairs, raters = (array[same[pairs[:, 0]] != same[pairs[:, 1]]] for array in (pairs, raters))
        difference = ratings[raters[:, 0]] - ratings[raters[:, 1]]
        kept = np.flatnonzero(difference)[:missing]
        drawn = kept[-1] + 1 if len(kept) == missing else len(difference)  # draws after the last comparison don't count
        ties += int(np.sum(difference[:drawn] == 0))
        first_wins = difference[kept] > 0
        chosen.append(np.where(first_wins, pairs[kept, 0], pairs[kept, 1]))
        rejected.append(np.where(first_wins, pairs[kept, 1], pairs[kept, 0]))
        margin.append(np.abs(difference[kept]))
        missing -= len(kept)
    return _comparisons(chosen, rejected, margin, ties)


def mean_comparisons(
    rng: np.random.Generator, items: Sequence[RatedText], n: int, *, min_gap: float = 1.0
) -> Comparisons:
    """Draw n different pairs of texts whose mean ratings differ by at least `min_gap`; the higher mean is chosen.

    These are for evaluation: with 20 raters a text, a gap of one point leaves little doubt which text people prefer.

    Args:
      rng: advanced by the draw.
      items: rated texts.
      n: comparisons wanted, all different.
      min_gap: smallest difference of the two means, more than 0.
    Returns: n comparisons, uniformly drawn without replacement from all pairs that qualify.
    Raises: ValueError if fewer than n pairs qualify, or an argument is out of range.
    """
    _check_count(n)
    if not min_gap > 0:
        raise ValueError(f"min_gap must be more than 0, got {min_gap}")
    same = _same_text(items)
    means = np.array([item.mean for item in items], np.float64)
    order = np.argsort(means, kind="stable")
    tolerance = 1e-9  # means are ratios: 2.1 - 1.1 must count as a gap of 1
    below = np.searchsorted(
        means[order], means[order] - min_gap + tolerance, side="right"
    )  # [items] qualifying partners
    ends = np.cumsum(below)
    total = int(ends[-1]) if len(ends) else 0
    twins = _qualifying_twins(same, means, min_gap - tolerance)  # records of one text, to be left out
    if total - twins < n:
        raise ValueError(f"{total - twins} pairs of texts have means {min_gap} or more apart, but n is {n}")
    picks = rng.choice(total, size=min(total, n + twins), replace=False)
    higher = np.searchsorted(ends, picks, side="right")
    lower = picks - (ends[higher] - below[higher])
    chosen, rejected = order[higher], order[lower]
    kept = np.flatnonzero(same[chosen] != same[rejected])[:n]
    chosen, rejected = chosen[kept], rejected[kept]
    return _comparisons([chosen], [rejected], [means[chosen] - means[rejected]], 0)


def comparison_quality(comparisons: Comparisons, items: Sequence[RatedText]) -> ComparisonQuality:
    """What a set of comparisons is worth: noise, ties, repetition and the pull of length.

    Args:
      comparisons: pairs of indices into `items`.
      items: rated texts.
    """
    chosen, rejected, margin, ties = comparisons
    means = np.array([item.mean for item in items], np.float64)
    lengths = np.array([len(item.text) for item in items], np.int64)
    agreement = (np.sign(means[chosen] - means[rejected]) + 1) / 2
    longer = np.sign(lengths[chosen] - lengths[rejected])
    pairs = np.stack([np.minimum(chosen, rejected), np.maximum(chosen, rejected)])
    unordered = np.unique(pairs, axis=1).shape[1]
    ordered = np.unique(np.stack([chosen, rejected]), axis=1).shape[1]
    return ComparisonQuality(
        count=len(chosen),
        distinct_texts=len(np.union1d(chosen, rejected)),
        tie_rate=_share(ties, ties + len(chosen)),
        mean_agreement=_share(agreement.sum(), len(agreement)),
        duplicates=len(chosen) - unordered,
        contradictions=ordered - unordered,
        longer_wins=_share((longer > 0).sum(), (longer != 0).sum()),
        mean_margin=_share(margin.sum(dtype=np.float64), len(margin)),
    )


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")


def _share(part: float, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


def _same_text(items: Sequence[RatedText]) -> np.ndarray:
    """[items] a number per text; equal numbers are the same text."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(item.key, len(numbers)) for item in items], np.int64)


def _some_pair_differs(items: Sequence[RatedText], same: np.ndarray) -> bool:
    """Whether two different texts have raters who said different things."""
    texts_of: dict[int, set[int]] = {}
    for number, item in zip(same.tolist(), items, strict=True):
        for rating in item.ratings:
            texts_of.setdefault(rating, set()).add(number)
    values = list(texts_of.values())
    # Two values can be said of two different texts unless both were only ever said of one and the same text.
    return any(len(a | b) > 1 for i, a in enumerate(values) for b in values[:i])


def _qualifying_twins(same: np.ndarray, means: np.ndarray, gap: float) -> int:
    """How many pairs of records of the same text have means at least `gap` apart."""
    twins = 0
    for number in np.flatnonzero(np.bincount(same) > 1) if len(same) else ():
        own = np.sort(means[same == number])
        twins += int(np.searchsorted(own, own - gap, side="right").sum())
    return twins


def _comparisons(
    chosen: list[np.ndarray], rejected: list[np.ndarray], margin: list[np.ndarray], ties: int
) -> Comparisons:
    empty = [np.zeros(0)]
    return Comparisons(
        np.concatenate(chosen or empty).astype(np.int32),
        np.concatenate(rejected or empty).astype(np.int32),
        np.concatenate(margin or empty).astype(np.float32),
        ties,
    )
