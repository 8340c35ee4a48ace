"""Distillation, with and without human feedback: to the teacher, or to the teacher times exp(r/β)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
    SEQUENCES,
    STAR,
    TEACHER,
    TV,
    N,
    R,
    V,
    minimise,
    minimise_all,
    probe,
    shaped,
    tokens,
    whole,
)

from rlhf_jax import logprobs, returns, rewards
from rlhf_jax.losses import (
    distillation,
    human_distillation,
    policy,
    sampled_distillation,
    supervised,
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


@probe(DISTILLATION, "sampled reverse KL, own samples", "π_T", TV, 5e-3)
def sampled_reverse_kl_loss_probe():
    def population(table, old, step):
        loss = sampled_distillation.sampled_reverse_kl(tokens(table), tokens(TEACHER))
        return jnp.sum(jnp.exp(whole(old))[:, None] * loss)

    return distilled(population)


# --- supervised -------------------------------------------------------------------------------------------------------

SUPERVISED = "supervised, answers of π_T"
SMOOTHING = 0.2
ANSWERS = jnp.exp(LOG_TEACHER)[:, None]  # how often each sequence is in the data
SMOOTHED = (1 - SMOOTHING) * jax.nn.softmax(TEACHER) + SMOOTHING / V
GREEDY = jnp.where(jnp.max(TEACHER, axis=-1, keepdims=True) == TEACHER, 0.0, -jnp.inf)
DATA = {
    "negative log-likelihood": (lambda table: supervised.negative_log_likelihood(tokens(table)), "π_T", TEACHER),
    "hard cross-entropy": (
        lambda table: distillation.hard_cross_entropy(table[PREFIX], TEACHER[PREFIX]),
        "the teacher's likeliest next token alone",
        GREEDY,
    ),
    "label smoothing 0.2": (
        lambda table: supervised.smoothed_cross_entropy(table[PREFIX], SEQUENCES, smoothing=SMOOTHING),
        "(1-ε) π_T + ε/V of every token",
        jnp.log(SMOOTHED),
    ),
    "likelihood and z-loss": (
        lambda table: (
            supervised.negative_log_likelihood(tokens(table))
            + supervised.z_loss(logprobs.log_normaliser(table)[PREFIX], coefficient=0.1)
        ),
        "π_T, as log-probs",
        TEACHER,
    ),
    "dynamic fine-tuning": (
        lambda table: supervised.dynamic_fine_tuning(tokens(table)),
        "the likeliest next token alone: its gradient is that of -π",
        GREEDY,
    ),
}


@functools.cache
def supervised_tables() -> dict[str, jax.Array]:
    losses = {name: lambda table, *_, loss=loss: jnp.sum(ANSWERS * loss(table)) for name, (loss, *_) in DATA.items()}
    return minimise_all(losses, REFERENCE, steps=3000)


def supervised_distance(name: str, optimum: jax.Array) -> jax.Array:
    table = supervised_tables()[name]
    distance = enumerable.total_variation(whole(table), whole(optimum))
    unnormalised = jnp.max(jnp.abs(logprobs.log_normaliser(table))) if "z-loss" in name else 0.0
    return jnp.maximum(distance, unnormalised)


for name, (_, answer, optimum) in DATA.items():
    probe(SUPERVISED, name, answer, TV, 1e-3)(functools.partial(supervised_distance, name, optimum))

# --- human feedback ---------------------------------------------------------------------------------------------------

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


@probe(HUMAN, "reward-weighted cross-entropy, weights of tokens", HUMAN_STAR, TV, 5e-3)
def step_weights_probe():
    """The soft values are sums over the teacher's sequences; a prefix may then occur as often as it likes."""
    gain, chance = np.exp(np.asarray(REWARDS, np.float64) / BETA), np.exp(np.asarray(LOG_TEACHER, np.float64))
    begun = [np.asarray(SEQUENCES[:, 0]) == first for first in SEQUENCES[:, 0]]
    later = np.array([(gain * chance)[same].sum() / chance[same].sum() for same in begun])
    values = BETA * np.log(np.stack([np.full(N, (gain * chance).sum()), later], axis=-1))
    weights = human_distillation.human_step_weights(jnp.asarray(values, jnp.float32), REWARDS, MASK, beta=BETA)
    often = jnp.exp(LOG_TEACHER)[:, None]
    loss = lambda table, *_: jnp.sum(often * human_distillation.reward_weighted_cross_entropy(tokens(table), weights))
    return distilled(loss, HUMAN_OPTIMUM)


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
