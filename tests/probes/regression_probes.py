# ruff: noqa: RUF001  (Greek letters in answers are meant)
"""Weighted regression on samples of the reference, and reward models, run to what they stand for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from preference_probes import FIRST, SECOND, WINS
from problem import (
    BETA,
    ERROR,
    LOG_REFERENCE,
    OPTIMUM,
    REFERENCE,
    REWARDS,
    STAR,
    TV,
    UNIFORM,
    UNIFORM_OPTIMUM,
    N,
    R,
    minimise,
    probe,
    root,
    tokens,
    whole,
)

from rlhf_jax.losses import (
    ranking,
    rating,
    regression_policy,
    reward_model,
)
from rlhf_jax.testing import enumerable

# --- regression on rewards --------------------------------------------------------------------------------------------

REGRESSION = "weighted regression, samples of the reference"


def cloning(weights: jax.Array, reference: jax.Array, optimum: jax.Array) -> jax.Array:
    def population(table, old, key, step):
        loss = regression_policy.weighted_log_likelihood(tokens(table), jnp.broadcast_to(weights[:, None], (N, R)))
        return jnp.sum(jnp.exp(reference)[:, None] * loss)

    table = minimise(population, REFERENCE)
    return enumerable.total_variation(whole(table), optimum)


@probe(REGRESSION, "AWR", STAR, TV, 2e-3)
def awr_probe():
    return cloning(regression_policy.awr_weights(REWARDS, temperature=BETA, max_weight=jnp.inf), LOG_REFERENCE, OPTIMUM)


@probe(REGRESSION, "AWAC", STAR, TV, 2e-3)
def awac_probe():
    weights = regression_policy.awac_weights(REWARDS, jnp.ones(N, bool), temperature=BETA)
    return cloning(weights, LOG_REFERENCE, OPTIMUM)


@probe(REGRESSION, "MPO E-step, uniform reference", "exp(r/β) / Z", TV, 2e-3)
def mpo_probe():
    weights = regression_policy.mpo_weights(REWARDS, jnp.ones(N, bool), temperature=BETA)
    return cloning(weights, UNIFORM, UNIFORM_OPTIMUM)


@probe(REGRESSION, "MPO temperature", "KL of the E-step = ε", "error of the KL in nats", 1e-3)
def mpo_temperature_probe():
    counted, epsilon = jnp.ones(N, bool), 0.3

    def dual(log_eta, old, key, step):
        return regression_policy.mpo_temperature_loss(jnp.exp(log_eta), REWARDS, counted, epsilon=epsilon)

    eta = jnp.exp(minimise(dual, jnp.zeros(())))
    target = jnp.log(regression_policy.mpo_weights(REWARDS, counted, temperature=eta))
    return jnp.abs(enumerable.kl_divergence(target, UNIFORM) - epsilon)


@probe(REGRESSION, "V-MPO temperature", "KL of the target from the better half = ε", "error of the KL in nats", 1e-3)
def vmpo_temperature_probe():
    half, epsilon = regression_policy.better_half(REWARDS, jnp.ones(N, bool)), 0.2

    def dual(log_eta, old, key, step):
        return regression_policy.vmpo_temperature_loss(jnp.exp(log_eta), REWARDS, half, epsilon=epsilon)

    eta = jnp.exp(minimise(dual, jnp.zeros(())))
    target = regression_policy.vmpo_weights(REWARDS, half, temperature=eta)
    return jnp.abs(jnp.sum(jax.scipy.special.xlogy(target, target * jnp.sum(half))) - epsilon)


@probe(REGRESSION, "KL constraint of MPO", "max E r where KL(π ‖ π_ref) = ε", "error of the KL in nats", 5e-3)
def kl_constraint_probe():
    epsilon = 0.2

    def population(params, old, key, step):
        table, log_multiplier = params
        log_p = whole(table)
        distance = enumerable.kl_divergence(log_p, LOG_REFERENCE)
        constraint = regression_policy.kl_constraint(jnp.exp(log_multiplier), distance, epsilon=epsilon)
        return constraint - enumerable.expectation(log_p, REWARDS)

    table, log_multiplier = minimise(population, (REFERENCE, jnp.zeros(())), steps=1500)
    best, _ = enumerable.regularised_optimum(LOG_REFERENCE, REWARDS, beta=jnp.exp(log_multiplier))
    reached = enumerable.kl_divergence(best, LOG_REFERENCE)
    return jnp.maximum(jnp.abs(reached - epsilon), enumerable.total_variation(whole(table), best))


@probe(REGRESSION, "DRO with a learned value", STAR, TV, 2e-3)
def dro_probe():
    def population(params, old, key, step):
        table, level = params
        ratios = whole(table) - LOG_REFERENCE
        return jnp.mean(regression_policy.dro(ratios, jnp.full(N, level), REWARDS, temperature=BETA))

    table, _ = minimise(population, (REFERENCE, jnp.zeros(())))
    return enumerable.total_variation(whole(table), OPTIMUM)


# --- reward models ----------------------------------------------------------------------------------------------------

MODELS = "reward models, answers drawn from the model itself"


def scores_error(loss: Callable[[jax.Array], jax.Array]) -> jax.Array:
    found = minimise(lambda scores, old, key, step: loss(scores), jnp.zeros(N))
    return jnp.max(jnp.abs((found - found.mean()) - (REWARDS - REWARDS.mean())))


@probe(MODELS, "Bradley-Terry", "r up to a constant", "largest error", 0.01)
def bradley_terry_probe():
    return scores_error(lambda s: jnp.mean(WINS * reward_model.bradley_terry(s[FIRST], s[SECOND])))


@probe(MODELS, "Bradley-Terry with centring, samples of π_ref", "where both gradients cancel, in float64", ERROR, 1e-3)
def centring_probe():
    """The term fixes the constant, which starts elsewhere, and pulls a little at answers that are often compared."""
    strength, weight = 0.1, jnp.exp(LOG_REFERENCE[FIRST] + LOG_REFERENCE[SECOND]) * WINS
    often, first, second = (np.asarray(x) for x in (weight, FIRST, SECOND))

    def population(s, *_):
        pair = s[FIRST], s[SECOND]
        return jnp.sum(weight * (reward_model.bradley_terry(*pair) + strength * reward_model.centring(*pair)))

    def gradient(s: np.ndarray) -> np.ndarray:
        push = -often / (1 + np.exp(s[first] - s[second]))
        pull = 2 * strength * often * (s[first] + s[second])
        return np.bincount(first, push + pull, minlength=N) + np.bincount(second, pull - push, minlength=N)

    return jnp.max(jnp.abs(minimise(population, jnp.ones(N)) - root(gradient, np.zeros(N))))


@probe(MODELS, "soft Bradley-Terry", "r up to a constant", "largest error", 0.01)
def soft_bradley_terry_probe():
    return scores_error(lambda s: jnp.mean(reward_model.soft_bradley_terry(s[FIRST], s[SECOND], WINS)))


def with_ties(log_probs: Callable[..., Any], loss: Callable[..., jax.Array]) -> jax.Array:
    chances = log_probs(REWARDS[FIRST], REWARDS[SECOND])
    untied, tied = jnp.zeros(N * N, bool), jnp.ones(N * N, bool)

    def population(scores):
        won, drawn = (loss(scores[FIRST], scores[SECOND], flag) for flag in (untied, tied))
        return jnp.mean(jnp.exp(chances.win) * won + 0.5 * jnp.exp(chances.tie) * drawn)

    return scores_error(population)


@probe(MODELS, "Rao-Kupper (ties)", "r up to a constant", "largest error", 0.01)
def rao_kupper_probe():
    return with_ties(
        lambda *x: reward_model.rao_kupper_log_probs(*x, theta=2.0), lambda *x: reward_model.rao_kupper(*x, theta=2.0)
    )


@probe(MODELS, "Davidson (ties)", "r up to a constant", "largest error", 0.01)
def davidson_probe():
    return with_ties(
        lambda *x: reward_model.davidson_log_probs(*x, nu=0.7), lambda *x: reward_model.davidson(*x, nu=0.7)
    )


@probe(MODELS, "Plackett-Luce, lists of three", "r up to a constant", "largest error", 0.01)
def plackett_luce_probe():
    lists = jnp.asarray([(i, j, k) for i in range(N) for j in range(N) for k in range(N) if len({i, j, k}) == 3])
    counted = jnp.ones(lists.shape, bool)
    chance = jnp.exp(-ranking.plackett_luce(REWARDS[lists], counted))
    return scores_error(lambda s: jnp.sum(chance * ranking.plackett_luce(s[lists], counted)) / N)


@probe(MODELS, "the best of three", "r up to a constant", "largest error", 0.01)
def list_choice_probe():
    lists = jnp.asarray([(i, j, k) for i in range(N) for j in range(i) for k in range(j)])
    counted = jnp.ones(lists.shape, bool)
    picks = [jnp.full(len(lists), place) for place in range(3)]
    chances = [jnp.exp(-ranking.list_choice(REWARDS[lists], pick, counted)) for pick in picks]

    def population(scores):
        losses = (ranking.list_choice(scores[lists], pick, counted) for pick in picks)
        return sum(jnp.mean(chance * loss) for chance, loss in zip(chances, losses, strict=True))

    return scores_error(population)


@probe(MODELS, "scalar ratings, half of them one higher", "their mean", "largest error", 0.01)
def rating_regression_probe():
    def population(scores, old, key, step):
        return jnp.mean(sum(rating.rating_regression(scores, REWARDS + more) for more in (0.0, 1.0)))

    return jnp.max(jnp.abs(minimise(population, jnp.zeros(N)) - REWARDS - 0.5))


@probe(MODELS, "steps, right with chance σ(r)", "r", "largest error", 0.01)
def process_rewards_probe():
    counted, chance = jnp.ones((1, N), bool), jax.nn.sigmoid(REWARDS)[None]

    def population(scores, old, key, step):
        return jnp.mean(rating.process_rewards(scores[None], chance, counted))

    return jnp.max(jnp.abs(minimise(population, jnp.zeros(N)) - REWARDS))


@probe(MODELS, "ordinal ratings", "r", "largest error", 0.01)
def ordinal_probe():
    cuts = jnp.array([-1.0, 0.0, 1.5])
    chance = jnp.exp(rating.ordinal_log_probs(REWARDS, cuts))  # [N, K]
    levels = jnp.broadcast_to(jnp.arange(4)[None], (N, 4))

    def population(scores, old, key, step):
        return jnp.mean(chance * rating.ordinal(jnp.broadcast_to(scores[:, None], (N, 4)), levels, cuts))

    return jnp.max(jnp.abs(minimise(population, jnp.zeros(N)) - REWARDS))
