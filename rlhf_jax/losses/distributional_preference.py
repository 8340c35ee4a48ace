"""Alignment via optimal transport (AOT): chosen completions should beat rejected ones quantile by quantile.

Both sides are sorted inside the batch and compared rank by rank, so the loss of a pair depends on every other pair of
the batch and on how large the batch is. It is the only pair loss that does. Micro-batches change it. Devices do not, if
`axis_name` is given: ranks are then those of the whole global batch.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import floating
from rlhf_jax.losses.preference import conservative_dpo

__all__ = ["aot_paired", "aot_unpaired"]


def _gather(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _partner_by_rank(x: Array, others: Array, mask: Array, axis_name: str | None) -> Array:
    """For each x the value of `others` that has the same rank; 0 outside the mask."""
    chex.assert_rank(x, 1)
    everyone = _gather(jnp.where(mask, jax.lax.stop_gradient(x), jnp.inf), axis_name)
    ranks = jnp.argsort(jnp.argsort(everyone))
    if axis_name is not None:
        ranks = jax.lax.dynamic_slice_in_dim(ranks, jax.lax.axis_index(axis_name) * x.size, x.size)
    ordered = jnp.sort(_gather(jnp.where(mask, others, jnp.inf), axis_name))
    return jnp.where(mask, ordered[ranks], 0.0)


def aot_paired(
    policy_margins: Array,
    reference_margins: Array,
    mask: Array,
    *,
    beta: ArrayLike = 0.01,
    label_smoothing: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """AOT of pairs: -log σ(β (m_(i) - m_ref,(i))), both margins sorted over the batch.

    Args:
      policy_margins: [B] log π(y_w) - log π(y_l), summed over completion tokens, in nats.
      reference_margins: [B] the same under the reference; stopped.
      mask: [B] bool, pairs that count.
      beta: β. Default 0.01 (figure 2).
      label_smoothing: ε as in `preference.conservative_dpo`. Default 0.
      axis_name: mapped axis whose devices are sorted together; without it the loss depends on the device split.
    Returns:
      [B] loss, each where its policy margin stands; 0 outside the mask. One pair gives `preference.dpo`.
    Reference: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882

    >>> loss = aot_paired(jnp.array([2.0, 1.0]), jnp.array([1.0, 2.0]), jnp.array([True, True]))
    >>> [round(x, 4) for x in loss.tolist()]
    [0.6931, 0.6931]
    """
    policy, reference = floating(policy_margins=policy_margins, reference_margins=reference_margins)
    (policy,) = masking.zero_outside(mask, policy)
    partners = _partner_by_rank(policy, jax.lax.stop_gradient(reference), mask, axis_name)
    loss = conservative_dpo(policy, partners, beta=beta, label_smoothing=label_smoothing)
    return jnp.where(mask, loss, 0.0)


def aot_unpaired(
    chosen_log_ratios: Array,
    rejected_log_ratios: Array,
    mask: Array,
    *,
    beta: ArrayLike = 0.01,
    label_smoothing: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """AOT without pairs: -log σ(β (ρ_w,(i) - ρ_l,(i))), both log-ratios sorted over the batch.

    Args:
      chosen_log_ratios: [B] summed log π - log π_ref of good completions, in nats.
      rejected_log_ratios: [B] of bad ones, in any order: as many as good ones, not necessarily of the same prompts.
      mask: [B] bool, slots that count on both sides.
      beta: β. Default 0.01 (figure 2).
      label_smoothing: ε as in `preference.conservative_dpo`. Default 0.
      axis_name: mapped axis whose devices are sorted together; without it the loss depends on the device split.
    Returns:
      [B] loss, each where its chosen log-ratio stands; 0 outside the mask. One pair gives `preference.dpo`.
    Reference: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882

    >>> loss = aot_unpaired(jnp.array([2.0, 1.0]), jnp.array([1.0, 2.0]), jnp.array([True, True]))
    >>> [round(x, 4) for x in loss.tolist()]
    [0.6931, 0.6931]
    """
    chosen, rejected = floating(chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    (chosen,) = masking.zero_outside(mask, chosen)
    partners = _partner_by_rank(chosen, rejected, mask, axis_name)
    loss = conservative_dpo(chosen, partners, beta=beta, label_smoothing=label_smoothing)
    return jnp.where(mask, loss, 0.0)
