"""rlhf_jax: reinforcement learning from human feedback as pure functions for JAX and Flax.

The functional core is imported with the package. Models, generation, feedback, data, training, algorithms, testing and
debugging are packages of their own, imported by name: `from rlhf_jax.algorithms import actor_critic`.
"""

from rlhf_jax import (
    advantages,
    constraints,
    ensembles,
    evaluation,
    group_advantages,
    kl,
    logprobs,
    losses,
    masking,
    pass_at_k,
    returns,
    reward_scales,
    rewards,
    teacher_chunks,
    token_advantages,
    types,
    vocabulary_chunks,
)

__all__ = [
    "advantages",
    "constraints",
    "ensembles",
    "evaluation",
    "group_advantages",
    "kl",
    "logprobs",
    "losses",
    "masking",
    "pass_at_k",
    "returns",
    "reward_scales",
    "rewards",
    "teacher_chunks",
    "token_advantages",
    "types",
    "vocabulary_chunks",
]
