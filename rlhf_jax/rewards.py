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
    "clip_rewards",
    "has_eos",
    "kl_shaped_rewards",
    "overlong_penalty",
    "replace_missing_eos",
    "score_after_last_token",
    "score_at_last_token",
    "score_at_slot",
    "state_mask",
    "subtract_missing_eos",
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


def _slots(mask: Array) -> Array:
    """[..., T] the index of every slot in its row."""
    return jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)


def _last_slot(mask: Array) -> Array:
    """[...] index of the last true slot of each row, -1 for an empty row."""
    return jnp.max(jnp.where(mask, _slots(mask), -1), axis=-1, initial=-1)


def _place(scores: Array, slots: Array, mask: Array) -> Array:
    """[..., T] scores at their slots and 0 elsewhere; a row whose slot is -1 gets nothing."""
    scores = check_rewards(scores, "scores")
    masking.check_mask(mask)
    chex.assert_shape(scores, mask.shape[:-1])
    here = _slots(mask) == slots[..., None]
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
    Reference: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325

    >>> score_at_last_token(jnp.array([0.7]), jnp.array([[True, True, False]])).tolist()
    [[0.0, 0.7, 0.0]]
    """
    return _place(scores, _last_slot(mask), mask)


def score_after_last_token(scores: Array, mask: Array) -> Array:
    """Puts each sequence's score one slot after its last valid token if there is room, else on it.

    Credit then reaches EOS through γλ like any other step, if the slot counts as a step: hand `state_mask(mask)`, not
    the mask of the tokens, to `advantages.gae`. In a row without room equal to `score_at_last_token`.

    Args:
      scores: [...] one per sequence; NaN (missing) lands as NaN.
      mask: [..., T] bool, tokens of the sequence.
    Returns:
      [..., T] rewards, 0 at every other slot. A row without a valid token gets nothing.
    Raises: TypeError for integer scores or a mask that is not bool; AssertionError if shapes disagree.
    Reference: Huang et al. 2024, https://arxiv.org/abs/2403.17031 (code)

    >>> scores = jnp.array([0.7, 0.7])
    >>> score_after_last_token(scores, jnp.array([[True, False, False], [True, True, True]])).tolist()
    [[0.0, 0.7, 0.0], [0.0, 0.0, 0.7]]
    """
    last = _last_slot(mask)
    return _place(scores, jnp.where(last < 0, -1, jnp.minimum(last + 1, mask.shape[-1] - 1)), mask)


def score_at_slot(scores: Array, mask: Array, *, slot: int = -1) -> Array:
    """Puts every score on the same slot, by default the last, whether or not it is a valid token.

    Args:
      scores: [...] one per sequence; NaN (missing) lands as NaN.
      mask: [..., T] bool, gives the shape alone: a score lands also in a row or slot outside it.
      slot: static int, -T <= slot < T.
    Returns:
      [..., T] rewards, 0 at every other slot.
    Raises: TypeError for integer scores or a mask that is not bool; ValueError for a slot out of range;
      AssertionError if shapes disagree.
    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (code): fixed-length answers, scored at the end

    >>> score_at_slot(jnp.array([0.7]), jnp.array([[True, False, False]])).tolist()
    [[0.0, 0.0, 0.7]]
    """
    length = mask.shape[-1]
    if not isinstance(slot, int) or isinstance(slot, bool) or not -length <= slot < length:
        raise ValueError(f"slot must be an int in [{-length}, {length}), got {slot!r}")
    return _place(scores, jnp.full(mask.shape[:-1], slot % length), mask)


def state_mask(mask: Array) -> Array:
    """The tokens and the slot after the last one, the states whose value counts where the score lands there.

    Args:
      mask: [..., T] bool, tokens of the sequence.
    Returns:
      [..., T] bool; a full row and an empty one stay as they are.
    Raises: TypeError for a mask that is not bool.
    Reference: Huang et al. 2024, https://arxiv.org/abs/2403.17031 (code)

    >>> state_mask(jnp.array([True, False, False])).tolist()
    [True, True, False]
    """
    masking.check_mask(mask)
    last = _last_slot(mask)[..., None]
    return mask | ((_slots(mask) == last + 1) & (last >= 0))


# --- the KL to the reference ------------------------------------------------------------------------------------------


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


# --- rules about the end and the length -------------------------------------------------------------------------------


def has_eos(tokens: Array, mask: Array, *, eos: ArrayLike) -> Array:
    """Whether a sequence contains an end token.

    Args:
      tokens: [..., T] int token ids.
      mask: [..., T] bool, tokens of the sequence, including EOS. Padding never counts, even if pad = EOS.
      eos: [] or [K] ids of the tokens that end a sequence.
    Returns:
      [...] bool.
    Raises: TypeError for a mask that is not bool; AssertionError if shapes differ.

    >>> tokens, mask = jnp.array([[5, 2], [5, 2]]), jnp.array([[True, True], [True, False]])
    >>> has_eos(tokens, mask, eos=2).tolist()
    [True, False]
    """
    masking.check_mask(mask, tokens)
    return jnp.any(jnp.isin(tokens, jnp.atleast_1d(jnp.asarray(eos))) & mask, axis=-1)


def replace_missing_eos(scores: Array, ended: Array, *, value: ArrayLike = -1.0) -> Array:
    """A sequence that never ended gets a fixed score, whatever the judge said: s if ended else value.

    Args:
      scores: [...] one per sequence; a missing (NaN) score is replaced as well.
      ended: [...] bool, from `has_eos`.
      value: the score of the others; below all honest scores, or not ending pays.
    Returns:
      [...] scores.
    Raises: TypeError for integer scores or `ended` that is not bool; AssertionError if shapes differ.
    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (code); Huang et al. 2024,
      https://arxiv.org/abs/2403.17031

    >>> replace_missing_eos(jnp.array([0.5, 9.0]), jnp.array([True, False])).tolist()
    [0.5, -1.0]
    """
    return jnp.where(_flag(ended, scores), check_rewards(scores, "scores"), value)


def subtract_missing_eos(scores: Array, ended: Array, *, penalty: ArrayLike = 1.0) -> Array:
    """A sequence that never ended pays a fixed price: s if ended else s - penalty (TRL).

    penalty = 0 changes nothing.

    Args:
      scores: [...] one per sequence.
      ended: [...] bool, from `has_eos`.
      penalty: price in reward units.
    Returns:
      [...] scores.
    Raises: TypeError for integer scores or `ended` that is not bool; AssertionError if shapes differ.

    >>> subtract_missing_eos(jnp.array([0.5, 9.0]), jnp.array([True, False])).tolist()
    [0.5, 8.0]
    """
    scores = check_rewards(scores, "scores")
    return jnp.where(_flag(ended, scores), scores, scores - penalty)


def _flag(ended: Array, scores: Array) -> Array:
    if ended.dtype != jnp.bool_:
        raise TypeError(f"ended must be bool, got dtype {ended.dtype}; write `ended > 0`")
    chex.assert_equal_shape([ended, scores])
    return ended


def overlong_penalty(lengths: Array, *, max_length: ArrayLike, buffer: ArrayLike) -> Array:
    """The soft punishment of long answers: 0 up to L - c tokens, falling to -1 at L, -1 beyond.

    clip((L - c - length) / c, -1, 0) with L = max_length, c = buffer. buffer = 0 is the hard rule, -1 beyond L tokens.

    Args:
      lengths: [...] tokens per sequence; any integer or floating type.
      max_length: L, tokens.
      buffer: c >= 0, tokens over which the punishment grows.
    Returns:
      [...] float32 in [-1, 0], to be added to the score.
    Reference: Yu et al. 2025, eq. 13, https://arxiv.org/abs/2503.14476

    >>> overlong_penalty(jnp.array([10, 15, 30]), max_length=20, buffer=10).tolist()
    [0.0, -0.5, -1.0]
    """
    lengths = jnp.asarray(lengths).astype(jnp.float32)
    buffer = jnp.asarray(buffer, jnp.float32)
    room = max_length - buffer - lengths
    soft = jnp.clip(room / jnp.where(buffer > 0, buffer, 1.0), -1.0, 0.0)
    return jnp.where(buffer > 0, soft, jnp.where(room < 0, -1.0, 0.0))


def clip_rewards(rewards: Array, *, low: ArrayLike = -10.0, high: ArrayLike = 10.0) -> Array:
    """Cuts rewards to a range: min(max(r, low), high). A missing reward (NaN) stays missing.

    Clip scores, before a baseline is taken from them; clipped advantages are biased.

    Args:
      rewards: [...] scores.
      low: smallest reward kept.
      high: largest reward kept.
    Returns:
      [...] rewards in [low, high].
    Raises: TypeError for integer rewards.
    Reference: Zheng et al. 2023, https://arxiv.org/abs/2307.04964

    >>> clip_rewards(jnp.array([-50.0, 3.0])).tolist()
    [-10.0, 3.0]
    """
    rewards = check_rewards(rewards)
    return jnp.clip(rewards, jnp.asarray(low, rewards.dtype), jnp.asarray(high, rewards.dtype))
