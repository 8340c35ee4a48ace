"""Policy-gradient losses per token: what an actor minimises, given log-probs and advantages.

Every function returns one value per token, unreduced; `masking` reduces. Padded slots are zeroed before
(`masking.zero_outside`) and left out after. Advantages, returns, values and old log-probs are stopped inside. The
ratio is r = π(token) / π_old(token) = exp(log_probs - old_log_probs); at r = 1 the gradient of every surrogate with
respect to `log_probs` is -advantage. Bounds are applied to the log-ratio, so a cut token overflows neither in value
nor in gradient.

The published algorithms are compositions of an advantage, a loss and a reducer:

===========  =====================================  ===========================================  ===================
algorithm    advantages                             loss                                         reducer
===========  =====================================  ===========================================  ===================
REINFORCE    `discounted_returns` minus a baseline  `reinforce`                                  `sequence_sum`
RLOO, ReMax  `leave_one_out`, `remax`               `reinforce`                                  `sequence_sum`
A2C          returns minus values                   `a2c` + value error + `entropy_bonus`        `token_mean`
PPO          `gae`, whitened                        `clipped_surrogate` + value error            `token_mean`
GRPO         `group_relative`                       `clipped_surrogate` + β·k3                   `sequence_mean`
Dr. GRPO     `group_centred`                        `clipped_surrogate`                          `fixed_length_mean`
DAPO         `group_relative`                       `clipped_surrogate`, clip_high=0.28          `token_mean`
BNPO         `group_relative`                       `clipped_surrogate` + β·k3                   `token_mean`
GPG          `gpg`                                  `reinforce`                                  `token_mean`
REINFORCE++  `reinforce_plus_plus`                  `clipped_surrogate`                          `token_mean`
INTELLECT-2  `group_relative`                       `two_sided_surrogate` + β·k3                 `token_mean`
CISPO        `group_relative`                       `gated_policy.cispo`                         `token_mean`
SAPO         `group_relative`                       `gated_policy.sapo`                          `sequence_mean`
DPPO         `group_relative`                       `gated_policy.dppo_tv`, `dppo_kl`            `token_mean`
GSPO         `group_relative`, per sequence         `sequence_policy.gspo`                       mean of rows
GSPO-token   per token                              `sequence_policy.gspo_token`                 `sequence_mean`
LUSPO        `group_relative`, per sequence         `sequence_policy.luspo`                      mean of rows
GMPO         `group_relative`, per sequence         `sequence_policy.gmpo`                       mean of rows
VESPO        `group_relative`, per sequence         `sequence_policy.vespo`                      `token_mean`
Clip-Cov     `group_relative`                       `covariance_policy.clip_cov`                 `token_mean`
KL-Cov       `group_relative`                       `covariance_policy.kl_cov`                   `token_mean`
AWR, AWAC    returns or Q minus values              `regression_policy.weighted_log_likelihood`  `token_mean`
===========  =====================================  ===========================================  ===================

A score per sequence becomes token advantages by `group_advantages.to_tokens`. "Mean of rows" is
`masking.masked_mean(loss, jnp.any(mask, axis=-1))`. A sampler that differs from the trainer is corrected by
multiplying the loss with a weight of `importance` before reducing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating

__all__ = [
    "ClippedSurrogate",
    "a2c",
    "clipped_surrogate",
    "dual_clip_surrogate",
    "entropy_bonus",
    "reinforce",
    "surrogate",
    "two_sided_surrogate",
]


class ClippedSurrogate(NamedTuple):
    """A surrogate loss and where its ratio was bounded."""

    loss: Array  # [..., T] per token, [...] for losses per sequence
    clipped: Array  # bool, same axes: where the bound holds, so that the ratio no longer moves the loss


def reinforce(log_probs: Array, advantages: Array) -> Array:
    """Score-function loss per token: -A·log π.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      advantages: [..., T] returns, returns minus a baseline, or any other weight; stopped.
    Returns:
      [..., T] loss, whose gradient with respect to log_probs is -advantages.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Williams 1992, https://doi.org/10.1007/BF00992696. GPG (https://arxiv.org/abs/2504.02546) is this loss
      with its own advantages.

    >>> reinforce(jnp.array([-2.0]), jnp.array([3.0])).tolist()
    [6.0]
    """
    log_probs, advantages = floating(log_probs=log_probs, advantages=advantages)
    return -log_probs * jax.lax.stop_gradient(advantages)


def a2c(log_probs: Array, returns: Array, values: Array) -> Array:
    """Advantage actor-critic, the actor's half, per token: -(R - V)·log π.

    The whole objective adds a value error of `value` and `entropy_bonus`.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      returns: [..., T] n-step, lambda or Monte-Carlo returns; stopped.
      values: [..., T] the critic's; stopped, so the actor's loss does not train the critic.
    Returns:
      [..., T] loss, equal to `reinforce` with advantages returns - values.
    Reference: Mnih et al. 2016, section 4, https://arxiv.org/abs/1602.01783

    >>> a2c(jnp.array([-2.0]), jnp.array([5.0]), jnp.array([2.0])).tolist()
    [6.0]
    """
    log_probs, returns, values = floating(log_probs=log_probs, returns=returns, values=values)
    return reinforce(log_probs, returns - values)


def surrogate(log_probs: Array, old_log_probs: Array, advantages: Array) -> Array:
    """Importance-sampled policy objective per token: -r·A, without any bound on r.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
    Returns:
      [..., T] loss. At equal log-probs it has value -A and the gradient of `reinforce`.
    Reference: Schulman et al. 2017, eq. 6, https://arxiv.org/abs/1707.06347

    >>> surrogate(jnp.zeros(1), jnp.zeros(1), jnp.array([3.0])).tolist()
    [-3.0]
    """
    log_probs, old_log_probs, advantages = floating(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
    return -jnp.exp(log_ratio) * jax.lax.stop_gradient(advantages)


def log_bounds(clip_low: ArrayLike, clip_high: ArrayLike) -> tuple[Array, Array]:
    """log(1 - clip_low) and log(1 + clip_high); clip_low >= 1 means no lower bound."""
    return jnp.log(jnp.maximum(1.0 - jnp.asarray(clip_low), 0.0)), jnp.log1p(clip_high)


def bounded_surrogate(
    log_ratio: Array, advantages: Array, *, lower: ArrayLike, upper: ArrayLike, ceiling: ArrayLike = jnp.inf
) -> ClippedSurrogate:
    """-exp(bounded log-ratio)·A: at most `upper` where A >= 0, between `lower` and `ceiling` where A < 0.

    With lower = log(1 - ε) and upper = log(1 + ε) this is -min(r·A, clip(r)·A), case by case of the sign of A.
    """
    advantages = jax.lax.stop_gradient(advantages)
    below = jnp.minimum(log_ratio, upper)
    within = jnp.minimum(jnp.maximum(log_ratio, lower), ceiling)
    bounded = jnp.where(advantages >= 0, below, within)
    clipped = ((advantages > 0) & (log_ratio > upper)) | (
        (advantages < 0) & ((log_ratio < lower) | (log_ratio > ceiling))
    )
    return ClippedSurrogate(-jnp.exp(bounded) * advantages, clipped)


def clipped_surrogate(
    log_probs: Array, old_log_probs: Array, advantages: Array, *, clip_low: ArrayLike = 0.2, clip_high: ArrayLike = 0.2
) -> ClippedSurrogate:
    """PPO objective per token: -min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A).

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      clip_low: how far below 1 the ratio may fall while the advantage is negative; 1 or more sets no bound.
      clip_high: how far above 1 it may rise while the advantage is positive. DAPO uses 0.28 ("clip-higher").
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]); clipped tokens have gradient 0. Infinite clips give
        `surrogate`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347; asymmetric: Yu et al. 2025 (DAPO),
      https://arxiv.org/abs/2503.14476

    >>> loss, clipped = clipped_surrogate(jnp.array([0.5, 0.0]), jnp.zeros(2), jnp.ones(2))
    >>> [round(x, 2) for x in loss.tolist()], clipped.tolist()
    ([-1.2, -1.0], [True, False])
    """
    log_probs, old_log_probs, advantages = floating(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    lower, upper = log_bounds(clip_low, clip_high)
    log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
    return bounded_surrogate(log_ratio, advantages, lower=lower, upper=upper)


def dual_clip_surrogate(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    *,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.2,
    dual_clip: ArrayLike = 3.0,
) -> ClippedSurrogate:
    """Dual-clip PPO per token: where A < 0, -max(min(r·A, clip(r)·A), dual_clip·A); elsewhere PPO.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      clip_low: as in `clipped_surrogate`.
      clip_high: as in `clipped_surrogate`.
      dual_clip: c > 1, the largest ratio that a negative advantage is multiplied with. Infinite gives
        `clipped_surrogate`.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]).
    Reference: Ye et al. 2020, https://arxiv.org/abs/1912.09729

    >>> loss, clipped = dual_clip_surrogate(jnp.array([9.0]), jnp.zeros(1), jnp.array([-1.0]))
    >>> round(float(loss[0]), 4), bool(clipped[0])
    (3.0, True)
    """
    log_probs, old_log_probs, advantages = floating(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    lower, upper = log_bounds(clip_low, clip_high)
    log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
    return bounded_surrogate(log_ratio, advantages, lower=lower, upper=upper, ceiling=jnp.log(dual_clip))


def two_sided_surrogate(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    *,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.2,
    delta: ArrayLike = 4.0,
) -> ClippedSurrogate:
    """Two-sided clipping per token: -min(min(r, δ)·A, clip(r, 1 - clip_low, 1 + clip_high)·A).

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      clip_low: as in `clipped_surrogate`.
      clip_high: as in `clipped_surrogate`.
      delta: cap on the unclipped ratio, meant to exceed 1 + clip_high. Then this equals `dual_clip_surrogate` with
        dual_clip = delta. Infinite gives `clipped_surrogate`.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]).
    Reference: Prime Intellect 2025 (INTELLECT-2), https://arxiv.org/abs/2505.07291

    >>> loss, clipped = two_sided_surrogate(jnp.array([9.0]), jnp.zeros(1), jnp.array([-1.0]))
    >>> round(float(loss[0]), 4), bool(clipped[0])
    (4.0, True)
    """
    log_probs, old_log_probs, advantages = floating(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    lower, upper = log_bounds(clip_low, clip_high)
    log_ratio, cap = log_probs - jax.lax.stop_gradient(old_log_probs), jnp.log(delta)
    return bounded_surrogate(
        log_ratio, advantages, lower=lower, upper=jnp.minimum(upper, cap), ceiling=jnp.maximum(upper, cap)
    )


def entropy_bonus(entropies: Array, *, coefficient: ArrayLike = 0.01) -> Array:
    """Entropy term per token, to be added to a policy loss: -coefficient·H.

    Args:
      entropies: [..., T] entropy of the policy at each token, in nats (`logprobs`). Its gradient flows.
      coefficient: weight; 0 turns the bonus off.
    Returns:
      [..., T] loss; minimising it raises the entropy.
    Reference: Mnih et al. 2016, section 4, https://arxiv.org/abs/1602.01783

    >>> entropy_bonus(jnp.array([2.0]), coefficient=0.5).tolist()
    [-1.0]
    """
    (entropies,) = floating(entropies=entropies)
    return -jnp.asarray(coefficient, entropies.dtype) * entropies
