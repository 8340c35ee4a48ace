"""Preference RL in games: the scale of rewards, and what values are."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step_game import coin

from rlhf_jax.environments import Trajectory
from rlhf_jax.models.control import PolicyValue
from rlhf_jax.recipes import preference_control
from rlhf_jax.recipes.preference_control import Config, start, turn


@pytest.mark.parametrize("true", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_scale_of_rewards_does_not_count_if_normalised(normalise, true, monkeypatch, key):
    config = Config(rounds=1, pairs=2, turns=1, batch=8, steps=16, segment=2, members=1, hidden=4, normalise=normalise)
    monkeypatch.setattr(preference_control, "human_reward", lambda judges, scorer, play: judges * play.actions)
    learner = start(key, coin(), config)

    @functools.partial(jax.jit, static_argnums=1)
    def learnt(scale, config):
        step = lambda *args: coin().step(*args)._replace(reward=scale * args[-1])
        after, _ = turn(learner._replace(judges=scale), key, coin()._replace(step=step), config, true=true)
        return after.agent.train.params

    small, large = (jax.tree.leaves(learnt(jnp.float32(scale), config)) for scale in (1.0, 10.0))
    same = [np.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(small, large, strict=True)]
    assert all(same) == normalise


def test_values_are_averages_of_rewards():
    """A critic that says r everywhere is right about play that gives r for ever, and returns are r too."""
    rewards = 3.0 * jnp.ones((2, 50))
    never, seen = jnp.zeros(rewards.shape, bool), jnp.zeros((*rewards.shape, 1))
    play = Trajectory(seen, seen, never, rewards, never, never)
    critic = SimpleNamespace(apply=lambda variables, seen: PolicyValue(None, jnp.full(seen.shape[:2], 3.0)))
    learned = preference_control.advantages(critic, None, play, rewards)
    np.testing.assert_allclose(learned.advantages, 0.0, atol=1e-5)
    np.testing.assert_allclose(learned.returns, 3.0, rtol=1e-5)
    over = preference_control.advantages(critic, None, play._replace(terminated=~never), rewards)
    np.testing.assert_allclose(over.returns, 0.03, rtol=1e-5)
