"""One seed of an experiment with a small decoder: a base, the same base trained on, AC-HF, GRPO and PD, as stages.

The algorithms are `recipes.sequences`; here are their optimisers, their keys and their places in a run's folder. Every
stage goes on where an interrupted run stopped, and gives the parameters of the policy that it has trained. All methods
take the same number of updates of the same number of answers: `turns` times `minibatches` updates of
`answers / minibatches` rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax import constraints
from rlhf_jax.algorithms import actor_critic, group, policy_distillation, sft
from rlhf_jax.data.batches import pad_left, pad_right
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.group_advantages import group_centred
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.quickstart.context import adam
from rlhf_jax.quickstart.report import Plot
from rlhf_jax.recipes import sequences, teacher_samples, token_reward
from rlhf_jax.recipes.run_folder import RunFolder
from rlhf_jax.recipes.sequences import Constraint, Judge, Prompts, Task
from rlhf_jax.types import PreferenceBatch, TokenInputs

__all__ = [
    "Bench",
    "Settings",
    "ac_hf",
    "base_model",
    "curves",
    "demonstrations",
    "grpo",
    "pd",
    "prompts",
    "reward_model",
    "task",
    "trained_on",
]

CRITIC = ScalarHead(hidden=64, scale=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers that every such experiment has; its own Config inherits them as flags."""

    vocabulary: int = 2_000
    width: int = 128
    layers: int = 3
    prompt_length: int = 20  # tokens
    length: int = 20  # tokens of an answer
    base_updates: int = 2_000
    batch: int = 64
    base_rate: float = 2e-3
    comparisons: int = 2_000  # scripted
    turns: int = 200  # of AC-HF and GRPO
    answers: int = 256  # of a turn
    minibatches: int = 2
    actor_rate: float = 3e-4
    critic_rate: float = 5e-3
    kl_coefficient: float = 0.02
    pool: int = 2_048  # prompts that the teacher of PD answers `group` times
    group: int = 8  # answers to a prompt, of GRPO and of PD's teacher
    beta: float = 0.25  # of PD, reward per nat
    chunk: int = 50  # updates per compiled call

    @property
    def updates(self) -> int:
        """Of every method after the base."""
        return self.turns * self.minibatches

    @property
    def rows(self) -> int:
        """Of each of them."""
        return self.answers // self.minibatches


def task(tokenizer: Tokenizer, settings: Settings) -> Task:
    """A decoder that starts from nothing."""
    shape = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=settings.width,
        num_layers=settings.layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=settings.width // 4,
        mlp_width=3 * settings.width,
    )
    end, pad = tokenizer.eos_id, tokenizer.pad_id
    return Task(Transformer(shape), settings.prompt_length, settings.length, end_token=end, pad_token=pad)


def prompts(task: Task, rows: list[list[int]], truth: Any) -> Prompts:
    """Token lists as prompts; `truth` is a pytree with the leading axis N."""
    return Prompts(*pad_left(rows, pad_id=task.pad_token, length=task.prompt_length), truth)


def demonstrations(task: Task, asked: Prompts, answers: list[list[int]]) -> sft.Batch:
    """Prompts with their right answers, which end here with the end token."""
    ended = [[*answer, task.end_token] for answer in answers]
    tokens, mask = pad_right(ended, pad_id=task.pad_token, length=task.length)
    inputs = TokenInputs(jnp.concatenate([asked.tokens, tokens], 1), jnp.concatenate([asked.mask, mask], 1))
    return sft.Batch(inputs, mask)


