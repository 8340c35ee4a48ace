"""A reward model of answers, learnt from comparisons: linear in what a frozen decoder sees of an answer on average.

A scorer is a dict: `kernel` [D] and `mean`, the mean score of what was compared. Scores are log-odds of being preferred
(Bradley-Terry), so only differences between answers to one prompt mean anything: the kernel starts at zero, for a
random one would rank prompts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhf_jax import masking
from rlhf_jax.algorithms import reward_model
from rlhf_jax.models import policies
from rlhf_jax.models.transformer import output_table
from rlhf_jax.recipes.sequences import Task
from rlhf_jax.types import PreferenceBatch, Rollout

__all__ = ["accuracy", "features", "fit", "pooled", "score", "words"]


def pooled(states: Array, mask: Array) -> Array:
    """[B, D] mean state of an answer: states [B, R, D], mask [B, R]."""
    return masking.masked_mean(states, jnp.broadcast_to(mask[..., None], states.shape), axis=-2)


def features(task: Task, params: Any, rollout: Rollout) -> Array:
    """[B, D] what the decoder with `params` sees of answers on average: last states, that know prompt and answer."""
    states = policies.response_hidden(task.model, params, rollout.inputs, prompt_length=task.prompt_length)
    return pooled(states, rollout.response_mask)


def words(params: Any, rollout: Rollout) -> Array:
    """[B, D] mean embedding of an answer's tokens; for tastes that do not depend on the prompt."""
    return pooled(output_table(params)[rollout.responses], rollout.response_mask)


def fit(pairs: PreferenceBatch, *, updates: int = 300) -> dict[str, Any]:
    """A scorer from pairs of features [N, D]; pairs of weight 0 count for nothing.

    Linear: a hidden layer learns a few thousand pairs by heart and ranks others worse.
    """
    both = jnp.concatenate([pairs.chosen, pairs.rejected])
    counts = jnp.tile(pairs.weight > 0, 2)
    wide = jnp.broadcast_to(counts[:, None], both.shape)
    deviation = jnp.sqrt(masking.masked_variance(both, wide, axis=0)) + 1e-6
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, updates), eps=1e-4, weight_decay=0.1)
    start = {"kernel": jnp.zeros(both.shape[1:])}
    state = reward_model.init(start, lambda params, x: x @ (params["kernel"] / deviation), optimizer)
    update = lambda state, _: reward_model.update(state, pairs, config=reward_model.Config())
    params: Any = jax.lax.scan(update, state, None, length=updates)[0].params
    kernel = params["kernel"] / deviation
    return {"kernel": kernel, "mean": masking.masked_mean(both @ kernel, counts)}


def score(scorer: dict[str, Any], x: Array) -> Array:
    """[B] log-odds, of features [B, D], against the mean of what was compared."""
    return x @ scorer["kernel"] - scorer["mean"]


def accuracy(scorer: dict[str, Any], pairs: PreferenceBatch) -> Array:
    """[] how often the chosen one of a pair scores higher; pairs of weight below 1 are left out."""
    right = score(scorer, pairs.chosen) > score(scorer, pairs.rejected)
    return masking.masked_mean(right.astype(jnp.float32), pairs.weight >= 1)
