"""Policy losses per token that bound the ratio by another gate than PPO's clip: CISPO, SAPO, DPPO.

The conventions are those of `policy`: unreduced, elementwise, advantages and old log-probs stopped,
r = exp(log_probs - old_log_probs), and at r = 1 the gradient with respect to `log_probs` is -advantage.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating
from rlhf_jax.losses.policy import ClippedSurrogate, log_bounds

__all__ = ["cispo", "dppo_kl", "dppo_tv", "sapo"]


def _inputs(log_probs: Array, old_log_probs: Array, advantages: Array) -> tuple[Array, Array, Array]:
    log_probs, old_log_probs, advantages = floating(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    return log_probs, jax.lax.stop_gradient(old_log_probs), jax.lax.stop_gradient(advantages)


def cispo(
    log_probs: Array, old_log_probs: Array, advantages: Array, *, clip_low: ArrayLike = 1.0, clip_high: ArrayLike = 4.0
) -> ClippedSurrogate:
    """Clipped importance weight times score function, per token: -sg(clip(r, 1 - clip_low, 1 + clip_high))·A·log π.

    The weight is bounded and stopped, so that every token keeps a gradient.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      clip_low: lower bound of the weight is 1 - clip_low. The default of 1 sets none, as in MiniMax-M1.
      clip_high: upper bound of the weight is 1 + clip_high. The default caps it at 5, as ScaleRL does
        (https://arxiv.org/abs/2510.13786); MiniMax-M1 states no number.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]); clipped marks bounded weights, whose gradient is not cut.
      clip_low = clip_high = 0 gives `policy.reinforce`; infinite clips give the gradient of `policy.surrogate`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: MiniMax 2025 (MiniMax-M1), https://arxiv.org/abs/2506.13585

    >>> loss, clipped = cispo(jnp.array([-1.0]), jnp.array([-4.0]), jnp.array([2.0]))
    >>> round(float(loss[0]), 3), bool(clipped[0])
    (10.0, True)
    """
    log_probs, old_log_probs, advantages = _inputs(log_probs, old_log_probs, advantages)
    lower, upper = log_bounds(clip_low, clip_high)
    log_ratio = jax.lax.stop_gradient(log_probs) - old_log_probs
    weight = jnp.exp(jnp.minimum(jnp.maximum(log_ratio, lower), upper))
    return ClippedSurrogate(-weight * advantages * log_probs, (log_ratio < lower) | (log_ratio > upper))


def sapo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    *,
    positive_temperature: ArrayLike = 1.0,
    negative_temperature: ArrayLike = 1.05,
) -> Array:
    """Soft adaptive policy optimisation, per token: -(4/τ)·sigmoid(τ·(r - 1))·A.

    The gradient fades smoothly as the ratio leaves 1, by 4·p·(1 - p)·r with p = sigmoid(τ·(r - 1)).

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      positive_temperature: τ where A > 0; larger fades sooner.
      negative_temperature: τ where A <= 0.
    Returns:
      [..., T] loss; at r = 1 it is -2·A/τ with gradient -A. Temperatures towards 0 give the gradient of
      `policy.surrogate`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Gao et al. 2025, https://arxiv.org/abs/2511.20347

    >>> sapo(jnp.zeros(1), jnp.zeros(1), jnp.array([3.0])).tolist()
    [-6.0]
    """
    log_probs, old_log_probs, advantages = _inputs(log_probs, old_log_probs, advantages)
    temperature = jnp.where(advantages > 0, positive_temperature, negative_temperature)
    # Beyond exp(30) the gate is flat to the last bit, and an infinite ratio would make its gradient NaN.
    ratio = jnp.exp(jnp.minimum(log_probs - old_log_probs, 30.0))
    return -4.0 / temperature * jax.nn.sigmoid(temperature * (ratio - 1.0)) * advantages


def _gated(log_ratio: Array, advantages: Array, closed: Array) -> ClippedSurrogate:
    """-r·A, and 0 without gradient where the gate is closed. Ratios that do not count are kept out of the exp."""
    idle = closed | (advantages == 0)
    ratio = jnp.exp(jnp.where(idle, 0.0, log_ratio))
    return ClippedSurrogate(jnp.where(idle, 0.0, -ratio * advantages), closed)


def dppo_tv(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    *,
    threshold_low: ArrayLike = 0.15,
    threshold_high: ArrayLike = 0.15,
) -> ClippedSurrogate:
    """Divergence PPO with the binary total variation, per token: -M·r·A.

    M is 0 where the step leads away from the old policy and |π - π_old| of the taken token exceeds the threshold:
    where A > 0 and π - π_old > threshold_high, or A < 0 and π_old - π > threshold_low. Elsewhere it is 1. A rare token
    may thus multiply its probability, and a frequent one may not lose much of it, unlike under a bound on the ratio.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      threshold_low: largest fall of the probability while the advantage is negative.
      threshold_high: largest rise of the probability while the advantage is positive.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]); clipped is M = 0, loss and gradient 0. Thresholds of 1 give
      `policy.surrogate`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Qi et al. 2026, https://arxiv.org/abs/2602.04879. Form and thresholds follow the authors' code and
      were not held against the paper's equations.

    >>> loss, clipped = dppo_tv(jnp.log(jnp.array([0.8, 0.1])), jnp.log(jnp.array([0.5, 0.01])), jnp.ones(2))
    >>> [round(x, 3) for x in loss.tolist()], clipped.tolist()
    ([0.0, -10.0], [True, False])
    """
    log_probs, old_log_probs, advantages = _inputs(log_probs, old_log_probs, advantages)
    rise = jax.lax.stop_gradient(jnp.exp(log_probs) - jnp.exp(old_log_probs))
    closed = ((advantages > 0) & (rise > threshold_high)) | ((advantages < 0) & (-rise > threshold_low))
    return _gated(log_probs - old_log_probs, advantages, closed)


def _binary_kl(old_log_probs: Array, log_probs: Array) -> Array:
    """KL(Bernoulli(π_old) || Bernoulli(π)) of taking the token or not; infinite if π = 1 and π_old < 1."""
    old, rest = jnp.exp(old_log_probs), -jnp.expm1(old_log_probs)
    other = jnp.log(rest) - jnp.log(-jnp.expm1(log_probs))
    return old * (old_log_probs - log_probs) + jnp.where(rest > 0, rest * other, 0.0)


def dppo_kl(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    *,
    threshold_low: ArrayLike = 0.05,
    threshold_high: ArrayLike = 0.05,
) -> ClippedSurrogate:
    """Divergence PPO with the binary KL, per token: -M·r·A.

    M is 0 where the step leads away from the old policy (A > 0 and π > π_old, or A < 0 and π < π_old) and
    KL(Bernoulli(π_old) || Bernoulli(π)) of the taken token exceeds the threshold; elsewhere it is 1.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      old_log_probs: [..., T] under the policy that sampled them; stopped.
      advantages: [..., T]; stopped.
      threshold_low: largest divergence, in nats, while the advantage is negative.
      threshold_high: largest divergence while the advantage is positive.
    Returns:
      ClippedSurrogate(loss [..., T], clipped [..., T]); clipped is M = 0, loss and gradient 0. Infinite thresholds give
      `policy.surrogate`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Qi et al. 2026, https://arxiv.org/abs/2602.04879. Form and thresholds follow the authors' code and
      were not held against the paper's equations.

    >>> loss, clipped = dppo_kl(jnp.log(jnp.array([0.8, 0.1])), jnp.log(jnp.array([0.5, 0.08])), jnp.ones(2))
    >>> [round(x, 3) for x in loss.tolist()], clipped.tolist()
    ([0.0, -1.25], [True, False])
    """
    log_probs, old_log_probs, advantages = _inputs(log_probs, old_log_probs, advantages)
    log_ratio = log_probs - old_log_probs
    far = jax.lax.stop_gradient(_binary_kl(old_log_probs, jax.lax.stop_gradient(log_probs)))
    up = (advantages > 0) & (log_ratio > 0) & (far > threshold_high)
    down = (advantages < 0) & (log_ratio < 0) & (far > threshold_low)
    return _gated(log_ratio, advantages, up | down)
