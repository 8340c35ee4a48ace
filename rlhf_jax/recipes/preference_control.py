"""Preference RL: an actor-critic that plays games for a reward learned from comparisons of segments of its play.

One round: the actor-critic plays; a teacher compares the pairs of segments on which an ensemble of Bradley-Terry reward
models disagrees most; the ensemble learns all comparisons so far; the actor-critic takes `turns` turns of PPO on the
ensemble's mean reward. The true reward reaches the learner through the teacher's answers alone. An episode's end is
seen by teacher and learner alike: a segment stops there, and so does the return.

The teacher here is scripted (`feedback.teachers`). `learn` is one pure function of a key: `jit` it, `vmap` it over
seeds. Reference: Christiano et al. 2017, https://arxiv.org/abs/1706.03741
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import ensembles, environments, masking
from rlhf_jax.advantages import Advantages, gae_with_truncation
from rlhf_jax.algorithms import actor_critic, reward_model
from rlhf_jax.environments import Environment, Trajectory
from rlhf_jax.feedback import teachers
from rlhf_jax.models import control

__all__ = [
    "Config",
    "Learner",
    "Segments",
    "acting",
    "advantages",
    "ask",
    "cut",
    "human_reward",
    "learn",
    "networks",
    "one_round",
    "scaled",
    "start",
    "turn",
]


DISCOUNT = 0.99
MINIBATCHES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How much is played, asked and learned."""

    # The scripted teacher of comparisons.
    rationality: float = float("inf")
    mistakes: float = 0.0
    equal_within: float = 0.5  # in true return
    # Preference RL: `rounds` times, `pairs` are asked, then `turns` turns of `steps` in each of `batch` games.
    rounds: int = 10
    pairs: int = 60
    turns: int = 16
    batch: int = 16
    steps: int = 128
    segment: int = 25
    members: int = 3
    judge_steps: int = 60  # gradient steps of the reward models per round
    epochs: int = 4
    rate: float = 1e-3  # of the reward models; the agent's falls from it to 0 in a line
    hidden: int = 32
    filters: int = 0  # of the reward model on boards
    entropy_weight: float = 0.01
    normalise: bool = False  # rewards to a standard deviation of 1 in every turn


class Segments(NamedTuple):
    """What the reward model scores: one number per segment."""

    observations: Array  # [N, H, ...]
    outcomes: Array  # [N, H, ...]
    actions: Array  # [N, H]
    mask: Array  # [N, H] bool, up to the end of the episode


class Learner(NamedTuple):
    """Everything that preference RL changes."""

    agent: actor_critic.State
    judges: Any  # TrainState with a leading axis of members
    first: Segments  # all pairs asked so far, room for rounds * pairs
    second: Segments
    answers: teachers.Answers
    games: Any  # where play goes on


def networks(game: Environment, config: Config) -> tuple[control.PolicyValueNet, control.StepScore]:
    """Actor with critic, and the reward model of one step."""
    rank, hidden = len(game.observation_shape), (config.hidden, config.hidden)
    return (
        control.PolicyValueNet(game.actions, hidden, rank),
        control.StepScore(game.actions, hidden, rank, config.filters),
    )


def acting(network: Any, params: Any, *, greedy: bool = False) -> environments.Policy:
    """The policy of a network that returns `control.PolicyValue`: sampled, or greedy."""

    def policy(key: Array, observations: Array) -> Array:
        logits = network.apply({"params": params}, observations).logits
        return jnp.argmax(logits, axis=-1) if greedy else jax.random.categorical(key, logits)

    return policy


def segment_score(scorer: Any) -> Callable[[Any, Segments], Array]:
    def apply(params: Any, s: Segments) -> Array:
        return masking.masked_sum(
            scorer.apply({"params": params}, s.observations, s.outcomes, s.actions), s.mask, axis=-1
        )

    return apply


