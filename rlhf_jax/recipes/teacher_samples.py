"""PD for a small decoder: a teacher's samples with their feedback, their human weights, and the student."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from flax.training.train_state import TrainState
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import constraints
from rlhf_jax.algorithms import policy_distillation
from rlhf_jax.constraints import Lagrange
from rlhf_jax.losses.human_distillation import human_weights
from rlhf_jax.models import policies
from rlhf_jax.models.transformer import output_table
from rlhf_jax.recipes.sequences import FREE, Constraint, Judge, Judged, Prompts, Task, act, ascend, repeated
from rlhf_jax.types import TokenInputs

__all__ = ["Rated", "distil", "rate", "tilt"]


@struct.dataclass
class Rated:
    """Samples of a teacher, K for each of N prompts, with their feedback."""

    inputs: TokenInputs  # [N, K, P + R]
    mask: Array  # [N, K, R] bool
    rewards: Array  # [N, K], or [N, K, R] of tokens; so the following
    costs: Array  # [N, K]
    at_stake: Array  # [N, K] bool


def rate(task: Task, params: dict, prompts: Prompts, key: Array, *, judge: Judge, samples: int) -> Rated:
    """K samples of the teacher `params` for every prompt, with their feedback; the judge sees the teacher's states."""
    rollout = act(task, params, prompts, key, samples=samples)
    states = policies.response_hidden(task.model, params, rollout.inputs, prompt_length=task.prompt_length)
    everything = (rollout.inputs, rollout.response_mask, *judge(rollout, repeated(prompts.truth, samples), states))
    return Rated(*jax.tree.map(lambda x: x.reshape(-1, samples, *x.shape[1:]), everything))


def tilt(rated: Rated, *, beta: ArrayLike, constraint: Constraint = FREE, steps: int = 0) -> tuple[Array, Lagrange]:
    """Human weights of the teacher's samples, of mean 1 within each prompt: w ∝ exp((r - λ c) / β).

    Rewards of tokens give weights of tokens: `human_step_weights`, if a reward is what the token added to the value.
    λ is found by `steps` steps of dual ascent on the mean cost that the reweighted teacher has; 0 steps leave it at
    `constraint.start`. It is not divided by 1 + λ as in `learn`: that would be another β for the rewards.

    Returns:
      ([N, K] or [N, K, R] weights, the multiplier).
    """
    rewards, costs = rated.rewards, rated.costs
    counted = rated.mask if rewards.ndim == rated.mask.ndim else jnp.ones(rewards.shape, bool)

    def weigh(lagrange: Lagrange) -> Array:
        mixed = rewards - lagrange.multiplier * costs
        return jax.vmap(functools.partial(human_weights, beta=beta))(mixed, counted)

    def step(lagrange: Lagrange, _: None) -> tuple[Lagrange, None]:
        weighted = Judged(rewards, weigh(lagrange) * costs, rated.at_stake)
        return ascend(lagrange, weighted, constraint)[0], None

    lagrange, _ = jax.lax.scan(step, constraints.init_lagrange(constraint.start), None, length=steps)
    return weigh(lagrange), lagrange


def distil(
    state: TrainState, teacher: dict, rated: Rated, weights: Array, key: Array, *, task: Task, updates: int, rows: int
) -> tuple[TrainState, dict[str, Array]]:
    """Updates of PD on rated samples [N, K]; metrics averaged.

    With weights of answers, rows are drawn by `policy_distillation.proposal`; with weights of tokens, all alike.

    `state.apply_fn` is `models.policies.student(...)` over {"student": ..., "teacher_table": ...}.
    """
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rated.inputs, rated.mask, weights))
    probabilities, importance = policy_distillation.proposal(flat[2] if flat[2].ndim == 1 else jnp.ones(len(flat[2])))
    frozen = {"teacher_table": output_table(teacher)}

    def update(state: TrainState, key: Array) -> tuple[TrainState, dict[str, Array]]:
        index = jax.random.choice(key, len(probabilities), (rows,), p=probabilities)
        inputs, mask, weight = jax.tree.map(lambda x: x[index], flat)
        states = policies.response_hidden(task.model, teacher, inputs, prompt_length=task.prompt_length)
        batch = policy_distillation.Batch(policies.TeacherInputs(inputs, states), mask, weight, importance[index])
        return policy_distillation.update(state, batch, config=policy_distillation.Config(), frozen=frozen)

    state, metrics = jax.lax.scan(update, state, jax.random.split(key, updates))
    return state, jax.tree.map(jnp.mean, metrics)
