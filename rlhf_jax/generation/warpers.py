"""Logits in, logits out: the transformations between a model's distribution and the one sampled from.

Each takes logits [..., V] and returns logits [..., V]; excluded tokens become -inf. Compose them by calling them in
order: ``lambda logits: top_p(temperature(logits, 0.7), 0.95)``.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["min_p", "temperature", "top_k", "top_p"]


def temperature(logits: Array, value: ArrayLike) -> Array:
    """Logits of p^(1/value), renormalised: logits / value. 1 changes nothing, towards 0 only the best token remains.

    >>> temperature(jnp.array([1.0, 2.0]), 0.5).tolist()
    [2.0, 4.0]
    """
    return logits / value


def top_k(logits: Array, k: int) -> Array:
    """Keeps the k most likely tokens, and those tied with the k-th (Fan et al. 2018). k = V changes nothing.

    >>> top_k(jnp.array([3.0, 1.0, 2.0]), 2).tolist()
    [3.0, -inf, 2.0]
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie in 1..{logits.shape[-1]} (the vocabulary), got {k}")
    threshold = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def top_p(logits: Array, p: ArrayLike) -> Array:
    """Keeps the smallest set of most likely tokens whose mass reaches p (nucleus; Holtzman et al. 2020).

    The token that crosses p stays, so at least one token does; tokens tied with the last kept one stay too. p = 1
    keeps every token.

    >>> top_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.6).round(2).tolist()
    [-0.69, -1.2, -inf]
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered.astype(jnp.float32), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = before < p
    threshold = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def min_p(logits: Array, p: ArrayLike) -> Array:
    """Keeps tokens at least p times as likely as the most likely one (Nguyen et al. 2024). p = 0 keeps every token.

    >>> min_p(jnp.log(jnp.array([0.6, 0.3, 0.1])), 0.4).round(2).tolist()
    [-0.51, -1.2, -inf]
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= best + jnp.log(p), logits, -jnp.inf)