def cut(play: Trajectory, key: Array, *, count: int, length: int) -> tuple[Segments, Array]:
    """Random segments of a rollout, and their true rewards for the teacher."""
    row_key, start_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (count, 1), 0, play.actions.shape[0])
    times = jax.random.randint(start_key, (count, 1), 0, play.actions.shape[1] - length + 1) + jnp.arange(length)[None]
    part = jax.tree.map(lambda x: x[rows, times], play)
    mask = environments.episode_mask(part.ended)
    return Segments(part.observations, part.outcomes, part.actions, mask), part.rewards


def ask(learner: Learner, play: Trajectory, turn: ArrayLike, key: Array, config: Config) -> Learner:
    """The scripted teacher compares the pairs, of four times as many, on which the ensemble disagrees most."""
    first_key, second_key, teacher_key, fit_key = jax.random.split(key, 4)
    count, scores = 4 * config.pairs, jax.vmap(learner.judges.apply_fn, (0, None))
    first, first_rewards = cut(play, first_key, count=count, length=config.segment)
    second, second_rewards = cut(play, second_key, count=count, length=config.segment)
    doubt = jnp.std(
        jax.nn.sigmoid(scores(learner.judges.params, first) - scores(learner.judges.params, second)), axis=0
    )
    chosen = jax.lax.top_k(doubt, config.pairs)[1]
    pick = lambda tree: jax.tree.map(lambda x: x[chosen], tree)
    answers = teachers.compare(
        pick(teachers.segment_returns(first_rewards, first.mask)),
        pick(teachers.segment_returns(second_rewards, second.mask)),
        teacher_key,
        rationality=config.rationality,
        mistakes=config.mistakes,
        equal_within=config.equal_within,
    )
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, turn * config.pairs, 0)
    stored = (learner.first, learner.second, learner.answers)
    stored = jax.tree.map(put, stored, (pick(first), pick(second), answers))

    def step(judge: Any, key: Array) -> tuple[Any, Array]:
        rows = jax.random.randint(key, (32,), 0, (turn + 1) * config.pairs)
        batch = teachers.preference_batch(*jax.tree.map(lambda x: x[rows], stored))
        judge, metrics = reward_model.update(judge, batch, config=reward_model.Config(centring=0.0))
        return judge, metrics["reward/accuracy"]

    keys = jax.vmap(lambda key: jax.random.split(key, config.judge_steps))(jax.random.split(fit_key, config.members))
    judges, _ = jax.vmap(lambda judge, keys: jax.lax.scan(step, judge, keys))(learner.judges, keys)
    return learner._replace(judges=judges, first=stored[0], second=stored[1], answers=stored[2])


def human_reward(judges: Any, scorer: Any, play: Any) -> Array:
    """[B, T] the ensemble's mean reward of every step of a `Trajectory` or of `Segments`."""
    score = lambda params: scorer.apply({"params": params}, play.observations, play.outcomes, play.actions)
    return ensembles.mean(jax.vmap(score)(judges.params))


def scaled(rewards: Array, config: Config) -> Array:
    """Rewards in standard deviations of this play's if `config.normalise`.

    Comparisons leave the scale of a learned reward open, and it grows as the models learn.
    """
    return rewards / (jnp.std(rewards) + 1e-6) if config.normalise else rewards


def advantages(network: Any, params: Any, play: Trajectory, rewards: Array) -> Advantages:
    """GAE of play by an actor with critic, on rewards [B, T] of its steps times 1 - γ.

    So values are discounted averages of rewards and not their sums, and a critic reaches them with small weights; what
    whitens advantages does not see the factor. A sum of 1 per step is 100, which the critic does not reach in a run.
    """
    values = lambda seen: network.apply({"params": params}, seen).values
    mask = jnp.ones(rewards.shape, bool)
    before, after = values(play.observations), values(play.outcomes)
    ends = play.terminated, play.truncated
    return gae_with_truncation((1.0 - DISCOUNT) * rewards, before, after, *ends, mask, discount=DISCOUNT)


