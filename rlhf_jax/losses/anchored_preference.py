"""Preference losses that give each log-ratio of a pair its own target: NCA, BCO, SPPO, APO.

Same signature as `preference`: ``(chosen_log_ratios, rejected_log_ratios, *, beta, knobs) -> loss per pair [...]``,
log-ratios summed over completion tokens. Unlike a function of the margin, these losses notice when both completions
become less likely: adding the same number to both log-ratios changes the loss.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating, knob

__all__ = ["apo_down", "apo_zero", "bco_pair", "nca", "sppo"]


def _rewards(chosen_log_ratios: Array, rejected_log_ratios: Array, beta: ArrayLike) -> tuple[Array, Array]:
    chosen, rejected = floating(chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    return knob(beta, chosen) * chosen, knob(beta, rejected) * rejected


def nca(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.01) -> Array:
    """Noise contrastive alignment of a pair: -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l), r = β ρ.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref, in nats.
      beta: β. Default 0.01 (appendix C).
    Returns:
      [...] loss per pair, minimal in the chosen reward at r_w = log 2: it is not pushed further.
      Log-ratios of 0 give 2 log 2.
    Reference: Chen et al. 2024, https://arxiv.org/abs/2402.05369

    >>> round(float(nca(jnp.array(0.0), jnp.array(0.0))), 4)
    1.3863
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair(
    chosen_log_ratios: Array,
    rejected_log_ratios: Array,
    *,
    beta: ArrayLike = 0.01,
    reward_shift: ArrayLike = 0.0,
) -> Array:
    """Binary classifier optimisation of a pair: -log σ(β ρ_w - δ) - log σ(-(β ρ_l - δ)).

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref, in nats.
      beta: β. Default 0.01 (appendix C).
      reward_shift: δ, [] or [...]; see `unpaired_preference.update_reward_shift`. Default 0, TRL's pair form.
    Returns:
      [...] loss per pair, at least `dpo`'s at the same beta whatever δ is. Log-ratios of 0 and δ = 0 give 2 log 2.
    Reference: Jung et al. 2024, https://arxiv.org/abs/2404.04656

    >>> round(float(bco_pair(jnp.array(0.0), jnp.array(0.0))), 4)
    1.3863
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    return -jax.nn.log_sigmoid(chosen - reward_shift) - jax.nn.log_sigmoid(reward_shift - rejected)


def sppo(
    chosen_log_ratios: Array,
    rejected_log_ratios: Array,
    *,
    beta: ArrayLike = 0.001,
    chosen_win_probability: ArrayLike = 1.0,
    rejected_win_probability: ArrayLike = 0.0,
) -> Array:
    """Self-play preference optimisation: (ρ_w - (P_w - ½) / β)² + (ρ_l - (P_l - ½) / β)².

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_t, in nats; π_t sampled the completions.
      beta: 1 / η. Default 0.001 (section 5: η = 1000).
      chosen_win_probability: P_w, [] or [...], the completion's mean win rate against samples of π_t. Default 1, the
        "hard" form that needs only the label.
      rejected_win_probability: P_l, [] or [...]. Default 0.
    Returns:
      [...] loss per pair. Hard labels pull ρ_w to 1 / (2 β) and ρ_l to -1 / (2 β); both P = ½ pull both to 0.
    Reference: Wu et al. 2024, https://arxiv.org/abs/2405.00675

    >>> float(sppo(jnp.array(5.0), jnp.array(-5.0), beta=0.1))
    0.0
    """
    chosen, rejected = floating(chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    won = (knob(chosen_win_probability, chosen) - 0.5) / beta
    lost = (knob(rejected_win_probability, rejected) - 0.5) / beta
    return jnp.square(chosen - won) + jnp.square(rejected - lost)


def apo_zero(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1) -> Array:
    """Anchored preference optimisation, zero: (1 - σ(r_w)) + σ(r_l), r = β ρ.

    For data better than what the policy writes: it raises the chosen and lowers the rejected completion.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref, in nats.
      beta: β. Default 0.1 (section 5.2).
    Returns:
      [...] loss per pair in [0, 2], the paper's plus 1. Log-ratios of 0 give 1.
    Reference: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266

    >>> float(apo_zero(jnp.array(0.0), jnp.array(0.0)))
    1.0
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1) -> Array:
    """Anchored preference optimisation, down: σ(r_w) + (1 - σ(r_w - r_l)), r = β ρ.

    For data worse than what the policy writes: it lowers both completions, the rejected one more.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref, in nats.
      beta: β. Default 0.1 (section 5.2).
    Returns:
      [...] loss per pair in [0, 2], the paper's plus 1. Log-ratios of 0 give 1.
    Reference: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266

    >>> float(apo_down(jnp.array(0.0), jnp.array(0.0)))
    1.0
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
