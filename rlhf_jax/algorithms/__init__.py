"""Algorithms, four names each: `Config`, `init`, `loss`, `update`. None imports another."""

from rlhf_jax.algorithms import (
    actor_critic,
    group,
    policy_distillation,
    preference,
    reward_model,
    sft,
    unpaired_preference,
)

__all__ = [
    "actor_critic",
    "group",
    "policy_distillation",
    "preference",
    "reward_model",
    "sft",
    "unpaired_preference",
]
