"""All probes, and the algorithms that have another optimum."""

from collections.abc import Callable

import bandit_probes  # noqa: F401  (registers its probes)
import critic_probes  # noqa: F401
import decision_probes  # noqa: F401
import group_probes
import jax
import jax.numpy as jnp
import labelled_answer_probes  # noqa: F401
import regression_probes  # noqa: F401
import sampler_probes  # noqa: F401
import two_answer_probes
from distillation_probes import distilled
from policy_probes import grouped, spread
from preference_probes import pairs, thumbs
from problem import BETA, HUMAN_OPTIMUM, OPTIMUM, PROBES, TEACHER

from rlhf_jax import group_advantages
from rlhf_jax.algorithms import unpaired_preference as unpaired
from rlhf_jax.losses import (
    distillation,
    preference,
    unpaired_preference,
)

__all__ = ["BIASED", "PROBES"]

BIASED: dict[str, Callable[[], jax.Array]] = {
    "GRPO, KL in the loss (k3)": lambda: grouped(spread(group_advantages.group_relative), kl_in_reward=False),
    "conservative DPO on clean labels": lambda: pairs(
        lambda *x: preference.conservative_dpo(*x, beta=BETA, label_smoothing=0.2), OPTIMUM
    ),
    two_answer_probes.TRAPPED: lambda: two_answer_probes.distance(two_answer_probes.TRAPPED),
    "pass@k training for k = 1, against the best pass@2": lambda: group_probes.distance(
        group_probes.passing, group_probes.PASS_1, lambda: group_probes.best_mixture(2)
    ),
    group_probes.SUMMED: lambda: group_probes.distance(
        group_probes.separate, group_probes.SUMMED, group_probes.gdpo_rest
    ),
    "BCO at the mean reward so far, every answer as often": lambda: thumbs(
        OPTIMUM, loss=unpaired_preference.bco, anchor=unpaired.mean_reward
    ),
    "IPO, against the optimum of the reward": lambda: pairs(lambda *x: preference.ipo_sum(*x, beta=BETA), OPTIMUM),
    "plain distillation": lambda: distilled(
        lambda table, old, step: jnp.sum(distillation.soft_cross_entropy(table, TEACHER)), HUMAN_OPTIMUM
    ),
}
"""Algorithms that optimise something else: their distance from π_ref exp(r/β) / Z (of π_T for distillation) is real."""
