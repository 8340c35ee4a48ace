"""Dialogues between two people, and what one of them thought of the whole: the `chitchat-dataset` package.

7,168 chats, 5,988 of them rated from 1 to 10 as witty, upbeat and interesting by one of the two. Where all three are 5
the sliders were probably never touched: `load_dialogues` leaves those out unless asked. What remains rates length more
than anything else: "the longer chat wins" orders most pairs rightly. So comparisons come in two kinds, as they are
(`rating_comparisons`) and between chats of the same length (`matched_comparisons`).
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from rlhf_jax.data.fetch import Artefact
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.comparisons import Comparisons

__all__ = ["CHITCHAT", "Dialogue", "load_dialogues", "matched_comparisons", "rating_comparisons", "without_length"]

CHITCHAT = Artefact(
    package="chitchat-dataset",
    version="0.9.0",
    file_name="chitchat_dataset-0.9.0-py3-none-any.whl",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    size=8_105_664,
    member="chitchat_dataset/dataset.json",
    member_sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    member_size=40_303_934,
    purpose="7,168 chats of two people each, 5,988 of them with human ratings",
    license="MIT",
)
QUALITIES = ("witty", "upbeat", "interesting")


@dataclasses.dataclass(frozen=True, slots=True)
class Dialogue:
    """A chat: what was said in turn, and the mean of its ratings.

    >>> Dialogue(("How are you?", "Fine, thanks"), 7.0).words
    5
    """

    turns: tuple[str, ...]  # each the messages that one person sent in a row
    rating: float | None  # 1 .. 10; None if nobody rated it or the sliders were left at 5

    @property
    def words(self) -> int:
        """How many words were said."""
        return sum(len(turn.split()) for turn in self.turns)


def load_dialogues(path: str | os.PathLike[str]) -> list[Dialogue]:
    """Reads `dataset.json`; a rating of 5 in every quality counts as none.

    Raises: UserError if the file is not that of the package.
    """
    try:
        chats = json.loads(Path(path).read_text(encoding="utf-8"))
        return [_dialogue(chat) for chat in chats.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold chats as chitchat-dataset stores them ({error!r}); delete and fetch it "
                        "again") from None  # fmt: skip


def _dialogue(chat: dict) -> Dialogue:
    turns = tuple(" ".join(" ".join(message["text"] for message in turn).split()) for turn in chat["messages"])
    ratings = chat.get("ratings")
    values = None if ratings is None else [float(ratings[quality]) for quality in QUALITIES]
    told = values is not None and any(value != 5.0 for value in values)
    return Dialogue(tuple(turn for turn in turns if turn), sum(values) / 3 if told and values is not None else None)


def rating_comparisons(rng: np.random.Generator, ratings: np.ndarray, n: int, *, min_gap: float = 2.0) -> Comparisons:
    """Draws n pairs of dialogues whose ratings differ by at least `min_gap`, with replacement.

    Args:
      rng: advanced by the draw.
      ratings: [items] mean ratings.
      n: comparisons wanted.
      min_gap: smallest difference.
    Raises: ValueError if no pair differs by so much.

    >>> rating_comparisons(np.random.default_rng(0), np.array([1.0, 9.0]), 2).chosen.tolist()
    [1, 1]
    """
    return _draw(rng, ratings, np.zeros_like(ratings), n, min_gap, np.inf)


def matched_comparisons(
    rng: np.random.Generator,
    ratings: np.ndarray,
    lengths: np.ndarray,
    n: int,
    *,
    min_gap: float = 2.0,
    within: float = 0.1,
) -> Comparisons:
    """Draws n pairs as `rating_comparisons` does, of dialogues whose lengths differ by a share of `within` at most.

    Args:
      rng: advanced by the draw.
      ratings: [items] mean ratings.
      lengths: [items] words or tokens, at least 1.
      n: comparisons wanted.
      min_gap: smallest difference of ratings.
      within: largest difference of log lengths.
    Raises: ValueError if no pair qualifies.

    >>> matched_comparisons(np.random.default_rng(0), np.array([1.0, 9.0, 9.0]), np.array([50, 51, 90]), 2).chosen
    array([1, 1], dtype=int32)
    """
    return _draw(rng, ratings, np.log(lengths), n, min_gap, within)


def _draw(
    rng: np.random.Generator, ratings: np.ndarray, sizes: np.ndarray, n: int, min_gap: float, within: float
) -> Comparisons:
    gap = ratings[:, None] - ratings[None, :]
    chosen, rejected = np.nonzero((gap >= min_gap) & (np.abs(sizes[:, None] - sizes[None, :]) <= within))
    if n and not len(chosen):
        raise ValueError(f"no two of {len(ratings)} dialogues are {min_gap} rating points apart and of like length")
    rows = rng.integers(max(len(chosen), 1), size=n)
    pairs = chosen[rows].astype(np.int32), rejected[rows].astype(np.int32)
    return Comparisons(*pairs, (ratings[pairs[0]] - ratings[pairs[1]]).astype(np.float32))


def without_length(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What length does not predict, by least squares on its logarithm: values = line[0] + line[1] log length + rest.

    Args:
      values: [N, ...] features or scores.
      lengths: [N] at least 1.
    Returns:
      The rest [N, ...], uncorrelated with log length, and the line [2, ...], to be taken off other values.

    >>> rest, line = without_length(np.array([0.0, 2.0]), np.array([1.0, np.e]))
    >>> line.round(6).tolist()
    [0.0, 2.0]
    """
    design = np.stack([np.ones(len(lengths)), np.log(lengths)], axis=1)
    line = np.linalg.lstsq(design, values.reshape(len(values), -1), rcond=None)[0]
    return values - (design @ line).reshape(values.shape), line.reshape(2, *values.shape[1:])
