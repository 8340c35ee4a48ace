"""AC-HF and GRPO for a small decoder that answers prompts, trained whole, in compiled chunks of steps.

Every function runs several updates inside one `lax.scan` and draws its rows from a key, so a jitted call is a step of
`run_folder.RunFolder.stage`. Feedback enters through a `Judge`: a pure function of a rollout, of what is known about
its prompts, and of the frozen reference's states, which a learned reward model may read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from flax.training.train_state import TrainState
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import constraints, masking
from rlhf_jax.algorithms import actor_critic, group, sft
from rlhf_jax.constraints import Lagrange
from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.drawing import Choose
from rlhf_jax.generation.sampler import generate
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, output_table
from rlhf_jax.types import ActorCritic, Rollout, TokenInputs
from rlhf_jax.vocabulary_chunks import head_log_probs

__all__ = [
    "FREE",
    "Constraint",
    "GroupLearner",
    "Judge",
    "Judged",
    "Learner",
    "Prompts",
    "Task",
    "act",
    "actor_critic_policy",
    "ascend",
    "learn",
    "learn_in_groups",
    "repeated",
    "supervise",
]


class Task(NamedTuple):
    """A decoder and the shape of what it answers."""

    model: Transformer
    prompt_length: int  # P
    length: int  # R, most tokens of an answer
    end_token: int
    pad_token: int


@struct.dataclass
class Prompts:
    """Left-padded prompts, and what the feedback knows about each."""

    tokens: Array  # [N, P] int32
    mask: Array  # [N, P] bool
    truth: Any  # pytree with the leading axis N

    def rows(self, index: Array) -> "Prompts":
        """Some of them."""
        return _rows(self, index)


@jax.jit
def _rows(prompts: Prompts, index: Array) -> Prompts:
    return jax.tree.map(lambda x: x[index], prompts)


class Judged(NamedTuple):
    """What feedback says about answers, each [B]; or each [B, R] about their tokens, which AC-HF and PD can take."""

    rewards: Array  # float32
    costs: Array  # float32, what a constraint limits; zeros where there is none
    at_stake: Array  # bool, answers whose cost counts in the mean that is limited


Judge = Callable[[Rollout, Any, Array], Judged]  # (rollout, truth of its rows, reference's states [B, R, D])


class Constraint(NamedTuple):
    """Of the mean cost of answers at stake, by dual ascent; the defaults constrain nothing."""

    limit: ArrayLike = 1.0
    rate: ArrayLike = 0.0  # η of the dual ascent
    start: ArrayLike = 0.0  # multiplier to start from, reward units per cost unit
    most: ArrayLike = jnp.inf  # mean cost that one step counts at most: far from the limit the multiplier climbs evenly


FREE = Constraint()


class Learner(NamedTuple):
    """What AC-HF changes."""

    agent: actor_critic.State  # of {"actor": ..., "critic": ...}
    lagrange: Lagrange


class GroupLearner(NamedTuple):
    """What GRPO changes."""

    train: TrainState
    lagrange: Lagrange


def act(
    task: Task, params: Any, prompts: Prompts, key: Array, *, choose: Choose = categorical, samples: int = 1
) -> Rollout:
    """Answers every prompt `samples` times; rows of a prompt are adjacent."""
    return generate(
        task.model,
        params,
        prompts.tokens,
        prompts.mask,
        jax.random.split(key, len(prompts.tokens) * samples),
        length=task.length,
        end_token=task.end_token,
        pad_token=task.pad_token,
        choose=choose,
        samples=samples,
    )


Update = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]
_SFT: Update = functools.partial(sft.update, config=sft.Config())


def supervise(
    state: TrainState,
    batch: Any,
    key: Array,
    *,
    updates: int,
    rows: int,
    update: Update = _SFT,
) -> tuple[TrainState, dict[str, Array]]:
    """Updates on rows of `batch`, drawn with replacement, of `sft` if nothing else is said; metrics averaged."""
    count = len(jax.tree.leaves(batch)[0])

    def step(state: TrainState, key: Array) -> tuple[TrainState, dict[str, Array]]:
        index = jax.random.randint(key, (rows,), 0, count)
        return update(state, jax.tree.map(lambda x: x[index], batch))

    state, metrics = jax.lax.scan(step, state, jax.random.split(key, updates))
    return state, jax.tree.map(jnp.mean, metrics)


def actor_critic_policy(task: Task, critic: ScalarHead) -> Callable[[dict, TokenInputs], ActorCritic]:
    """`apply_fn({"actor": ..., "critic": ...}, inputs)`: the whole decoder, and a critic on its stopped last states."""

    def apply(params: dict, inputs: TokenInputs) -> ActorCritic:
        states = policies.response_hidden(task.model, params["actor"], inputs, prompt_length=task.prompt_length)
        taken = inputs.tokens[:, task.prompt_length :]
        log_probs = head_log_probs(states, output_table(params["actor"]), taken)
        return ActorCritic(log_probs, critic.apply({"params": params["critic"]}, jax.lax.stop_gradient(states)))

    return apply


def learn(
    learner: Learner,
    reference: dict,
    prompts: Prompts,
    key: Array,
    *,
    task: Task,
    judge: Judge,
    turns: int,
    rows: int,
    minibatches: int,
    config: actor_critic.Config,
    constraint: Constraint = FREE,
) -> tuple[Learner, dict[str, Array]]:
    """Turns of AC-HF: answer, be judged, learn. The multiplier follows the mean cost of the answers at stake.

    Under a multiplier λ the policy maximises (E[r - λ c] - β KL) / (1 + λ): the pull towards the reference is divided
    like the reward (`constraints.penalised_rewards`), or a large λ would hold the policy at the reference.

    Args:
      learner: to go on from.
      reference: parameters of the frozen reference.
      prompts: N to draw from.
      key: consumed.
      task, judge: what is answered and what is good.
      turns: of this call; each answers `rows` prompts and takes `minibatches` steps.
      config: of the actor-critic; its KL coefficient stays where `actor_critic.init` put it.
      constraint: limit and rate of the multiplier; where it starts is in the learner.
    """
    answered = functools.partial(_answered, task, judge, reference, prompts, rows=rows)

    def turn(learner: Learner, key: Array) -> tuple[Learner, dict[str, Array]]:
        *keys, update_key = jax.random.split(key, 3)
        train = learner.agent.train
        rollout, judged, log_probs = answered(train.params["actor"], *keys)
        batch, told = actor_critic.experience(
            rollout.inputs,
            rollout.response_mask,
            rollout.log_probs,
            log_probs,
            train.apply_fn(train.params, rollout.inputs).values,
            constraints.penalised_rewards(judged.rewards, judged.costs, learner.lagrange.multiplier),
            kl_coefficient=learner.agent.kl.coefficient / (1.0 + learner.lagrange.multiplier),
            config=config,
        )
        agent, learnt = actor_critic.update_epochs(
            learner.agent, batch, update_key, epochs=1, minibatches=minibatches, config=config
        )
        lagrange, limited = ascend(learner.lagrange, judged, constraint)
        return Learner(agent, lagrange), told | learnt | limited

    learner, metrics = jax.lax.scan(turn, learner, jax.random.split(key, turns))
    return learner, jax.tree.map(jnp.mean, metrics)


def learn_in_groups(
    learner: GroupLearner,
    reference: dict,
    prompts: Prompts,
    key: Array,
    *,
    task: Task,
    judge: Judge,
    turns: int,
    rows: int,
    minibatches: int,
    config: group.Config,
    constraint: Constraint = FREE,
) -> tuple[GroupLearner, dict[str, Array]]:
    """Turns of the GRPO family, `rows` prompts each, answered `config.group` times; otherwise as `learn`."""
    answered = functools.partial(_answered, task, judge, reference, prompts, rows=rows, samples=config.group)

    def turn(learner: GroupLearner, key: Array) -> tuple[GroupLearner, dict[str, Array]]:
        *keys, update_key = jax.random.split(key, 3)
        rollout, judged, log_probs = answered(learner.train.params, *keys)
        batch, told = group.experience(
            rollout.inputs,
            rollout.response_mask,
            rollout.log_probs,
            constraints.penalised_rewards(judged.rewards, judged.costs, learner.lagrange.multiplier),
            log_probs,
            config=config,
        )
        pull = None if config.kl_weight is None else config.kl_weight / (1.0 + learner.lagrange.multiplier)
        pulled = dataclasses.replace(config, kl_weight=pull)
        train, learnt = group.update_epochs(
            learner.train, batch, update_key, epochs=1, minibatches=minibatches, config=pulled
        )
        lagrange, limited = ascend(learner.lagrange, judged, constraint)
        return GroupLearner(train, lagrange), told | learnt | limited

    learner, metrics = jax.lax.scan(turn, learner, jax.random.split(key, turns))
    return learner, jax.tree.map(jnp.mean, metrics)


def _answered(
    task: Task,
    judge: Judge,
    reference: dict,
    prompts: Prompts,
    policy: Any,
    row_key: Array,
    act_key: Array,
    *,
    rows: int,
    samples: int = 1,
) -> tuple[Rollout, Judged, Array]:
    """A policy's answers to some prompts, what feedback says of them, and the reference's log-probs [B, R]."""
    asked = prompts.rows(jax.random.randint(row_key, (rows,), 0, len(prompts.tokens)))
    rollout = act(task, policy, asked, act_key, samples=samples)
    states = policies.response_hidden(task.model, reference, rollout.inputs, prompt_length=task.prompt_length)
    log_probs = head_log_probs(states, output_table(reference), rollout.responses)
    return rollout, judge(rollout, repeated(asked.truth, samples), states), log_probs


def repeated(tree: Any, times: int) -> Any:
    """Every row as often as its prompt is answered, adjacent."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def ascend(lagrange: Lagrange, judged: Judged, constraint: Constraint) -> tuple[Lagrange, dict[str, Array]]:
    """One step of the multiplier; where no answer is at stake it stays. Metrics: reward, cost, multiplier."""
    cost = masking.masked_mean(judged.costs, judged.at_stake)
    measured = jnp.where(jnp.any(judged.at_stake), jnp.minimum(cost, constraint.most), constraint.limit)
    lagrange = constraints.update_lagrange(lagrange, measured, limit=constraint.limit, learning_rate=constraint.rate)
    whole = judged.rewards.reshape(len(judged.rewards), -1).sum(-1)  # of answers, also where tokens are judged
    told = {"human/reward": masking.masked_mean(whole, jnp.ones(whole.shape, bool)), "constraint/cost": cost}
    return lagrange, told | {"constraint/multiplier": lagrange.multiplier}
