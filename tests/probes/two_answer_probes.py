"""Preference losses on two answers, against the minimum of the published objective itself.

The objective is written out in float64 and searched on a fine grid of policies; all losses are trained in one program.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from problem import BETA, TV, minimise_all, probe

from rlhf_jax.losses import (
    anchored_preference,
    distributional_preference,
    online_preference,
    preference,
    reference_free_preference,
)

CHANCES = np.array([0.6, 0.9])  # that the first answer is preferred
SURER = np.array([0.7, 0.9])
REFERENCE = np.log(np.array([0.4, 0.6]))
BATCH = 10  # pairs, where the loss belongs to a batch


class Answers(NamedTuple):
    """Log-probs of a pair in the order of the verdict, and of the first and second answer whatever the verdict is."""

    won: jax.Array
    lost: jax.Array
    won_reference: jax.Array
    lost_reference: jax.Array
    first: jax.Array
    second: jax.Array

    def ratios(self) -> tuple[jax.Array, jax.Array]:
        return self.won - self.won_reference, self.lost - self.lost_reference


def average(loss: Callable[[Answers], jax.Array], first: jax.Array, second: jax.Array, chance: float) -> jax.Array:
    """The mean of a loss over verdicts."""
    reference = [np.full(np.shape(first), x, first.dtype) for x in REFERENCE]
    for_first = Answers(first, second, *reference, first, second)
    for_second = Answers(second, first, *reversed(reference), first, second)
    return chance * loss(for_first) + (1 - chance) * loss(for_second)


ONE = jnp.ones(1, jnp.int32)
LOG_SIGMOID = lambda x: -np.logaddexp(0.0, -x)
SIGMOID = lambda x: np.exp(LOG_SIGMOID(x))
LOG_ODDS = lambda x: x - np.log(-np.expm1(x))


def discopop(x: Answers, tau: float) -> jax.Array:
    z = BETA * (x.ratios()[0] - x.ratios()[1])
    return SIGMOID(-z / tau) * -LOG_SIGMOID(z) + SIGMOID(z / tau) * np.exp(-z)


def apo_down(x: Answers) -> jax.Array:
    won, lost = (2.0 * ratio for ratio in x.ratios())
    return SIGMOID(won) + SIGMOID(lost - won)


DISCOVERED, DOWN = "DiscoPOP, τ = 0.05, started at a margin of 2", "APO-down, β = 2"
TRAPPED = "DiscoPOP, τ = 0.05, started at the reference"


SHAPED = lambda x: 4 * (1 - np.exp(-0.25 * x))
PAIRS = {
    "DiscoPOP": (lambda x: preference.discopop(*x.ratios(), beta=BETA, tau=1.0), lambda x: discopop(x, 1.0)),
    DISCOVERED: (lambda x: preference.discopop(*x.ratios(), beta=BETA), lambda x: discopop(x, 0.05)),
    TRAPPED: (lambda x: preference.discopop(*x.ratios(), beta=BETA), lambda x: discopop(x, 0.05)),
    DOWN: (lambda x: anchored_preference.apo_down(*x.ratios(), beta=2.0), apo_down),
    "SimPO": (
        lambda x: reference_free_preference.simpo(x.won, x.lost, ONE, ONE, beta=1.0, gamma=0.3),
        lambda x: -LOG_SIGMOID(x.won - x.lost - 0.3),
    ),
    "AlphaPO": (
        lambda x: reference_free_preference.alphapo(x.won, x.lost, ONE, ONE, beta=1.0, gamma=0.3, alpha=0.25),
        lambda x: -LOG_SIGMOID(SHAPED(x.won) - SHAPED(x.lost) - 0.3),
    ),
    "ORPO": (
        lambda x: reference_free_preference.orpo(x.won, x.lost, ONE, ONE, beta=0.5),
        lambda x: -x.won - 0.5 * LOG_SIGMOID(LOG_ODDS(x.won) - LOG_ODDS(x.lost)),
    ),
    "TPO": (
        lambda x: reference_free_preference.tpo(x.won, x.lost, x.first, beta=1.0, alpha=0.2),
        lambda x: -LOG_SIGMOID(x.won - x.lost) - 0.2 * x.first,
    ),
    "TPO, length controlled": (
        lambda x: reference_free_preference.tpo_length_controlled(
            x.won, x.lost, x.first, ONE, ONE, beta=1.0, gamma=0.3, alpha=0.2
        ),
        lambda x: -LOG_SIGMOID(x.won - x.lost - 0.3) - 0.2 * x.first,
    ),
    "XPO": (
        lambda x: online_preference.xpo(*x.ratios(), 0.4 * x.first + 0.6 * x.second, beta=BETA, alpha=0.1),
        lambda x: -LOG_SIGMOID(BETA * (x.ratios()[0] - x.ratios()[1])) + 0.1 * (0.4 * x.first + 0.6 * x.second),
    ),
}


def aot(policy_margin: jax.Array, chance: float) -> jax.Array:
    """AOT of a batch in which the first answer wins as often as it is likely to."""
    signs = jnp.where(jnp.arange(BATCH) < round(BATCH * chance), 1.0, -1.0)
    margins = signs * policy_margin
    reference = signs * float(REFERENCE[0] - REFERENCE[1])
    return jnp.mean(distributional_preference.aot_paired(margins, reference, jnp.ones(BATCH, bool), beta=BETA))


def aot_written(first: np.ndarray, second: np.ndarray, chance: float) -> np.ndarray:
    wins = round(BATCH * chance)
    ordered = lambda m: np.sort(np.stack([m] * wins + [-m] * (BATCH - wins)), axis=0)
    gaps = ordered(first - second) - ordered(np.full(first.shape, REFERENCE[0] - REFERENCE[1]))
    return np.mean(-LOG_SIGMOID(BETA * gaps), axis=0)


def written(name: str, first: np.ndarray, second: np.ndarray, chance: float) -> np.ndarray:
    return aot_written(first, second, chance) if name == "AOT" else average(PAIRS[name][1], first, second, chance)


def chances(name: str) -> np.ndarray:
    """APO-down leaves a first answer that wins little more than half the time for the second, which costs less."""
    return SURER if name == DOWN else CHANCES


START = jnp.full(len(CHANCES), float(REFERENCE[0] - REFERENCE[1]))  # a margin of 0


@functools.cache
def trained() -> dict[str, jax.Array]:
    """[2] logits of the first answer, for each chance."""

    def population(name):
        def objective(logits, *_):
            total = jnp.zeros(())
            for logit, chance in zip(logits, chances(name), strict=True):
                first, second = jax.nn.log_sigmoid(logit)[None], jax.nn.log_sigmoid(-logit)[None]
                if name == "AOT":
                    total += aot((first - second)[0], chance)
                else:
                    total += jnp.sum(average(PAIRS[name][0], first, second, chance))
            return total

        return objective

    names = [*PAIRS, "AOT"]
    return minimise_all({name: population(name) for name in names}, START, {DISCOVERED: START + 2.0})


GRID = np.linspace(-12.0, 12.0, 48_001)


def distance(name: str) -> jax.Array:
    """Largest distance of a policy from the best one of the grid."""
    worst = 0.0
    for logit, chance in zip(trained()[name], chances(name), strict=True):
        best = GRID[np.argmin(written(name, LOG_SIGMOID(GRID), LOG_SIGMOID(-GRID), chance))]
        worst = max(worst, abs(float(SIGMOID(float(logit)) - SIGMOID(best))))
    return jnp.asarray(worst)


for name in [name for name in [*PAIRS, "AOT"] if name != TRAPPED]:
    probe("two answers, the first preferred with chance p", name, "minimum of the objective on a grid", TV, 2e-3)(
        functools.partial(distance, name)
    )
