"""Rewards: where a sequence's score lands among its tokens, and what is added to or taken from it.

Conventions:

* A reward is float32 (float64 stays); integers are refused, for a buffer typed like token ids would cut 0.7 to 0.
* A missing reward is NaN. Arithmetic carries NaN on, so it shows; what leaves it out says so in its name or takes a
  mask.
* Index t of token rewards is the token t whose choice earned them. A slot outside the mask holds what was placed there,
  else 0.
* Rewards are constants: no gradient flows through the log-probs they are made of.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import kl, masking

__all__ = [
    "check_rewards",
    "kl_shaped_rewards",
    "score_at_last_token",
]


def check_rewards(rewards: Array, name: str = "rewards") -> Array:
    """The rewards in float32 at least; integers and bools are refused.

    Args:
      rewards: [...] scores.
      name: what the message calls them.
    Returns:
      [...] float32, or float64 if they were.
    Raises: TypeError for integers or bools.

    >>> check_rewards(jnp.array([0.5], jnp.bfloat16)).dtype.name
    'float32'
    """
    rewards = jnp.asarray(rewards)
    if not jnp.issubdtype(rewards.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got dtype {rewards.dtype}; write `{name}.astype(jnp.float32)`")
    return rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))


# --- where a sequence's score lands -----------------------------------------------------------------------------------


def _last_slot(mask: Array) -> Array:
    """[...] index of the last true slot of each row, -1 for an empty row."""
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1]), -1), axis=-1)


def _place(scores: Array, slots: Array, mask: Array) -> Array:
    """[..., T] scores at their slots and 0 elsewhere; a row whose slot is -1 gets nothing."""
    scores = check_rewards(scores, "scores")
    masking.check_mask(mask)
    chex.assert_shape(scores, mask.shape[:-1])
    here = jnp.arange(mask.shape[-1]) == slots[..., None]
    return jnp.where(here, scores[..., None], jnp.zeros((), scores.dtype))


def score_at_last_token(scores: Array, mask: Array) -> Array:
    """Puts each sequence's score on its last valid token, usually EOS (verl, OpenRLHF).

    The rewards of a row sum to its score. A row without a valid token gets nothing.

    Args:
      scores: [...] one per sequence; NaN (missing) lands as NaN.
      mask: [..., T] bool, tokens of the sequence.
    Returns:
      [..., T] rewards, 0 at every other slot.
    Raises: TypeError for integer scores or a mask that is not bool; AssertionError if shapes disagree.
    Reference: Ziegler et al. 2019, section 2.1, https://arxiv.org/abs/1909.08593

    >>> score_at_last_token(jnp.array([0.7]), jnp.array([[True, True, False]])).tolist()
    [[0.0, 0.7, 0.0]]
    """
    return _place(scores, _last_slot(mask), mask)


def kl_shaped_rewards(
    score_rewards: Array, log_probs: Array, reference_log_probs: Array, mask: Array, *, beta: ArrayLike = 0.05
) -> Array:
    """Token rewards with the KL penalty: r_t = s_t - β (log π - log π_ref)_t.

    The rewards of a row sum to its score minus β times its log-ratio. beta = 0 gives the scores alone.

    Args:
      score_rewards: [..., T] the score where it lands, from `score_at_last_token` or another placement; kept also
        outside the mask, for a score may land one slot after the last token.
      log_probs: [..., T] of the generated tokens under the policy that generated them; stopped.
      reference_log_probs: [..., T] of the same tokens under the reference; stopped.
      mask: [..., T] bool, tokens that pay for their KL.
      beta: KL coefficient, for instance `AdaptiveKL.coefficient`.
    Returns:
      [..., T] rewards in reward units (β is in reward per nat).
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError if shapes differ.
    Reference: Ziegler et al. 2019, eq. 2, https://arxiv.org/abs/1909.08593; β = 0.05 from Huang et al. 2024,
      https://arxiv.org/abs/2403.17031

    >>> scores = score_at_last_token(jnp.array([1.0]), jnp.array([[True, True]]))
    >>> kl_shaped_rewards(
    ...     scores, jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -1.0]]), jnp.array([[True, True]]), beta=0.1
    ... ).tolist()
    [[-0.1, 1.1]]
    """
    score_rewards = check_rewards(score_rewards, "score_rewards")
    chex.assert_equal_shape([score_rewards, mask])
    log_probs, reference_log_probs = masking.zero_outside(mask, log_probs, reference_log_probs)
    return score_rewards - jax.lax.stop_gradient(beta * kl.k1(log_probs, reference_log_probs))
