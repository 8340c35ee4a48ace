"""Preference losses over pairs of log-ratios: the DPO family that differs by the shape of one scalar function.

One signature for all: ``(chosen_log_ratios, rejected_log_ratios, *, beta, knobs) -> loss per pair [...]``. A log-ratio
is a completion's summed log π(y|x) - log π_ref(y|x), over completion tokens only; β times it is the implied reward.
Losses are unreduced, float32 (float64 inputs stay float64), and the gradient flows into both log-ratios. A mixture of
losses is their sum.
"""

import jax
import jax.numpy as jnp  # noqa: F401
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating

__all__ = ["dpo"]


def dpo(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1) -> Array:
    """Direct preference optimisation: -log σ(β (ρ_w - ρ_l)).

    Args:
      chosen_log_ratios: [...] summed log π - log π_ref of the preferred completions, in nats.
      rejected_log_ratios: [...] the same of the rejected completions.
      beta: strength of the implied KL constraint; larger stays closer to the reference. Default 0.1 (the paper's code).
    Returns:
      [...] loss per pair. Equal log-ratios give log 2; only their difference matters.
    Raises:
      TypeError: an input is not floating. AssertionError: shapes differ.
    Reference: Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290

    >>> round(float(dpo(jnp.array(0.0), jnp.array(0.0))), 4)
    0.6931
    """
    chosen, rejected = floating(chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))
