"""Hypothesis strategies for what flows through RLHF: ragged masks, log-probs, rewards with ties, logits.

All arrays are float32, int32 or bool NumPy. Shapes are arguments, not drawn, so that a jitted loss compiles once for
all examples; pass ``sizes(...)`` where a property is about shapes. With ``garbage`` every slot outside the mask holds
it, as real padding may.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

__all__ = [
    "PreferencePairs",
    "RaggedBatch",
    "garbage_values",
    "grouped_rewards",
    "log_probs",
    "log_ratios",
    "logits",
    "masks",
    "preference_pairs",
    "ragged_batches",
    "rewards",
    "sizes",
    "values",
]


def sizes(rows: tuple[int, int] = (1, 5), tokens: tuple[int, int] = (1, 7)) -> st.SearchStrategy[tuple[int, int]]:
    """Shapes [B, T] with B and T between the given bounds."""
    return st.tuples(st.integers(*rows), st.integers(*tokens))


def garbage_values() -> st.SearchStrategy[float]:
    """What padding may hold: NaN, either infinity, a huge number, a plausible one."""
    return st.sampled_from([float("nan"), float("inf"), -float("inf"), -1e9, 1.0])


@st.composite
def masks(
    draw: st.DrawFn, shape: tuple[int, int] = (4, 6), *, layout: str = "any", empty_rows: bool = True
) -> np.ndarray:
    """Bool masks [B, T].

    Args:
      draw: supplied by hypothesis.
      shape: (B, T).
      layout: "right" pads after the tokens, "left" before them, "holes" lets any slot be out, "any" draws one of them.
      empty_rows: whether a row may have no token.
    """
    rows, tokens = shape
    if layout not in ("right", "left", "holes", "any"):
        raise ValueError(f"layout must be right, left, holes or any, got {layout!r}")
    layout = draw(st.sampled_from(["right", "left", "holes"])) if layout == "any" else layout
    if layout == "holes":
        mask = draw(hnp.arrays(np.bool_, shape))
        if not empty_rows:
            mask[~mask.any(-1), draw(st.integers(0, tokens - 1))] = True
        return mask
    lengths = draw(hnp.arrays(np.int64, rows, elements=st.integers(0 if empty_rows else 1, tokens)))
    mask = np.arange(tokens) < lengths[:, None]
    return mask if layout == "right" else mask[:, ::-1].copy()


def _floats(shape: tuple[int, ...], low: float, high: float) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32, allow_subnormal=False))


def log_probs(shape: tuple[int, ...] = (4, 6), *, lowest: float = -20.0) -> st.SearchStrategy[np.ndarray]:
    """Log-probabilities in [lowest, 0]."""
    return _floats(shape, lowest, 0.0)


def log_ratios(shape: tuple[int, ...] = (4, 6), *, extreme: float = 80.0) -> st.SearchStrategy[np.ndarray]:
    """Log-ratios: mostly near 0, as on-policy ones are, some anywhere in [-extreme, extreme], some at the ends."""
    near, far = st.floats(-0.5, 0.5, width=32), st.floats(-extreme, extreme, width=32)
    ends = st.sampled_from([-extreme, 0.0, extreme])
    return hnp.arrays(np.float32, shape, elements=st.one_of(near, near, far, ends))


def rewards(shape: tuple[int, ...] = (4,), *, ties: bool = True) -> st.SearchStrategy[np.ndarray]:
    """Scores in [-10, 10]; with ties, often from a few levels (0, 1, ratings), so that equal ones are common."""
    levels = hnp.arrays(np.float32, shape, elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
    return st.one_of(_floats(shape, -10.0, 10.0), levels) if ties else _floats(shape, -10.0, 10.0)


@st.composite
def grouped_rewards(draw: st.DrawFn, groups: int = 2, group: int = 4, *, equal_groups: bool = True) -> np.ndarray:
    """Scores [groups · group], rows of a group side by side; some groups all equal, where variance is 0."""
    scores = draw(rewards((groups, group)))
    if equal_groups:
        equal = draw(hnp.arrays(np.bool_, groups))
        scores = np.where(equal[:, None], scores[:, :1], scores)
    return scores.reshape(-1).astype(np.float32)


def values(shape: tuple[int, ...] = (4, 6)) -> st.SearchStrategy[np.ndarray]:
    """Critic outputs in [-10, 10]."""
    return _floats(shape, -10.0, 10.0)


def logits(shape: tuple[int, ...] = (4, 6, 5), *, extreme: float = 30.0) -> st.SearchStrategy[np.ndarray]:
    """Logits [..., V] in [-extreme, extreme]."""
    return _floats(shape, -extreme, extreme)


class RaggedBatch(NamedTuple):
    """Per-token arrays of one batch, aligned: index t is the same generated token everywhere."""

    mask: np.ndarray  # [B, T] bool
    log_probs: np.ndarray  # [B, T] float32, of the trained policy
    old_log_probs: np.ndarray  # [B, T] float32, of the policy that sampled
    reference_log_probs: np.ndarray  # [B, T] float32
    rewards: np.ndarray  # [B, T] float32
    values: np.ndarray  # [B, T] float32
    advantages: np.ndarray  # [B, T] float32

    def filled(self, garbage: float) -> "RaggedBatch":
        """The same batch with another number in every slot outside the mask."""
        return RaggedBatch(self.mask, *(np.where(self.mask, x, np.float32(garbage)) for x in self[1:]))


@st.composite
def ragged_batches(
    draw: st.DrawFn,
    shape: tuple[int, int] | st.SearchStrategy[tuple[int, int]] = (4, 6),
    *,
    layout: str = "any",
    empty_rows: bool = True,
    garbage: float | None = float("nan"),
) -> RaggedBatch:
    """Batches [B, T] with everything a token-level loss may want.

    Args:
      draw: supplied by hypothesis.
      shape: (B, T), or a strategy for it such as `sizes()`.
      layout: as for `masks`.
      empty_rows: whether a row may have no token.
      garbage: fills every slot outside the mask; None leaves plausible numbers there.
    """
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    mask = draw(masks(shape, layout=layout, empty_rows=empty_rows))
    new = draw(log_probs(shape))
    old = np.minimum(new - draw(log_ratios(shape, extreme=20.0)), 0.0).astype(np.float32)
    reference = np.minimum(new - draw(log_ratios(shape, extreme=20.0)), 0.0).astype(np.float32)
    batch = RaggedBatch(mask, new, old, reference, draw(values(shape)), draw(values(shape)), draw(values(shape)))
    return batch if garbage is None else batch.filled(garbage)


class PreferencePairs(NamedTuple):
    """Summed log-ratios log π - log π_ref of both answers, and how many tokens they have."""

    chosen_log_ratios: np.ndarray  # [B] float32
    rejected_log_ratios: np.ndarray  # [B] float32
    chosen_lengths: np.ndarray  # [B] int32, at least 1
    rejected_lengths: np.ndarray  # [B] int32, at least 1


@st.composite
def preference_pairs(draw: st.DrawFn, rows: int = 5, *, extreme: float = 80.0) -> PreferencePairs:
    """Pairs for the DPO family, with equal margins and extreme ones among them."""
    ratios = [draw(log_ratios((rows,), extreme=extreme)) for _ in range(2)]
    if draw(st.booleans()):
        ratios[1][0] = ratios[0][0]
    lengths = [draw(hnp.arrays(np.int32, rows, elements=st.integers(1, 20))) for _ in range(2)]
    return PreferencePairs(*ratios, *lengths)
