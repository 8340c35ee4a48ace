"""One decoder-only transformer in Flax Linen, with its key-value cache as an explicit pytree.

The model is used in three ways, all through `Transformer.__call__`:

* training and scoring: tokens and mask in, hidden states out (`cache=None`);
* generation: the same call with a `Cache`, which it returns extended (prefill with many tokens, decode with one);
* partially: ``first`` and ``last`` run a slice of the layers, so that a frozen lower part (the trunk) is computed once
  and its activations are shared by actor, critic, reference and reward model.

Hidden states and not logits come back, because [B, T, V] is what runs out of memory: pass them with `output_table` to
`rlhf_jax.logprobs.head_log_probs`, or call `Transformer.logits` for the few positions that need all of V.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rlhf_jax.models.attention import Attention, visible
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.fused_attention import Kernel, by_backend
from rlhf_jax.models.layers import MLP, Norm, soft_cap
from rlhf_jax.models.moe import MixtureOfExperts
from rlhf_jax.models.rotary import Rotation, rotation

__all__ = ["Cache", "Output", "Transformer", "TransformerConfig", "init_cache", "output_table", "positions"]


class Cache(NamedTuple):
    """Keys and values of the slots written so far. S is the capacity; slots are filled from the left."""

    keys: tuple[Array, ...]  # per layer [B, kv_heads, S, head_dim]
    values: tuple[Array, ...]  # per layer [B, kv_heads, S, head_dim]
    mask: Array  # [B, S] bool, slots that hold a real token
    length: Array  # [] int32, slots written

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return self.mask.shape[-1]

    def extended(self, span: "Span", first: int, keys: Sequence[Array], values: Sequence[Array]) -> "Cache":
        """The cache after layers first, first + 1, ... have written the tokens of `span`."""
        stop = first + len(keys)
        return Cache(
            self.keys[:first] + tuple(keys) + self.keys[stop:],
            self.values[:first] + tuple(values) + self.values[stop:],
            span.seen,
            self.length + span.position.shape[-1],
        )


class Span(NamedTuple):
    """Where T new tokens stand among the S slots they may attend to."""

    position: Array  # [B, T] int32, of the new tokens among their row's real tokens
    seen: Array  # [B, S] bool, slots that hold a real token
    seen_position: Array  # [B, S] int32
    reach: Array  # [1 or B, T, S] bool, slots that are not after the token, and of its segment


class Output(NamedTuple):
    """What one call computes."""

    hidden: Array  # [B, T, D] after the final norm, or the activations entering layer `last` if that comes earlier
    tap: Array | None  # [B, T, D] activations entering layer `tap`, if it was asked for
    cache: Cache | None  # the extended cache, if one was given


def init_cache(config: TransformerConfig, batch: int, capacity: int, *, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` slots.

    Raises: ValueError if the model has a table of learned positions and the capacity goes beyond it.
    """
    _check_length(config, capacity)
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
    return Cache(empty, empty, jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))


def written(mask: Array, cache: Cache | None, segments: Array | None = None) -> Span:
    """The new tokens of mask [B, T] by themselves, in segments [B, T], or behind the slots of a cache."""
    tokens = mask.shape[-1]
    if cache is None:
        position = positions(mask, segments)
        reach = jnp.tril(jnp.ones((tokens, tokens), bool))[None]
        if segments is not None:
            reach = reach & (segments[:, :, None] == segments[:, None])
        return Span(position, mask, position, reach)
    if segments is not None:
        raise ValueError("segments and a cache exclude each other: a cache holds one text per row")
    seen = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.length, axis=1)
    seen_position = positions(seen)
    position = jax.lax.dynamic_slice_in_dim(seen_position, cache.length, tokens, axis=1)
    new = cache.length + jnp.arange(tokens)
    return Span(position, seen, seen_position, (jnp.arange(cache.capacity)[None] <= new[:, None])[None])


