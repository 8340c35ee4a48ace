"""Logits in, logits out: the transformations between a model's distribution and the one sampled from.

Each takes logits [..., V] and returns logits [..., V]; excluded tokens become -inf, and at least one token survives.
Compose them by calling them in order: ``lambda logits: top_p(temperature(logits, 0.7), 0.95)``. Knobs are traced, so
that they can be swept without compiling again, and may differ by row: an array [..., 1].

`top_k` and `top_p` look for their threshold by bisection over the float32 numbers between the smallest and the largest
logit, 32 passes over the vocabulary. It finds the very threshold that sorting would find, and costs a small part of it.

What depends on the tokens written so far is in `rlhf_jax.generation.history`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["logit_bias", "min_p", "temperature", "top_k", "top_p"]


def temperature(logits: Array, value: ArrayLike) -> Array:
    """Logits of p^(1/value), renormalised: logits / value. 1 changes nothing, towards 0 only the best token remains.

    >>> temperature(jnp.array([1.0, 2.0]), 0.5).tolist()
    [2.0, 4.0]
    """
    return logits / value


def logit_bias(logits: Array, tokens: Array, bias: ArrayLike) -> Array:
    """Adds a bias to the logits of some tokens; -inf excludes them. An empty list changes nothing.

    Args:
      logits: [..., V].
      tokens: [K] int ids; one that occurs twice gets both biases.
      bias: [K] or a scalar.
    Returns:
      [..., V].

    >>> logit_bias(jnp.zeros(3), jnp.array([0, 2]), jnp.array([1.0, -jnp.inf])).tolist()
    [1.0, 0.0, -inf]
    """
    added = jnp.zeros(logits.shape[-1:], logits.dtype).at[tokens].add(bias)
    return logits + added.reshape((1,) * (logits.ndim - 1) + added.shape)


def _ordered(x: Array) -> Array:
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _number(ordered: Array) -> Array:
    """The inverse of `_ordered`."""
    bits = jnp.where(ordered >> 31 == 1, ordered ^ jnp.uint32(1 << 31), ~ordered)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _keep_above_threshold(logits: Array, enough: Callable[[Array], Array]) -> Array:
    """Keeps the logits >= t, for the largest t [..., 1] with enough(logits >= t); all finite ones if there is none."""
    wide = logits.astype(jnp.float32)
    best = jnp.max(wide, axis=-1, keepdims=True)
    least = jnp.min(jnp.where(wide == -jnp.inf, best, wide), axis=-1, keepdims=True)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = high - ((high - low) >> 1)
        holds = enough(wide >= _number(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, jnp.maximum(middle, low + 1) - 1)

    threshold, _ = jax.lax.fori_loop(0, 32, halve, (_ordered(least), _ordered(best)))
    return jnp.where(wide >= _number(threshold), logits, -jnp.inf)


def top_k(logits: Array, k: ArrayLike) -> Array:
    """Keeps the k most likely tokens, and those tied with the k-th. k = V changes nothing, k = 1 is greedy.

    Args:
      logits: [..., V].
      k: how many, 1 <= k <= V.
    Returns:
      [..., V].
    Raises: ValueError if k is a Python int out of range.
    Reference: Fan et al. 2018, section 3.4, https://arxiv.org/abs/1805.04833

    >>> top_k(jnp.array([3.0, 1.0, 2.0]), 2).tolist()
    [3.0, -inf, 2.0]
    """
    if isinstance(k, int) and not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie in 1..{logits.shape[-1]} (the vocabulary), got {k}")
    return _keep_above_threshold(logits, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= k)


def top_p(logits: Array, p: ArrayLike) -> Array:
    """Keeps the smallest set of most likely tokens whose mass reaches p, the nucleus.

    The token that crosses p stays, so at least one token does; tokens tied with the last kept one stay too. p = 1 keeps
    every token, p = 0 the best one. Masses are float32 sums, so that a token whose inclusion depends on less than 1e-6
    of mass may fall on either side.

    Args:
      logits: [..., V].
      p: mass, 0 <= p <= 1.
    Returns:
      [..., V].
    Reference: Holtzman et al. 2020, section 3.1, https://arxiv.org/abs/1904.09751

    >>> top_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.6).round(2).tolist()
    [-0.69, -1.2, -inf]
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    mass = lambda kept: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1, keepdims=True)
    nucleus = _keep_above_threshold(logits, lambda kept: mass(kept) >= p)
    return jnp.where(jnp.asarray(p) >= 1.0, logits, nucleus)


def min_p(logits: Array, p: ArrayLike) -> Array:
    """Keeps tokens at least p times as likely as the most likely one. p = 0 keeps every token, p = 1 the best one.

    Args:
      logits: [..., V].
      p: share of the best token's probability, 0 <= p <= 1.
    Returns:
      [..., V].
    Reference: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082

    >>> min_p(jnp.log(jnp.array([0.6, 0.3, 0.1])), 0.4).round(2).tolist()
    [-0.51, -1.2, -inf]
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= best + jnp.log(p), logits, -jnp.inf)
