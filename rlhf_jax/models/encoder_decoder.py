"""An encoder-decoder of the T5 type, for tasks with a source and a target such as translation.

The encoder reads the source once. What every decoder layer needs of it, keys and values, is a `Memory`; the decoder
then runs like a `rlhf_jax.models.transformer.Transformer` on target tokens, with the same `Cache` and `Output`:

* scoring: ``model.apply(v, source, source_mask, target, target_mask)``, where `target` begins with the start token;
* generation: `Decoder` is what `rlhf_jax.generation.sampler.generate` takes for a model, with the memory among its
  parameters and a prompt that is the start token alone.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rlhf_jax.models.attention import Attention, attend, visible
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.layers import MLP, Norm
from rlhf_jax.models.linear import Dense
from rlhf_jax.models.relative import RelativeBias
from rlhf_jax.models.transformer import Block, Cache, Output, positions, written

__all__ = ["Decoder", "EncoderDecoder", "EncoderDecoderConfig", "Memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Shape of an encoder-decoder with relative positions; the defaults are those of T5 1.1."""

    vocab_size: int
    width: int
    num_layers: int  # of the decoder
    num_encoder_layers: int
    num_heads: int
    head_dim: int
    mlp_width: int
    activation: str = "gelu_tanh"
    gated: bool = True
    norm_epsilon: float = 1e-6
    relative_buckets: int = 32
    relative_distance: int = 128
    tie_embeddings: bool = False
    scale_output: bool = False  # hidden states are multiplied by width^-0.5 before the output table (T5 1.0)
    family: str | None = None

    # What a `Cache` is made from.
    learned_positions = False

    @property
    def num_kv_heads(self) -> int:
        """Every head has its own keys."""
        return self.num_heads

    @property
    def layer(self) -> TransformerConfig:
        """The shape of one layer: no rotation, scores that are not scaled."""
        shared = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        shared += ("activation", "gated", "norm_epsilon")
        return TransformerConfig(
            **{name: getattr(self, name) for name in shared}, query_scale=1.0, learned_positions=True
        )


class Memory(NamedTuple):
    """What the decoder needs of a source."""

    keys: tuple[Array, ...]  # per decoder layer [B, heads, S, head_dim]
    values: tuple[Array, ...]  # per decoder layer [B, heads, S, head_dim]
    mask: Array  # [B, S] bool, real source tokens


