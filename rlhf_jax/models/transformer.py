"""One decoder-only transformer in Flax Linen, with its key-value cache as an explicit pytree.

The model is used in three ways, all through `Transformer.__call__`:

* training and scoring: tokens and mask in, hidden states out (`cache=None`);
* generation: the same call with a `Cache`, which it returns extended (prefill with many tokens, decode with one);
* partially: ``first`` and ``last`` run a slice of the layers, so that a frozen lower part (the trunk) is computed once
  and its activations are shared by actor, critic, reference and reward model.

Hidden states and not logits come back, because [B, T, V] is what runs out of memory: pass them with `output_table` to
`rlhf_jax.logprobs.head_log_probs`, or call `Transformer.logits` for the few positions that need all of V.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

__all__ = ["Cache", "Output", "Transformer", "TransformerConfig", "init_cache", "output_table", "positions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a Llama-type decoder: RMS norm, rotary positions, grouped-query attention, gated SiLU."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    max_length: int = 2048

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")


class Cache(NamedTuple):
    """Keys and values of the slots written so far. S is the capacity; slots are filled from the left."""

    keys: tuple[Array, ...]  # per layer [B, S, kv_heads, head_dim]
    values: tuple[Array, ...]  # per layer [B, S, kv_heads, head_dim]
    mask: Array  # [B, S] bool, slots that hold a real token
    length: Array  # [] int32, slots written

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return self.mask.shape[-1]


class Output(NamedTuple):
    """What one call computes."""

    hidden: Array  # [B, T, D] after the final norm, or the activations entering layer `last` if that comes earlier
    tap: Array | None  # [B, T, D] activations entering layer `tap`, if it was asked for
    cache: Cache | None  # the extended cache, if one was given


def init_cache(config: TransformerConfig, batch: int, capacity: int, *, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` slots."""
    shape = (batch, capacity, config.num_kv_heads, config.head_dim)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
    return Cache(empty, empty, jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))


def positions(mask: Array) -> Array:
    """Position of each token among its row's real tokens; padding gets the position of its left neighbour, at least 0.

    So left padding does not shift a prompt. mask: [B, T] bool -> [B, T] int32.

    >>> positions(jnp.array([[False, True, True]])).tolist()
    [[0, 0, 1]]
    """
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


def output_table(params: dict) -> Array:
    """[V, D] rows that hidden states are multiplied with for logits: the tied embedding, or the untied head."""
    return params["head"]["embedding"] if "head" in params else params["embed"]["embedding"]


def rotate(x: Array, position: Array, theta: float) -> Array:
    """Rotary position embedding on pairs (i, i + head_dim/2) (Su et al. 2021, eq. 34; half-split layout).

    x: [B, T, N, head_dim]; position: [B, T]. Computed in float32, returned in x's dtype.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, position: Array, attend: Array, slot: tuple[Array, Array, Array] | None):
        """x [B, T, D], position [B, T], attend [B, T, S] bool -> output [B, T, D], keys, values [B, S, kv, head_dim].

        slot is (keys, values, first slot to write) of a cache, or None to attend among the T tokens themselves.
        """
        config = self.config
        heads = lambda name, count: nn.Dense(count * config.head_dim, use_bias=False, name=name)(x).reshape(
            *x.shape[:-1], count, config.head_dim
        )
        query = rotate(heads("query", config.num_heads), position, config.rope_theta)
        key = rotate(heads("key", config.num_kv_heads), position, config.rope_theta)
        value = heads("value", config.num_kv_heads)
        if slot is not None:
            keys, values, start = slot
            key = jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), start, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(values, value.astype(values.dtype), start, axis=1)
        mixed = jax.nn.dot_product_attention(query, key.astype(x.dtype), value.astype(x.dtype), mask=attend[:, None])
        flat = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return nn.Dense(config.width, use_bias=False, name="out")(flat), key, value


class MLP(nn.Module):
    """Gated linear unit (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = lambda name, width: nn.Dense(width, use_bias=False, name=name)
        width = self.config.mlp_width
        return dense("down", self.config.width)(nn.silu(dense("gate", width)(x)) * dense("up", width)(x))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, position: Array, attend: Array, slot: tuple[Array, Array, Array] | None):
        norm = lambda name: nn.RMSNorm(epsilon=self.config.norm_epsilon, name=name)
        mixed, keys, values = Attention(self.config, name="attention")(
            norm("attention_norm")(x), position, attend, slot
        )
        x = x + mixed
        return x + MLP(self.config, name="mlp")(norm("mlp_norm")(x)), keys, values


class Transformer(nn.Module):
    """Decoder-only language model (Llama type)."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.width, embedding_init=nn.initializers.normal(0.02))
        self.layer = [Block(config) for _ in range(config.num_layers)]
        self.final_norm = nn.RMSNorm(epsilon=config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nn.Embed(config.vocab_size, config.width, embedding_init=nn.initializers.normal(0.02))

    def __call__(
        self,
        inputs: Array,
        mask: Array,
        *,
        cache: Cache | None = None,
        first: int = 0,
        last: int | None = None,
        tap: int | None = None,
    ) -> Output:
        """Runs layers first..last-1 over T new tokens.

        Args:
          inputs: [B, T] int tokens if first == 0, else [B, T, D] activations entering layer `first`.
          mask: [B, T] bool, real tokens. Padding may stand anywhere; nothing attends to it.
          cache: earlier slots to attend to; the T tokens are written behind them.
          first: first layer to run.
          last: layer to stop before; None runs to the end and applies the final norm.
          tap: layer whose incoming activations are returned too, first <= tap <= num_layers.
        Returns:
          `Output`; hidden states of padding are finite and meaningless.
        """
        stop = self.config.num_layers if last is None else last
        # Padding is embedded as token 0: its id may lie outside the vocabulary.
        x = inputs if first else self.embed(jnp.where(mask, inputs, 0))
        tokens = mask.shape[-1]
        if cache is None:
            position = positions(mask)
            reach = jnp.tril(jnp.ones((tokens, tokens), bool))[None]
            seen = mask
        else:
            seen = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.length, axis=1)
            position = jax.lax.dynamic_slice_in_dim(positions(seen), cache.length, tokens, axis=1)
            new = cache.length + jnp.arange(tokens)
            reach = (jnp.arange(cache.capacity)[None] <= new[:, None])[None]
        attend = reach & seen[:, None]
        # A padded query sees no key; letting it see all of them keeps its softmax, and its gradient, finite.
        attend = attend | ~jnp.any(attend, axis=-1, keepdims=True)
        tapped, keys, values = None, [], []
        for index in range(first, stop):
            if index == tap:
                tapped = x
            slot = None if cache is None else (cache.keys[index], cache.values[index], cache.length)
            x, key, value = self.layer[index](x, position, attend, slot)
            keys.append(key)
            values.append(value)
        if tap == stop:
            tapped = x
        if last is None:
            x = self.final_norm(x)
        if cache is not None:
            cache = Cache(
                cache.keys[:first] + tuple(keys) + cache.keys[stop:],
                cache.values[:first] + tuple(values) + cache.values[stop:],
                seen,
                cache.length + tokens,
            )
        return Output(x, tapped, cache)

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in float32 of hidden states [..., D] after the final norm."""
        table = self.embed if self.config.tie_embeddings else self.head
        return table.attend(hidden).astype(jnp.float32)

    def initialise(self, tokens: Array, mask: Array) -> Array:
        """Touches every parameter, for `init`; returns logits."""
        return self.logits(self(tokens, mask).hidden)
