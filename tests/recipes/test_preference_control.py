"""Preference RL in games: the scale of the learned reward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step_game import coin

from rlhf_jax.recipes import preference_control
from rlhf_jax.recipes.preference_control import Config, start, turn


@pytest.mark.parametrize("normalise", [True, False])
def test_the_scale_that_comparisons_leave_open_does_not_count_if_normalised(normalise, monkeypatch, key):
    config = Config(rounds=1, pairs=2, turns=1, batch=8, steps=16, segment=2, members=1, hidden=4, normalise=normalise)
    monkeypatch.setattr(preference_control, "human_reward", lambda judges, scorer, play: judges * play.actions)
    learner = start(key, coin(), config)

    @functools.partial(jax.jit, static_argnums=1)
    def learnt(scale, config):
        after, _ = turn(learner._replace(judges=scale), key, coin(), config)
        return after.agent.train.params

    small, large = (jax.tree.leaves(learnt(jnp.float32(scale), config)) for scale in (1.0, 10.0))
    same = [np.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(small, large, strict=True)]
    assert all(same) == normalise
