"""Preference losses over single completions marked desirable or not: KTO, APO-zero and BCO without pairs.

Signature: ``(log_ratios, desirable, ..., *, beta, knobs) -> loss per completion [...]``, log-ratios summed over
completion tokens. What a completion is compared with, KTO's reference point or BCO's reward shift, is a statistic of
the whole batch or run: compute it with the function beside the loss, across devices, and hand it in. No gradient flows
into it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import check_flags, floating, knob

__all__ = [
    "apo_zero_unpaired",
    "bco",
    "density_ratio_weights",
    "init_reward_shift",
    "kto",
    "kto_reference_point",
    "update_reward_shift",
]


def kto_reference_point(log_ratios: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """KTO's estimate of KL(π ‖ π_ref), shared by the whole batch: max(0, mean ρ of mismatched completions).

    Args:
      log_ratios: [...] summed log π - log π_ref of completions that belong to *another* prompt of the batch (for
        instance the completions rolled by one row). Matched ones would estimate something else.
      mask: [...] bool.
      axis_name: mapped axis whose devices share the estimate.
    Returns:
      [] nats, at least 0, without gradient. An empty mask gives 0.
    Reference: Ethayarajh et al. 2024, section 4.2, https://arxiv.org/abs/2402.01306

    >>> float(kto_reference_point(jnp.array([1.0, 3.0]), jnp.array([True, True])))
    2.0
    """
    (ratios,) = floating(log_ratios=log_ratios)
    return jnp.maximum(masking.masked_mean(jax.lax.stop_gradient(ratios), mask, axis_name=axis_name), 0.0)


def kto(
    log_ratios: Array,
    desirable: Array,
    reference_point: Array,
    *,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> Array:
    """Kahneman-Tversky optimisation: λ_D (1 - σ(β (ρ - z₀))) if desirable, λ_U (1 - σ(β (z₀ - ρ))) if not.

    Args:
      log_ratios: [...] summed log π - log π_ref, in nats.
      desirable: [...] bool, whether the completion is a good one.
      reference_point: [] z₀ from `kto_reference_point`; stopped.
      beta: β. Default 0.1.
      desirable_weight, undesirable_weight: λ_D, λ_U. Defaults 1; keep λ_D n_D / (λ_U n_U) near 1 if classes are uneven.
    Returns:
      [...] loss per completion in [0, λ]; λ / 2 at ρ = z₀.
    Reference: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306

    >>> kto(jnp.array([2.0, 2.0]), jnp.array([True, False]), jnp.array(2.0)).tolist()
    [0.5, 0.5]
    """
    (ratios,) = floating(log_ratios=log_ratios)
    check_flags("desirable", desirable, ratios)
    gain = beta * (ratios - jax.lax.stop_gradient(knob(reference_point, ratios)))
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))


def apo_zero_unpaired(log_ratios: Array, desirable: Array, *, beta: ArrayLike = 0.1) -> Array:
    """APO-zero without pairs: 1 - σ(β ρ) if desirable, σ(β ρ) if not.

    Args:
      log_ratios: [...] summed log π - log π_ref, in nats.
      desirable: [...] bool.
      beta: β. Default 0.1 (as for `anchored_preference.apo_zero`).
    Returns:
      [...] loss per completion in [0, 1]: `kto` with reference point 0. A pair's two losses add up to `apo_zero`.
    Reference: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266

    >>> apo_zero_unpaired(jnp.array([0.0, 0.0]), jnp.array([True, False])).tolist()
    [0.5, 0.5]
    """
    return kto(log_ratios, desirable, jnp.zeros(()), beta=beta)


def init_reward_shift() -> masking.Moments:
    """Moments of the implied rewards seen so far, none yet; their mean is BCO's δ.

    >>> float(init_reward_shift().mean)
    0.0
    """
    return masking.init_moments()


def update_reward_shift(
    moments: masking.Moments,
    log_ratios: Array,
    mask: Array,
    *,
    beta: ArrayLike = 0.01,
    axis_name: str | None = None,
) -> masking.Moments:
    """Adds a batch's implied rewards β ρ, of good and bad completions alike, to the running moments.

    TRL updates first and then uses ``moments.mean`` as δ in the same step.

    Args:
      moments: from `init_reward_shift` or the last update.
      log_ratios: [...] summed log π - log π_ref, in nats; stopped.
      mask: [...] bool.
      beta: as in `bco`. Default 0.01.
      axis_name: mapped axis whose devices share the moments.
    Returns:
      Moments whose mean is δ.
    Reference: Jung et al. 2024, https://arxiv.org/abs/2404.04656

    >>> seen = update_reward_shift(init_reward_shift(), jnp.array([1.0, 3.0]), jnp.array([True, True]), beta=0.5)
    >>> float(seen.mean)
    1.0
    """
    (ratios,) = floating(log_ratios=log_ratios)
    return masking.update_moments(
        moments, knob(beta, ratios) * jax.lax.stop_gradient(ratios), mask, axis_name=axis_name
    )


def bco(log_ratios: Array, desirable: Array, reward_shift: Array, *, beta: ArrayLike = 0.01) -> Array:
    """Binary classifier optimisation: -log σ(β ρ - δ) if desirable, -log σ(-(β ρ - δ)) if not.

    Args:
      log_ratios: [...] summed log π - log π_ref, in nats.
      desirable: [...] bool.
      reward_shift: [] δ, the mean of `update_reward_shift`'s moments; stopped.
      beta: β. Default 0.01 (appendix C).
    Returns:
      [...] loss per completion; log 2 at β ρ = δ. A pair's two losses add up to `anchored_preference.bco_pair`.
    Reference: Jung et al. 2024, https://arxiv.org/abs/2404.04656

    >>> [round(x, 4) for x in bco(jnp.array([2.0, 2.0]), jnp.array([True, False]), jnp.array(0.02)).tolist()]
    [0.6931, 0.6931]
    """
    (ratios,) = floating(log_ratios=log_ratios)
    check_flags("desirable", desirable, ratios)
    logits = beta * ratios - jax.lax.stop_gradient(knob(reward_shift, ratios))
    return -jax.nn.log_sigmoid(jnp.where(desirable, logits, -logits))


def density_ratio_weights(
    desirable_probabilities: Array, *, minimum: ArrayLike = 0.5, maximum: ArrayLike = 10.0
) -> Array:
    """BCO's weight of an undesirable completion whose prompt is unlike the desirable ones': clip(p / (1 - p)).

    p is a classifier's probability that the prompt belongs to a desirable example, given its embedding; the weight
    estimates the ratio of the two prompt densities. Gradients are stopped.

    Args:
      desirable_probabilities: [...] p in [0, 1].
      minimum, maximum: bounds of the weight. Defaults 0.5 and 10 (TRL).
    Returns:
      [...] weights. p = ½, prompts that cannot be told apart, gives 1; p = 1 gives the maximum.
    Reference: Jung et al. 2024, https://arxiv.org/abs/2404.04656

    >>> density_ratio_weights(jnp.array([0.5, 0.75, 1.0])).tolist()
    [1.0, 3.0, 10.0]
    """
    (p,) = floating(desirable_probabilities=desirable_probabilities)
    p = jax.lax.stop_gradient(p)
    return jnp.clip(p / jnp.maximum(1 - p, jnp.finfo(p.dtype).tiny), minimum, maximum)
