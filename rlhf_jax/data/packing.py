"""Several texts in one row, with segment ids that keep them apart; and the lengths that batches should have.

Nothing is dropped and nothing is cut. A packed row equals its texts in rows of their own, for models that take
`segments`: attention stays within a segment, and positions start again in each.
"""

import bisect
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from rlhf_jax.data.batches import check_tokens

__all__ = ["PackedBatch", "choose_buckets", "pack", "packed_batch", "unpack"]


@struct.dataclass
class PackedBatch:
    """Rows that hold several texts each."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, real tokens
    segments: Array  # [B, T] int32, 0 in padding, 1, 2, ... for the texts of a row
    positions: Array  # [B, T] int32, of each token in its text; 0 in padding
    loss_mask: Array  # [B, T] bool, targets; the first token of a text never is one


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Which items share a row: best fit, the longest first.

    An item goes to the fullest row that still holds it. So any two rows together hold more than `capacity`, fewer than
    2 * tokens / capacity + 1 rows are used, and never more than 11/9 of the least possible, plus one.

    Args:
      lengths: [items] each between 1 and `capacity`.
      capacity: T, slots of a row.
    Returns: rows of indices into `lengths`; each index occurs once.
    Raises: ValueError that names an item that is empty or too long.

    >>> pack([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    sizes = [int(length) for length in lengths]
    for item, size in enumerate(sizes):
        if not 1 <= size <= capacity:
            raise ValueError(f"item {item} has length {size}, which must be between 1 and the capacity {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free slots, row), sorted
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        place = bisect.bisect_left(room, (sizes[item], -1))
        if place == len(room):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(item)
        bisect.insort(room, (free - sizes[item], row))
    return rows


def packed_batch(
    texts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[bool]] | None,
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    length: int,
    bos_id: int | None = None,
    names: Sequence[str] = (),
) -> PackedBatch:
    """Texts side by side in the rows that `pack` chose.

    Args:
      texts: lists of token ids.
      targets: as long as the texts, True for tokens to learn; None learns all. A text's first token has nothing before
        it to be predicted from and is never a target.
      rows: B lists of indices into `texts`; an empty one gives a row of padding.
      pad_id: what fills the other slots.
      length: T, slots of a row.
      bos_id: the begin token, which no text may have twice at its beginning; None looks for none.
      names: what to call the texts in errors, for instance file and line; by default their numbers.
    Raises: ValueError if a row's texts do not fit, or targets and texts do not pair up; UserError for a text that would
      go wrong, see `check_tokens`. Without `targets` one of a single token is allowed.
    """
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, np.bool_)
    for row, items in enumerate(rows):
        start = 0
        for segment, item in enumerate(items, 1):
            size = len(texts[item])
            wanted = [True] * size if targets is None else targets[item]
            if len(wanted) != size:
                raise ValueError(f"text {item} has {size} tokens and {len(wanted)} targets")
            name = names[item] if names else f"text {item}"
            counted = [True, True] if targets is None else wanted
            check_tokens(texts[item], counted, name, pad_id=pad_id, bos_id=bos_id)
            if start + size > length:
                raise ValueError(f"the texts of row {row} have more than {length} tokens")
            own = slice(start, start + size)
            tokens[row, own], segments[row, own], positions[row, own] = texts[item], segment, np.arange(size)
            loss_mask[row, own] = wanted
            loss_mask[row, start : start + 1] = False
            start += size
    return PackedBatch(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(segments > 0),
        segments=jnp.asarray(segments),
        positions=jnp.asarray(positions),
        loss_mask=jnp.asarray(loss_mask),
    )


def unpack(values: Array | np.ndarray, segments: Array | np.ndarray, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What belongs to each text, in the texts' own order: the inverse of `packed_batch`.

    Args:
      values: [B, T, ...] tokens, log-probs or anything else per slot.
      segments: [B, T] of the packed batch.
      rows: what `pack` gave.
    Returns: one array [length, ...] per text.
    """
    values, segments = np.asarray(values), np.asarray(segments)
    found = {
        item: values[row][segments[row] == segment]
        for row, items in enumerate(rows)
        for segment, item in enumerate(items, 1)
    }
    return [found[item] for item in sorted(found)]


def choose_buckets(lengths: Sequence[int] | np.ndarray, count: int, *, multiple: int = 1) -> tuple[int, ...]:
    """The at most `count` lengths that batches should have, so that padding is least: one compilation each.

    Exact, by dynamic programming over the lengths that occur.

    Args:
      lengths: [items] all at least 1.
      count: how many buckets there may be at most.
      multiple: buckets are multiples of this.
    Returns: buckets, rising; the last one holds the longest item.
    Raises: ValueError for no items, or numbers below 1.

    >>> choose_buckets([1, 1, 1, 9, 10], 2)
    (1, 10)
    """
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or not sizes.size or sizes.min() < 1 or count < 1 or multiple < 1:
        raise ValueError(f"need items of at least one token, count and multiple of at least 1, got {count}, {multiple}")
    ends, items = np.unique(-(-sizes // multiple) * multiple, return_counts=True)
    before = np.concatenate([[0], np.cumsum(items)])  # [M + 1] items that end before each length
    slots = np.full(len(ends) + 1, np.iinfo(np.int64).max // 4, np.int64)
    slots[0] = 0  # slots[m]: the fewest slots that hold the m shortest lengths, with the buckets allowed so far
    choices = []
    for _ in range(min(count, len(ends))):
        # [M, M + 1]: the last bucket is ends[m] and holds all from length j on
        cost = slots[None, :] + ends[:, None] * (before[1:, None] - before[None, :])
        cost = np.where(np.arange(len(ends) + 1)[None, :] <= np.arange(len(ends))[:, None], cost, cost.max() + 1)
        choice = np.argmin(cost, axis=1)
        slots = np.concatenate([[0], np.take_along_axis(cost, choice[:, None], axis=1)[:, 0]])
        choices.append(choice)
    buckets, stop = [], len(ends)
    for choice in reversed(choices):
        if stop:
            buckets.append(int(ends[stop - 1]))
            stop = int(choice[stop - 1])
    return tuple(reversed(buckets))