def turn(
    learner: Learner, key: Array, game: Environment, config: Config, *, true: bool = False
) -> tuple[Learner, Array]:
    """One turn of play and learning; returns the true return per finished episode, for the report only."""
    network, scorer = networks(game, config)
    play_key, update_key = jax.random.split(key)
    params = learner.agent.train.params
    games, play = environments.rollout(game, acting(network, params), learner.games, play_key, steps=config.steps)
    rewards = scaled(play.rewards if true else human_reward(learner.judges, scorer, play), config)
    inputs, mask = control.ActionInputs(play.observations, play.actions), jnp.ones(play.rewards.shape, bool)
    old = learner.agent.train.apply_fn(params, inputs)
    learned = advantages(network, params, play, rewards)
    white = masking.whiten(learned.advantages, mask)
    batch = actor_critic.Batch(inputs, mask, old.log_probs, old.values, white, learned.returns)
    knobs = actor_critic.Config(value_clip=1e6, value_weight=0.5, entropy_weight=config.entropy_weight)
    agent, _ = actor_critic.update_epochs(
        learner.agent, batch, update_key, epochs=config.epochs, minibatches=MINIBATCHES, config=knobs
    )
    returned = jnp.sum(play.rewards) / jnp.maximum(jnp.sum(play.ended), 1)
    return learner._replace(agent=agent, games=games), returned


def start(key: Array, game: Environment, config: Config) -> Learner:
    """A learner that has seen and been told nothing; `key` is consumed."""
    network, scorer = networks(game, config)
    agent_key, judge_key, game_key = jax.random.split(key, 3)
    seen, action = jnp.zeros((1, *game.observation_shape)), jnp.zeros(1, jnp.int32)
    updates = config.rounds * config.turns * config.epochs * MINIBATCHES
    adam = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(optax.linear_schedule(config.rate, 0.0, updates)))
    agent = actor_critic.init(network.init(agent_key, seen)["params"], control.actor_critic(network), adam)
    start_judge = lambda key: reward_model.init(
        scorer.init(key, seen, seen, action)["params"], segment_score(scorer), optax.adam(config.rate)
    )
    shape = (config.rounds * config.pairs, config.segment)
    board = jnp.zeros((*shape, *game.observation_shape))
    empty = Segments(board, board, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    answers = teachers.Answers(jnp.zeros(shape[0]), jnp.zeros(shape[0], bool))
    judges = jax.vmap(start_judge)(jax.random.split(judge_key, config.members))
    return Learner(agent, judges, empty, empty, answers, environments.reset(game, game_key, batch=config.batch))


def one_round(
    learner: Learner, index: ArrayLike, key: Array, game: Environment, config: Config, *, true: bool = False
) -> tuple[Learner, Array]:
    """Round number `index`: questions, then turns of play and learning; a checkpoint may come between two rounds.

    Returns:
      The learner, and [turns] true return per finished episode.
    """
    play_key, ask_key, turns_key = jax.random.split(key, 3)
    if not true:
        policy = acting(networks(game, config)[0], learner.agent.train.params)
        games, play = environments.rollout(game, policy, learner.games, play_key, steps=config.steps)
        learner = ask(learner._replace(games=games), play, index, ask_key, config)
    step = lambda learner, key: turn(learner, key, game, config, true=true)
    return jax.lax.scan(step, learner, jax.random.split(turns_key, config.turns))


def learn(key: Array, game: Environment, config: Config, *, true: bool = False) -> tuple[Learner, Array]:
    """Preference RL from a key; with `true` the same actor-critic on the true reward, for comparison.

    Args:
      key: consumed.
      game: the environment.
      config: sizes, and the scripted teacher.
      true: static; the actor-critic learns the environment's reward and nobody is asked.
    Returns:
      The learner, and [rounds * turns] true return per finished episode of every turn.
    """
    start_key, loop_key = jax.random.split(key)
    go = lambda learner, xs: one_round(learner, xs[0], xs[1], game, config, true=true)
    rounds = (jnp.arange(config.rounds), jax.vmap(jax.random.fold_in, (None, 0))(loop_key, jnp.arange(config.rounds)))
    learner, curve = jax.lax.scan(go, start(start_key, game, config), rounds)
    return learner, curve.reshape(-1)
