"""Key-value caches between prompt and response: read prompts once, repeat rows, make room, rows of different lengths.

Nothing here knows how a cache lies in memory: every array of it has the rows first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models.transformer import Cache, Transformer, init_cache

__all__ = ["Prefill", "RowsRead", "anyone", "grow", "narrow", "prefill", "read_rows", "repeat_rows", "rows_of", "widen"]


class Prefill(NamedTuple):
    """Prompts that the model has read, all but their last token."""

    cache: Cache  # of capacity P - 1, full
    trunk: Array | None  # [B, P - 1, D] activations entering the tapped layer, if one was


def prefill(
    model: Transformer, params: dict, prompts: Array, prompt_mask: Array, *, tap: int | None = None
) -> Prefill | None:
    """Reads the prompts once, for any number of `generate` calls with the same parameters.

    Args:
      model: the decoder.
      params: its parameters.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool.
      tap: the layer that `generate` will tap.
    Returns:
      `Prefill`, or None for prompts of one token, of which nothing is to be read ahead.
    """
    rows, length = prompts.shape
    if length == 1:
        return None
    empty = init_cache(model.config, rows, length - 1)
    out = model.apply({"params": params}, prompts[:, :-1], prompt_mask[:, :-1], cache=empty, tap=tap)
    return Prefill(out.cache, out.tap)


def repeat_rows(tree: Any, times: int) -> Any:
    """Every row of every array `times` times; scalars are left alone."""
    return jax.tree.map(lambda x: x if times == 1 or x.ndim == 0 else jnp.repeat(x, times, axis=0), tree)


def grow(model: Transformer, cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` slots."""
    empty = init_cache(model.config, cache.mask.shape[0], capacity, dtype=cache.keys[0].dtype)
    return jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice(x, part, (0,) * x.ndim), empty, cache)


@jax.custom_batching.custom_vmap
def anyone(alive: Array) -> Array:
    """[] bool, whether any row is alive; under `jax.vmap` any row of all runs, which is one answer for all of them.

    A loop that asks it goes on until the last run's last row has ended. If each run had its own answer, `jax.vmap`
    would choose between the old and the new value of everything that the loop carries, caches too, and write with a
    scatter. A turn must leave rows that have ended as they are, which it does for the sake of other rows anyway.

    >>> jax.vmap(anyone)(jnp.array([[True, False], [False, False]]))
    Array([ True,  True], dtype=bool)
    """
    return jnp.any(alive)


@anyone.def_vmap
def _anyone_of_all_runs(size: int, batched: list[bool], alive: Array) -> tuple[Array, bool]:
    del size, batched
    return anyone(alive), False


# --- rows of different lengths ----------------------------------------------------------------------------------------


class RowsRead(NamedTuple):
    """What reading some tokens of every row gives."""

    hidden: Array  # [B, T, D] after the final norm
    cache: Cache  # one per row


def rows_of(cache: Cache) -> Cache:
    """One cache per row: arrays [B, S, ...] become [B, 1, S, ...] and the length [B], so that rows may differ in it."""
    rows = cache.mask.shape[0]
    return jax.tree.map(lambda x: x[:, None] if x.ndim else jnp.broadcast_to(x, (rows,)), cache)


def read_rows(model: Transformer, params: dict, tokens: Array, mask: Array, caches: Cache) -> RowsRead:
    """Reads tokens [B, T] with mask [B, T] behind what each row has read before, each at its own length.

    Args:
      model: the decoder.
      params: its parameters.
      tokens: [B, T] int32.
      mask: [B, T] bool, real tokens.
      caches: one cache per row, as `rows_of` makes them.
    Returns:
      `RowsRead`.
    """

    def one(tokens: Array, mask: Array, cache: Cache) -> RowsRead:
        out = model.apply({"params": params}, tokens[None], mask[None], cache=cache)
        return RowsRead(out.hidden[0], out.cache)

    if model.config.num_experts:  # the grouped product of experts cannot be mapped over rows, so rows take turns
        return jax.lax.map(lambda row: one(*row), (tokens, mask, caches))
    return jax.vmap(one)(tokens, mask, caches)


def narrow(caches: Cache, capacity: int) -> Cache:
    """The first `capacity` slots of one cache per row."""
    cut = lambda x, axis: jax.lax.slice_in_dim(x, 0, capacity, axis=axis)
    keys, values = (tuple(cut(x, 3) for x in layers) for layers in (caches.keys, caches.values))
    return Cache(keys, values, cut(caches.mask, 2), caches.length)


def widen(caches: Cache, part: Cache) -> Cache:
    """The caches with their first slots as in `part`, which `narrow` has cut off them; lengths are the part's."""
    put = lambda x, y: jax.lax.dynamic_update_slice(x, y, (0,) * x.ndim)
    return jax.tree.map(put, caches, part)
