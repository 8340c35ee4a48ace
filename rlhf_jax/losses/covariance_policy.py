"""Policy losses that spare the tokens whose covariance of log-prob and advantage drains the entropy: Clip-Cov, KL-Cov.

The covariance of a token is its share of the batch covariance, (log π - mean log π)·(A - mean A), with means over the
valid tokens of the whole batch (of all devices, given `axis_name`). Tokens with a large one, confident and rewarded
alike, account for most of the fall of the entropy. Advantages and old log-probs are stopped; choosing tokens has no
gradient.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses import _selection
from rlhf_jax.losses._pairs import floating
from rlhf_jax.losses.policy import ClippedSurrogate, bounded_surrogate, log_bounds

__all__ = ["clip_cov", "kl_cov", "token_covariances"]


def token_covariances(log_probs: Array, advantages: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """Each token's share of the batch covariance: (log π - mean log π)·(A - mean A).

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy; stopped.
      advantages: [..., T]; stopped.
      mask: [..., T] bool.
      axis_name: mapped axis whose devices share the means.
    Returns:
      [..., T] covariances, 0 outside the mask; their mean is the covariance of the batch. Shifting all log-probs or all
      advantages changes nothing.
    Raises: TypeError for integer inputs or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617

    >>> ones = jnp.array([True, True])
    >>> token_covariances(jnp.array([-1.0, -3.0]), jnp.array([1.0, -1.0]), ones).tolist()
    [1.0, 1.0]
    """
    log_probs, advantages = floating(log_probs=log_probs, advantages=advantages)
    log_probs, advantages = jax.lax.stop_gradient(masking.zero_outside(mask, log_probs, advantages))
    left = log_probs - masking.masked_mean(log_probs, mask, axis_name=axis_name)
    right = advantages - masking.masked_mean(advantages, mask, axis_name=axis_name)
    return jnp.where(mask, left * right, 0.0)


def _share(mask: Array, fraction: ArrayLike, axis_name: str | None) -> Array:
    """max(1, floor(fraction · number of tokens)), over all devices."""
    tokens = masking.masked_sum(jnp.ones_like(mask, jnp.float32), mask, axis_name=axis_name)
    return jnp.maximum(jnp.floor(fraction * tokens), 1.0)


def clip_cov(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    key: Array,
    *,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.2,
    fraction: ArrayLike = 2e-4,
    covariance_low: ArrayLike = 1.0,
    covariance_high: ArrayLike = 5.0,
    axis_name: str | None = None,
) -> ClippedSurrogate:
    """Clip-Cov, per token: PPO's clipped loss, and 0 for a few random tokens of high covariance.

    Of the tokens with covariance_low < covariance < covariance_high that PPO does not clip already, max(1, fraction·N)
    are drawn and detached, N being the number of tokens of the batch.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      mask: [..., T] bool.
      key: typed key, consumed; the same on every device, given axis_name.
      clip_low: as in `policy.clipped_surrogate`.
      clip_high: as in `policy.clipped_surrogate`.
      fraction: share of all tokens to detach.
      covariance_low: only larger covariances are eligible.
      covariance_high: only smaller covariances are eligible.
      axis_name: mapped axis whose devices share means, counts and the draw.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]); clipped marks the tokens that PPO clips and the drawn ones.
      With covariance_low infinite it is `policy.clipped_surrogate`.
    Raises: TypeError for integer inputs or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617

    >>> log_probs, advantages = jnp.array([0.0, -4.0]), jnp.array([1.0, -1.0])
    >>> mask = jnp.array([True, True])
    >>> loss, clipped = clip_cov(log_probs, log_probs, advantages, mask, jax.random.key(0))
    >>> sorted(loss.tolist()) in ([-1.0, 0.0], [0.0, 1.0]), int(clipped.sum())
    (True, 1)
    """
    log_probs, old_log_probs, advantages = floating(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    log_probs, old_log_probs, advantages = masking.zero_outside(mask, log_probs, old_log_probs, advantages)
    lower, upper = log_bounds(clip_low, clip_high)
    log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
    loss, clipped = bounded_surrogate(log_ratio, advantages, lower=lower, upper=upper)
    covariances = token_covariances(log_probs, advantages, mask, axis_name=axis_name)
    eligible = mask & ~clipped & (covariances > covariance_low) & (covariances < covariance_high)
    draws = _selection.uniform(key, mask.shape, axis_name=axis_name)
    drawn = _selection.largest(draws, eligible, _share(mask, fraction, axis_name), axis_name=axis_name)
    return ClippedSurrogate(jnp.where(drawn, 0.0, loss), clipped | drawn)


def kl_cov(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    fraction: ArrayLike = 2e-4,
    coefficient: ArrayLike = 1.0,
    axis_name: str | None = None,
) -> Array:
    """KL-Cov, per token: -r·A, plus coefficient·|log r| for the tokens of largest covariance.

    The max(1, fraction·N) tokens of largest covariance are held near the old policy; no ratio is clipped. The penalty
    is the authors' estimate of the KL divergence, the absolute log-ratio.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      mask: [..., T] bool.
      fraction: share of all tokens to penalise.
      coefficient: weight of the penalty; 0 gives `policy.surrogate`.
      axis_name: mapped axis whose devices share means, counts and ranks.
    Returns:
      [..., T] loss, 0 outside the mask.
    Raises: TypeError for integer inputs or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617

    >>> log_probs, old = jnp.array([0.0, -4.0]), jnp.array([-0.5, -4.0])
    >>> [round(x, 3) for x in kl_cov(log_probs, old, jnp.array([1.0, 0.0]), jnp.array([True, True])).tolist()]
    [-1.149, 0.0]
    """
    log_probs, old_log_probs, advantages = floating(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    log_probs, old_log_probs, advantages = masking.zero_outside(mask, log_probs, old_log_probs, advantages)
    log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
    covariances = token_covariances(log_probs, advantages, mask, axis_name=axis_name)
    held = _selection.largest(covariances, mask, _share(mask, fraction, axis_name), axis_name=axis_name)
    loss = -jnp.exp(log_ratio) * jax.lax.stop_gradient(advantages)
    return loss + jnp.where(held, coefficient * jnp.abs(log_ratio), 0.0)