def within(mask: Array, segments: Array | None) -> Array:
    """The real tokens of the mask that belong to a segment."""
    if segments is None:
        return mask
    if segments.shape != mask.shape:
        raise ValueError(f"segments must have the shape of the mask, {mask.shape}, got {segments.shape}")
    return mask & (segments > 0)


def _check_length(config: TransformerConfig, slots: int) -> None:
    if config.learned_positions and slots > config.max_length:
        raise ValueError(f"this model has positions for {config.max_length} tokens, got {slots} slots")


def positions(mask: Array, segments: Array | None = None) -> Array:
    """Position of each token among the real tokens of its row, or of its segment.

    Padding gets the position of its left neighbour, at least 0. So left padding does not shift a prompt.

    Args:
      mask: [B, T] bool, real tokens.
      segments: [B, T] int, the text that each slot belongs to, if a row holds several one behind the other.
    Returns:
      [B, T] int32.

    >>> positions(jnp.array([[False, True, True]])).tolist()
    [[0, 0, 1]]
    >>> positions(jnp.ones((1, 5), bool), jnp.array([[1, 1, 1, 2, 2]])).tolist()
    [[0, 1, 2, 0, 1]]
    """
    real = mask.astype(jnp.int32)
    count = jnp.cumsum(real, axis=-1)
    if segments is not None:
        starts = jnp.diff(segments, axis=-1, prepend=segments[:, :1]) != 0
        count = count - jax.lax.cummax(jnp.where(starts, count - real, 0), axis=1)
    return jnp.maximum(count - 1, 0)


def rotations(
    config: TransformerConfig, position: Array, segments: Array | None, window: int | None
) -> Rotation | None:
    """How layers of a window turn queries and keys; None for a model of learned positions."""
    if config.learned_positions:
        return None
    if window is not None and config.local_rope_theta is not None:
        return rotation(position, config.rotary_dim, config.local_rope_theta)
    return rotation(position, config.rotary_dim, config.rope_theta, config.rope_scaling, segments)


def texts(mask: Array, segments: Array | None) -> Array:
    """[B, T] int32: the segment of every token, 1 without segments, and 0 for padding."""
    return jnp.where(mask, 1 if segments is None else segments, 0).astype(jnp.int32)


@functools.cache
def kernel_of(kernel: Kernel | None, window: int | None) -> Kernel | None:
    """The kernel for layers of a window: the same one for the same window, so that their traces are shared."""
    return None if kernel is None else functools.partial(kernel, window=window)


def output_table(params: dict) -> Array:
    """[V, D] rows that hidden states are multiplied with for logits: the tied embedding, or the untied head."""
    return params["head"]["embedding"] if "head" in params else params["embed"]["embedding"]


