"""All gradient steps on one batch as one program: epochs of minibatches in a fresh random order."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.training.gradients import split_rows

__all__ = ["run_epochs"]

State = TypeVar("State")


def run_epochs(
    step: Callable[[State, Any], tuple[State, dict[str, Array]]],
    state: State,
    batch: Any,
    key: Array,
    *,
    epochs: int,
    minibatches: int = 1,
) -> tuple[State, dict[str, Array]]:
    """`epochs` passes over the batch, each in `minibatches` steps; metrics averaged over all of them.

    Args:
      step: (state, rows) -> (state, metrics).
      state: what the first step starts from.
      batch: pytree whose leaves all have the leading axis B.
      key: consumed; under a mapped axis give each device its own.
      epochs: passes, at least 1. A single pass in a single step is ``step(state, batch)`` itself, without a loop.
      minibatches: steps per pass, a divisor of B; 1 keeps the rows in their order.
    Raises:
      ValueError: epochs below 1, or minibatches that do not divide B.

    >>> step = lambda total, rows: (total + jnp.sum(rows), {"mean": jnp.mean(rows)})
    >>> total, metrics = run_epochs(step, 0, jnp.arange(4), jax.random.key(0), epochs=3, minibatches=2)
    >>> int(total), float(metrics["mean"])
    (18, 1.5)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    rows = len(jax.tree.leaves(batch)[0])
    if minibatches < 1 or rows % minibatches:
        raise ValueError(f"minibatches must divide the rows of batch, got minibatches={minibatches}, B={rows}")
    if epochs == minibatches == 1:
        return step(state, batch)

    def epoch(state: State, key: Array) -> tuple[State, dict[str, Array]]:
        if minibatches == 1:
            return step(state, batch)
        order = jax.random.permutation(key, rows)
        shuffled = jax.tree.map(lambda x: x[order], batch)
        return jax.lax.scan(step, state, split_rows(shuffled, minibatches))

    state, metrics = jax.lax.scan(epoch, state, jax.random.split(key, epochs))
    return state, jax.tree.map(jnp.mean, metrics)
