"""Grouped-query attention over visible slots, and who sees whom.

Keys and values stand with their heads before their slots, [B, kv_heads, S, head_dim], in a cache too: so decoding reads
every head's slots in one stretch.

`attend` is what XLA compiles on every backend: scores [B, N, T, S] are formed, values and gradients are those of
`jax.nn.dot_product_attention`, which has no soft cap and other places for the heads. `fused_attention` has the kernels
of GPU and TPU that do without the scores.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rlhf_jax.models.layers import Norm, soft_cap
from rlhf_jax.models.linear import Dense
from rlhf_jax.models.rotary import Rotation, rotate

if TYPE_CHECKING:
    from rlhf_jax.models.config import TransformerConfig

__all__ = ["Attention", "attend", "visible"]


def visible(position: Array, seen: Array, seen_position: Array, reach: Array, window: int | None) -> Array:
    """Which slots each query sees: real ones, not after itself, and within the window.

    Args:
      position: [B, T] int positions of the queries.
      seen: [B, S] bool, slots that hold a real token.
      seen_position: [B, S] int positions of the slots.
      reach: [1, T, S] bool, slots that are not after the query.
      window: how many tokens are seen, the query's own included; None for all. Padding does not count.
    Returns:
      [B, T, S] bool. A query that would see nothing (padding) sees everything, so that its softmax and its gradient
      stay finite.

    >>> reach, row = jnp.tril(jnp.ones((1, 3, 3), bool)), jnp.arange(3)[None]
    >>> visible(row, jnp.ones((1, 3), bool), row, reach, 2).astype(int)[0].tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    allowed = reach & seen[:, None]
    if window is not None:
        allowed = allowed & (position[:, :, None] - seen_position[:, None] < window)
    return allowed | ~jnp.any(allowed, axis=-1, keepdims=True)


def attend(
    query: Array,
    key: Array,
    value: Array,
    allowed: Array,
    *,
    scale: float,
    cap: float | None = None,
    bias: Array | None = None,
) -> Array:
    """softmax(cap · tanh(scale · query · key / cap) + bias) · value over allowed slots; groups of heads share a key.

    Args:
      query: [B, T, N, H].
      key: [B, K, S, H] where K divides N; heads n · N/K .. share key head n.
      value: [B, K, S, H].
      allowed: [B, T, S] bool; every query is allowed one slot at least.
      scale: multiplies the scores.
      cap: soft cap of the scores; None for none, which is the limit of a large one.
      bias: [B, N, T, S] added to the scores; None for none.
    Returns:
      [B, T, N, H] in the query's dtype; scores and softmax are float32 (float64 for float64 inputs).
    Reference: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245

    >>> same = jnp.ones((1, 1, 2, 1))  # two slots that are equally near
    >>> attend(jnp.ones((1, 1, 1, 1)), same, jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1), jnp.ones((1, 1, 2), bool),
    ...        scale=1.0).item()
    2.0
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(*query.shape[:2], key.shape[1], -1, query.shape[-1])
    scores = soft_cap(jnp.einsum("btkgh,bksh->bkgts", grouped, key, preferred_element_type=wide) * scale, cap)
    if bias is not None:
        scores = scores + bias.reshape(scores.shape)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(wide).min)
    # Weights are divided by their sum after the product with the values: H numbers per query and not S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights.astype(value.dtype), value)
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.moveaxis(mixed, 3, 1).astype(query.dtype).reshape(query.shape)


class Attention(nn.Module):
    """Projections to heads, rotation, attention, and back to the width.

    Attributes:
      config: its shape.
      kernel: of `fused_attention` with its window, for tokens that attend among themselves; None is `attend`.
    """

    config: "TransformerConfig"
    kernel: Callable[..., Array] | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        turn: Rotation | None,
        allowed: Array,
        slot: tuple[Array, Array, Array] | None,
        bias: Array | None = None,
        text: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """x [B, T, D], allowed [B, T, S] bool -> output [B, T, D], keys, values [B, kv_heads, S, head_dim].

        slot is (keys, values, first slot to write) of a cache, or None to attend among the T tokens themselves; bias
        [B, heads, T, S] is added to the scores; text [B, T] int is what a kernel needs besides, None for `attend`.
        """
        config = self.config
        project = lambda name, count: Dense(count * config.head_dim, use_bias=config.qkv_bias, name=name)(x).reshape(
            *x.shape[:-1], count, config.head_dim
        )
        query, key = project("query", config.num_heads), project("key", config.num_kv_heads)
        value = project("value", config.num_kv_heads)
        if config.query_key_norm:
            query = Norm(epsilon=config.norm_epsilon, offset=config.norm_offset, name="query_norm")(query)
            key = Norm(epsilon=config.norm_epsilon, offset=config.norm_offset, name="key_norm")(key)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        if slot is not None:
            keys, values, start = slot
            key = jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), start, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(values, value.astype(values.dtype), start, axis=2)
        seen = query, key.astype(x.dtype), value.astype(x.dtype), allowed
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        if self.kernel is None or text is None or bias is not None:
            bias = None if bias is None else bias.astype(x.dtype)
            mixed = attend(*seen, scale=scale, cap=config.attention_soft_cap, bias=bias)
        else:
            mixed = self.kernel(*seen, text, scale=scale, cap=config.attention_soft_cap)
        flat = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return Dense(config.width, use_bias=config.out_bias, name="out")(flat), key, value
