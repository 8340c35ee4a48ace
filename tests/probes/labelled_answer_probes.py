"""Preference losses whose optimum follows from how often each answer is chosen and rejected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from preference_probes import FIRST, SECOND, WINS
from problem import BETA, LOG_REFERENCE, REWARDS, TV, N, minimise, minimise_all, probe

from rlhf_jax.losses import (
    anchored_preference,
    distributional_preference,
    preference,
    preference_inputs,
)
from rlhf_jax.testing import enumerable

LABELLED = "answers chosen and rejected with known chances"

# --- nine answers -----------------------------------------------------------------------------------------------------

PAIR_WEIGHT = jnp.exp(LOG_REFERENCE[FIRST] + LOG_REFERENCE[SECOND]) * WINS
CHOSEN, REJECTED = (jnp.zeros(N).at[index].add(PAIR_WEIGHT) for index in (FIRST, SECOND))


@probe(LABELLED, "BCO of pairs, shift -β log Z", "π_ref (chosen / rejected)^(1/β) / Z", TV, 1e-3)
def bco_pair_probe():
    """The classifier's optimum β ρ - δ = log(chosen / rejected) is a policy for δ = -β log Z alone."""
    optimum, value = enumerable.regularised_optimum(LOG_REFERENCE, jnp.log(CHOSEN / REJECTED), beta=BETA)

    def population(logits, *_):
        ratios = jax.nn.log_softmax(logits) - LOG_REFERENCE
        loss = anchored_preference.bco_pair(ratios[FIRST], ratios[SECOND], beta=BETA, reward_shift=-value)
        return jnp.sum(PAIR_WEIGHT * loss)

    return enumerable.total_variation(jax.nn.log_softmax(minimise(population, LOG_REFERENCE)), optimum)


# --- three answers ----------------------------------------------------------------------------------------------------

LOG_THREE = jnp.log(jnp.array([0.5, 0.3, 0.2]))
RIGHT = 0.8  # chance that the first answer is preferred to the second


def apo_down(logits: jax.Array, *_) -> jax.Array:
    ratios = jax.nn.log_softmax(logits) - LOG_THREE
    loss = lambda won, lost: anchored_preference.apo_down(ratios[won], ratios[lost], beta=BETA)
    return RIGHT * loss(0, 1) + (1 - RIGHT) * loss(1, 0)


SMOOTHING = 0.1
GOOD, BAD = (jnp.repeat(jnp.arange(3), jnp.array(count), total_repeat_length=10) for count in ((5, 3, 2), (2, 3, 5)))
SPREAD = float(jax.scipy.special.logit(1 - SMOOTHING)) / BETA * jnp.array([2.0, 1.0, 0.0])


def aot_unpaired(logits: jax.Array, *_) -> jax.Array:
    ratios = jax.nn.log_softmax(logits) - LOG_THREE
    return jnp.mean(
        distributional_preference.aot_unpaired(
            ratios[GOOD], ratios[BAD], jnp.ones(10, bool), beta=BETA, label_smoothing=SMOOTHING
        )
    )


THREE = {
    "APO-down, a third answer never labelled": (
        apo_down,
        "the third answer alone: the loss stays above 1 - p and comes to it as both others vanish, the loser faster",
        jnp.array([-jnp.inf, -jnp.inf, 0.0]),
    ),
    "AOT unpaired, labels smoothed": (
        aot_unpaired,
        "neighbours in rank logit(1-ε)/β apart",
        jax.nn.log_softmax(LOG_THREE + SPREAD),
    ),
}


@functools.cache
def three() -> dict[str, jax.Array]:
    return minimise_all({name: loss for name, (loss, *_) in THREE.items()}, LOG_THREE)


for name, (_, answer, optimum) in THREE.items():
    probe(LABELLED, name, answer, TV, 1e-3)(
        lambda name=name, optimum=optimum: enumerable.total_variation(jax.nn.log_softmax(three()[name]), optimum)
    )

# --- answers of two lengths -------------------------------------------------------------------------------------------

LENGTHS = jnp.array([1] + [2] * 6)  # token 0 ends the answer, tokens 1 and 2 go on with any second token
FIRST_TOKEN, SECOND_TOKEN = jnp.array([0, 1, 1, 1, 2, 2, 2]), jnp.array([0, 0, 1, 2, 0, 1, 2])
VALID = jnp.arange(2)[None] < LENGTHS[:, None]
TABLES = jnp.array([[0.3, -0.2, 0.1], [0.5, -0.5, 0.0], [-0.4, 0.2, 0.6]])  # first token, two second ones
LONG = jnp.arange(1, 7)
ALPHA = 0.4


def by_token(tables: jax.Array) -> jax.Array:
    """[7, 2] log-probs of the tokens of every answer."""
    log_tables = jax.nn.log_softmax(tables)
    return jnp.stack([log_tables[0, FIRST_TOKEN], log_tables[jnp.maximum(FIRST_TOKEN, 1), SECOND_TOKEN]], axis=-1)


def complete(tables: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(VALID, by_token(tables), 0.0), axis=-1)


@probe(LABELLED, "LD-DPO, a short answer against longer ones", "π_ref exp(r/β) / Z, at αβ beyond its length", TV, 1e-3)
def ld_dpo_probe():
    """Every pair can be met: the second token follows π_ref exp(r/αβ), and the first the soft value of it."""
    reference, rewards = by_token(TABLES), REWARDS[:7]

    def population(tables, *_):
        ratios = by_token(tables) - reference
        summed = lambda rows, others: preference_inputs.length_desensitised_sum(
            ratios[rows], VALID[rows], LENGTHS[others], alpha=ALPHA
        )
        short = jnp.zeros_like(LONG)
        long_wins = jax.nn.sigmoid(rewards[LONG] - rewards[0])
        pair = summed(LONG, short), summed(short, LONG)
        losses = long_wins * preference.dpo(*pair, beta=BETA) + (1 - long_wins) * preference.dpo(*pair[::-1], beta=BETA)
        return jnp.sum(losses)

    first, *second = np.asarray(jax.nn.log_softmax(TABLES), np.float64)
    score = np.asarray(rewards, np.float64)
    tilted = [first[0] + score[0] / BETA]
    for token, log_p in enumerate(second, start=1):
        sharp = log_p + score[3 * token - 2 : 3 * token + 1] / (ALPHA * BETA)
        value = ALPHA * np.logaddexp.reduce(sharp)
        tilted.extend(first[token] + value + sharp - np.logaddexp.reduce(sharp))
    optimum = jnp.asarray(np.asarray(tilted) - np.logaddexp.reduce(tilted), jnp.float32)
    return enumerable.total_variation(complete(minimise(population, TABLES)), optimum)
