"""How close translations are to references: chrF and BLEU by `sacrebleu`, with paired bootstrap intervals.

Everything measured over the same phrases is resampled alike, so a gain of one system over another is paired.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.errors import missing_extra

__all__ = ["BALANCED", "METRICS", "chrf", "gain", "half", "scores"]

METRICS = ("chrF", "BLEU")
BALANCED = {"beta": 1, "word_order": 2}  # chrF++, precision weighs like recall: length for its own sake gains nothing


def _metrics() -> Any:
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise missing_extra(error.name or "sacrebleu", "translation", "score translations") from error


def chrf(texts: Sequence[str], references: Sequence[str], **options: int) -> np.ndarray:
    """[N] chrF of every text, with options of sacrebleu's CHRF; recall weighs twice precision unless they say else."""
    metric = _metrics().CHRF(**options)
    return np.array([metric.sentence_score(text, [right]).score for text, right in zip(texts, references, strict=True)])


def scores(texts: Sequence[str], references: Sequence[str], *, draws: int = 500) -> dict[str, Any]:
    """Mean chrF of a text and corpus BLEU, each {"score", "draws"}, and the mean numbers of "words"."""
    each, metric = chrf(texts, references), _metrics().BLEU(effective_order=True)
    counted = [metric.sentence_score(text, [right]) for text, right in zip(texts, references, strict=True)]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in counted])
    rows = np.random.default_rng(0).integers(0, len(each), (draws, len(each)))
    return {
        "chrF": {"score": float(each.mean()), "draws": [float(each[row].mean()) for row in rows]},
        "BLEU": {"score": _bleu(counts), "draws": [_bleu(counts[row]) for row in rows]},
        "words": {"texts": float(counts[:, 8].mean()), "references": float(counts[:, 9].mean())},
    }


def _bleu(counts: np.ndarray) -> float:
    """Corpus BLEU of texts' counts [N, 10]: n-grams matched and written, of four lengths, and words of both sides."""
    total = counts.sum(0).tolist()
    return _metrics().BLEU.compute_bleu(total[:4], total[4:8], *total[8:], smooth_method="exp").score


def half(draws: Any) -> float:
    """Half the 95 % interval of bootstrap draws."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(high - low) / 2.0


def gain(told: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Of one over another in one metric, with half its paired interval."""
    return {"score": told["score"] - other["score"], "half": half(np.subtract(told["draws"], other["draws"]))}
