"""Reward models of chats, with the shortcut of length and without: linear Bradley-Terry scores of a frozen layer.

A scorer is a dict: weights [D] of the features, slope of the log length, and offset and scale, which `calibrated` sets
so that the base model's replies have mean 0 and deviation 1. A matched scorer learns from chats of equal length with
length regressed out of the features, and what a reply's length predicts of its score is taken off as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax.algorithms import reward_model
from rlhf_jax.feedback.baselines import pair_accuracy
from rlhf_jax.feedback.comparisons import Comparisons
from rlhf_jax.feedback.dialogues import (
    Dialogue,
    matched_comparisons,
    rating_comparisons,
    without_length,
)
from rlhf_jax.recipes.chats import Policy, World, right
from rlhf_jax.recipes.pooled_reward import pooled
from rlhf_jax.types import PreferenceBatch, Rollout

__all__ = ["accuracy", "calibrated", "fit", "score", "seen_by"]


def log_length(mask: Array) -> Array:
    return jnp.log(jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(jnp.float32))


def score(scorer: dict, features: Array, lengths: Array) -> Array:
    """[B] linear in features and log length, in standard deviations of the base model's replies from their mean."""
    return (features @ scorer["weights"] + scorer["slope"] * lengths - scorer["offset"]) / scorer["scale"]


def seen_by(world: World, base: Policy, rollout: Rollout, layer: int) -> tuple[Array, Array]:
    """Features and log lengths of replies, for the scorers."""
    start = world.config.prompt_length
    hidden = world.model.apply({"params": base.frozen}, rollout.tokens, rollout.mask, last=layer).hidden
    return pooled(hidden[:, start:], rollout.response_mask), log_length(rollout.response_mask)


def dialogue_features(world: World, base: Policy, chats: list[Dialogue], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] what one layer sees on average in the first tokens of a chat; [N] tokens of the whole chat."""
    tokens, mask, lengths = right(world, [" ".join(chat.turns) for chat in chats], world.config.dialogue_tokens)
    look = jax.jit(lambda t, m: pooled(world.model.apply({"params": base.frozen}, t, m, last=layer).hidden, m))
    parts = [np.asarray(look(tokens[i : i + 64], mask[i : i + 64])) for i in range(0, len(tokens), 64)]
    return np.concatenate(parts), lengths


def fit(world: World, seed: int, base: Policy, chats: list[Dialogue], layer: int, *, matched: bool) -> dict:
    """A scorer of chats from comparisons of them; `offset` and `scale` are set later, from the base's replies."""
    rng = np.random.default_rng((seed, 3, layer, matched))
    rated = [chat for chat in chats if chat.rating is not None]
    ratings = np.array([chat.rating for chat in rated], np.float64)
    features, lengths = dialogue_features(world, base, rated, layer)
    if matched:
        features, pairs = without_length(features, lengths)[0], matched_comparisons
        pairs = matched_comparisons(rng, ratings, lengths, world.config.comparisons)
    else:
        features = np.concatenate([features, np.log(lengths)[:, None]], axis=1)
        pairs = rating_comparisons(rng, ratings, world.config.comparisons)
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = jnp.asarray((features - mean) / deviation, jnp.float32)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 200), weight_decay=1.0)
    state = reward_model.init({"w": jnp.zeros(x.shape[1])}, lambda params, x: x @ params["w"], optimizer)
    batch = PreferenceBatch(x[pairs.chosen], x[pairs.rejected], jnp.ones(len(pairs.chosen)))
    step = lambda state, _: reward_model.update(state, batch, config=reward_model.Config(centring=0.0))
    weights = jax.jit(lambda state: jax.lax.scan(step, state, None, length=200)[0])(state).params["w"] / deviation
    slope = weights[-1] if not matched else jnp.zeros(())
    return {"weights": weights[: base.model.config.width], "slope": slope, "offset": jnp.zeros(()),
            "scale": jnp.ones(())}  # fmt: skip


def accuracy(world: World, seed: int, base: Policy, scorer: dict, layer: int, chats: list[Dialogue]) -> dict[str, Any]:
    """How often chats nobody trained on are put in the order that people gave them, of any and of equal length."""
    rated = [chat for chat in chats if chat.rating is not None]
    ratings = np.array([chat.rating for chat in rated], np.float64)
    features, lengths = dialogue_features(world, base, rated, layer)
    scores = np.asarray(score(scorer, jnp.asarray(features), jnp.log(jnp.asarray(lengths, jnp.float32))))
    rng, n = np.random.default_rng((seed, 4)), 3000
    tests: dict[str, Comparisons] = {"any": rating_comparisons(rng, ratings, n)}
    tests["equal length"] = matched_comparisons(rng, ratings, lengths, n)
    said = {f"pairs of {name}": pair_accuracy(scores, pairs) for name, pairs in tests.items()}
    return said | {f"longer wins, {name}": pair_accuracy(lengths, pairs) for name, pairs in tests.items()}


def calibrated(scorer: dict, features: Array, lengths: Array, *, matched: bool) -> dict:
    """The scorer in standard deviations of the base's replies; `matched` takes off what their length predicts."""
    raw = np.asarray(score(scorer, features, lengths), np.float64)
    rest, line = without_length(raw, np.exp(np.asarray(lengths, np.float64))) if matched else (raw, (raw.mean(), 0.0))
    scale = rest.std() + 1e-6
    own = {"slope": scorer["slope"] - line[1], "offset": jnp.asarray(line[0]), "scale": jnp.asarray(scale)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), scorer | own)
