"""Environments as two pure functions, what a policy does in them, and what it earns.

`Environment` is the one interface: `reset(key)` starts an episode, `step(key, state, action)` goes on and starts the
next episode by itself when one ends. So a stretch of T steps is a `lax.scan`, B of them a `vmap`, and a whole training
run one program. `gymnax` and `pgx` wrap the games of those packages, which are imported only here and only when asked
for. Anything else that has the two functions is an environment too.

Arrays of a `Trajectory` are [B, T, ...]; index t is the same step everywhere. `rewards` are the environment's own: a
learner from human feedback reports them and learns from others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.errors import UserError, missing_extra

__all__ = ["Environment", "Step", "Trajectory", "episode_mask", "episode_returns", "gymnax", "pgx", "reset", "rollout"]

Policy = Callable[[Array, Array], Array]  # (key, observations [B, ...]) -> actions [B] int32


class Step(NamedTuple):
    """What one action led to."""

    state: Any  # of the environment; of the next episode if this step ended one
    observation: Array  # [...] what to act on next, after the reset if there was one
    outcome: Array  # [...] what the action led to, before any reset
    reward: Array  # [] float32, the environment's own
    terminated: Array  # [] bool, the episode ended by the rules of the game
    truncated: Array  # [] bool, the time limit cut it; never together with terminated


class Environment(NamedTuple):
    """A game as pure functions."""

    reset: Callable[[Array], tuple[Any, Array]]  # key -> state, observation
    step: Callable[[Array, Any, Array], Step]  # key, state, action
    actions: int  # how many there are; an action is an int32 below this
    observation_shape: tuple[int, ...]
    time_limit: int  # steps after which an episode is truncated


class Trajectory(NamedTuple):
    """T steps of B environments side by side."""

    observations: Array  # [B, T, ...] float32, before each action
    outcomes: Array  # [B, T, ...] float32, after it and before a reset
    actions: Array  # [B, T] int32
    rewards: Array  # [B, T] float32, the environment's own
    terminated: Array  # [B, T] bool
    truncated: Array  # [B, T] bool

    @property
    def ended(self) -> Array:
        """[B, T] bool, the step was the last of its episode."""
        return self.terminated | self.truncated


# --- acting -----------------------------------------------------------------------------------------------------------


def reset(environment: Environment, key: Array, *, batch: int) -> tuple[Any, Array]:
    """B fresh episodes: their states and first observations, with leading axis B. `key` is consumed."""
    return jax.vmap(environment.reset)(jax.random.split(key, batch))


def rollout(
    environment: Environment, policy: Policy, start: tuple[Any, Array], key: Array, *, steps: int
) -> tuple[tuple[Any, Array], Trajectory]:
    """Lets a policy act for T steps in B environments.

    Args:
      environment: the game.
      policy: (key, observations [B, ...]) -> actions [B] int32.
      start: states and observations [B, ...] from `reset` or from the rollout before.
      key: consumed.
      steps: T, static.
    Returns:
      Where the next rollout goes on, and the steps taken.

    >>> counter = Environment(
    ...     reset=lambda key: (jnp.zeros(()), jnp.zeros(1)),
    ...     step=lambda key, s, a: Step(s + a, (s + a)[None], (s + a)[None], s + a, s > 9, s < 0),
    ...     actions=2, observation_shape=(1,), time_limit=9)
    >>> always = lambda key, observations: jnp.ones(observations.shape[0], jnp.int32)
    >>> first = reset(counter, jax.random.key(0), batch=1)
    >>> rollout(counter, always, first, jax.random.key(1), steps=3)[1].rewards.tolist()
    [[1.0, 2.0, 3.0]]
    """

    def act(carry: tuple[Any, Array], key: Array) -> tuple[tuple[Any, Array], Trajectory]:
        states, observations = carry
        policy_key, step_key = jax.random.split(key)
        actions = policy(policy_key, observations)
        step = jax.vmap(environment.step)(jax.random.split(step_key, actions.shape[0]), states, actions)
        taken = Trajectory(observations, step.outcome, actions, step.reward, step.terminated, step.truncated)
        return (step.state, step.observation), taken

    end, taken = jax.lax.scan(act, start, jax.random.split(key, steps))
    return end, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), taken)


def episode_mask(ended: Array) -> Array:
    """The steps of the first episode of a stretch: True up to and including the first step that ended one.

    Args:
      ended: [..., T] bool.
    Returns:
      [..., T] bool; all True where no episode ended.

    >>> episode_mask(jnp.array([False, True, False, True])).tolist()
    [True, True, False, False]
    """
    before = jnp.cumsum(ended, axis=-1) - ended
    return before == 0


def episode_returns(
    environment: Environment, policy: Policy, key: Array, *, episodes: int, steps: int | None = None
) -> Array:
    """[episodes] true undiscounted return of one episode each, at most `steps` long (default: the time limit)."""
    reset_key, act_key = jax.random.split(key)
    start = reset(environment, reset_key, batch=episodes)

    def act(carry: tuple[Any, Array, Array], key: Array) -> tuple[tuple[Any, Array, Array], Array]:
        states, observations, alive = carry
        (states, observations), step = rollout(environment, policy, (states, observations), key, steps=1)
        return (states, observations, alive & ~step.ended[:, 0]), jnp.where(alive, step.rewards[:, 0], 0.0)

    keys = jax.random.split(act_key, environment.time_limit if steps is None else steps)
    _, earned = jax.lax.scan(act, (*start, jnp.ones(episodes, bool)), keys)
    return jnp.sum(earned, axis=0)


# --- games of other packages ------------------------------------------------------------------------------------------


def gymnax(name: str) -> Environment:
    """A game of gymnax with a discrete action space, for instance "CartPole-v1".

    Raises: UserError if gymnax or its own dependency six is not installed, or it has no such game.
    """
    try:
        import gymnax as package  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "gymnax", "games", f"play {name}") from error
    try:
        game, params = package.make(name)
    except (KeyError, ValueError) as error:
        raise UserError(f"gymnax has no game named {name!r}; `gymnax.registered_envs` lists its games.") from error

    def start(key: Array) -> tuple[Any, Array]:
        observation, state = game.reset(key, params)
        return state, observation.astype(jnp.float32)

    def step(key: Array, state: Any, action: Array) -> Step:
        observation, state, reward, terminated, truncated, info = game.step(key, state, action, params)
        observation, outcome = observation.astype(jnp.float32), info["final_observation"].astype(jnp.float32)
        return Step(state, observation, outcome, jnp.float32(reward), terminated, truncated & ~terminated)

    shape = game.observation_space(params).shape
    return Environment(start, step, int(game.num_actions), tuple(shape), int(params.max_steps_in_episode))


def pgx(name: str, *, time_limit: int = 1000) -> Environment:
    """A game of pgx for one player, for instance "minatar-breakout", with a time limit of our own.

    Raises: UserError if pgx is not installed or has no such game; ValueError if it is for several players.
    """
    try:
        import pgx as package  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "pgx", "games", f"play {name}") from error
    if name not in package.available_envs():
        raise UserError(f"pgx has no game named {name!r}; it has {', '.join(package.available_envs())}.")
    game = package.make(name)
    if game.num_players != 1:
        raise ValueError(f"name must be a game for one player, got {name!r} for {game.num_players}")

    def start(key: Array) -> tuple[Any, Array]:
        state = game.init(key)
        return state, state.observation.astype(jnp.float32)

    def step(key: Array, state: Any, action: Array) -> Step:
        step_key, reset_key = jax.random.split(key)
        state = game.step(state, action, step_key)
        outcome, reward = state.observation.astype(jnp.float32), state.rewards[0]
        terminated = state.terminated
        truncated = (state.truncated | (state._step_count >= time_limit)) & ~terminated
        ended = terminated | truncated
        state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), game.init(reset_key), state)
        return Step(state, state.observation.astype(jnp.float32), outcome, reward, terminated, truncated)

    return Environment(start, step, int(game.num_actions), tuple(game.observation_shape), time_limit)
