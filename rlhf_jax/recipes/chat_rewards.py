"""Reward models of chats, with the shortcut of length and without: linear Bradley-Terry scores of a frozen layer.

A scorer gives every token a worth, w · h + b. People rated whole chats; what a reply is worth follows from what a chat
is worth:

* as collected: a chat is worth the **sum** over its tokens, and so is a reply: what it would add to a chat. It learns
  from any two chats, and the longer chat is mostly the better rated one.
* length removed: a chat is worth the **mean** over its tokens. It learns from chats of equal length, features without
  what length predicts of them. Of a reply's score what its length predicts is taken off as well; and an actor earns
  with a token what it is worth beyond other tokens at its place in the replies of the same turn (`token_rewards`).

The worth is calibrated on the base's replies, as a reply is not a chat: there the mean token of a summing scorer is
worth what the mean token of a chat is, and scores have standard deviation 1.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax import masking
from rlhf_jax.algorithms import reward_model
from rlhf_jax.feedback.baselines import pair_accuracy
from rlhf_jax.feedback.comparisons import Comparisons
from rlhf_jax.feedback.dialogues import matched_comparisons, rating_comparisons, without_length
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.chats import Policy, World, right
from rlhf_jax.recipes.run_folder import RunFolder
from rlhf_jax.types import PreferenceBatch, Rollout

__all__ = ["Features", "Scorer", "accuracy", "calibrated", "chat_features", "fit", "score", "seen",
           "token_rewards"]  # fmt: skip


class Scorer(NamedTuple):
    """What a token is worth, and how scores of replies follow; pytree of arrays."""

    weights: Array  # [D]
    bias: Array
    level: Array  # what the mean token of a chat is worth
    summed: Array  # bool: the sum over tokens; else the mean
    line: Array  # [2] what log length predicts of a reply's score
    scale: Array


class Features(NamedTuple):
    """What frozen layers see in chats."""

    reward: np.ndarray  # [N, D] mean over the first tokens
    judge: np.ndarray  # [N, D] of another layer
    lengths: np.ndarray  # [N] tokens of the whole chat


def chat_features(folder: RunFolder, world: World, base: Policy) -> Features:
    """Features of the rated chats, the same for all seeds; the first token, which attention pools in, is left out."""
    config, size = world.config, 64
    rows = right(world, [" ".join(chat.turns) for chat in world.rated], config.chat_tokens)
    tokens, mask, lengths = rows
    start = np.full((len(tokens), 1), world.tokenizer.eos_id, np.int32)
    tokens, mask = np.concatenate([start, tokens], axis=1), np.concatenate([start == start, mask], axis=1)

    @jax.jit
    def look(params: Any, tokens: Array, mask: Array) -> Array:
        return jnp.stack([pooled(states[:, 1:], mask[:, 1:]) for states in _layers(world, params, tokens, mask)])

    def step(state: Array, index: int) -> tuple[Array, dict[str, Array]]:
        chosen = np.resize(np.arange(index * size, min((index + 1) * size, len(tokens))), size)
        return state.at[:, chosen].set(look(base.frozen, tokens[chosen], mask[chosen])), {}

    blank = jnp.zeros((2, len(tokens), world.model.config.width))
    found = folder.stage("features of chats", step, blank, -(-len(tokens) // size), save_every=8)
    return Features(np.asarray(found[0]), np.asarray(found[1]), lengths)


def _layers(world: World, params: Any, tokens: Array, mask: Array) -> tuple[Array, Array]:
    """[B, T, D] entering the layers that reward models and judge read."""
    return _run(world.model, world.config.reward_layer, world.config.judge_layer, params, tokens, mask)


@partial(jax.jit, static_argnums=range(3))
def _run(model: Transformer, last: int, tap: int, params: Any, tokens: Array, mask: Array) -> tuple[Array, Array]:
    out = model.apply({"params": params}, tokens, mask, last=last, tap=tap)
    return out.hidden, out.tap


def pooled(states: Array, mask: Array) -> Array:
    """[B, D] mean state: states [B, T, D], mask [B, T]."""
    return masking.masked_mean(states, jnp.broadcast_to(mask[..., None], states.shape), axis=-2)


def seen(world: World, base: Policy, rollout: Rollout) -> tuple[Array, Array]:
    """[B, R, D] what the layers of reward models and judge see in replies."""
    states = _layers(world, base.frozen, rollout.tokens, rollout.mask)
    start = world.config.prompt_length
    return states[0][:, start:], states[1][:, start:]


def log_length(mask: Array) -> Array:
    return jnp.log(jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(jnp.float32))


def worth(scorer: Scorer, states: Array, mask: Array) -> Array:
    return jnp.where(mask, states @ scorer.weights + scorer.bias, 0.0)


@jax.jit
def score(scorer: Scorer, states: Array, mask: Array) -> Array:
    """[B] of replies, in standard deviations of the base's: states [B, R, D], mask [B, R]."""
    total = jnp.sum(worth(scorer, states, mask), axis=-1)
    mean = total / jnp.maximum(jnp.sum(mask, axis=-1), 1)
    raw = jnp.where(scorer.summed, total, mean)
    return (raw - scorer.line[0] - scorer.line[1] * log_length(mask)) / scorer.scale


