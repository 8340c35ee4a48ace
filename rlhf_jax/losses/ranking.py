"""Reward-model losses over lists of K completions: a whole ranking, or the one that was picked.

Lists are ragged: `mask` [..., K] says which slots hold a completion. A list without any gives 0.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import masking
from rlhf_jax.losses._pairs import check_integers, floating

__all__ = ["list_choice", "plackett_luce"]


def _low(x: Array) -> float:
    """The score of an absent completion: exp(low - score) is 0, and low - score does not overflow."""
    return float(jnp.finfo(x.dtype).min) / 2


def plackett_luce(scores: Array, mask: Array, *, depth: int | None = None) -> Array:
    """Plackett-Luce likelihood of a ranking, best first: Σ_k (log Σ_{j ≥ k} exp(s_j) - s_k).

    The person picks the best of all, then the best of the rest, and so on.

    Args:
      scores: [..., K] in the order of the ranking, best first.
      mask: [..., K] bool, slots that hold a completion.
      depth: number of picks that were made, the rest being unordered; None, the default, ranks the whole list.
    Returns:
      [...] loss per list. Two completions give `reward_model.bradley_terry`, one gives 0, n equal scores log n!.
      depth = 1 is `list_choice` of the first.
    Raises: ValueError if depth is below 1. TypeError if mask is not bool.
    Reference: Luce 1959; Plackett 1975; as a loss Xia et al. 2008 (ListMLE)

    >>> round(float(plackett_luce(jnp.array([3.0, 3.0, 9.0]), jnp.array([True, True, False]))), 4)
    0.6931
    """
    if depth is not None and depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    (scores,) = floating(scores=scores)
    masking.check_mask(mask, scores)
    present = jnp.where(mask, scores, _low(scores))
    rest = jax.lax.cumlogsumexp(present, axis=scores.ndim - 1, reverse=True)
    picked = mask if depth is None else mask & (jnp.cumsum(mask, axis=-1) <= depth)
    return masking.masked_sum(rest - present, picked, axis=-1)


def list_choice(scores: Array, choice: Array, mask: Array) -> Array:
    """Softmax likelihood of the one completion picked out of K: log Σ_j exp(s_j) - s_choice.

    Args:
      scores: [..., K] of the completions shown.
      choice: [...] int, which of them was picked.
      mask: [..., K] bool, slots that hold a completion.
    Returns:
      [...] loss per list. K equal scores give log K, two completions `reward_model.bradley_terry`. A choice outside
      the list or of an empty slot gives NaN, unless the whole list is empty: that gives 0.
    Raises: TypeError if choice is not integer or mask not bool.
    Reference: Ziegler et al. 2019, eq. 1, https://arxiv.org/abs/1909.08593

    >>> round(float(list_choice(jnp.zeros(4), jnp.array(2), jnp.ones(4, bool))), 4)
    1.3863
    """
    (scores,) = floating(scores=scores)
    masking.check_mask(mask, scores)
    check_integers("choice", choice)
    chex.assert_shape(choice, scores.shape[:-1])
    present = jnp.where(mask, scores, _low(scores))
    picked = mask & jax.nn.one_hot(choice, scores.shape[-1], dtype=jnp.bool_)
    loss = jax.nn.logsumexp(present, axis=-1) - masking.masked_sum(present, picked, axis=-1)
    return jnp.where(jnp.any(mask, axis=-1), jnp.where(jnp.any(picked, axis=-1), loss, jnp.nan), 0.0)
