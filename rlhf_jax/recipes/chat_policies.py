"""A base model that answers, AC-HF from it on a scorer of `recipes.chat_rewards`, and PD with human reward.

Every function is a stage of a `RunFolder`: it goes on where an interrupted run stopped.
"""

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax.algorithms import actor_critic, policy_distillation, sft
from rlhf_jax.losses.human_distillation import human_step_weights
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import output_table
from rlhf_jax.quickstart.context import adam, layers_from
from rlhf_jax.recipes.chat_rewards import Scorer, score, seen, token_rewards
from rlhf_jax.recipes.chats import Policy, World, exchanges, left, reply, right
from rlhf_jax.recipes.run_folder import RunFolder
from rlhf_jax.training.state import merge_params, split_params
from rlhf_jax.types import TokenInputs

__all__ = ["Learning", "ac_hf", "base_model", "learning", "pd", "reference", "run_key"]

CRITIC = ScalarHead(hidden=128, scale=0.0)


def run_key(*path: int) -> Array:
    """A key of its own for a seed and what it is for."""
    return reduce(jax.random.fold_in, path[1:], jax.random.key(path[0]))


def base_model(folder: RunFolder, world: World) -> Policy:
    """Learns from chats that nobody rated to answer what was said last; the same for all seeds."""
    config, rng = world.config, np.random.default_rng(1)
    pairs = exchanges(world.chats)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[: 2 * config.base_steps * config.base_batch]]
    prompts, replies = left(world, [a for a, _ in pairs]), right(world, [b for _, b in pairs], config.response_length)
    fits = np.flatnonzero(replies[2] <= config.response_length)
    tokens, mask = (np.concatenate([prompts[i], replies[i]], axis=1)[fits] for i in range(2))
    trained, frozen = split_params(world.params, layers_from(config.base_from))
    apply_fn = policies.token_policy(world.model, prompt_length=config.prompt_length)
    state = sft.init(trained, apply_fn, adam(config.base_rate, config.base_steps))
    update = jax.jit(partial(sft.update, config=sft.Config()))

    def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
        rows = (np.arange(config.base_batch) + index * config.base_batch) % len(tokens)
        inputs = TokenInputs(jnp.asarray(tokens[rows]), jnp.asarray(mask[rows]))
        return update(state, sft.Batch(inputs, inputs.mask[:, config.prompt_length :]), frozen=frozen)

    state = folder.stage("base", step, state, config.base_steps, save_every=10)
    return Policy(*split_params(merge_params(state.params, frozen), layers_from(config.trunk)))


@jax.jit
def _copied(params: Any) -> Any:
    """For a state that is donated."""
    return jax.tree.map(jnp.copy, params)


class Learning(NamedTuple):
    """AC-HF as two functions; every scorer and seed goes through the same compiled turn."""

    start: Callable[[Policy, Array], actor_critic.State]  # base, key
    turn: Callable[..., tuple[actor_critic.State, dict[str, Array]]]


def learning(world: World) -> Learning:
    """AC-HF on whatever a scorer rewards."""
    config, model = world.config, world.model
    apply_fn = policies.actor_critic(
        model, CRITIC, prompt_length=config.prompt_length, first=config.trunk, temperature=config.temperature
    )
    knobs = actor_critic.Config(value_weight=1.0)
    actor, critic = adam(config.actor_rate, config.turns * config.minibatches), optax.adam(1e-3)
    optimizer = optax.partition({"actor": actor, "critic": critic}, lambda params: {name: name for name in params})

    def start(base: Policy, key: Array) -> actor_critic.State:
        critic = jax.jit(CRITIC.init)(key, jnp.zeros((1, model.config.width)))["params"]
        begin = {"actor": _copied(base.trained), "critic": critic}
        return actor_critic.init(begin, apply_fn, optimizer, kl_coefficient=config.kl_coefficient)

    @partial(jax.jit, donate_argnums=0)
    def turn(state: Any, base: Policy, scorers: tuple[Scorer, Scorer], tokens: Array, mask: Array, key: Array) -> Any:
        act_key, update_key = jax.random.split(key)
        params = state.train.params
        acting = Policy(params["actor"], base.frozen)
        rollout = reply(world, acting, (tokens, mask), jax.random.split(act_key, len(tokens)), tap=True)
        real, (read, watched) = rollout.response_mask, seen(world, base, rollout)
        batch, told = actor_critic.experience(
            rollout.inputs,
            real,
            rollout.log_probs,
            reference(world)(base.params, rollout.inputs),
            apply_fn({"actor": acting.params, "critic": params["critic"]}, rollout.inputs).values,
            token_rewards(scorers[0], read, real),
            kl_coefficient=state.kl.coefficient,
            config=knobs,
        )
        state, learnt = actor_critic.update_epochs(
            state, batch, update_key, epochs=1, minibatches=config.minibatches, config=knobs,
            frozen={"actor": base.frozen},
        )  # fmt: skip
        scores = [jnp.mean(score(*x, real)) for x in zip(scorers, (read, watched), strict=True)]
        return state, told | learnt | {"reward/score": scores[0], "judge/score": scores[1]}

    return Learning(start, turn)


