"""The stage "reward model and judge": two linear Bradley-Terry heads on the frozen trunk, from single raters' pairs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax import masking
from rlhf_jax.algorithms import reward_model
from rlhf_jax.feedback.comparisons import Comparisons, single_rater_comparisons
from rlhf_jax.feedback.ratings import RatedText
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.quickstart.context import ROWS, Policy, Run
from rlhf_jax.quickstart.material import pack
from rlhf_jax.quickstart.settings import Settings
from rlhf_jax.types import PreferenceBatch

__all__ = ["RewardModels", "prefix_scores", "reward_models", "score"]

HEAD = ScalarHead()


class RewardModels(NamedTuple):
    """A reward model and an independent judge; each {"head", "mean", "deviation"} over another layer's features."""

    reward: dict
    judge: dict


def _pooled(activations: Array, mask: Array) -> Array:
    return masking.masked_mean(activations, jnp.broadcast_to(mask[..., None], activations.shape), axis=-2)


def score(head: dict, activations: Array, mask: Array) -> Array:
    """[B] scores of sequences from one layer's activations [B, T, D]: mean over tokens, standardise, linear head."""
    return _score_features(head, _pooled(activations, mask))


def prefix_scores(head: dict, activations: Array, mask: Array) -> Array:
    """[B, T] `score` of each beginning: entry t is the score of the tokens up to and including t."""
    real = mask[..., None]
    sums = jnp.cumsum(jnp.where(real, activations, 0.0), axis=-2)
    counts = jnp.cumsum(real, axis=-2)
    return jax.vmap(functools.partial(_score_features, head), in_axes=1, out_axes=1)(sums / jnp.maximum(counts, 1))


def _score_features(head: dict, features: Array) -> Array:
    standard = (features - head["mean"][None]) / head["deviation"][None]
    return HEAD.apply({"params": head["head"]}, standard)


def _features(run: Run, trunk: dict, items: Sequence[RatedText], layers: tuple[int, int]) -> np.ndarray:
    """[2, N, D] mean activations entering two layers. Rows go through in two lengths, so short ones cost less."""
    model, (lower, upper) = run.model, layers
    texts = pack(run.material.tokenizer, [item.text for item in items], run.settings.text_length)

    @jax.jit
    def encode(params: dict, tokens: Array, mask: Array) -> Array:
        out = model.apply({"params": params}, tokens, mask, last=upper, tap=lower)
        return jnp.stack([_pooled(out.tap, mask), _pooled(out.hidden, mask)])

    lengths, width = texts.mask.sum(axis=-1), texts.mask.shape[-1]
    features = np.zeros((2, len(lengths), model.config.width), np.float32)
    for shortest, longest in ((0, (2 * width) // 3), ((2 * width) // 3, width)):
        chosen = np.flatnonzero((lengths > shortest) & (lengths <= longest))
        for start in range(0, len(chosen), ROWS):
            rows = chosen[start : start + ROWS]
            padded = np.resize(rows, ROWS)
            batch = run.split_rows((texts.tokens[padded, :longest], texts.mask[padded, :longest]))
            features[:, rows] = np.asarray(encode(trunk, *batch))[:, : len(rows)]
    return features


def _fit(settings: Settings, key: Array, features: np.ndarray, comparisons: Comparisons) -> dict:
    """A linear Bradley-Terry reward head on standardised features."""
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    standard = jnp.asarray((features - mean) / deviation)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(settings.reward_rate, settings.reward_steps), weight_decay=settings.reward_decay
    )

    def fit(key: Array, standard: Array, chosen: Array, rejected: Array) -> dict:
        params = HEAD.init(key, standard[:1])["params"]
        state = reward_model.init(params, lambda params, x: HEAD.apply({"params": params}, x), optimizer)
        pairs = PreferenceBatch(standard[chosen], standard[rejected], jnp.ones(chosen.shape))
        update = lambda state, _: reward_model.update(state, pairs, config=reward_model.Config())
        return dict(jax.lax.scan(update, state, None, length=settings.reward_steps)[0].params)

    head = jax.jit(fit)(key, standard, comparisons.chosen, comparisons.rejected)
    return {"head": head, "mean": jnp.asarray(mean), "deviation": jnp.asarray(deviation)}


def reward_models(run: Run, base: Policy) -> tuple[RewardModels, np.ndarray]:
    """Trains the reward model on the training half and the judge on the other half, from single raters' comparisons.

    Returns both, and how the reward model scores the judge's texts, which it has never seen.
    """
    settings, material = run.settings, run.material
    width = run.model.config.width
    blank = {
        "head": HEAD.init(run.key(2), jnp.zeros((1, width)))["params"],
        "mean": jnp.zeros(width),
        "deviation": jnp.zeros(width),
    }
    state = run.copy_everywhere({"models": RewardModels(blank, blank), "held_out": jnp.zeros(settings.judge_texts)})
    layers = (settings.judge_layer, settings.trunk)

    def fit(index: int, items: Sequence[RatedText], features: np.ndarray) -> dict:
        comparisons = single_rater_comparisons(run.rng(2, index), items, settings.comparisons)
        return _fit(settings, run.key(2, index), features, comparisons)

    def step(state: dict, index: int) -> tuple[dict, dict[str, Array]]:
        models, held_out = state["models"], state["held_out"]
        items = (material.train, material.judge)[index]
        for_judge, for_reward = _features(run, base.frozen, items, layers)
        if index == 0:
            models = models._replace(reward=fit(0, items, for_reward))
        else:
            models = models._replace(judge=fit(1, items, for_judge))
            held_out = jax.jit(_score_features)(models.reward, for_reward)
        return run.copy_everywhere({"models": models, "held_out": held_out}), {}

    state = run.loop("reward model and judge", step, state, 2)
    return state["models"], np.asarray(state["held_out"])