@nn.jit  # traced once for all layers and calls of the same shapes; XLA inlines it
class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)); both may be normalised once more."""

    config: TransformerConfig
    sparse: bool = False
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
        """As `Attention`: output, keys and values."""
        config = self.config
        norm = lambda name: Norm(config.norm, config.norm_epsilon, config.norm_offset, name=name)
        after = lambda name, y: norm(name)(y) if config.post_norms else y
        attention = Attention(config, self.kernel, name="attention")
        mixed, keys, values = attention(norm("attention_norm")(x), turn, allowed, slot, bias, text)
        x = x + after("attention_post_norm", mixed)
        mlp = MixtureOfExperts(config, name="mlp") if self.sparse else MLP(config, name="mlp")
        return x + after("mlp_post_norm", mlp(norm("mlp_norm")(x))), keys, values


class Transformer(nn.Module):
    """Decoder-only language model.

    Attributes:
      config: its shape.
      remat: recomputes each block in the backward pass instead of keeping what its forward pass computed. A policy of
        `jax.checkpoint_policies` says what is kept all the same; None keeps everything. The numbers are the same.
      kernel: attention among tokens without a cache, of `fused_attention`; None always forms the scores.
    """

    config: TransformerConfig
    remat: Callable[..., Any] | None = None
    kernel: Kernel | None = by_backend

    if TYPE_CHECKING:  # Linen cannot say that without mutable collections `apply` returns what the method does

        def apply(self, *args: Any, **kwargs: Any) -> Any: ...

    def setup(self) -> None:
        config = self.config
        table = lambda rows: nn.Embed(rows, config.width, embedding_init=nn.initializers.normal(0.02))
        block = Block if self.remat is None else nn.remat(Block, policy=self.remat)
        self.embed = table(config.vocab_size)
        if config.learned_positions:
            self.position_embed = table(config.max_length)
        self.layer = [
            block(config, config.is_sparse(index), kernel_of(self.kernel, config.window(index)))
            for index in range(config.num_layers)
        ]
        self.final_norm = Norm(config.norm, config.norm_epsilon, config.norm_offset)
        if not config.tie_embeddings:
            self.head = table(config.vocab_size)

    def __call__(
        self,
        inputs: Array,
        mask: Array,
        *,
        cache: Cache | None = None,
        segments: Array | None = None,
        first: int = 0,
        last: int | None = None,
        tap: int | None = None,
    ) -> Output:
        """Runs layers first..last-1 over T new tokens.

        Args:
          inputs: [B, T] int tokens if first == 0, else [B, T, D] activations entering layer `first`.
          mask: [B, T] bool, real tokens. Padding may stand anywhere; nothing attends to it.
          cache: earlier slots to attend to; the T tokens are written behind them.
          segments: [B, T] int, several texts packed into a row one behind the other: 0 for padding, 1, 2, ... for the
            texts. A token sees its own text only and positions begin anew with each, so that every text gets the
            states that it gets in a row of its own. None for one text per row.
          first: first layer to run.
          last: layer to stop before; None runs to the end and applies the final norm.
          tap: layer whose incoming activations are returned too, first <= tap <= num_layers.
        Returns:
          `Output`; hidden states of padding are finite and meaningless.
        Raises:
          ValueError: more slots than the model has learned positions for, segments that are not of the mask's shape,
            or segments together with a cache.
        """
        config = self.config
        stop = config.num_layers if last is None else last
        mask = within(mask, segments)
        span = written(mask, cache, segments)
        windows = {config.window(index) for index in range(first, stop)}
        allowed = {window: visible(*span, window) for window in windows}
        turns = {window: rotations(config, span.position, segments, window) for window in windows}
        text = None if cache is not None else texts(mask, segments)

        x = inputs if first else self._embed(inputs, mask, span.position)
        tapped, keys, values = None, [], []
        for index in range(first, stop):
            if index == tap:
                tapped = x
            slot = None if cache is None else (cache.keys[index], cache.values[index], cache.length)
            window = config.window(index)
            x, key, value = self.layer[index](x, turns[window], allowed[window], slot, None, text)
            keys.append(key)
            values.append(value)
        if tap == stop:
            tapped = x
        if last is None:
            x = self.final_norm(x)
        return Output(x, tapped, None if cache is None else cache.extended(span, first, keys, values))

    def _embed(self, tokens: Array, mask: Array, position: Array) -> Array:
        """[B, T, D] activations entering layer 0."""
        config = self.config
        # Padding is embedded as token 0: its id may lie outside the vocabulary.
        x = self.embed(jnp.where(mask, tokens, 0))
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.learned_positions:
            _check_length(config, mask.shape[-1])
            x = x + self.position_embed(position)
        return x

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in float32 of hidden states [..., D] after the final norm."""
        table = self.embed if self.config.tie_embeddings else self.head
        return soft_cap(table.attend(hidden).astype(jnp.float32), self.config.logit_soft_cap)

    def initialise(self, tokens: Array, mask: Array) -> Array:
        """Touches every parameter, for `init`; returns logits."""
        return self.logits(self(tokens, mask).hidden)
