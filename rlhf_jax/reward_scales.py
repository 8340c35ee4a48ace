"""Rewards on a common scale, and several rewards made into one: normalisation and weighted sums.

* The KL coefficient β is in reward per nat, so it means nothing before the rewards have a scale: take it from reference
  samples once (`reference_scale`), or follow it (`masking.update_moments` with `centre_and_scale` or `scale_only`).
* Several rewards lie on the last axis, [..., N]. Opinions of several models on one reward are in `ensembles`.
* A missing reward is NaN. The sums leave it out, as their names say, and an item with no reward at all stays NaN.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.masking import Moments
from rlhf_jax.rewards import check_rewards

__all__ = [
    "Scale",
    "apply_scale",
    "centre_and_scale",
    "normalised_sum_of_present",
    "reference_scale",
    "reference_shift",
    "scale_only",
    "weighted_mean_of_present",
    "weighted_sum_of_present",
]


# --- one reward -------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """An affine map of rewards: gain · r + bias."""

    gain: Array  # []
    bias: Array  # []


def reference_scale(
    scores: Array,
    mask: Array,
    *,
    mean: ArrayLike = 0.0,
    std: ArrayLike = 1.0,
    ddof: ArrayLike = 0,
    axis_name: str | None = None,
) -> Scale:
    """The gain and bias that give the rewards of reference samples a wanted mean and spread.

    gain = std / std(scores), bias = mean - gain · mean(scores). If all scores are equal the gain is 1.

    Args:
      scores: [...] rewards of answers of the reference policy.
      mask: [...] bool, scores that count.
      mean: wanted mean.
      std: wanted standard deviation.
      ddof: 0 divides the variance by n, 1 by n - 1.
      axis_name: mapped axis whose devices share the statistics.
    Returns:
      Scale, to be used by `apply_scale`; stopped.
    Raises: TypeError for integer scores or a mask that is not bool; AssertionError if shapes differ.
    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; its code does so before and after the reward
      model is trained

    >>> scale = reference_scale(jnp.array([1.0, 5.0]), jnp.array([True, True]))
    >>> float(scale.gain), float(scale.bias)
    (0.5, -1.5)
    """
    scores = check_rewards(jax.lax.stop_gradient(scores), "scores")
    variance = masking.masked_variance(scores, mask, ddof=ddof, axis_name=axis_name)
    gain = jnp.where(variance > 0, jnp.asarray(std) * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)
    return Scale(gain, jnp.asarray(mean) - gain * masking.masked_mean(scores, mask, axis_name=axis_name))


def reference_shift(scores: Array, mask: Array, *, mean: ArrayLike = 0.0, axis_name: str | None = None) -> Scale:
    """The bias alone: reference samples get a wanted mean, differences stay what they are. gain = 1.

    Args:
      scores: [...] rewards of reference answers, for instance human demonstrations.
      mask: [...] bool, scores that count.
      mean: wanted mean.
      axis_name: mapped axis whose devices share the mean.
    Returns:
      Scale, to be used by `apply_scale`; stopped.
    Raises: TypeError for integer scores or a mask that is not bool; AssertionError if shapes differ.
    Reference: Huang et al. 2024, https://arxiv.org/abs/2403.17031

    >>> float(reference_shift(jnp.array([1.0, 5.0]), jnp.array([True, True])).bias)
    -3.0
    """
    scores = check_rewards(jax.lax.stop_gradient(scores), "scores")
    average = masking.masked_mean(scores, mask, axis_name=axis_name)
    return Scale(jnp.ones_like(average), jnp.asarray(mean) - average)


def apply_scale(rewards: Array, scale: Scale) -> Array:
    """gain · r + bias.

    >>> apply_scale(jnp.array([2.0]), Scale(jnp.array(0.5), jnp.array(1.0))).tolist()
    [2.0]
    """
    return scale.gain * check_rewards(rewards) + scale.bias


def centre_and_scale(rewards: Array, moments: Moments, *, ddof: ArrayLike = 0, epsilon: ArrayLike = 1e-8) -> Array:
    """Rewards by running moments: (r - mean) / √(variance + ε).

    Follow the moments with `masking.init_moments` and `masking.update_moments`; before anything was seen, or after
    equal rewards only, the rewards are centred and not scaled.

    Args:
      rewards: [...] rewards; NaN stays NaN.
      moments: of the rewards seen so far; stopped.
      ddof: 0 divides the squares by n, 1 by n - 1.
      epsilon: added under the root.
    Returns:
      [...] rewards without a unit.
    Raises: TypeError for integer rewards.
    Reference: Zheng et al. 2023, https://arxiv.org/abs/2307.04964

    >>> seen = masking.update_moments(masking.init_moments(), jnp.array([1.0, 5.0]), jnp.array([True, True]))
    >>> [round(r, 3) for r in centre_and_scale(jnp.array([1.0, 7.0]), seen).tolist()]
    [-1.0, 2.0]
    """
    return (check_rewards(rewards) - jax.lax.stop_gradient(moments.mean)) * _running_gain(moments, ddof, epsilon)


def scale_only(rewards: Array, moments: Moments, *, ddof: ArrayLike = 0, epsilon: ArrayLike = 1e-8) -> Array:
    """Rewards by their running spread alone, so that their sign keeps its meaning: r / √(variance + ε) (trlx).

    Before anything was seen, or after equal rewards only, the rewards stay what they are.

    Args:
      rewards: [...] rewards; NaN stays NaN.
      moments: of the rewards seen so far; stopped.
      ddof: 0 divides the squares by n, 1 by n - 1.
      epsilon: added under the root.
    Returns:
      [...] rewards without a unit.
    Raises: TypeError for integer rewards.
    Reference: Engstrom et al. 2020, https://arxiv.org/abs/2005.12729, by the spread of discounted sums

    >>> seen = masking.update_moments(masking.init_moments(), jnp.array([1.0, 5.0]), jnp.array([True, True]))
    >>> [round(r, 3) for r in scale_only(jnp.array([1.0, -4.0]), seen).tolist()]
    [0.5, -2.0]
    """
    return check_rewards(rewards) * _running_gain(moments, ddof, epsilon)


def _running_gain(moments: Moments, ddof: ArrayLike, epsilon: ArrayLike) -> Array:
    variance = jax.lax.stop_gradient(moments).variance(ddof=ddof)
    return jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0) + epsilon), 1.0)


# --- several rewards --------------------------------------------------------------------------------------------------


def _present(rewards: Array, weights: ArrayLike) -> tuple[Array, Array, Array]:
    """[..., N] rewards without NaN, weights, and where a reward is there."""
    rewards = check_rewards(rewards)
    weights = jnp.asarray(weights, rewards.dtype)
    if weights.shape not in ((), rewards.shape[-1:]):
        raise ValueError(f"weights must be one number or have shape {rewards.shape[-1:]}, got shape {weights.shape}")
    there = ~jnp.isnan(rewards)
    return jnp.where(there, rewards, 0.0), jnp.broadcast_to(weights, rewards.shape), there


def weighted_sum_of_present(rewards: Array, *, weights: ArrayLike = 1.0) -> Array:
    """Σ_n w_n r_n over the rewards that are there; NaN if none is.

    A missing reward adds nothing, so an item with many missing ones tends to 0 (TRL). To have it compared by the
    rewards it has, use `weighted_mean_of_present`.

    Args:
      rewards: [..., N] N rewards per item, NaN where missing.
      weights: [] or [N].
    Returns:
      [...] one reward per item.
    Raises: TypeError for integer rewards; ValueError for weights of another shape.

    >>> weighted_sum_of_present(jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), weights=jnp.array([1.0, 10.0])).tolist()
    [21.0, 3.0]
    """
    clean, w, there = _present(rewards, weights)
    return jnp.where(jnp.any(there, axis=-1), jnp.sum(w * clean, axis=-1), jnp.nan)


def weighted_mean_of_present(rewards: Array, *, weights: ArrayLike = 1.0) -> Array:
    """Σ_n w_n r_n / Σ_n w_n, both over the rewards that are there; NaN if none is or their weights sum to 0.

    With nothing missing and weights that sum to 1 equal to `weighted_sum_of_present`.

    Args:
      rewards: [..., N] N rewards per item, NaN where missing.
      weights: [] or [N].
    Returns:
      [...] one reward per item.
    Raises: TypeError for integer rewards; ValueError for weights of another shape.

    >>> weighted_mean_of_present(jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), weights=jnp.array([1.0, 3.0])).tolist()
    [1.75, 3.0]
    """
    clean, w, there = _present(rewards, weights)
    total = jnp.sum(jnp.where(there, w, 0.0), axis=-1)
    mean = jnp.sum(w * clean, axis=-1) / jnp.where(total == 0, 1.0, total)
    return jnp.where(total == 0, jnp.nan, mean)


def normalised_sum_of_present(
    rewards: Array,
    *,
    weights: ArrayLike = 1.0,
    ddof: ArrayLike = 0,
    epsilon: ArrayLike = 1e-8,
    axis_name: str | None = None,
) -> Array:
    """Each reward brought to mean 0 and variance 1 over the batch, then summed: Σ_n w_n (r_n - mean_n) / √(var_n + ε).

    So no reward drowns another by its scale: multiplying one by a positive number changes nothing at ε = 0. GDPO
    normalises within the group of a prompt instead; see `group_advantages.gdpo`.

    Args:
      rewards: [B, N] N rewards per item, NaN where missing.
      weights: [] or [N].
      ddof: 0 divides the variances by n, 1 by n - 1.
      epsilon: added under the roots.
      axis_name: mapped axis whose devices share the statistics.
    Returns:
      [B] one reward per item; NaN if it has none.
    Raises: TypeError for integer rewards; ValueError for weights of another shape.
    Reference: Liu et al. 2026, https://arxiv.org/abs/2601.05242, for the idea

    >>> normalised_sum_of_present(jnp.array([[0.0, 300.0], [2.0, 100.0]])).tolist()
    [0.0, 0.0]
    """
    clean, w, there = _present(rewards, weights)
    chex.assert_rank(clean, 2)
    whiten = lambda r, m: masking.whiten(r, m, ddof=ddof, epsilon=epsilon, axis_name=axis_name)
    each = jax.vmap(whiten, 1, 1)(clean, there)
    return jnp.where(jnp.any(there, axis=-1), jnp.sum(w * each, axis=-1), jnp.nan)
