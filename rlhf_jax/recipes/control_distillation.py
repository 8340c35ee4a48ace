"""PD in games: a small student of an agent that preference RL has trained, with human reward and without."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhf_jax import environments, masking
from rlhf_jax.algorithms import policy_distillation
from rlhf_jax.environments import Environment
from rlhf_jax.losses import human_distillation
from rlhf_jax.models import control
from rlhf_jax.recipes import preference_control
from rlhf_jax.recipes.preference_control import Learner, acting, advantages, human_reward, networks, scaled

__all__ = ["Config", "distil", "student_network"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(preference_control.Config):
    """How much the student learns, beside what the agent does."""

    student_hidden: int = 8
    student_steps: int = 300
    human_beta: float = 3.0  # in standard deviations of the steps' advantages, which of a good teacher are noise


def student_network(game: Environment, config: Config) -> control.PolicyValueNet:
    return control.PolicyValueNet(game.actions, (config.student_hidden,), len(game.observation_shape))


def distil(key: Array, game: Environment, learner: Learner, config: Config, human: Array) -> Any:
    """A small student's parameters, learnt from a trained agent's play: soft targets, and each step's human weight.

    The weight is exp(A / β): the whitened advantage A says by how much an action made the verdict on what follows
    better than expected, so the target is a step of policy improvement over the teacher (as in Peng et al. 2019,
    https://arxiv.org/abs/1910.00177).

    Args:
      key: consumed.
      game: the environment.
      learner: of `preference_control`; its agent is the teacher, its reward models judge.
      config: sizes.
      human: [] bool, whether human reward counts; else all weights are 1.
    """
    network, scorer = networks(game, config)
    student = student_network(game, config)
    init_key, play_key, loop_key = jax.random.split(key, 3)
    params = learner.agent.train.params
    _, play = environments.rollout(game, acting(network, params), learner.games, play_key, steps=4 * config.steps)
    rewards = scaled(human_reward(learner.judges, scorer, play), config)
    gained = advantages(network, params, play, rewards).advantages
    taken = jnp.ones(gained.shape, bool)
    weights = human_distillation.human_weights(masking.whiten(gained, taken), taken, beta=config.human_beta)
    logits = network.apply({"params": params}, play.observations).logits
    inputs = control.ActionInputs(play.observations, play.actions, logits)
    every = policy_distillation.Batch(inputs, taken, jnp.where(human, weights, 1.0))
    every = jax.tree.map(lambda x: x.reshape(-1, 32, *x.shape[2:]), every)
    own = student.init(init_key, play.observations[:1, 0])["params"]
    state = policy_distillation.init(own, control.distilled(student), optax.adam(1e-2))

    def step(state: Any, key: Array) -> tuple[Any, None]:
        rows = jax.random.randint(key, (32,), 0, len(every.mask))
        batch = jax.tree.map(lambda x: x[rows], every)
        return policy_distillation.update(state, batch, config=policy_distillation.Config())[0], None

    state, _ = jax.lax.scan(step, state, jax.random.split(loop_key, config.student_steps))
    return state.params