def ac_hf(
    folder: RunFolder, seed: int, world: World, how: Learning, base: Policy, prompts: Any, scorers: Any, name: str
) -> Policy:
    """The actor learns the first scorer's `token_rewards`; the second, the judge, watches."""

    def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
        rows = np.random.default_rng((seed, 6, index)).integers(len(prompts[0]), size=world.config.batch)
        return how.turn(state, base, scorers, prompts[0][rows], prompts[1][rows], run_key(seed, 6, index))

    start = how.start(base, run_key(seed, 5))
    state = folder.stage(f"seed_{seed}/{name}", step, start, world.config.turns, save_every=10)
    return base._replace(trained=state.train.params["actor"])


def reference(world: World) -> Callable[[Any, TokenInputs], Array]:
    """Log-probs of replies at the temperature that they are drawn at, from the trunk's kept activations on."""
    config = world.config
    return policies.token_policy(
        world.model, prompt_length=config.prompt_length, first=config.trunk, temperature=config.temperature
    )


def pd(folder: RunFolder, seed: int, world: World, base: Policy, prompts: Any, reward: Scorer) -> Policy:
    """PD with the base as teacher and as the student's start: human reward alone moves it.

    A token's weight is exp of what it earned among all samples (`token_rewards`, `human_step_weights`).
    """
    config, size = world.config, min(32, world.config.teacher_samples)
    parts = [np.arange(i, i + size) % len(prompts[0]) for i in range(0, config.teacher_samples, size)]

    def sample(part: np.ndarray, number: int) -> Any:
        keys = jax.random.split(run_key(seed, 7, number), size)
        rollout = reply(world, base, (prompts[0][part], prompts[1][part]), keys, tap=True, keep_hidden=True)
        assert rollout.hidden is not None  # asked for
        taught = policies.TeacherInputs(rollout.inputs, rollout.hidden)
        return jax.device_get((taught, rollout.response_mask, seen(world, base, rollout)[0]))

    @cache
    def every() -> policy_distillation.Batch:
        sampled = [sample(part, number) for number, part in enumerate(parts)]
        taught, mask, states = jax.tree.map(lambda *x: np.concatenate(x), *sampled)
        earned = token_rewards(reward, jnp.asarray(states), jnp.asarray(mask))
        before = jnp.cumsum(earned, axis=-1) - earned
        weights = human_step_weights(before, jnp.sum(earned, axis=-1), jnp.asarray(mask), beta=config.human_beta)
        return jax.tree.map(np.asarray, policy_distillation.Batch(taught, mask, weights))

    apply_fn = policies.student(world.model, prompt_length=config.prompt_length, first=config.trunk)
    update = jax.jit(partial(policy_distillation.update, config=policy_distillation.Config()), donate_argnums=0)
    fixed = {"student": base.frozen, "teacher_table": output_table(base.params)}
    order = np.random.default_rng((seed, 7)).permutation(size * len(parts))
    order = np.resize(order, (config.student_steps, config.student_batch))

    def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
        return update(state, jax.tree.map(lambda x: x[order[index]], every()), frozen=fixed)

    start = {"student": _copied(base.trained)}
    state = policy_distillation.init(start, apply_fn, adam(config.student_rate, config.student_steps))
    state = folder.stage(f"seed_{seed}/PD, human reward", step, state, config.student_steps)
    return base._replace(trained=state.params["student"])
