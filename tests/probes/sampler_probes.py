"""Corrections for a sampler that is not quite the trainer, as of another precision, with new errors in each step.

At the optimum of the KL-regularised reward every sequence has the same KL-shaped reward, so that no weight and no mask
moves it; away from it they only choose what is learned from.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from problem import (
    BETA,
    LOG_REFERENCE,
    MASK,
    OPTIMUM,
    REFERENCE,
    REWARDS,
    STAR,
    TV,
    N,
    R,
    minimise_all,
    probe,
    tokens,
    whole,
)

from rlhf_jax.losses import importance, policy
from rlhf_jax.testing import enumerable

SAMPLER = "sampler that differs from the trainer, KL in the reward"


def corrected(weights: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """REINFORCE on what the sampler draws; weights(trainer, sampler, advantages) are [N, R] or [N, 1]."""

    def population(table, old_table, key, step):
        trainer = tokens(old_table)
        sampler = tokens(old_table + 0.3 * jax.random.normal(key, old_table.shape))
        gain = REWARDS - BETA * (trainer.sum(-1) - LOG_REFERENCE)
        judged = gain - jnp.sum(jnp.exp(trainer.sum(-1)) * gain)
        loss = policy.reinforce(tokens(table), jnp.broadcast_to(judged[:, None], (N, R)))
        drawn = jnp.exp(jax.lax.stop_gradient(sampler.sum(-1)))
        return jnp.sum(drawn[:, None] * weights(trainer, sampler, judged) * loss)

    return population


CORRECTIONS = {
    "truncated weights per token": lambda new, old, _: importance.truncated_weights(new, old, cap=1.2),
    "masked weights per token": lambda new, old, _: importance.masked_weights(new, old, low=0.8, high=1.25),
    "truncated weights per sequence": lambda new, old, _: importance.sequence_truncated_weights(
        new, old, MASK, cap=1.2
    )[:, None],
    "masked weights per sequence": lambda new, old, _: importance.sequence_masked_weights(
        new, old, MASK, low=0.7, high=1.4
    )[:, None],
    "sequences of ordinary mean ratio": lambda new, old, _: importance.sequence_mean_mask(
        new, old, MASK, low=0.8, high=1.25
    )[:, None],
    "bad sequences off the policy dropped": lambda new, old, judged: importance.off_policy_sequence_mask(
        new, old, judged, MASK, threshold=0.1
    )[:, None],
}


@functools.cache
def corrections() -> dict[str, jax.Array]:
    return minimise_all({name: corrected(weights) for name, weights in CORRECTIONS.items()}, REFERENCE)


for name in CORRECTIONS:
    probe(SAMPLER, name, STAR, TV, 2e-3)(
        lambda name=name: enumerable.total_variation(whole(corrections()[name]), OPTIMUM)
    )