@jax.jit
def token_rewards(scorer: Scorer, states: Array, mask: Array) -> Array:
    """[B, R] what each token of the replies of one turn earned.

    As collected its worth, so that a reply's sum is its score up to a constant. Length removed, its worth beyond the
    mean of its place, over the replies that have one there: at no place is going on or ending worth more on average.
    A reply's last token, which ends it, earns nothing then. Unit: standard deviations, for a reply of mean length.
    """
    each = worth(scorer, states, mask)
    lengths = jnp.sum(mask, axis=-1, keepdims=True)
    inner = jnp.arange(mask.shape[-1])[None] < lengths - 1
    place = jnp.sum(jnp.where(inner, each, 0.0), axis=0) / jnp.maximum(jnp.sum(inner, axis=0), 1)
    above = jnp.where(inner, each - place[None], 0.0) / jnp.mean(lengths.astype(jnp.float32))
    return jnp.where(scorer.summed, each, above) / scorer.scale


def fit(rng: np.random.Generator, world: World, rows: np.ndarray, x: np.ndarray, lengths: np.ndarray, *,
        matched: bool) -> Scorer:  # fmt: skip
    """A scorer of chats `rows` from comparisons of them; `calibrated` makes it one of replies."""
    ratings = np.array([world.rated[i].rating for i in rows], np.float64)
    x, lengths = x[rows], lengths[rows]
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    standard, many = (x - mean) / deviation, (lengths / lengths.mean())[:, None]
    if matched:
        pairs = matched_comparisons(rng, ratings, lengths, world.config.comparisons)
        inputs = without_length(standard, lengths)[0]
    else:
        pairs = rating_comparisons(rng, ratings, world.config.comparisons)
        inputs = np.concatenate([many * standard, many], axis=1)
    inputs = jnp.asarray(inputs, jnp.float32)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 200), weight_decay=1.0)
    state = reward_model.init({"w": jnp.zeros(inputs.shape[1])}, lambda params, x: x @ params["w"], optimizer)
    batch = PreferenceBatch(inputs[pairs.chosen], inputs[pairs.rejected], jnp.ones(len(pairs.chosen)))
    step = lambda state, _: reward_model.update(state, batch, config=reward_model.Config(centring=0.0))
    learnt = np.asarray(jax.jit(lambda state: jax.lax.scan(step, state, None, length=200)[0])(state).params["w"])
    weights, level = learnt[: x.shape[1]] / deviation, 0.0 if matched else learnt[-1]
    parts = weights, level - mean @ weights, level, not matched, [0.0, 0.0], 1.0
    return Scorer(*(jnp.asarray(part, bool if part is parts[3] else jnp.float32) for part in parts))


def accuracy(rng: np.random.Generator, world: World, scorer: Scorer, rows: np.ndarray, x: np.ndarray,
             lengths: np.ndarray) -> dict[str, Any]:  # fmt: skip
    """How often chats that the scorer has not seen are put in the order that people gave them, `rows` of them."""
    ratings, lengths = np.array([world.rated[i].rating for i in rows], np.float64), lengths[rows]
    scores = (x[rows] @ np.asarray(scorer.weights) + float(scorer.bias)) * np.where(scorer.summed, lengths, 1)
    tests: dict[str, Comparisons] = {"any length": rating_comparisons(rng, ratings, 3000)}
    tests["equal length"] = matched_comparisons(rng, ratings, lengths, 3000)
    said = {f"pairs of {name}": pair_accuracy(scores, pairs) for name, pairs in tests.items()}
    return said | {f"longer wins, {name}": pair_accuracy(lengths, pairs) for name, pairs in tests.items()}


def calibrated(scorer: Scorer, states: Array, mask: Array) -> Scorer:
    """The scorer in standard deviations of replies of the base: states [N, R, D], mask [N, R]."""
    usual = masking.masked_mean(worth(scorer, states, mask), mask)
    scorer = scorer._replace(bias=scorer.bias + scorer.level - usual)
    raw, lengths = np.asarray(score(scorer, states, mask), np.float64), np.asarray(jnp.sum(mask, axis=-1))
    rest, line = (raw, np.array([raw.mean(), 0.0])) if scorer.summed else without_length(raw, lengths)
    return scorer._replace(line=jnp.asarray(line, jnp.float32), scale=jnp.float32(rest.std() + 1e-6))
