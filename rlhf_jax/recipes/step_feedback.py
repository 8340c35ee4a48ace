"""TAMER and COACH: an agent that learns from a trainer who calls single steps right or wrong, some of them, and late.

One lesson: the agent plays; a scripted trainer judges steps (`feedback.teachers.delayed_signals`: half of them, 0.2 to
0.6 s after their end); one gradient step follows. The environment's reward is reported and never learned from. `learn`
is one pure function of a key: `jit` it, `vmap` it over seeds.

References: Knox and Stone 2009, https://doi.org/10.1145/1597735.1597738; MacGlashan et al. 2017,
https://arxiv.org/abs/1701.06049
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhf_jax import environments, masking
from rlhf_jax.environments import Environment, Trajectory
from rlhf_jax.feedback import teachers
from rlhf_jax.losses import feedback as coaching
from rlhf_jax.losses import tamer
from rlhf_jax.models import control
from rlhf_jax.recipes.preference_control import acting

__all__ = ["COACH", "TAMER", "Config", "Method", "cart_pole_trainer", "learn"]

STEP_SECONDS = 0.2  # CartPole ten times slowed, so that a person could follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How much is taught."""

    lessons: int = 120  # gradient steps, each after `lesson_steps` steps in `lesson_games` games
    lesson_games: int = 4
    lesson_steps: int = 64
    lesson_rate: float = 1e-2
    lesson_hidden: int = 32


class Method(NamedTuple):
    """How signals become a loss, and how the agent acts while it learns."""

    loss: Callable[[Array, Trajectory, teachers.Signals], Array]  # logits [B, T, A] -> []
    choose: Callable[[Array, Array], Array]  # key, logits [B, A] -> actions [B]


def _taken(x: Array, play: Trajectory) -> Array:
    return jnp.take_along_axis(x, play.actions[..., None], axis=-1)[..., 0]


def _tamer_loss(logits: Array, play: Trajectory, signals: teachers.Signals) -> Array:
    """The logits are the predicted human reward of each action; a signal is credited to the steps it may be about."""
    mask = jnp.ones(play.rewards.shape, bool)
    starts = jnp.broadcast_to(jnp.arange(mask.shape[1]) * STEP_SECONDS, mask.shape)
    credit = tamer.delay_credit(signals.times, starts, starts + STEP_SECONDS, mask)
    reachable = jnp.sum(credit, axis=-1) > 0.5  # signals after the stretch's end have nothing to be about
    errors = tamer.tamer(_taken(logits, play), credit, mask, signals.values)
    return masking.token_mean(errors, signals.given & reachable)


def _coach_loss(logits: Array, play: Trajectory, signals: teachers.Signals) -> Array:
    """Signals are advantages of the steps before they were heard."""
    mask = jnp.ones(play.rewards.shape, bool)
    arrivals = jnp.round(signals.times / STEP_SECONDS - 1).astype(jnp.int32)
    heard = jnp.zeros_like(signals.values)
    heard = jax.vmap(lambda x, t, v: x.at[t].add(v, mode="drop"))(heard, arrivals, signals.values)
    credited = coaching.human_returns(coaching.shift_feedback(heard, mask, delay=1), mask, discount=0.5)
    return masking.token_mean(coaching.coach(_taken(jax.nn.log_softmax(logits), play), credited), mask)


def _mostly_best(key: Array, logits: Array) -> Array:
    """The best action, one time in ten any."""
    wander_key, any_key = jax.random.split(key)
    best = jnp.argmax(logits, axis=-1)
    anything = jax.random.randint(any_key, best.shape, 0, logits.shape[-1])
    return jnp.where(jax.random.bernoulli(wander_key, 0.1, best.shape), anything, best)


TAMER = Method(_tamer_loss, _mostly_best)
COACH = Method(_coach_loss, jax.random.categorical)


def cart_pole_trainer(play: Trajectory) -> Array:
    """[B, T] what the scripted trainer thinks: +1 where a linear controller would act alike, else -1."""
    gains = jnp.array([1.0, 1.6, 18.0, 3.0])  # position, speed, angle, its speed
    right = play.actions == (jnp.einsum("...d,d->...", play.observations, gains) > 0)
    return jnp.where(right, 1.0, -1.0)


def learn(
    key: Array, game: Environment, trainer: Callable[[Trajectory], Array], method: Method, config: Config
) -> tuple[environments.Policy, Array, Array]:
    """An agent taught by a trainer.

    Args:
      key: consumed.
      game: the environment.
      trainer: what the trainer thinks of each step, [B, T]; said late and not always.
      method: `TAMER` or `COACH`.
      config: sizes.
    Returns:
      The greedy policy, [lessons] true return per finished episode, [] signals given.
    """
    network = control.PolicyValueNet(game.actions, (config.lesson_hidden,), len(game.observation_shape))
    init_key, game_key, loop_key = jax.random.split(key, 3)
    params = network.init(init_key, jnp.zeros((1, *game.observation_shape)))["params"]
    adam = optax.adam(config.lesson_rate)
    games = environments.reset(game, game_key, batch=config.lesson_games)
    logits = lambda params, seen: network.apply({"params": params}, seen).logits

    def lesson(carry: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
        params, optimizer, games = carry
        play_key, trainer_key = jax.random.split(key)
        policy = lambda key, seen: method.choose(key, logits(params, seen))
        games, play = environments.rollout(game, policy, games, play_key, steps=config.lesson_steps)
        signals = teachers.delayed_signals(trainer(play), trainer_key, step_seconds=STEP_SECONDS)
        grads = jax.grad(lambda params: method.loss(logits(params, play.observations), play, signals))(params)
        updates, optimizer = adam.update(grads, optimizer)
        returned = jnp.sum(play.rewards) / jnp.maximum(jnp.sum(play.ended), 1)
        return (optax.apply_updates(params, updates), optimizer, games), (returned, jnp.sum(signals.given))

    begin = (params, adam.init(params), games)
    (params, _, _), (curve, given) = jax.lax.scan(lesson, begin, jax.random.split(loop_key, config.lessons))
    return acting(network, params, greedy=True), curve, jnp.sum(given)
