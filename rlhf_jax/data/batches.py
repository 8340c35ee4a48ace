"""Token lists to padded batches of few shapes, and the order in which data comes, as a value that can be saved.

Prompts are padded on the left and responses on the right, so that every response starts at the same slot. Lengths are
rounded up to a small set of buckets: each bucket compiles once. An epoch shows every item exactly once. Where items do
not fill a batch, it is filled up with repeated items whose `valid` is False: shapes stay and nothing is dropped.

Nothing is cut either, and what would go wrong in silence is an error that names the row: padding among its tokens, a
begin token twice, nothing to learn.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.errors import UserError
from rlhf_jax.types import PreferenceBatch, TokenBatch

__all__ = [
    "BatchStream",
    "DataPosition",
    "PlannedBatch",
    "bucket_length",
    "check_tokens",
    "epoch_plan",
    "pad_left",
    "pad_right",
    "preference_batch",
    "token_batch",
]


class PlannedBatch(NamedTuple):
    """Which items make up a batch."""

    indices: np.ndarray  # [B] int32, into the data
    valid: np.ndarray  # [B] bool, False for items that only fill the batch up
    length: int  # the bucket: no item of the batch is longer


@struct.dataclass
class DataPosition:
    """Where a stream stands: with the seed, all that is needed to go on with the same batches."""

    seed: ArrayLike  # [] integer
    epoch: ArrayLike  # [] integer, epochs finished
    step: ArrayLike  # [] integer, batches of this epoch already handed out


def bucket_length(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`.

    Raises: ValueError if none does.

    >>> bucket_length(9, [8, 16])
    16
    """
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise ValueError(f"no bucket in {tuple(buckets)} holds length {length}; cut the item or add a bucket")
    return min(fitting)


def check_tokens(
    tokens: Sequence[int], targets: Sequence[bool], name: str, *, pad_id: int, bos_id: int | None = None
) -> None:
    """Raises a UserError if a row begins twice, holds padding, or has nothing to learn.

    Args:
      tokens: of the whole row.
      targets: as long, True for tokens to learn; that of the first token does not count.
      name: what to call the row.
      pad_id: what fills other slots. Where it is the end token too, rows that end hold it, and are refused.
      bos_id: the begin token; None looks for none.

    >>> check_tokens([1, 1, 5], [False, False, True], "chats.jsonl:3", pad_id=0, bos_id=1)
    Traceback (most recent call last):
    rlhf_jax.errors.UserError: chats.jsonl:3 begins with the begin token twice; a template and its caller both add it
    """
    tokens = list(tokens)
    if bos_id is not None and tokens[:2] == [bos_id] * 2:
        raise UserError(f"{name} begins with the begin token twice; a template and its caller both add it")
    if pad_id in tokens:
        raise UserError(
            f"{name} holds the padding token {pad_id} at {tokens.index(pad_id)}; if texts end with it, pad with another"
        )
    if not any(targets[1:]):
        raise UserError(f"{name} has nothing to learn: none of its {len(tokens)} tokens is a target")


def pad_left(rows: Sequence[Sequence[int]], *, pad_id: int, length: int) -> tuple[Array, Array]:
    """Rows padded on the left, as prompts are, for the sampler.

    Args:
      rows: B lists of token ids.
      pad_id: what fills the other slots.
      length: slots per row.
    Returns: (tokens [B, length] int32, mask [B, length] bool, True at the rows' own tokens).
    Raises: ValueError if a row is longer than `length`.

    >>> pad_left([[5]], pad_id=0, length=3)[0].tolist()
    [[0, 0, 5]]
    """
    tokens, mask = _pad(rows, pad_id, length, left=True)
    return jnp.asarray(tokens), jnp.asarray(mask)


def pad_right(rows: Sequence[Sequence[int]], *, pad_id: int, length: int) -> tuple[Array, Array]:
    """Rows padded on the right, as responses are; otherwise as `pad_left`.

    >>> pad_right([[5]], pad_id=0, length=3)[0].tolist()
    [[5, 0, 0]]
    """
    tokens, mask = _pad(rows, pad_id, length, left=False)
    return jnp.asarray(tokens), jnp.asarray(mask)


