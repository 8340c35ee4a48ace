"""Policy-gradient losses per token: what the actor minimises, from log-probs and advantages."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["ClippedSurrogate", "clipped_surrogate"]


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(x).astype(jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)) for x in arrays)


class ClippedSurrogate(NamedTuple):
    """A surrogate loss and where its gradient was cut."""

    loss: Array  # [..., T]
    clipped: Array  # [..., T] bool, tokens whose gradient is cut


def clipped_surrogate(
    log_probs: Array, old_log_probs: Array, advantages: Array, *, clip_low: ArrayLike = 0.2, clip_high: ArrayLike = 0.2
) -> ClippedSurrogate:
    """PPO objective per token: -min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A) with r = exp(log π - log π_old).

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      clip_low: how far below 1 the ratio may fall while the advantage is negative.
      clip_high: how far above 1 it may rise while the advantage is positive.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]).
    Reference: Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347

    >>> loss, clipped = clipped_surrogate(jnp.array([0.5, 0.0]), jnp.zeros(2), jnp.ones(2))
    >>> [round(x, 2) for x in loss.tolist()], clipped.tolist()
    ([-1.2, -1.0], [True, False])
    """
    chex.assert_equal_shape([log_probs, old_log_probs, advantages])
    log_probs, old_log_probs, advantages = _float32(log_probs, old_log_probs, advantages)
    advantages = jax.lax.stop_gradient(advantages)
    ratio = jnp.exp(log_probs - jax.lax.stop_gradient(old_log_probs))
    bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return ClippedSurrogate(
        -jnp.minimum(ratio * advantages, bounded * advantages), bounded * advantages < ratio * advantages
    )
