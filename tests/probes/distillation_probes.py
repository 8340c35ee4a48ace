"""Distillation, with and without human feedback: to the teacher, or to the teacher times exp(r/β)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from problem import (
    BETA,
    HUMAN_OPTIMUM,
    LOG_TEACHER,
    MASK,
    OPTIMUM,
    PREFIX,
    REFERENCE,
    REWARDS,
    STAR,
    TEACHER,
    TV,
    N,
    R,
    V,
    minimise,
    probe,
    shaped,
    tokens,
    whole,
)

from rlhf_jax import returns, rewards
from rlhf_jax.losses import (
    distillation,
    human_distillation,
    policy,
    sampled_distillation,
)
from rlhf_jax.testing import enumerable

# --- distillation -----------------------------------------------------------------------------------------------------

DISTILLATION = "distillation"


def distilled(loss: Callable[..., jax.Array], optimum: jax.Array = LOG_TEACHER, steps: int = 800) -> jax.Array:
    table = minimise(lambda table, old, key, step: loss(table, old, step), REFERENCE, steps=steps)
    return enumerable.total_variation(whole(table), optimum)


DENSE = {
    "soft cross-entropy": distillation.soft_cross_entropy,
    "soft cross-entropy, τ² at τ = 2": distillation.hinton_cross_entropy,
    "forward KL": distillation.forward_kl,
    "reverse KL": distillation.reverse_kl,
    "generalised JSD": distillation.generalised_jsd,
    "total variation": distillation.total_variation,
}
for name, loss in DENSE.items():
    probe(DISTILLATION, name, "π_T", TV, 5e-3)(
        lambda loss=loss: distilled(lambda table, old, step: jnp.sum(loss(table, TEACHER)))
    )


@probe(DISTILLATION, "top-k KL, k = V - 1 and the tail", "π_T", TV, 5e-3)
def top_k_probe():
    log_probs, indices = jax.lax.top_k(jax.nn.log_softmax(TEACHER), V - 1)
    return distilled(lambda table, old, step: jnp.sum(distillation.top_k_kl(table, indices, log_probs)))


@probe(DISTILLATION, "cross-entropy on the teacher's samples", "π_T", TV, 5e-3)
def sampled_cross_entropy_probe():
    weight = jnp.broadcast_to(jnp.exp(LOG_TEACHER)[:, None], (N, R))
    return distilled(lambda t, old, step: jnp.sum(sampled_distillation.sampled_cross_entropy(tokens(t), weight)))


@probe(DISTILLATION, "reverse KL as an advantage, own samples", "π_T", TV, 5e-3)
def sampled_reverse_kl_probe():
    def population(table, old, step):
        own = tokens(old)
        gain = sampled_distillation.sampled_reverse_kl_advantages(own, tokens(TEACHER))
        to_go = returns.discounted_returns(gain, MASK)
        return jnp.sum(jnp.exp(own.sum(-1))[:, None] * policy.reinforce(tokens(table), to_go))

    return distilled(population)


HUMAN = "distillation with human feedback"
HUMAN_STAR = "π_T exp(r/β) / Z"


@probe(HUMAN, "human-reweighted teacher", HUMAN_STAR, TV, 5e-3)
def reweighted_teacher_probe():
    return distilled(
        lambda table, old, step: human_distillation.human_reweighted_cross_entropy(
            whole(table), LOG_TEACHER, REWARDS, beta=BETA
        ),
        HUMAN_OPTIMUM,
    )


@probe(HUMAN, "on-policy reverse KL with the reward in the advantage", HUMAN_STAR, TV, 5e-3)
def human_reverse_kl_probe():
    landed = rewards.score_at_last_token(REWARDS, MASK)

    def population(table, old, step):
        own = tokens(old)
        reward = human_distillation.human_reverse_kl_rewards(own, tokens(TEACHER), landed, beta=BETA)
        to_go = returns.discounted_returns(reward, MASK)
        return jnp.sum(jnp.exp(own.sum(-1))[:, None] * policy.reinforce(tokens(table), to_go))

    return distilled(population, HUMAN_OPTIMUM)


HUMAN_WEIGHTS = human_distillation.human_weights(REWARDS, jnp.ones(N, bool), beta=BETA)[:, None]


@probe(HUMAN, "reward-weighted cross-entropy", HUMAN_STAR, TV, 5e-3)
def reward_weighted_probe():
    def population(table, old, step):
        loss = human_distillation.reward_weighted_cross_entropy(tokens(table), HUMAN_WEIGHTS)
        return jnp.sum(jnp.exp(LOG_TEACHER)[:, None] * loss)

    return distilled(population, HUMAN_OPTIMUM)


@probe(HUMAN, "soft targets with a human term", HUMAN_STAR, TV, 5e-3)
def human_soft_targets_probe():
    def population(table, old, step):
        dense = distillation.soft_cross_entropy(table, TEACHER)[PREFIX]
        loss = human_distillation.human_soft_targets(dense, tokens(table), HUMAN_WEIGHTS)
        return jnp.sum(jnp.exp(LOG_TEACHER)[:, None] * loss)

    return distilled(population, HUMAN_OPTIMUM)


@probe(HUMAN, "kickstarting, help ends half way", STAR, TV, 5e-3)
def kickstarting_probe():
    schedule = optax.linear_schedule(1.0, 0.0, 400)

    def population(table, old, step):
        own = tokens(old)
        to_go = returns.discounted_returns(shaped(own), MASK)
        weight = jnp.exp(own.sum(-1))[:, None]
        task = policy.reinforce(tokens(table), to_go)
        help_ = distillation.soft_cross_entropy(table, TEACHER)[PREFIX]
        return jnp.sum(weight * distillation.kickstarting(task, help_, step, weight=schedule))

    return distilled(population, OPTIMUM)
