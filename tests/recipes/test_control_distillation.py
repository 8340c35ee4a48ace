"""PD in games: without human reward a student plays like its teacher, with it rather what people like."""

import jax
import jax.numpy as jnp
import pytest
from one_step_game import coin

from rlhf_jax.recipes import control_distillation
from rlhf_jax.recipes.control_distillation import Config, distil, student_network
from rlhf_jax.recipes.preference_control import start


@pytest.mark.parametrize("liked", [0, 1])
def test_human_reward_moves_the_student_to_the_action_that_is_liked(key, monkeypatch, liked):
    monkeypatch.setattr(
        control_distillation, "human_reward", lambda judges, scorer, play: (play.actions == liked).astype(jnp.float32)
    )
    config = Config(
        rounds=1, pairs=2, turns=1, batch=8, steps=16, segment=2, members=1, hidden=4, student_steps=60, human_beta=1.0
    )
    learner, game = start(key, coin(), config), coin()
    learn = jax.jit(lambda human: distil(key, game, learner, config, human))
    chosen = lambda params: jax.nn.softmax(student_network(game, config).apply({"params": params}, jnp.ones(1)).logits)
    assert abs(float(chosen(learn(jnp.bool_(False)))[liked]) - 0.5) < 0.03  # the untrained teacher's
    # Whitened, actions taken equally often have advantages of 1 and -1: weights e and 1 / e of the same target.
    wanted = float(jax.nn.sigmoid(2.0))
    assert abs(float(chosen(learn(jnp.bool_(True)))[liked]) - wanted) < 0.08
