"""The stages that train a language model: base model, AC-HF and PD. Each is a pure, jitted step and what feeds it.

A stage takes what earlier stages made and returns what later ones need; `Run.loop` makes each of them resumable.
"""

import dataclasses
import functools
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
from rlhf_jax.models.transformer import Transformer, output_table
from rlhf_jax.quickstart.context import Policy, Run, adam, continuations, continue_with, layers_from
from rlhf_jax.quickstart.material import Tokens, pack, prompts
from rlhf_jax.quickstart.rewards import RewardModels, prefix_scores
from rlhf_jax.training.state import merge_params, split_params
from rlhf_jax.types import Rollout, TokenInputs

__all__ = ["Samples", "ac_hf", "base_model", "policy_distillation_students", "teacher_samples"]

CRITIC = ScalarHead(hidden=128, scale=0.0)


class Samples(NamedTuple):
    """Continuations of training prefixes by the base model, on the host."""

    inputs: TokenInputs  # [N, P + R], the trunk below the student's first trained layer
    response_mask: Any  # [N, R]
    teacher_hidden: Any  # [N, R, D] final hidden states that predict the response
    prefix_scores: np.ndarray  # [N, R + 1] the reward model's, of the prefix and of what it became with each token

    @property
    def scores(self) -> np.ndarray:
        """[N] scores of the whole texts; their spread is the unit of human reward in what follows."""
        return self.prefix_scores[:, -1]


def base_model(run: Run) -> Policy:
    """Fine-tunes the model on rated texts of the training half, so that it writes such texts.

    Returns the base policy, split at the trunk: the layers below are shared by everything that follows.
    """
    settings = run.settings
    texts = pack(run.material.tokenizer, [item.text for item in run.material.train], settings.text_length)
    trained, frozen = split_params(run.material.params, layers_from(settings.base_from))
    frozen = run.copy_everywhere(frozen)
    state = sft.init(
        run.copy_everywhere(trained),
        policies.token_policy(run.model, prompt_length=1),
        adam(settings.base_rate, settings.base_steps),
    )
    update = jax.jit(functools.partial(sft.update, config=sft.Config()), donate_argnums=0)

    def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
        rows = run.rng(1, index).choice(len(texts.tokens), settings.base_batch, replace=False)
        tokens, mask = map(jnp.asarray, (texts.tokens[rows], texts.mask[rows]))
        batch = sft.Batch(TokenInputs(tokens, mask), mask[:, 1:])
        return update(state, run.split_rows(batch), frozen=frozen)

    state = run.loop("base model", step, run.copy_everywhere(state), settings.base_steps)
    upper, trunk = split_params(merge_params(state.params, frozen), layers_from(settings.trunk))
    return Policy(run.model, upper, trunk)


def teacher_samples(run: Run, base: Policy, models: RewardModels) -> Samples:
    """What the base model makes of training prefixes, with its hidden states and the reward model's scores."""
    settings = run.settings
    pool = prompts(run.material, run.material.train, settings.prompt_length)
    rows = np.resize(run.rng(4).permutation(len(pool.tokens)), settings.teacher_samples)
    first = settings.student_from
    beginnings = Tokens(pool.tokens[rows], pool.mask[rows])
    batches = continuations(run, base, beginnings, run.key(4), tap=first or None, keep_hidden=True)

    @jax.jit
    def look(trunk: dict, reward: dict, rollout: Rollout) -> Array:
        start = rollout.trunk if first else rollout.tokens
        states = base.model.apply({"params": trunk}, start, rollout.mask, first=first, last=settings.trunk).hidden
        return prefix_scores(reward, states, rollout.mask)[:, settings.prompt_length - 1 :]

    looked = jax.device_get([(rollout, look(base.frozen, models.reward, rollout)) for rollout in batches])
    rollout, scores = jax.tree.map(lambda *parts: np.concatenate(parts)[: settings.teacher_samples], *looked)
    return Samples(rollout.inputs, rollout.response_mask, rollout.hidden, scores)


