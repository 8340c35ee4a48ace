"""A reward model of answers, learnt from comparisons: linear in the mean of a frozen decoder's normalised states.

A scorer is a dict: the head's parameters, and mean and deviation of the scores of what was compared, in whose standard
deviations `score` answers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhf_jax import masking
from rlhf_jax.algorithms import reward_model
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.recipes.sequences import Task
from rlhf_jax.types import PreferenceBatch, Rollout

__all__ = ["accuracy", "features", "fit", "pooled", "score"]

HEAD = ScalarHead()  # linear: a hidden layer learns a few thousand pairs by heart and ranks others worse


def pooled(states: Array, mask: Array) -> Array:
    """[B, D] mean state of an answer: states [B, R, D], mask [B, R]."""
    return masking.masked_mean(states, jnp.broadcast_to(mask[..., None], states.shape), axis=-2)


def features(task: Task, params: Any, rollout: Rollout) -> Array:
    """[B, D] what the decoder with `params` sees of answers on average."""
    states = policies.response_hidden(task.model, params, rollout.inputs, prompt_length=task.prompt_length)
    return pooled(states, rollout.response_mask)


def fit(pairs: PreferenceBatch, key: Array, *, updates: int = 300) -> dict[str, Any]:
    """A scorer from pairs of features [N, D]; pairs of weight 0 are seen by mean and deviation alone."""
    apply = lambda params, x: HEAD.apply({"params": params}, x)
    params = HEAD.init(key, pairs.chosen[:1])["params"]
    state = reward_model.init(params, apply, optax.adamw(optax.cosine_decay_schedule(1e-2, updates), weight_decay=1.0))
    update = lambda state, _: reward_model.update(state, pairs, config=reward_model.Config())
    params = jax.lax.scan(update, state, None, length=updates)[0].params
    scores = apply(params, jnp.concatenate([pairs.chosen, pairs.rejected]))
    return {"head": params, "mean": jnp.mean(scores), "deviation": jnp.std(scores)}


def score(scorer: dict[str, Any], x: Array) -> Array:
    """[B] of features [B, D], in standard deviations from the mean."""
    return (HEAD.apply({"params": scorer["head"]}, x) - scorer["mean"]) / scorer["deviation"]


def accuracy(scorer: dict[str, Any], pairs: PreferenceBatch) -> Array:
    """[] how often the chosen one of a pair scores higher; pairs of weight below 1 are left out."""
    right = score(scorer, pairs.chosen) > score(scorer, pairs.rejected)
    return masking.masked_mean(right.astype(jnp.float32), pairs.weight >= 1)