class CrossAttention(nn.Module):
    """Attention from the target to the source."""

    config: TransformerConfig

    def setup(self) -> None:
        inner = self.config.num_heads * self.config.head_dim
        self.query, self.key, self.value = (Dense(inner, use_bias=False) for _ in range(3))
        self.out = Dense(self.config.width, use_bias=False)

    def memory(self, encoded: Array) -> tuple[Array, Array]:
        """encoded [B, S, D] -> keys and values [B, heads, S, head_dim]."""
        heads_first = lambda x: jnp.swapaxes(self._heads(x), 1, 2)
        return heads_first(self.key(encoded)), heads_first(self.value(encoded))

    def __call__(self, x: Array, keys: Array, values: Array, allowed: Array) -> Array:
        """x [B, T, D], keys and values of `memory`, allowed [B, T, S] bool -> [B, T, D]."""
        query = self._heads(self.query(x))
        mixed = attend(query, keys.astype(x.dtype), values.astype(x.dtype), allowed, scale=1.0)
        return self.out(mixed.reshape(*x.shape[:-1], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


class DecoderBlock(nn.Module):
    """Self-attention, attention to the source, MLP; each behind a norm and beside the residual."""

    config: TransformerConfig

    def setup(self) -> None:
        norm = lambda: Norm(epsilon=self.config.norm_epsilon)
        self.attention_norm, self.cross_norm, self.mlp_norm = norm(), norm(), norm()
        self.attention, self.cross, self.mlp = Attention(self.config), CrossAttention(self.config), MLP(self.config)

    def __call__(
        self,
        x: Array,
        allowed: Array,
        slot: tuple[Array, Array, Array] | None,
        bias: Array,
        memory: tuple[Array, Array, Array],
    ) -> tuple[Array, Array, Array]:
        """memory is (keys, values, which source tokens each query sees)."""
        mixed, keys, values = self.attention(self.attention_norm(x), None, allowed, slot, bias)
        x = x + mixed
        x = x + self.cross(self.cross_norm(x), *memory)
        return x + self.mlp(self.mlp_norm(x)), keys, values

    def memory(self, encoded: Array) -> tuple[Array, Array]:
        """Keys and values of the source for this layer."""
        return self.cross.memory(encoded)


class EncoderDecoder(nn.Module):
    """Sequence-to-sequence language model."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        config = self.config
        layer = config.layer
        table = lambda: nn.Embed(config.vocab_size, config.width, embedding_init=nn.initializers.normal(1.0))
        norm = lambda: Norm(epsilon=config.norm_epsilon)
        self.embed = table()
        self.encoder = [Block(layer) for _ in range(config.num_encoder_layers)]
        self.encoder_bias, self.encoder_norm = self._bias(both_ways=True), norm()
        self.decoder = [DecoderBlock(layer) for _ in range(config.num_layers)]
        self.decoder_bias, self.final_norm = self._bias(both_ways=False), norm()
        if not config.tie_embeddings:
            self.head = table()

    def _bias(self, *, both_ways: bool) -> RelativeBias:
        config = self.config
        return RelativeBias(config.num_heads, config.relative_buckets, config.relative_distance, both_ways)

    def encode(self, source: Array, mask: Array) -> Array:
        """source [B, S] int, mask [B, S] bool -> [B, S, D]. Padding may stand anywhere."""
        x = self.embed(jnp.where(mask, source, 0))
        place = positions(mask)
        allowed = visible(place, mask, place, jnp.ones((1, mask.shape[-1], mask.shape[-1]), bool), None)
        bias = self.encoder_bias(place, place)
        for block in self.encoder:
            x, _, _ = block(x, None, allowed, None, bias)
        return self.encoder_norm(x)

    def memory(self, source: Array, mask: Array) -> Memory:
        """Encodes a source and prepares it for every decoder layer."""
        encoded = self.encode(source, mask)
        keys, values = zip(*(block.memory(encoded) for block in self.decoder), strict=True)
        return Memory(keys, values, mask)

    def decode(
        self,
        inputs: Array,
        mask: Array,
        memory: Memory,
        *,
        cache: Cache | None = None,
        segments: Array | None = None,
        first: int = 0,
        last: int | None = None,
        tap: int | None = None,
    ) -> Output:
        """Runs decoder layers first..last-1 over T target tokens; the arguments are those of `Transformer.__call__`.

        Args:
          inputs: [B, T] int tokens if first == 0, else [B, T, D] activations entering layer `first`.
          mask: [B, T] bool, real tokens; the start token is one.
          memory: of the source.
          cache: earlier target tokens, from `init_cache(config, ...)`.
          segments: only None: a row is one source and one target, and what is short goes into a bucket of its length.
          first: first layer to run.
          last: layer to stop before; None runs to the end and applies the final norm.
          tap: layer whose incoming activations are returned too.
        Raises:
          ValueError: there are segments.
        """
        if segments is not None:
            raise ValueError(
                "an encoder-decoder takes no segments: a row is one source and one target; do not pack the rows, put "
                "them into buckets by length (rlhf_jax.data.choose_buckets)"
            )
        stop = self.config.num_layers if last is None else last
        span = written(mask, cache)
        allowed = visible(*span, None)
        bias = self.decoder_bias(span.position, span.seen_position)
        sources = jnp.broadcast_to(memory.mask[:, None], (*mask.shape, memory.mask.shape[-1]))
        sources = sources | ~jnp.any(sources, axis=-1, keepdims=True)  # an empty source keeps its softmax finite
        x = inputs if first else self.embed(jnp.where(mask, inputs, 0))
        tapped, keys, values = None, [], []
        for index in range(first, stop):
            if index == tap:
                tapped = x
            slot = None if cache is None else (cache.keys[index], cache.values[index], cache.length)
            x, key, value = self.decoder[index](
                x, allowed, slot, bias, (memory.keys[index], memory.values[index], sources)
            )
            keys.append(key)
            values.append(value)
        if tap == stop:
            tapped = x
        if last is None:
            x = self.final_norm(x)
            if self.config.scale_output:
                x = x * self.config.width**-0.5
        return Output(x, tapped, None if cache is None else cache.extended(span, first, keys, values))

    def __call__(self, source: Array, source_mask: Array, target: Array, target_mask: Array, **slices: Any) -> Output:
        """decode(target, target_mask, memory(source, source_mask)): hidden states that predict the next target token.

        Args:
          source: [B, S] int.
          source_mask: [B, S] bool.
          target: [B, T] int, beginning with the start token.
          target_mask: [B, T] bool.
          **slices: first, last and tap of `decode`.
        """
        return self.decode(target, target_mask, self.memory(source, source_mask), **slices)

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in float32 of hidden states [..., D] after the final norm."""
        table = self.embed if self.config.tie_embeddings else self.head
        return table.attend(hidden).astype(jnp.float32)

    def initialise(self, source: Array, source_mask: Array, target: Array, target_mask: Array) -> Array:
        """Touches every parameter, for `init`; returns logits."""
        return self.logits(self(source, source_mask, target, target_mask).hidden)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The decoder alone, as a model whose parameters are ``{"model": params, "memory": Memory}``.

    It has what generation asks of a `Transformer`: `config`, and `apply` on tokens, mask and cache.
    """

    model: EncoderDecoder

    @property
    def config(self) -> EncoderDecoderConfig:
        """The model's shape."""
        return self.model.config

    def apply(self, variables: dict[str, Any], *arguments: Array, method: str = "decode", **options: Any) -> Any:
        """`decode` on (tokens, mask), or `logits` on hidden states."""
        held = variables["params"]
        if method == "decode":
            arguments = (*arguments, held["memory"])
        return self.model.apply({"params": held["model"]}, *arguments, method=method, **options)
