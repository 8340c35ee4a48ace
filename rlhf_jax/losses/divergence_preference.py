"""f-DPO: the KL that DPO constrains the policy with, replaced by another f-divergence D_f(π ‖ π_ref).

The reward that a policy implies becomes β f'(π / π_ref). So each divergence is one function of the log-ratio ρ, its
*score*, and the loss is DPO on scores: -log σ(β (s(ρ_w) - s(ρ_l))). Constants of f' cancel and are left out or not as
reads best. Any other pair loss takes scores just as well:

>>> from rlhf_jax.losses.preference import hinge
>>> hinge(jensen_shannon_scores(jnp.array([1.0])), jensen_shannon_scores(jnp.array([1.0]))).tolist()
[1.0]

The reverse KL has the score ρ: it is `preference.dpo`. Scores that exponentiate a summed log-ratio are continued
along their tangent beyond exp(80) (float32; exp(701) in float64), so that they and their gradients stay finite.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import bounded_exp, floating, power_scores
from rlhf_jax.losses.preference import dpo

__all__ = [
    "alpha_divergence_dpo",
    "alpha_divergence_scores",
    "forward_kl_dpo",
    "forward_kl_scores",
    "jensen_shannon_dpo",
    "jensen_shannon_scores",
]


def forward_kl_scores(log_ratios: Array) -> Array:
    """f'(π / π_ref) of the forward KL, f(u) = -log u: -exp(-ρ).

    Args:
      log_ratios: [...] summed log π - log π_ref, in nats.
    Returns:
      [...] scores, below 0.
    Reference: Wang et al. 2023, table 1, https://arxiv.org/abs/2309.16240

    >>> float(forward_kl_scores(jnp.array(0.0)))
    -1.0
    """
    (ratios,) = floating(log_ratios=log_ratios)
    return -bounded_exp(-ratios)


def jensen_shannon_scores(log_ratios: Array) -> Array:
    """f'(π / π_ref) of the Jensen-Shannon divergence, f(u) = u log u - (u + 1) log((u + 1) / 2): log(2 u / (1 + u)).

    Args:
      log_ratios: [...] summed log π - log π_ref, in nats.
    Returns:
      [...] scores log 2 + log σ(ρ), bounded above by log 2. A log-ratio of 0 gives 0; for ρ → -∞ it is ρ + log 2.
    Reference: Wang et al. 2023, table 1, https://arxiv.org/abs/2309.16240

    >>> float(jensen_shannon_scores(jnp.array(0.0)))
    0.0
    """
    (ratios,) = floating(log_ratios=log_ratios)
    return jnp.log(2.0) + jax.nn.log_sigmoid(ratios)


def alpha_divergence_scores(log_ratios: Array, *, alpha: ArrayLike = 0.5) -> Array:
    """f'(π / π_ref) of the α-divergence: (1 - u^(-α)) / α, u = π / π_ref.

    Args:
      log_ratios: [...] summed log π - log π_ref, in nats.
      alpha: α; 0 is the reverse KL (the score is ρ), 1 the forward KL (`forward_kl_scores` + 1). Default 0.5. TRL's
        coefficient is 1 - α.
    Returns:
      [...] scores. A log-ratio of 0 gives 0.
    Reference: Wang et al. 2023, table 1, https://arxiv.org/abs/2309.16240

    >>> [round(float(alpha_divergence_scores(jnp.array(2.0), alpha=a)), 4) for a in (0.0, 1.0)]
    [2.0, 0.8647]
    """
    (ratios,) = floating(log_ratios=log_ratios)
    return power_scores(ratios, alpha)


def forward_kl_dpo(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1) -> Array:
    """DPO under a forward-KL constraint: -log σ(β (exp(-ρ_l) - exp(-ρ_w))).

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref, in nats.
      beta: as for `preference.dpo`. Default 0.1.
    Returns:
      [...] loss per pair. Equal log-ratios give log 2.
    Reference: Wang et al. 2023, https://arxiv.org/abs/2309.16240

    >>> round(float(forward_kl_dpo(jnp.array(1.0), jnp.array(1.0))), 4)
    0.6931
    """
    return dpo(forward_kl_scores(chosen_log_ratios), forward_kl_scores(rejected_log_ratios), beta=beta)


def jensen_shannon_dpo(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1) -> Array:
    """DPO under a Jensen-Shannon constraint: -log σ(β (log σ(ρ_w) - log σ(ρ_l))).

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref, in nats.
      beta: as for `preference.dpo`. Default 0.1.
    Returns:
      [...] loss per pair. Equal log-ratios give log 2; for both log-ratios → -∞ it is `preference.dpo`.
    Reference: Wang et al. 2023, https://arxiv.org/abs/2309.16240

    >>> round(float(jensen_shannon_dpo(jnp.array(1.0), jnp.array(1.0))), 4)
    0.6931
    """
    return dpo(jensen_shannon_scores(chosen_log_ratios), jensen_shannon_scores(rejected_log_ratios), beta=beta)


def alpha_divergence_dpo(
    chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1, alpha: ArrayLike = 0.5
) -> Array:
    """DPO under an α-divergence constraint: -log σ(β (exp(-α ρ_l) - exp(-α ρ_w)) / α).

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref, in nats.
      beta: as for `preference.dpo`. Default 0.1.
      alpha: α, see `alpha_divergence_scores`. Default 0.5.
    Returns:
      [...] loss per pair. α = 0 gives `preference.dpo`, α = 1 `forward_kl_dpo`.
    Reference: Wang et al. 2023, https://arxiv.org/abs/2309.16240

    >>> round(float(alpha_divergence_dpo(jnp.array(1.0), jnp.array(1.0))), 4)
    0.6931
    """
    chosen = alpha_divergence_scores(chosen_log_ratios, alpha=alpha)
    return dpo(chosen, alpha_divergence_scores(rejected_log_ratios, alpha=alpha), beta=beta)
