"""Relative positions as a learned bias of the attention scores (T5)."""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

__all__ = ["RelativeBias", "relative_bucket"]


def relative_bucket(distance: Array, *, buckets: int, longest: int, both_ways: bool) -> Array:
    """The bucket of a distance (key position minus query position): exact when near, logarithmic when far.

    Args:
      distance: [...] int.
      buckets: number of buckets.
      longest: distances from here on share the last bucket.
      both_ways: half of the buckets for keys behind the query, half for keys before it; else keys behind it share
        bucket 0.
    Returns:
      [...] int32 in [0, buckets).
    Reference: Raffel et al. 2020, section 2.1, https://arxiv.org/abs/1910.10683

    >>> relative_bucket(jnp.array([0, -1, -4, -40, 3]), buckets=8, longest=16, both_ways=False).tolist()
    [0, 1, 4, 7, 0]
    """
    if both_ways:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        offset = jnp.zeros_like(distance)
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    far = np.arange(exact, longest + 1)
    growth = np.log(far / exact) / math.log(longest / exact) * (buckets - exact)
    # Computed once, in float64: in float32 a distance on the border of two buckets falls to either side.
    borders = np.minimum(exact + np.floor(growth + 1e-9).astype(np.int32), buckets - 1)
    table = jnp.asarray(np.concatenate([np.arange(exact, dtype=np.int32), borders]))
    return (offset + table[jnp.minimum(distance, longest)]).astype(jnp.int32)


class RelativeBias(nn.Module):
    """A learned number per head and bucket, added to the scores of every layer of a stack."""

    num_heads: int
    buckets: int
    longest: int
    both_ways: bool

    @nn.compact
    def __call__(self, position: Array, seen_position: Array) -> Array:
        """position [B, T], seen_position [B, S] -> [B, heads, T, S]."""
        table = self.param("embedding", nn.initializers.normal(0.1), (self.buckets, self.num_heads))
        bucket = relative_bucket(
            seen_position[:, None] - position[:, :, None],
            buckets=self.buckets,
            longest=self.longest,
            both_ways=self.both_ways,
        )
        return jnp.moveaxis(table[bucket], -1, 1)
