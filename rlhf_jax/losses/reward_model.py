"""Reward-model losses over pairs of scores: Bradley-Terry and what is done to it.

Scores are a reward model's outputs, one per completion. Losses are per pair, unreduced, float32 (float64 inputs stay
float64), and depend on the scores' difference only, unless said otherwise.
"""

import jax
import jax.numpy as jnp  # noqa: F401
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating

__all__ = ["bradley_terry"]


def bradley_terry(
    chosen_scores: Array, rejected_scores: Array, *, margin: ArrayLike = 0.0, label_smoothing: ArrayLike = 0.0
) -> Array:
    """Bradley-Terry likelihood of the observed choice: -(1 - ε) log σ(Δ) - ε log σ(-Δ), Δ = s_w - s_l - margin.

    Args:
      chosen_scores: [...] scores of the preferred completions.
      rejected_scores: [...] scores of the rejected completions.
      margin: [] or [...] how far apart the scores should be, larger for clearer preferences. Default 0.
      label_smoothing: ε, [] or [...], probability that the label is flipped. Default 0.
    Returns:
      [...] loss per pair. Equal scores and no margin give log 2; ε = 0.5 has its minimum log 2 at Δ = 0.
    Raises:
      TypeError: a score is not floating. AssertionError: shapes differ.
    Reference: Bradley and Terry 1952; margin: Touvron et al. 2023 (Llama 2), eq. 2, https://arxiv.org/abs/2307.09288

    >>> round(float(bradley_terry(jnp.array(2.0), jnp.array(0.0), margin=2.0)), 4)
    0.6931
    """
    chosen, rejected = floating(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    difference = chosen - rejected - margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(difference) - label_smoothing * jax.nn.log_sigmoid(-difference)
