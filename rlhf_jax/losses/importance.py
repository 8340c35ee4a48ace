"""Weights that correct for a sampler whose probabilities differ from the trainer's.

The sampler (another precision, another kernel, older parameters) draws tokens with probability μ while the trainer
assigns π. With ρ = π / μ, a loss is corrected by multiplying it with one of these weights before reducing. All weights
are stopped: they change the measure, not the objective. If both agree every weight is 1.

Token-level functions are elementwise; zero both inputs outside the mask first (`masking.zero_outside`). Functions of
whole sequences take `mask` and give one weight per row, 1 for a row without a token; write `weights[..., None]` to
multiply token losses.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import floating

__all__ = [
    "effective_sample_share",
    "masked_weights",
    "off_policy_sequence_mask",
    "sequence_masked_weights",
    "sequence_mean_mask",
    "sequence_truncated_weights",
    "truncated_weights",
]


def _log_ratio(trainer_log_probs: Array, sampler_log_probs: Array) -> Array:
    trainer_log_probs, sampler_log_probs = floating(
        trainer_log_probs=trainer_log_probs, sampler_log_probs=sampler_log_probs
    )
    return jax.lax.stop_gradient(trainer_log_probs - sampler_log_probs)


def _row_log_ratio(trainer_log_probs: Array, sampler_log_probs: Array, mask: Array) -> Array:
    """log of the product of token ratios, [...]."""
    cleaned = masking.zero_outside(mask, trainer_log_probs, sampler_log_probs)
    return masking.masked_sum(_log_ratio(*cleaned), mask, axis=-1)


def _within(log_ratio: Array, low: ArrayLike, high: ArrayLike) -> Array:
    return (log_ratio >= jnp.log(low)) & (log_ratio <= jnp.log(high))


def truncated_weights(trainer_log_probs: Array, sampler_log_probs: Array, *, cap: ArrayLike = 2.0) -> Array:
    """Truncated importance sampling, per token: w = min(ρ, cap).

    Args:
      trainer_log_probs: [..., T] log π of the sampled tokens under the trainer.
      sampler_log_probs: [..., T] log μ of the same tokens as the sampler reported them.
      cap: largest weight; infinite gives plain importance sampling.
    Returns:
      [..., T] weights in [0, cap], stopped.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Ionides 2008, https://doi.org/10.1198/106186008X320456; for samplers of language models Yao et al. 2025,
      https://fengyao.notion.site/off-policy-rl

    >>> trainer, sampler = jnp.log(jnp.array([0.5, 0.9])), jnp.log(jnp.array([1.0, 0.3]))
    >>> [round(w, 2) for w in truncated_weights(trainer, sampler).tolist()]
    [0.5, 2.0]
    """
    return jnp.exp(jnp.minimum(_log_ratio(trainer_log_probs, sampler_log_probs), jnp.log(cap)))


def masked_weights(
    trainer_log_probs: Array, sampler_log_probs: Array, *, low: ArrayLike = 0.5, high: ArrayLike = 5.0
) -> Array:
    """Masked importance sampling (IcePop), per token: w = ρ if low <= ρ <= high, else 0.

    Args:
      trainer_log_probs: [..., T] log π of the sampled tokens under the trainer.
      sampler_log_probs: [..., T] log μ of the same tokens as the sampler reported them.
      low: smaller ratios drop the token; 0 keeps them.
      high: larger ratios drop the token; infinite keeps them.
    Returns:
      [..., T] weights, stopped.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Ling team 2025 (Ring-1T), https://arxiv.org/abs/2510.18855

    >>> trainer, sampler = jnp.log(jnp.array([0.4, 0.6, 0.9])), jnp.log(jnp.array([1.0, 0.5, 0.1]))
    >>> [round(w, 2) for w in masked_weights(trainer, sampler).tolist()]
    [0.0, 1.2, 0.0]
    """
    log_ratio = _log_ratio(trainer_log_probs, sampler_log_probs)
    kept = _within(log_ratio, low, high)
    return jnp.where(kept, jnp.exp(jnp.where(kept, log_ratio, 0.0)), 0.0)


def sequence_truncated_weights(
    trainer_log_probs: Array, sampler_log_probs: Array, mask: Array, *, cap: ArrayLike = 2.0
) -> Array:
    """Truncated importance sampling, per sequence: w = min(Π_t ρ_t, cap).

    Args:
      trainer_log_probs: [..., T] log π of the sampled tokens under the trainer.
      sampler_log_probs: [..., T] log μ of the same tokens as the sampler reported them.
      mask: [..., T] bool, the sequence's tokens.
      cap: largest weight; infinite gives the unbiased weight of the sequence.
    Returns:
      [...] weights, stopped. For one token it equals `truncated_weights`.
    Raises: TypeError for integer inputs or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Ionides 2008, https://doi.org/10.1198/106186008X320456

    >>> trainer, sampler = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[1.0, 0.8]]))
    >>> [round(w, 4) for w in sequence_truncated_weights(trainer, sampler, jnp.array([[True, True]])).tolist()]
    [0.3125]
    """
    return jnp.exp(jnp.minimum(_row_log_ratio(trainer_log_probs, sampler_log_probs, mask), jnp.log(cap)))


def sequence_masked_weights(
    trainer_log_probs: Array, sampler_log_probs: Array, mask: Array, *, low: ArrayLike = 0.5, high: ArrayLike = 5.0
) -> Array:
    """Masked importance sampling, per sequence: w = W if low <= W <= high, else 0, with W = Π_t ρ_t.

    Args:
      trainer_log_probs: [..., T] log π of the sampled tokens under the trainer.
      sampler_log_probs: [..., T] log μ of the same tokens as the sampler reported them.
      mask: [..., T] bool, the sequence's tokens.
      low: smaller ratios drop the sequence; 0 keeps them.
      high: larger ratios drop the sequence; infinite keeps them.
    Returns:
      [...] weights, stopped. For one token it equals `masked_weights`.
    Raises: TypeError for integer inputs or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Ling team 2025 (Ring-1T, the rule per token), https://arxiv.org/abs/2510.18855

    >>> trainer, sampler = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[1.0, 0.8]]))
    >>> sequence_masked_weights(trainer, sampler, jnp.array([[True, True]])).tolist()
    [0.0]
    """
    log_ratio = _row_log_ratio(trainer_log_probs, sampler_log_probs, mask)
    kept = _within(log_ratio, low, high)
    return jnp.where(kept, jnp.exp(jnp.where(kept, log_ratio, 0.0)), 0.0)


def sequence_mean_mask(
    trainer_log_probs: Array, sampler_log_probs: Array, mask: Array, *, low: ArrayLike, high: ArrayLike
) -> Array:
    """Keeps a sequence while the geometric mean of its token ratios lies in [low, high].

    The mean does not grow with length as the product does, so the bounds are close to 1 and mean the same for short and
    long sequences.

    Args:
      trainer_log_probs: [..., T] log π of the sampled tokens under the trainer.
      sampler_log_probs: [..., T] log μ of the same tokens as the sampler reported them.
      mask: [..., T] bool, the sequence's tokens.
      low: smallest mean ratio kept.
      high: largest mean ratio kept.
    Returns:
      [...] bool; use it to narrow the mask, `mask & kept[..., None]`.
    Raises: TypeError for integer inputs or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Zheng et al. 2025 (GSPO), section 4.1, for the ratio, https://arxiv.org/abs/2507.18071

    >>> trainer, sampler = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[1.0, 0.8]]))
    >>> sequence_mean_mask(trainer, sampler, jnp.array([[True, True]]), low=0.5, high=2.0).tolist()
    [True]
    """
    cleaned = masking.zero_outside(mask, trainer_log_probs, sampler_log_probs)
    return _within(masking.masked_mean(_log_ratio(*cleaned), mask, axis=-1), low, high)


def off_policy_sequence_mask(
    trainer_log_probs: Array, sampler_log_probs: Array, advantages: Array, mask: Array, *, threshold: ArrayLike
) -> Array:
    """Drops bad sequences that the trainer has moved away from: keep if A >= 0 or mean_t log(μ_t / π_t) <= threshold.

    Learning from one's own mistakes is safe; punishing sequences that have become unlikely is not.

    Args:
      trainer_log_probs: [..., T] log π of the sampled tokens under the trainer, now.
      sampler_log_probs: [..., T] log μ of the same tokens as the sampler reported them.
      advantages: [...] one per sequence.
      mask: [..., T] bool, the sequence's tokens.
      threshold: largest mean divergence, in nats per token, of a sequence with a negative advantage.
    Returns:
      [...] bool; use it to narrow the mask, `mask & kept[..., None]`.
    Raises: ValueError if advantages are not one per sequence, TypeError for integer inputs or a mask that is not bool,
      AssertionError if shapes differ (at trace time).
    Reference: DeepSeek-AI 2025 (DeepSeek-V3.2), https://arxiv.org/abs/2512.02556

    >>> trainer, sampler = jnp.array([[-3.0], [-3.0]]), jnp.array([[-1.0], [-1.0]])
    >>> mask = jnp.array([[True], [True]])
    >>> off_policy_sequence_mask(trainer, sampler, jnp.array([1.0, -1.0]), mask, threshold=0.5).tolist()
    [True, False]
    """
    (advantages,) = floating(advantages=advantages)
    if advantages.shape != mask.shape[:-1]:
        raise ValueError(f"advantages must have one value per sequence, {mask.shape[:-1]}, got {advantages.shape}")
    cleaned = masking.zero_outside(mask, trainer_log_probs, sampler_log_probs)
    divergence = -masking.masked_mean(_log_ratio(*cleaned), mask, axis=-1)
    return (advantages >= 0) | (divergence <= threshold)


def effective_sample_share(weights: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """Share of the samples that weighted averaging really uses: (Σ w)² / (n·Σ w²), a diagnostic.

    Args:
      weights: [...] importance weights.
      mask: [...] bool.
      axis_name: mapped axis whose devices are counted together.
    Returns:
      [] share, 1 for equal weights and 1/n if one weight dominates; 0 if nothing counts or all weights are 0.
    Raises: TypeError for integer weights or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Kong 1992, technical report 348, University of Chicago

    >>> round(float(effective_sample_share(jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.ones(4, bool))), 3)
    0.5
    """
    (weights,) = floating(weights=weights)
    (weights,) = masking.zero_outside(mask, weights)
    mean = masking.masked_mean(weights, mask, axis_name=axis_name)
    square = masking.masked_mean(jnp.square(weights), mask, axis_name=axis_name)
    return jnp.square(mean) / jnp.where(square > 0, square, 1.0)
