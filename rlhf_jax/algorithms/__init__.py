"""Algorithms, four names each: `Config`, `init`, `loss`, `update`. None imports another."""

from rlhf_jax.algorithms import (
    actor_critic,
    policy_distillation,
    reward_model,
    sft,
)

__all__ = [
    "actor_critic",
    "policy_distillation",
    "reward_model",
    "sft",
]
