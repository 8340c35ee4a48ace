"""Log-probabilities straight from hidden states and a head, in vocabulary chunks: [B, T, V] never exists.

The softmax over the vocabulary is computed as attention is in memory-efficient kernels: a scan visits the head in
chunks of C tokens, holds [tokens, C] logits, and keeps a running maximum and running sums. The gradient with respect to
the hidden states, e_y - Σ_v p_v e_v, is one more running sum of the same pass, so that with a frozen head forward and
backward cost what dense autodiff costs: two products. The gradient of the head is a separate pass over the chunks that
recomputes their logits; `jax.jit` removes it where nobody asks for it.

Conventions: `kernel` is [D, V] with ``vocabulary_axis=1`` (a Dense kernel, the default), or [V, D] with
``vocabulary_axis=0`` (a tied embedding table, used as it lies, never transposed). Inputs sharded over the batch stay
sharded. Sums are float32 also for bfloat16 inputs. Reverse-mode derivatives only.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

__all__ = ["head_log_probs"]

Carry = TypeVar("Carry")

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 logits: larger falls out of the cache, smaller starves the matrix product
_SMALLEST_CHUNK = 512


class Plan(NamedTuple):
    """How the vocabulary is cut; static."""

    axis: int  # where the vocabulary lies in the kernel
    size: int  # V
    chunk: int  # C; chunks count * C >= V, the last one overlaps its neighbour
    count: int  # number of chunks


def plan_chunks(hidden: Array, kernel: Array, *, vocabulary_axis: int, chunk: int | None) -> Plan:
    """Checks a head against its hidden states and cuts the vocabulary into equal chunks.

    Args:
      hidden: [..., D].
      kernel: [D, V], or [V, D] with ``vocabulary_axis=0``.
      vocabulary_axis: 0 or 1.
      chunk: C, or None for as many logits as stay in the cache.
    Raises:
      ValueError: for a kernel, axis or chunk that does not fit.
    """
    if vocabulary_axis not in (0, 1):
        raise ValueError(f"vocabulary_axis must be 0 (kernel [V, D]) or 1 (kernel [D, V]), got {vocabulary_axis!r}")
    if kernel.ndim != 2 or kernel.shape[1 - vocabulary_axis] != hidden.shape[-1]:
        expected = "[D, V]" if vocabulary_axis else "[V, D]"
        raise ValueError(f"kernel must be {expected} with D = {hidden.shape[-1]}, got shape {kernel.shape}")
    size = kernel.shape[vocabulary_axis]
    if chunk is None:
        tokens = max(math.prod(hidden.shape[:-1]), 1)
        count = math.ceil(size / max(_CHUNK_ELEMENTS // tokens, _SMALLEST_CHUNK))
        chunk = min(math.ceil(size / count / 16) * 16, size)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a positive int or None, got {chunk!r}")
    chunk = min(chunk, size)
    return Plan(vocabulary_axis, size, chunk, math.ceil(size / chunk))


class Block(NamedTuple):
    """One chunk of a head and the logits it gives."""

    start: Array  # [] first token of the chunk
    embeddings: Array  # [C, D] or [D, C]
    logits: Array  # [N, C] scaled, at least float32
    fresh: Array | None  # [C] bool, tokens that no earlier chunk has seen; None if all are


def wide(*arrays: Array) -> jnp.dtype:
    """The dtype in which sums are kept: at least float32."""
    return jnp.result_type(jnp.float32, *arrays)


def logits_block(plan: Plan, index: Array, hidden: Array, kernel: Array, scale: ArrayLike) -> Block:
    """Chunk number `index`: its slice of the kernel and scale * hidden · kernel."""
    start = jnp.minimum(index * plan.chunk, plan.size - plan.chunk)
    embeddings = lax.dynamic_slice_in_dim(kernel, start, plan.chunk, plan.axis)
    dtype = jnp.result_type(hidden, kernel)
    contract = (((1,), (1 - plan.axis,)), ((), ()))
    logits = lax.dot_general(
        hidden.astype(dtype), embeddings.astype(dtype), contract, preferred_element_type=wide(hidden, kernel)
    )
    fresh = None
    if plan.count * plan.chunk != plan.size:
        fresh = start + jnp.arange(plan.chunk) >= index * plan.chunk
    return Block(start, embeddings, logits * scale, fresh)


def unseen(block: Block, x: Array, fill: ArrayLike) -> Array:
    """x [N, C] with `fill` in the columns that an earlier chunk has already counted."""
    return x if block.fresh is None else jnp.where(block.fresh[None], x, fill)


def weighted_embeddings(plan: Plan, weights: Array, embeddings: Array) -> Array:
    """Σ_v weights_v e_v: [N, C] with a chunk of the kernel -> [N, D]."""
    return lax.dot_general(weights, embeddings.astype(weights.dtype), (((1,), (plan.axis,)), ((), ())))


def is_token(block: Block, tokens: Array) -> Array:
    """[N, C] bool, where a column is the row's token."""
    return (block.start + jnp.arange(block.logits.shape[-1]))[None] == tokens[:, None]