def ac_hf(run: Run, base: Policy, models: RewardModels, samples: Samples) -> Policy:
    """Actor-critic with human feedback: the actor continues prefixes, the human reward model scores, both learn.

    A turn is one program: generate, score, evaluate reference and critic, advantages, all gradient steps. Trunk
    activations are computed once, by generation. The reward of a token is what it added to the reward model's score of
    the text, in standard deviations of the base model's scores: over a text that is its score less the prefix's, so the
    best policy is that of one reward at the end (potential-based shaping, Ng et al. 1999), and every token has its own.
    """
    settings = run.settings
    pool = prompts(run.material, run.material.train, settings.prompt_length)
    total = settings.turns * settings.minibatches
    critic = CRITIC.init(run.key(3), jnp.zeros((1, run.model.config.width)))["params"]
    optimizer = optax.partition(
        {"actor": adam(settings.actor_rate, total), "critic": optax.adam(settings.critic_rate)},
        lambda params: {name: name for name in params},
    )
    apply_fn = policies.actor_critic(run.model, CRITIC, prompt_length=settings.prompt_length, first=settings.trunk)
    reference_fn = policies.token_policy(run.model, prompt_length=settings.prompt_length, first=settings.trunk)
    config = actor_critic.Config(value_weight=1.0, kl_target=settings.kl_target, kl_horizon=settings.kl_horizon)
    start = {"actor": jax.tree.map(jnp.copy, base.trained), "critic": run.copy_everywhere(critic)}
    state = actor_critic.init(start, apply_fn, optimizer, kl_coefficient=settings.kl_coefficient)
    act = continue_with(run, base, settings.trunk)
    spread = float(samples.scores.std())

    def turn(state, reference, trunk, reward, tokens, mask, keys, key):
        actor = state.train.params["actor"]
        rollout = act(actor, trunk, tokens, mask, keys)
        inputs = rollout.inputs
        assert rollout.trunk is not None  # asked for by tap
        worth = prefix_scores(reward, rollout.trunk, rollout.mask)[:, settings.prompt_length - 1 :] / spread
        reference_log_probs = reference_fn(merge_params(reference, trunk), inputs)
        values = apply_fn({"actor": merge_params(actor, trunk), "critic": state.train.params["critic"]}, inputs).values
        batch, told = actor_critic.experience(
            inputs,
            rollout.response_mask,
            rollout.log_probs,
            reference_log_probs,
            values,
            jnp.diff(worth, axis=-1),
            kl_coefficient=state.kl.coefficient,
            config=config,
        )
        state, learnt = actor_critic.update_epochs(
            state, batch, key, epochs=1, minibatches=settings.minibatches, config=config, frozen={"actor": trunk}
        )
        state = actor_critic.steer(state, told["policy/kl"], sequences=settings.batch, config=config)
        return state, told | learnt | {"policy/kl_coefficient": state.kl.coefficient}

    program = jax.jit(turn, donate_argnums=0)

    def step(state, index):
        rows = run.rng(3, index).choice(len(pool.tokens), settings.batch, replace=len(pool.tokens) < settings.batch)
        keys = jax.random.split(run.key(3, index, 0), settings.batch)
        data = run.split_rows((pool.tokens[rows], pool.mask[rows], keys))
        return program(state, base.trained, base.frozen, models.reward, *data, run.key(3, index, 1))

    state = run.loop("AC-HF", step, run.copy_everywhere(state), settings.turns)
    return base._replace(trained=state.train.params["actor"])


def policy_distillation_students(run: Run, base: Policy, samples: Samples) -> tuple[Policy, Policy]:
    """Two students of the base model, without and with human feedback, from one start and for the same steps.

    Both learn from the same samples of the base model; they differ in the human weights alone, which are 1 for the
    first. A text's value while it is being written is the reward model's score of what is there: a token's weight is
    exp of what it added to that score.
    """
    settings = run.settings
    model = Transformer(dataclasses.replace(run.model.config, num_layers=len(settings.student_layers)))
    teacher = merge_params(base.trained, base.frozen)
    own = {name: part for name, part in teacher.items() if not name.startswith("layer_")}
    own |= {f"layer_{number}": teacher[f"layer_{source}"] for number, source in enumerate(settings.student_layers)}
    trained, frozen = split_params(own, layers_from(settings.student_from))
    teacher_table = output_table(teacher)
    apply_fn = policies.student(model, prompt_length=settings.prompt_length, first=settings.student_from)
    update = jax.jit(
        functools.partial(policy_distillation.update, config=policy_distillation.Config()), donate_argnums=0
    )
    worth = samples.prefix_scores / samples.scores.std()
    liked = human_step_weights(worth[:, :-1], worth[:, -1], samples.response_mask, beta=settings.human_beta)
    alike = jnp.ones_like(liked)

    def learn(stage: str, number: int, start: dict, weights: Array, steps: int) -> dict:
        state = policy_distillation.init(
            {"student": jax.tree.map(jnp.copy, start)}, apply_fn, adam(settings.student_rate, steps)
        )
        rows = run.rng(5, number).permutation(settings.teacher_samples)
        order = np.resize(rows, (steps, settings.student_batch))

        def step(state, index):
            taught = policies.TeacherInputs(samples.inputs, samples.teacher_hidden)
            everything = policy_distillation.Batch(taught, samples.response_mask, weights)
            batch = jax.tree.map(lambda x: np.asarray(x)[order[index]], everything)
            fixed = {"student": frozen, "teacher_table": teacher_table}
            return update(state, run.split_rows(batch), frozen=fixed)

        return run.loop(stage, step, run.copy_everywhere(state), steps).params["student"]

    start = learn("PD: common start", 0, trained, alike, settings.start_steps)
    plain = learn("PD without human reward", 1, start, alike, settings.student_steps)
    human = learn("PD with human reward", 1, start, liked, settings.student_steps)
    return Policy(model, plain, frozen), Policy(model, human, frozen)