class Bench(NamedTuple):
    """Where one seed's stages find what they share."""

    folder: RunFolder
    seed: int
    task: Task
    settings: Settings

    def key(self, *path: int) -> Array:
        """A key of its own for every path."""
        return functools.reduce(jax.random.fold_in, path, jax.random.key(self.seed))

    def stage(self, number: int, name: str, step: Callable[[Any, Array], Any], state: Any, calls: int) -> Any:
        """The state after `calls` of `step(state, key)`."""
        numbered = lambda state, index: step(state, self.key(number, index))
        return self.folder.stage(f"seed_{self.seed}/{name}", numbered, state, calls)

    @property
    def answering(self) -> Callable[[Any, TokenInputs], Array]:
        """The policy's `apply_fn`."""
        return policies.token_policy(self.task.model, prompt_length=self.task.prompt_length)

    @property
    def knobs(self) -> dict[str, Any]:
        """Of a compiled call of turns."""
        settings = self.settings
        turns = max(1, min(settings.chunk // 5, settings.turns))
        return {"task": self.task, "turns": turns, "minibatches": settings.minibatches}


def base_model(bench: Bench, batch: sft.Batch) -> Any:
    """Supervised, from nothing."""
    one, settings = jnp.zeros((1, 1), jnp.int32), bench.settings
    fresh = jax.jit(lambda key: bench.task.model.init(key, one, one == 0, method="initialise")["params"])
    numbers = settings.base_rate, settings.base_updates, settings.batch
    return _supervised(bench, 1, "base", fresh(bench.key(0)), batch, *numbers)


def trained_on(bench: Bench, base: Any, batch: sft.Batch) -> Any:
    """The base after as many further supervised updates as the other methods take."""
    settings = bench.settings
    numbers = settings.actor_rate, settings.updates, settings.rows
    return _supervised(bench, 2, "base, extra updates", base, batch, *numbers)


def _supervised(
    bench: Bench, number: int, name: str, params: Any, batch: sft.Batch, rate: float, updates: int, rows: int
) -> Any:
    chunk = min(bench.settings.chunk, updates)
    start, learn = _supervising(bench.task, rate, updates, chunk, rows)
    return bench.stage(number, name, lambda s, key: learn(s, batch, key), start(params), updates // chunk).params


@functools.cache
def _supervising(task: Task, rate: float, updates: int, chunk: int, rows: int) -> tuple[Callable, Callable]:
    """An initial state of parameters, and the compiled chunk: one for all seeds and stages of equal numbers."""
    apply_fn, optimizer = policies.token_policy(task.model, prompt_length=task.prompt_length), adam(rate, updates)
    learn = jax.jit(functools.partial(sequences.supervise, updates=chunk, rows=rows))
    return lambda params: sft.init(params, apply_fn, optimizer), learn


def reward_model(bench: Bench, base: Any, pairs: PreferenceBatch, *, updates: int, rate: float) -> Any:
    """The base as a reward model that is trained whole; a scorer for `token_reward.parts`."""
    chunk = min(bench.settings.chunk, updates)
    learn = jax.jit(functools.partial(token_reward.learn, updates=chunk, rows=bench.settings.batch))
    start = token_reward.init(bench.task, base, adam(rate, updates))
    return bench.stage(11, "reward model", lambda state, key: learn(state, pairs, key), start, updates // chunk).params


def ac_hf(
    bench: Bench, base: Any, asked: Prompts, judge: Judge, arms: Mapping[str, Constraint]
) -> dict[str, Callable[[], Any]]:
    """AC-HF from the base, with a critic on the actor's states, once for every constraint: who trains each policy."""
    settings, knobs = bench.settings, bench.knobs
    rates: dict[Any, Any] = {
        "actor": adam(settings.actor_rate, settings.updates),
        "critic": optax.adam(settings.critic_rate),
    }
    agent = actor_critic.init(
        {"actor": base, "critic": jax.jit(CRITIC.init)(bench.key(4), jnp.zeros((1, settings.width)))["params"]},
        sequences.actor_critic_policy(bench.task, CRITIC),
        optax.partition(rates, lambda tree: {name: name for name in tree}),
        kl_coefficient=settings.kl_coefficient,
    )
    knobs |= {"judge": judge, "rows": settings.answers, "config": actor_critic.Config(value_weight=0.5)}
    turns = jax.jit(functools.partial(sequences.learn, **knobs))

    def train(number: int, name: str, constraint: Constraint) -> Any:
        step = lambda state, key: turns(state, base, asked, key, constraint=constraint)
        start = sequences.Learner(agent, constraints.init_lagrange(constraint.start))
        state = bench.stage(50 + number, name, step, start, settings.turns // knobs["turns"])
        return state.agent.train.params["actor"]

    return {name: functools.partial(train, number, name, arm) for number, (name, arm) in enumerate(arms.items())}


def grpo(bench: Bench, base: Any, asked: Prompts, judge: Judge, constraint: Constraint) -> Any:
    """GRPO from the base, its advantages centred only: divided by a group's deviation, no multiplier would count."""
    settings, knobs = bench.settings, bench.knobs
    config = group.Config(group=settings.group, advantages=group_centred, kl_weight=settings.kl_coefficient)
    knobs |= {"judge": judge, "rows": settings.answers // settings.group, "config": config}
    turns = jax.jit(functools.partial(sequences.learn_in_groups, **knobs))
    step = lambda state, key: turns(state, base, asked, key, constraint=constraint)
    train = group.init(base, bench.answering, adam(settings.actor_rate, settings.updates))
    start = sequences.GroupLearner(train, constraints.init_lagrange(constraint.start))
    return bench.stage(7, "GRPO", step, start, settings.turns // knobs["turns"]).train.params


def pd(bench: Bench, base: Any, asked: Prompts, judge: Judge, constraint: Constraint) -> Any:
    """PD with the base as teacher and as the student's start, so that human reward alone moves it."""
    settings, task = bench.settings, bench.task
    rating = jax.jit(functools.partial(teacher_samples.rate, task, judge=judge, samples=settings.group))
    order = np.random.default_rng(bench.seed).permutation(len(asked.tokens))
    parts = np.resize(order, (-(-settings.pool // 64), 64))
    rated = [rating(base, asked.rows(jnp.asarray(part)), bench.key(8, i)) for i, part in enumerate(parts)]
    rated = jax.tree.map(lambda *x: jnp.concatenate(x), *rated)
    weigh = functools.partial(teacher_samples.tilt, beta=settings.beta, constraint=constraint, steps=500)
    weights, _ = jax.jit(weigh)(rated)
    student = policies.student(task.model, prompt_length=task.prompt_length)
    state = policy_distillation.init({"student": base}, student, adam(settings.actor_rate, settings.updates))
    chunk = min(settings.chunk, settings.updates)
    learn = jax.jit(functools.partial(teacher_samples.distil, task=task, updates=chunk, rows=settings.rows))
    step = lambda state, key: learn(state, base, rated, weights, key)
    return bench.stage(10, "PD", step, state, settings.updates // chunk).params["student"]


def curves(folder: RunFolder, seed: int, title: str, unit: str, names: tuple[str, ...], metric: str) -> Plot:
    """A metric of several stages over the compiled calls."""
    series = [folder.series(f"seed_{seed}/{name}", metric, name) for name in names]
    return Plot(title=title, x_label="compiled call", y_label=unit, series=series)
