"""A reward model of answers that is a whole decoder, to which every token of an answer adds its part.

It starts as a copy of the policy's base, which understands prompts and answers, with a linear head on what the decoder
sees once it has read a token. The score of an answer is the sum over its tokens, in log-odds of being preferred
(Bradley-Terry); what a beginning scores is the sum so far. So AC-HF may take the parts as rewards of single tokens and
PD as gains of value: for either the best policy is that of the whole score at the end.
"""

import functools
from typing import Any

import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import Array

from rlhf_jax import masking
from rlhf_jax.algorithms import reward_model
from rlhf_jax.recipes import sequences
from rlhf_jax.recipes.sequences import Task
from rlhf_jax.types import PreferenceBatch, TokenInputs

__all__ = ["accuracy", "init", "learn", "parts"]


def parts(task: Task, scorer: Any, inputs: TokenInputs) -> Array:
    """[B, R] what each token of an answer adds to its score; 0 in padding."""
    states = task.model.apply({"params": scorer["decoder"]}, inputs.tokens, inputs.mask).hidden[:, task.prompt_length :]
    (added,) = masking.zero_outside(inputs.mask[:, task.prompt_length :], states @ scorer["kernel"])
    return added


def init(task: Task, base: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The base with a head of zeros: all answers score 0. A scorer is `params` of the state."""
    start = {"decoder": base, "kernel": jnp.zeros(task.model.config.width)}
    return reward_model.init(start, lambda scorer, inputs: jnp.sum(parts(task, scorer, inputs), axis=-1), optimizer)


def learn(
    state: TrainState, pairs: PreferenceBatch, key: Array, *, updates: int, rows: int
) -> tuple[TrainState, dict[str, Array]]:
    """Updates on rows of `pairs` (of `TokenInputs`), drawn with replacement; metrics averaged."""

    update = functools.partial(reward_model.update, config=reward_model.Config())
    return sequences.supervise(state, pairs, key, updates=updates, rows=rows, update=update)


def accuracy(task: Task, scorer: Any, pairs: PreferenceBatch) -> Array:
    """[] how often the chosen answer of a pair scores higher; pairs of weight below 1 are left out."""
    chosen, rejected = (jnp.sum(parts(task, scorer, x), axis=-1) for x in (pairs.chosen, pairs.rejected))
    return masking.masked_mean((chosen > rejected).astype(jnp.float32), pairs.weight >= 1)