def token_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    prompt_length: int,
    response_length: int,
    bos_id: int | None = None,
    valid: Sequence[bool] | np.ndarray | None = None,
    names: Sequence[str] = (),
) -> TokenBatch:
    """Prompts and responses side by side; the response tokens are the targets.

    A row's first token has nothing before it to be predicted from and is never a target, so that an empty prompt loses
    its response's first token; begin such rows with a begin token.

    Args:
      prompts: B lists of token ids, context only; may be empty.
      responses: B lists of token ids, with their end token if it is to be learnt.
      pad_id: what fills the other slots.
      prompt_length: P, slots for prompts.
      response_length: R, slots for responses.
      bos_id: the begin token, which no row may have twice at its beginning; None looks for none.
      valid: [B] bool, rows that count (`PlannedBatch.valid`); the others get an empty loss_mask. By default all do.
      names: what to call the rows in errors, for instance file and line; by default their numbers.
    Returns: a TokenBatch of [B, P + R].
    Raises: ValueError if the numbers of rows differ or a row does not fit; UserError for a row that counts and would go
      wrong, see `check_tokens`.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"prompts and responses must pair up, got {len(prompts)} and {len(responses)}")
    prompt_tokens, prompt_mask = _pad(prompts, pad_id, prompt_length, left=True, name="prompts", names=names)
    response_tokens, response_mask = _pad(responses, pad_id, response_length, left=False, name="responses", names=names)
    counts = _checked_valid(valid, len(prompts))
    for row in np.flatnonzero(counts).tolist():
        targets = [False] * len(prompts[row]) + [True] * len(responses[row])
        name = names[row] if names else f"row {row}"
        check_tokens([*prompts[row], *responses[row]], targets, name, pad_id=pad_id, bos_id=bos_id)
    mask = np.concatenate([prompt_mask, response_mask], axis=1)
    first = mask & (np.cumsum(mask, axis=1) == 1)
    targets = np.concatenate([np.zeros_like(prompt_mask), response_mask], axis=1) & ~first
    targets &= counts[:, None]
    return TokenBatch(
        tokens=jnp.asarray(np.concatenate([prompt_tokens, response_tokens], axis=1)),
        mask=jnp.asarray(mask),
        loss_mask=jnp.asarray(targets),
    )


def preference_batch(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    *,
    pad_id: int,
    prompt_length: int,
    response_length: int,
    bos_id: int | None = None,
    valid: Sequence[bool] | np.ndarray | None = None,
    names: Sequence[str] = (),
) -> PreferenceBatch:
    """Two responses to each prompt, of which people preferred the first; arguments as in `token_batch`.

    Returns: a PreferenceBatch of [B, P + R] whose weight is 1 where `valid`, else 0.
    """
    options = {"pad_id": pad_id, "prompt_length": prompt_length, "response_length": response_length, "bos_id": bos_id}
    batches = [token_batch(prompts, responses, **options, valid=valid, names=names) for responses in (chosen, rejected)]
    weight = jnp.asarray(_checked_valid(valid, len(prompts)).astype(np.float32))
    return PreferenceBatch(chosen=batches[0], rejected=batches[1], weight=weight)


def epoch_plan(
    lengths: Sequence[int] | np.ndarray, *, buckets: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[PlannedBatch]:
    """All batches of one epoch: every item in exactly one batch, each batch of one bucket, in shuffled order.

    Args:
      lengths: [items] length of each item.
      buckets: lengths that batches may have. One bucket means plain shuffling.
      batch_size: B, rows of every batch.
      seed, epoch: the same two give the same plan.
    Returns: the batches. The last one of each bucket may be filled up: `valid` is False there.
    Raises: ValueError if there are no items, or an item fits no bucket.
    """
    lengths = np.asarray(lengths)
    if batch_size < 1 or lengths.ndim != 1 or not len(lengths):
        raise ValueError(f"need at least one item and one row, got lengths {lengths.shape} and batch_size {batch_size}")
    bucket_length(int(lengths.max()), buckets)
    ordered = np.sort(np.asarray(buckets))
    bucket_of = np.searchsorted(ordered, lengths)
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    batches = []
    for bucket, length in enumerate(ordered.tolist()):
        members = shuffled[bucket_of[shuffled] == bucket]
        for start in range(0, len(members), batch_size):
            own = members[start : start + batch_size]
            batches.append(
                PlannedBatch(np.resize(own, batch_size).astype(np.int32), np.arange(batch_size) < len(own), length)
            )
    return [batches[i] for i in rng.permutation(len(batches))]


class BatchStream:
    """An endless iterator over the batches of epoch after epoch, which goes on from any saved position.

    `position` always points at the next batch. Save it with the rest of the training state; a new stream over the same
    data that is given that position hands out the very same batches from there on. It may also be set at any time.

    Args:
      lengths: [items] length of each item.
      buckets, batch_size: as in `epoch_plan`.
      seed: seed of a new stream; a given position brings its own.
      position: where to go on; by default at the very beginning.

    >>> stream = BatchStream([3, 1, 2], buckets=[4], batch_size=2)
    >>> first, second = next(stream), next(stream)
    >>> sorted([*first.indices[first.valid].tolist(), *second.indices[second.valid].tolist()])
    [0, 1, 2]
    >>> stream.position
    DataPosition(seed=0, epoch=1, step=0)
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        buckets: Sequence[int],
        batch_size: int,
        seed: int = 0,
        position: DataPosition | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.buckets = tuple(buckets)
        self.batch_size = batch_size
        self.position = DataPosition(seed=seed, epoch=0, step=0) if position is None else position
        self._plan: list[PlannedBatch] = []
        self._plan_is_for: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self

    def __next__(self) -> PlannedBatch:
        seed, epoch, step = (int(np.asarray(x)) for x in (self.position.seed, self.position.epoch, self.position.step))
        if self._plan_is_for != (seed, epoch):
            self._plan = epoch_plan(
                self.lengths, buckets=self.buckets, batch_size=self.batch_size, seed=seed, epoch=epoch
            )
            self._plan_is_for = (seed, epoch)
        if not 0 <= step < len(self._plan):
            raise ValueError(
                f"position.step is {step} but an epoch has {len(self._plan)} batches: it was saved with other data, "
                "buckets or batch_size"
            )
        last = step + 1 == len(self._plan)
        self.position = DataPosition(seed=seed, epoch=epoch + last, step=0 if last else step + 1)
        return self._plan[step]


def _pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    length: int,
    *,
    left: bool,
    name: str = "rows",
    names: Sequence[str] = (),
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.bool_)
    for index, row in enumerate(rows):
        if len(row) > length:
            where = f"{names[index]}, in {name}," if names else f"{name}[{index}]"
            raise ValueError(f"{where} has {len(row)} tokens but only {length} slots; cut it or use more slots")
        own = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[index, own] = row
        mask[index, own] = True
    return tokens, mask


def _checked_valid(valid: Sequence[bool] | np.ndarray | None, rows: int) -> np.ndarray:
    checked = np.ones(rows, np.bool_) if valid is None else np.asarray(valid)
    if checked.dtype != np.bool_ or checked.shape != (rows,):
        raise ValueError(f"valid must be {rows} bools, one per row, got {checked.dtype} of shape {checked.shape}")
    return checked
