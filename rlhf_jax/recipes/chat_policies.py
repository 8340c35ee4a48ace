"""A base model that answers, AC-HF from it on a scorer of `recipes.chat_rewards`, and PD into smaller students.

Every function is a stage of a `RunFolder`: it goes on where an interrupted run stopped.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax.algorithms import actor_critic, policy_distillation, sft
from rlhf_jax.losses.human_distillation import human_weights
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, output_table
from rlhf_jax.quickstart.context import adam, layers_from
from rlhf_jax.recipes.chat_rewards import score, seen_by
from rlhf_jax.recipes.chats import Policy, World, exchanges, left, reply, right
from rlhf_jax.recipes.run_folder import RunFolder
from rlhf_jax.training.state import merge_params, split_params
from rlhf_jax.types import Rollout, TokenInputs

__all__ = ["ac_hf", "base_model", "students"]


CRITIC = ScalarHead(hidden=64, scale=0.0)


def base_model(folder: RunFolder, seed: int, world: World) -> Policy:
    """Learns to answer what was said last, from replies that fit."""
    config, rng = world.config, np.random.default_rng((seed, 1))
    pairs = exchanges(world.train)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[: config.base_steps * config.base_batch]]
    prompts, replies = left(world, [a for a, _ in pairs]), right(world, [b for _, b in pairs], config.response_length)
    fits = np.flatnonzero(replies[2] <= config.response_length)
    tokens, mask = (np.concatenate([prompts[i], replies[i]], axis=1)[fits] for i in range(2))
    one = jnp.zeros((1, 1), jnp.int32)
    params = world.model.init(world.key(seed, 1), one, one == 0, method="initialise")["params"]
    apply_fn = policies.token_policy(world.model, prompt_length=config.prompt_length)
    state = sft.init(params, apply_fn, adam(config.base_rate, config.base_steps))
    update = jax.jit(partial(sft.update, config=sft.Config()))

    def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
        rows = np.random.default_rng((seed, 2, index)).integers(len(tokens), size=config.base_batch)
        inputs = TokenInputs(jnp.asarray(tokens[rows]), jnp.asarray(mask[rows]))
        return update(state, sft.Batch(inputs, inputs.mask[:, config.prompt_length :]))

    state = folder.stage(f"seed_{seed}/base", step, state, config.base_steps, save_every=100)
    return Policy(world.model, *split_params(state.params, layers_from(config.trunk)))


def ac_hf(folder: RunFolder, seed: int, world: World, base: Policy, prompts: Any, reward: dict, judge: dict, name: str):
    """The actor learns one reward; the judge watches."""
    config, model = world.config, world.model
    total = config.turns * config.minibatches
    critic = CRITIC.init(world.key(seed, 5), jnp.zeros((1, config.width)))["params"]
    optimizer = optax.partition(
        {"actor": adam(config.actor_rate, total), "critic": optax.adam(1e-3)}, lambda p: {name: name for name in p}
    )
    apply_fn = policies.actor_critic(model, CRITIC, prompt_length=config.prompt_length, first=config.trunk)
    reference = policies.token_policy(model, prompt_length=config.prompt_length, first=config.trunk)
    knobs = actor_critic.Config(value_weight=1.0, kl_target=config.kl_target)
    begin = {"actor": base.trained, "critic": critic}
    state = actor_critic.init(begin, apply_fn, optimizer, kl_coefficient=config.kl_coefficient)

    @jax.jit
    def turn(state: Any, tokens: Array, mask: Array, key: Array) -> tuple[Any, dict[str, Array]]:
        act_key, update_key = jax.random.split(key)
        params = state.train.params
        acting = Policy(model, params["actor"], base.frozen)
        rollout = reply(world, acting, (tokens, mask), jax.random.split(act_key, len(tokens)), tap=config.trunk)
        whole = {"actor": merge_params(params["actor"], base.frozen), "critic": params["critic"]}
        batch, told = actor_critic.experience(
            rollout.inputs,
            rollout.response_mask,
            rollout.log_probs,
            reference(merge_params(base.trained, base.frozen), rollout.inputs),
            apply_fn(whole, rollout.inputs).values,
            score(reward, *seen_by(world, base, rollout, config.trunk)),
            kl_coefficient=state.kl.coefficient,
            config=knobs,
        )
        state, learnt = actor_critic.update_epochs(
            state, batch, update_key, epochs=1, minibatches=config.minibatches, config=knobs,
            frozen={"actor": base.frozen},
        )  # fmt: skip
        judged = jnp.mean(score(judge, *seen_by(world, base, rollout, config.judge_layer)))
        return actor_critic.steer(state, told["policy/kl"], sequences=len(tokens), config=knobs), told | learnt | {
            "judge/score": judged
        }

    def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
        rows = np.random.default_rng((seed, 6, index)).integers(len(prompts[0]), size=config.batch)
        return turn(state, prompts[0][rows], prompts[1][rows], world.key(seed, 6, index))

    state = folder.stage(f"seed_{seed}/{name}", step, state, config.turns, save_every=10)
    return base._replace(trained=state.train.params["actor"])


def students(folder: RunFolder, seed: int, world: World, base: Policy, prompts: Any, reward: dict) -> dict[str, Policy]:
    """PD: a smaller student from the base's soft targets, and from there on without and with human reward."""
    config, own_layers = world.config, (*range(world.config.layers - 2), world.config.layers - 1)
    whole = merge_params(base.trained, base.frozen)
    rows = np.resize(np.arange(len(prompts[0])), config.teacher_samples)
    keys = jax.random.split(world.key(seed, 7), len(rows))

    @jax.jit
    def sample(tokens: Array, mask: Array, keys: Array) -> tuple[Rollout, Array, Array]:
        rollout = reply(world, base, (tokens, mask), keys, tap=None)
        hidden = policies.response_hidden(world.model, whole, rollout.inputs, prompt_length=config.prompt_length)
        return rollout, hidden, score(reward, *seen_by(world, base, rollout, config.trunk))

    rollout, hidden, scores = sample(prompts[0][rows], prompts[1][rows], keys)
    model = Transformer(dataclasses.replace(world.model.config, num_layers=len(own_layers)))
    first = {name: part for name, part in whole.items() if not name.startswith("layer_")}
    first |= {f"layer_{number}": whole[f"layer_{source}"] for number, source in enumerate(own_layers)}
    apply_fn = policies.student(model, prompt_length=config.prompt_length)
    update = jax.jit(partial(policy_distillation.update, config=policy_distillation.Config()))
    taught = policies.TeacherInputs(rollout.inputs, hidden)
    fixed = {"teacher_table": output_table(whole)}

    def learn(name: str, number: int, start: Any, weights: Array) -> Any:
        probabilities, importance = policy_distillation.proposal(weights)
        exact = np.asarray(probabilities, np.float64)
        every = policy_distillation.Batch(taught, rollout.response_mask, weights, importance)
        state = policy_distillation.init({"student": start}, apply_fn, adam(1e-3, config.student_steps))

        def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
            rng = np.random.default_rng((seed, 7, number, index))
            chosen = rng.choice(len(weights), config.batch, p=exact / exact.sum())
            return update(state, jax.tree.map(lambda x: x[chosen], every), frozen=fixed)

        return folder.stage(f"seed_{seed}/{name}", step, state, config.student_steps).params["student"]

    liked = human_weights(scores, jnp.ones(scores.shape, bool), beta=config.human_beta)
    start = learn("PD start", 0, first, jnp.ones(scores.shape))
    weights = {"PD": jnp.ones(scores.shape), "PD, human reward": liked}
    return {name: Policy(model, learn(name, 1, start, w), {}) for name, w in weights.items()}