def fold(plan: Plan, step: Callable[[Carry, Array], Carry], carry: Carry) -> Carry:
    """Runs ``carry = step(carry, chunk index)`` over all chunks; one chunk needs no loop."""
    if plan.count == 1:
        return step(carry, jnp.int32(0))
    return lax.scan(lambda c, i: (step(c, i), None), carry, jnp.arange(plan.count))[0]


def kernel_gradient(plan: Plan, hidden: Array, kernel: Array, logits_gradient: Callable[[Array], tuple]) -> Array:
    """Σ_n (∂ / ∂ logits)ᵀ hidden, chunk by chunk, written once in the kernel's own layout.

    `logits_gradient` maps a chunk index to (first token, [N, C] gradient with respect to the unscaled logits).
    """

    def step(gradient: Array, index: Array) -> Array:
        start, block = logits_gradient(index)
        left, right = (block, hidden) if plan.axis == 0 else (hidden, block)
        part = lax.dot_general(left.astype(wide(hidden)), right.astype(wide(hidden)), (((0,), (0,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(gradient, part.astype(gradient.dtype), start, plan.axis)

    return fold(plan, step, jnp.zeros_like(kernel))


# --- log-probability of one token -------------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """Running softmax statistics of rows of logits."""

    maximum: Array  # [N]
    total: Array  # [N] Σ exp(logit - maximum)

    @property
    def log_normaliser(self) -> Array:
        """[N] log Σ exp(logit)."""
        return self.maximum + jnp.log(self.total)


def init_softmax(rows: int, dtype: jnp.dtype) -> Softmax:
    """Statistics of no logits at all."""
    return Softmax(jnp.full(rows, jnp.finfo(dtype).min, dtype), jnp.zeros(rows, dtype))


def update_softmax(softmax: Softmax, block: Block) -> tuple[Softmax, Array, Array]:
    """(new statistics, decay [N] of older sums, exp(logit - new maximum) [N, C], 0 for columns already counted)."""
    logits = unseen(block, block.logits, -jnp.inf)
    maximum = jnp.maximum(softmax.maximum, jnp.max(logits, axis=-1))
    decay = jnp.exp(softmax.maximum - maximum)
    weights = jnp.exp(logits - maximum[:, None])
    return Softmax(maximum, softmax.total * decay + jnp.sum(weights, axis=-1)), decay, weights


def token_embeddings(plan: Plan, kernel: Array, tokens: Array) -> Array:
    """[N, D] the head's vectors of the tokens; NaN for an id outside [0, V)."""
    inside = jnp.where(tokens < 0, plan.size, tokens)
    rows = jnp.take(kernel, inside, axis=plan.axis, mode="fill", fill_value=jnp.nan)
    return rows.astype(wide(kernel)) if plan.axis == 0 else rows.T.astype(wide(kernel))


def _log_probs_value(plan: Plan, hidden: Array, kernel: Array, tokens: Array, scale: Array) -> Array:
    dtype = wide(hidden, kernel)

    def step(softmax: Softmax, index: Array) -> Softmax:
        return update_softmax(softmax, logits_block(plan, index, hidden, kernel, scale))[0]

    softmax = fold(plan, step, init_softmax(hidden.shape[0], dtype))
    chosen = jnp.sum(hidden.astype(dtype) * token_embeddings(plan, kernel, tokens), axis=-1)
    return chosen * scale - softmax.log_normaliser


def _log_probs_forward(plan: Plan, hidden: Array, kernel: Array, tokens: Array, scale: Array):
    dtype = wide(hidden, kernel)

    def step(carry: tuple[Softmax, Array], index: Array) -> tuple[Softmax, Array]:
        softmax, expected = carry
        block = logits_block(plan, index, hidden, kernel, scale)
        softmax, decay, weights = update_softmax(softmax, block)
        return softmax, expected * decay[:, None] + weighted_embeddings(plan, weights, block.embeddings)

    softmax, expected = fold(plan, step, (init_softmax(hidden.shape[0], dtype), jnp.zeros(hidden.shape, dtype)))
    embeddings = token_embeddings(plan, kernel, tokens)
    log_probs = jnp.sum(hidden.astype(dtype) * embeddings, axis=-1) * scale - softmax.log_normaliser
    slope = embeddings - expected / softmax.total[:, None]  # of log_probs / scale, with respect to hidden
    return log_probs, (hidden, kernel, tokens, scale, softmax.log_normaliser, slope)


def _log_probs_backward(plan: Plan, residuals, cotangent: Array):
    hidden, kernel, tokens, scale, log_normaliser, slope = residuals
    used = cotangent != 0  # a slot that nobody uses may hold anything, NaN included
    slope = jnp.where(used[:, None], slope, 0.0)
    clean = jnp.where(used[:, None], hidden, 0)
    hidden_gradient = (cotangent * scale)[:, None] * slope
    scale_gradient = jnp.sum(cotangent * jnp.sum(clean.astype(slope.dtype) * slope, axis=-1))
    log_normaliser = jnp.where(used, log_normaliser, jnp.inf)

    def logits_gradient(index: Array) -> tuple[Array, Array]:
        block = logits_block(plan, index, clean, kernel, scale)
        probs = jnp.exp(block.logits - log_normaliser[:, None])
        return block.start, (cotangent * scale)[:, None] * (is_token(block, tokens) - probs)

    gradient = kernel_gradient(plan, clean, kernel, logits_gradient)
    return hidden_gradient.astype(hidden.dtype), gradient, None, scale_gradient.astype(scale.dtype)


_log_probs = jax.custom_vjp(_log_probs_value, nondiff_argnums=(0,))
_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def head_log_probs(
    hidden: Array,
    kernel: Array,
    tokens: Array,
    *,
    temperature: ArrayLike = 1.0,
    vocabulary_axis: int = 1,
    chunk: int | None = None,
) -> Array:
    """Log-probability of each token from hidden states: log softmax(hidden · kernel / τ)[token], without the logits.

    Equals ``token_log_probs(hidden @ kernel, tokens)`` in value and in the gradients of hidden, kernel and τ. A token
    id outside [0, V) gives NaN. A slot whose cotangent is exactly 0 (masked later) adds nothing to the kernel's
    gradient, even if its hidden state is NaN.

    Args:
      hidden: [..., D] states that predict `tokens` (aligned: no shift here).
      kernel: [D, V] the head; with ``vocabulary_axis=0`` [V, D], for instance a tied embedding table.
      tokens: [...] int ids.
      temperature: τ, divides the logits.
      vocabulary_axis: 1 or 0, where V lies in `kernel`; static.
      chunk: logits per token held at once, static; None chooses by the number of tokens.
    Returns:
      [...] float32 log-probs (float64 for float64 inputs).
    Raises:
      ValueError: for a kernel, axis or chunk that does not fit.
      TypeError: for tokens that are not integers.

    >>> hidden, kernel = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    >>> round(float(head_log_probs(hidden, kernel, jnp.array([0]))[0]), 4)
    -0.4076
    """
    hidden, kernel, tokens = jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(tokens)
    plan = plan_chunks(hidden, kernel, vocabulary_axis=vocabulary_axis, chunk=chunk)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got dtype {tokens.dtype}")
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(f"tokens must be {hidden.shape[:-1]} like hidden without its last axis, got {tokens.shape}")
    scale = jnp.asarray(1.0 / jnp.asarray(temperature, wide(hidden, kernel)))
    flat = _log_probs(plan, hidden.reshape(-1, hidden.shape[-1]), kernel, tokens.reshape(-1), scale)
    return flat.reshape(tokens.shape)
