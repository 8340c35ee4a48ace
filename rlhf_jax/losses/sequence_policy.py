"""Policy losses whose importance ratio belongs to a whole sequence: GSPO, GSPO-token, LUSPO, GMPO, VESPO.

These functions sum over tokens and therefore take a bool `mask` [..., T]; padded slots may hold anything. A row without
a token has loss 0. Losses per sequence [...] are averaged over non-empty rows by
`masking.masked_mean(loss, jnp.any(mask, axis=-1))`, losses per token by the reducers of `masking`. Advantages and old
log-probs are stopped.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import floating
from rlhf_jax.losses.policy import ClippedSurrogate, bounded_surrogate, log_bounds

__all__ = ["gmpo", "gspo", "gspo_token", "luspo", "vespo"]


def _log_ratios(log_probs: Array, old_log_probs: Array, mask: Array) -> tuple[Array, Array]:
    """log_probs [..., T] and log r [..., T], both 0 outside the mask; the old log-probs are stopped."""
    masking.check_mask(mask, log_probs)
    log_probs, old_log_probs = floating(log_probs=log_probs, old_log_probs=old_log_probs)
    log_probs, old_log_probs = masking.zero_outside(mask, log_probs, old_log_probs)
    return log_probs, log_probs - jax.lax.stop_gradient(old_log_probs)


def _per_row(advantages: Array, mask: Array) -> Array:
    """Advantages [...] in float32, stopped, 0 for rows without a token."""
    (advantages,) = floating(advantages=advantages)
    if advantages.shape != mask.shape[:-1]:
        raise ValueError(f"advantages must have one value per sequence, {mask.shape[:-1]}, got {advantages.shape}")
    return jax.lax.stop_gradient(jnp.where(jnp.any(mask, axis=-1), advantages, 0.0))


def gspo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: ArrayLike = 3e-4,
    clip_high: ArrayLike = 4e-4,
) -> ClippedSurrogate:
    """Group sequence policy optimisation, per sequence: -min(s·A, clip(s)·A) with s = exp(mean_t log r_t).

    s is the geometric mean of the token ratios, (π(y) / π_old(y))^(1/|y|), so its bounds are much tighter than PPO's.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [...] one per sequence; stopped.
      mask: [..., T] bool, the sequence's tokens.
      clip_low: s is bounded below by 1 - clip_low while A < 0; 1 or more sets no bound.
      clip_high: s is bounded above by 1 + clip_high while A > 0.
    Returns:
      ClippedSurrogate(loss [...], clipped [...]). At s = 1 the gradient is -A/|y| per token. For one token it equals
      `policy.clipped_surrogate`.
    Raises: ValueError if advantages are not one per sequence, TypeError for integer inputs or a mask that is not bool,
      AssertionError if shapes differ (at trace time).
    Reference: Zheng et al. 2025, section 4.1, https://arxiv.org/abs/2507.18071

    >>> loss, clipped = gspo(jnp.array([[0.1, -0.1]]), jnp.zeros((1, 2)), jnp.array([2.0]), jnp.array([[True, True]]))
    >>> loss.tolist(), clipped.tolist()
    ([-2.0], [False])
    """
    _, log_ratio = _log_ratios(log_probs, old_log_probs, mask)
    lower, upper = log_bounds(clip_low, clip_high)
    mean = masking.masked_mean(log_ratio, mask, axis=-1)
    return bounded_surrogate(mean, _per_row(advantages, mask), lower=lower, upper=upper)


def gspo_token(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: ArrayLike = 3e-4,
    clip_high: ArrayLike = 4e-4,
) -> ClippedSurrogate:
    """GSPO with an advantage per token: -min(s_t·A_t, clip(s_t)·A_t) with s_t = sg(s)·π_t / sg(π_t).

    Every token of a row has the row's ratio s as its value, and its own log-prob as its gradient.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T] one per token; stopped.
      mask: [..., T] bool, the sequence's tokens.
      clip_low: as in `gspo`.
      clip_high: as in `gspo`.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]), 0 and False outside the mask. With one advantage per row,
      `masking.sequence_mean` of it has the value and gradient of `gspo` averaged over rows.
    Raises: TypeError for integer inputs or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Zheng et al. 2025, section 4.3, https://arxiv.org/abs/2507.18071

    >>> zeros, ones = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> gspo_token(zeros, zeros, 3 * ones, ones > 0).loss.tolist()
    [[-3.0, -3.0]]
    """
    log_probs, log_ratio = _log_ratios(log_probs, old_log_probs, mask)
    (advantages,) = floating(advantages=advantages)
    (advantages,) = masking.zero_outside(mask, advantages)
    lower, upper = log_bounds(clip_low, clip_high)
    mean = jax.lax.stop_gradient(masking.masked_mean(log_ratio, mask, axis=-1, keepdims=True))
    own = mean + log_probs - jax.lax.stop_gradient(log_probs)
    return bounded_surrogate(own, advantages, lower=lower, upper=upper)


def luspo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: ArrayLike = 2e-3,
    clip_high: ArrayLike = 2.5e-3,
) -> ClippedSurrogate:
    """Length-unbiased sequence policy optimisation, per sequence: |y| times the loss of `gspo`.

    The factor cancels the 1/|y| in the gradient of GSPO's ratio, so that every token weighs the same in a short and in
    a long sequence: at s = 1 the gradient is -A per token.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [...] one per sequence; stopped.
      mask: [..., T] bool, the sequence's tokens.
      clip_low: as in `gspo`.
      clip_high: as in `gspo`.
    Returns:
      ClippedSurrogate(loss [...], clipped [...]).
    Raises: as `gspo`.
    Reference: Liu et al. 2026, https://arxiv.org/abs/2602.05261. Form and defaults follow published code and were not
      held against the paper's equations.

    >>> zeros, ones = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> luspo(zeros, zeros, jnp.array([3.0]), ones > 0).loss.tolist()
    [-6.0]
    """
    loss, clipped = gspo(log_probs, old_log_probs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return ClippedSurrogate(loss * masking.masked_sum(jnp.ones_like(mask, loss.dtype), mask, axis=-1), clipped)


def gmpo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: ArrayLike = 0.4,
    clip_high: ArrayLike = 0.4,
) -> ClippedSurrogate:
    """Geometric-mean policy optimisation, per sequence: -A·exp(mean_t bounded log r_t), bounded token by token.

    The log-ratio is cut above clip_high where A > 0 and below -clip_low where A < 0, before the mean, so single
    outlying tokens lose their gradient and the others keep theirs.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [...] one per sequence; stopped.
      mask: [..., T] bool, the sequence's tokens.
      clip_low: bound on the log-ratio from below, so ratios down to exp(-clip_low).
      clip_high: bound on the log-ratio from above, so ratios up to exp(clip_high).
    Returns:
      ClippedSurrogate(loss [...], clipped [..., T]): a loss per sequence, and the tokens that were cut. Infinite clips
      give `gspo` with infinite clips.
    Raises: as `gspo`.
    Reference: Zhao et al. 2025, https://arxiv.org/abs/2507.20673

    >>> ratios = jnp.array([[0.6, 0.2]])
    >>> loss, clipped = gmpo(ratios, jnp.zeros((1, 2)), jnp.ones(1), jnp.array([[True, True]]))
    >>> round(float(jnp.log(-loss[0])), 3), clipped.tolist()
    (0.3, [[True, False]])
    """
    _, log_ratio = _log_ratios(log_probs, old_log_probs, mask)
    advantages = _per_row(advantages, mask)
    sign = advantages[..., None]
    bounded = jnp.where(sign >= 0, jnp.minimum(log_ratio, clip_high), jnp.maximum(log_ratio, -jnp.asarray(clip_low)))
    clipped = ((sign > 0) & (log_ratio > clip_high)) | ((sign < 0) & (log_ratio < -jnp.asarray(clip_low)))
    return ClippedSurrogate(-advantages * jnp.exp(masking.masked_mean(bounded, mask, axis=-1)), clipped)


def vespo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    positive_power: ArrayLike = 2.0,
    positive_decay: ArrayLike = 3.0,
    negative_power: ArrayLike = 3.0,
    negative_decay: ArrayLike = 2.0,
) -> Array:
    """Variational sequence-level soft policy optimisation, per token: -sg(φ(W))·A·log π.

    W = π(y) / π_old(y) is the ratio of the whole sequence, a product without length normalisation, and
    φ(W) = W^k·exp(λ·(1 - W)) rises like a power below W = k/λ and falls exponentially above. φ(1) = 1.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [...] one per sequence; stopped.
      mask: [..., T] bool, the sequence's tokens.
      positive_power: k where A >= 0.
      positive_decay: λ where A >= 0.
      negative_power: k where A < 0.
      negative_decay: λ where A < 0.
    Returns:
      [..., T] loss, 0 outside the mask. On-policy, and for k = λ = 0, it is `policy.reinforce`. log W is limited to
      ±20, as in the authors' code.
    Raises: as `gspo`.
    Reference: Shen et al. 2026, https://arxiv.org/abs/2602.10693. Form and defaults follow published code and were not
      held against the paper's equations.

    >>> log_probs = jnp.array([[-1.0, -2.0]])
    >>> vespo(log_probs, log_probs, jnp.array([2.0]), jnp.array([[True, True]])).tolist()
    [[2.0, 4.0]]
    """
    log_probs, log_ratio = _log_ratios(log_probs, old_log_probs, mask)
    advantages = _per_row(advantages, mask)
    log_weight = jnp.clip(jax.lax.stop_gradient(masking.masked_sum(log_ratio, mask, axis=-1)), -20.0, 20.0)
    power = jnp.where(advantages >= 0, positive_power, negative_power)
    decay = jnp.where(advantages >= 0, positive_decay, negative_decay)
    weight = jnp.exp(power * log_weight + decay * (1.0 - jnp.exp(log_weight)))
    return -(weight * advantages)[..., None] * log_probs
