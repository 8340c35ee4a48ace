"""Batches as a grain data set: the order of `BatchStream`, made by grain's threads, with an iterator that checkpoints.

Grain is an extra; `rlhf_jax.data.batches.BatchStream` needs none and gives the same batches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.batches import PlannedBatch, epoch_plan
from rlhf_jax.errors import missing_extra

__all__ = ["PlanSource", "batch_dataset"]


class PlanSource:
    """The batches of `epochs` epochs, each by its number: what `BatchStream` hands out, with random access.

    Args:
      lengths, buckets, batch_size, seed: as in `epoch_plan`.
      epochs: how many.

    >>> source = PlanSource([3, 1, 2], buckets=[4], batch_size=2, epochs=5)
    >>> len(source), source[3].length
    (10, 4)
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        buckets: Sequence[int],
        batch_size: int,
        seed: int = 0,
        epochs: int = 1,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self._plan = lambda epoch: epoch_plan(lengths, buckets=buckets, batch_size=batch_size, seed=seed, epoch=epoch)
        self._latest = (0, self._plan(0))
        self.epochs = epochs
        self.steps = len(self._latest[1])  # the same in every epoch

    def __len__(self) -> int:
        return self.epochs * self.steps

    def __getitem__(self, index: int) -> PlannedBatch:
        epoch, step = divmod(int(index), self.steps)
        latest = self._latest  # read and replaced whole: threads share the source
        if latest[0] != epoch:
            self._latest = latest = (epoch, self._plan(epoch))
        return latest[1][step]


def batch_dataset(source: PlanSource, collate: Callable[[PlannedBatch], Any]) -> Any:
    """A `grain.MapDataset` of finished batches.

    `iter(batch_dataset(...).to_iter_dataset())` has `get_state()`, which goes into a checkpoint as JSON, and
    `set_state(state)`, after which the very same batches follow.

    Args:
      source: which items make up each batch.
      collate: makes the batch, for instance by `token_batch`; it runs in grain's threads.
    Raises: UserError if grain is not installed.
    """
    try:
        import grain
    except ImportError:
        raise missing_extra("grain", "data", "make a grain data set") from None
    return grain.MapDataset.source(source).map(collate)
