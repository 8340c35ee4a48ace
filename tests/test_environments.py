"""The environment interface: aligned steps, resets, time limits, returns; the games of gymnax and pgx through it."""

import builtins

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import environments
from rlhf_jax.environments import Environment, Step
from rlhf_jax.errors import UserError


def corridor(length=5, limit=3):
    """State (place, time); action 1 goes right, and the end pays 10; `limit` steps are allowed."""
    see = lambda state: state[0].astype(jnp.float32)[None]
    fresh = (jnp.int32(0), jnp.int32(0))

    def step(key, state, action):
        place, time = state[0] + action, state[1] + 1
        terminated = place >= length
        truncated = (time >= limit) & ~terminated
        new = jax.tree.map(lambda a, b: jnp.where(terminated | truncated, a, b), fresh, (place, time))
        return Step(new, see(new), see((place, time)), jnp.where(terminated, 10.0, 1.0), terminated, truncated)

    return Environment(lambda key: (fresh, see(fresh)), step, 2, (1,), limit)


def always(action):
    return lambda key, observations: jnp.full(observations.shape[0], action, jnp.int32)


def test_steps_are_aligned_and_the_outcome_is_what_was_there_before_the_reset(key):
    game = corridor()
    start = environments.reset(game, key, batch=2)
    _, play = environments.rollout(game, always(1), start, key, steps=5)
    assert play.observations[0, :, 0].tolist() == [0, 1, 2, 0, 1]
    assert play.outcomes[0, :, 0].tolist() == [1, 2, 3, 1, 2]
    assert play.truncated[0].tolist() == [False, False, True, False, False]
    assert not bool(play.terminated.any())
    assert play.actions.shape == play.rewards.shape == (2, 5)


def test_a_rollout_goes_on_where_the_last_one_ended(key):
    game = corridor()
    start = environments.reset(game, key, batch=1)
    middle, first = environments.rollout(game, always(1), start, key, steps=2)
    _, second = environments.rollout(game, always(1), middle, key, steps=3)
    _, whole = environments.rollout(game, always(1), start, key, steps=5)
    assert jnp.concatenate([first.observations, second.observations], axis=1).tolist() == whole.observations.tolist()


@pytest.mark.parametrize(("length", "limit", "wanted"), [(2, 9, 11.0), (9, 4, 4.0)])
def test_a_return_counts_one_episode_and_stops_at_its_end(key, length, limit, wanted):
    game = corridor(length, limit)
    assert environments.episode_returns(game, always(1), key, episodes=3).tolist() == [wanted] * 3


def test_the_first_episode_of_a_stretch():
    ended = jnp.array([[False, False], [True, False], [False, True]])
    assert environments.episode_mask(ended).tolist() == [[True, True], [True, False], [True, True]]


def test_a_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name in ("gymnax", "pgx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    for wrap in (environments.gymnax, environments.pgx):
        with pytest.raises(UserError, match=r"rlhf_jax\[games\]"):
            wrap("any")


def test_cartpole_falls_when_pushed_one_way(key):
    pytest.importorskip("six")
    pytest.importorskip("gymnax")
    game = environments.gymnax("CartPole-v1")
    assert (game.actions, game.observation_shape, game.time_limit) == (2, (4,), 500)
    start = environments.reset(game, key, batch=2)
    _, play = jax.jit(lambda start, key: environments.rollout(game, always(1), start, key, steps=30))(start, key)
    assert bool(play.terminated.any(axis=1).all())
    assert not bool(play.truncated.any())
    fallen = jnp.abs(play.outcomes[..., 2]) > 12 * 2 * jnp.pi / 360
    assert bool(jnp.all(fallen == play.terminated))  # the outcome is the fall, not the fresh start
    with pytest.raises(UserError, match="no game named"):
        environments.gymnax("Tetris")


def test_breakout_and_its_time_limit(key):
    pytest.importorskip("pgx")
    game = environments.pgx("minatar-breakout", time_limit=4)
    assert (game.actions, game.observation_shape) == (3, (10, 10, 4))
    start = environments.reset(game, key, batch=2)
    _, play = jax.jit(lambda start, key: environments.rollout(game, always(0), start, key, steps=8))(start, key)
    assert play.truncated.tolist() == [[False, False, False, True] * 2] * 2
    assert play.observations.dtype == jnp.float32
    with pytest.raises(UserError, match="no game named"):
        environments.pgx("tetris")
    with pytest.raises(ValueError, match="one player"):
        environments.pgx("tic_tac_toe")
