"""The fixed work that is measured: two models, eight steps of training or generation, and the products they must do.

Weights are random, lengths are fixed, nothing ends early, everything is float32. A step is the whole of it: rollout,
reference, scoring, advantages and every gradient step, in one jitted program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms import actor_critic, group, policy_distillation, preference, reward_model, sft
from rlhf_jax.generation.sampler import generate
from rlhf_jax.group_advantages import leave_one_out
from rlhf_jax.losses import policy
from rlhf_jax.masking import sequence_sum_totals
from rlhf_jax.models.heads import ScalarHead, SequenceScore
from rlhf_jax.models.policies import TeacherInputs, response_hidden, student, token_policy
from rlhf_jax.models.transformer import Transformer, TransformerConfig, output_table
from rlhf_jax.training.gradients import clip_by_global_norm
from rlhf_jax.types import ActorCritic, PreferenceBatch, Rollout, TokenInputs

MODELS = {
    "tiny": TransformerConfig(
        vocab_size=64,
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=64,
        tie_embeddings=False,
    ),
    "lm_small": TransformerConfig(
        vocab_size=4096,
        width=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        mlp_width=688,
        tie_embeddings=False,
    ),
    "gpt2_124m": TransformerConfig(
        vocab_size=50257,
        width=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_width=3072,
        learned_positions=True,
        max_length=1024,
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation="gelu_tanh",
        gated=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows (prompts, pairs or texts), prompt and response length, answers per prompt, passes over each rollout.

    `microbatches` says how many parts the gradient of a step is summed over.
    """

    rows: int
    prompt: int
    response: int
    group: int = 1
    epochs: int = 1
    microbatches: int = 1


SIZES = {
    "gen": Sizes(16, 32, 64),
    "sft": Sizes(8, 1, 127, microbatches=4),
    "reward": Sizes(8, 1, 127, microbatches=4),
    "dpo": Sizes(8, 32, 96, microbatches=4),
    "grpo": Sizes(8, 32, 64, group=4, microbatches=4),
    "rloo": Sizes(8, 32, 64, group=4, microbatches=4),
    "ppo": Sizes(32, 32, 64, epochs=4, microbatches=4),
    "distill": Sizes(8, 32, 64),
}


def sizes_of(task: str, model: str, microbatches: int | None = None) -> Sizes:
    """The sizes of a case. PPO takes a single pass with the large model.

    Gradients of the small model are summed over parts whose activations stay in the processor's cache, unless
    `microbatches` says otherwise; those of the large model are not, for its gradients are larger than that.
    """
    sizes = SIZES[task]
    if model == "tiny":
        sizes = dataclasses.replace(sizes, rows=4, prompt=min(sizes.prompt, 4), response=4, epochs=min(sizes.epochs, 2))
    elif model == "gpt2_124m":
        sizes = dataclasses.replace(sizes, epochs=1)
    if microbatches is None:
        microbatches = sizes.microbatches if model == "lm_small" else 1
    return dataclasses.replace(sizes, microbatches=microbatches)


class Case(NamedTuple):
    """One measured step."""

    state: Any  # what training changes; donated
    fixed: Any  # parameters that nothing trains
    batch: Callable[[int], Any]  # seed -> a batch, every leaf with the leading axis of rows
    step: Callable[..., tuple[Any, Any]]  # (state, fixed, batch, *, axis_name) -> (state, result)
    tokens: int  # trained or generated in a step
    products: list[tuple[str, int, int, int, int]]  # (forward | train, m, k, n, how often)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products, attention not counted."""
        return sum({"forward": 2, "train": 6}[kind] * m * k * n * count for kind, m, k, n, count in self.products)


def normal_like(shapes: Any, seed: int) -> Any:
    """Parameters of the given shapes: normal with deviation 0.02, scales of norms 1, biases 0."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, name == "scale", jnp.float32)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes(config: TransformerConfig) -> Any:
    """Parameters of the whole model, as shapes."""
    one = jnp.ones((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, method="initialise")
    return jax.eval_shape(init, jax.random.key(0), one, one > 0)["params"]


def without_head(params: dict) -> dict:
    """The trunk's parameters, for models that only have a scalar head."""
    return {name: leaf for name, leaf in params.items() if name != "head"}


def scalar_head(head: Any, *inputs: jax.Array) -> Any:
    """Parameters of a head."""
    return normal_like(jax.eval_shape(head.init, jax.random.key(0), *inputs)["params"], 3)


def adamw() -> optax.GradientTransformation:
    """The optimiser of every case."""
    return optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))


def products(config: TransformerConfig, kind: str, rows: int, *, head_rows: int, times: int = 1) -> list:
    """The matrix products of one pass over `rows` tokens, `head_rows` of which meet the output table."""
    width, heads = config.width, config.num_heads * config.head_dim
    kv, up = config.num_kv_heads * config.head_dim, 2 if config.gated else 1
    layer = [(width, heads, 1), (width, kv, 2), (heads, width, 1), (width, config.mlp_width, up)]
    layer.append((config.mlp_width, width, 1))
    found = [(kind, rows, k, n, count * config.num_layers * times) for k, n, count in layer]
    return found + ([(kind, head_rows, width, config.vocab_size, times)] if head_rows else [])


class Setup:
    """A model with the material that the tasks have in common."""

    def __init__(self, config: TransformerConfig, sizes: Sizes) -> None:
        self.config, self.sizes = config, sizes
        self.writer = self.model = Transformer(config)  # what generates, and what reads
        self.shapes = shapes(config)  # of the parameters, as `model` takes them
        self.length = sizes.prompt + sizes.response
        self.rows = sizes.rows * sizes.group
        self.log_probs = token_policy(self.model, prompt_length=sizes.prompt)
        self.critic, self.scorer = ScalarHead(), SequenceScore()

    def read(self, kind: str, *, sides: int = 1, head: bool = True, times: int = 1) -> list:
        """Products of one pass over all rows, `sides` texts each; the head predicts responses alone."""
        rows = self.rows * sides
        head_rows = rows * self.sizes.response if head else 0
        return products(self.config, kind, rows * self.length, head_rows=head_rows, times=times)

    def write(self) -> list:
        """Products of reading every prompt once and writing the answers token by token, all rows at a time."""
        prompts = products(self.config, "forward", self.sizes.rows * self.sizes.prompt, head_rows=0)
        return prompts + products(self.config, "forward", self.rows, head_rows=self.rows, times=self.sizes.response)

    def text(self, seed: int) -> TokenInputs:
        """Random texts without padding."""
        tokens = self._tokens(seed, self.length)
        return TokenInputs(tokens, jnp.ones(tokens.shape, bool))

    def pair(self, seed: int) -> tuple[TokenInputs, TokenInputs]:
        """Two texts per row."""
        return self.text(seed), self.text(seed + 1)

    def prompts(self, seed: int) -> dict[str, jax.Array]:
        """Random prompts, and a key for every answer."""
        keys = jax.random.split(jax.random.key(seed), (self.sizes.rows, self.sizes.group))
        return {"tokens": self._tokens(seed, self.sizes.prompt), "keys": keys}

    def _tokens(self, seed: int, length: int) -> jax.Array:
        shape = (self.sizes.rows, length)
        return jnp.asarray(np.random.default_rng(seed).integers(4, self.config.vocab_size, shape, np.int32))

    def answer(self, params: Any, batch: dict[str, jax.Array]) -> Rollout:
        """Answers of full length."""
        given, keys = batch["tokens"], batch["keys"].reshape(-1)
        return generate(
            self.writer,
            self.plain(params),
            given,
            jnp.ones(given.shape, bool),
            keys,
            length=self.sizes.response,
            end_token=-1,
            pad_token=0,
            samples=self.sizes.group,
        )

    def hidden(self, params: Any, inputs: TokenInputs) -> jax.Array:
        """States of all tokens."""
        return self.model.apply({"params": params}, inputs.tokens, inputs.mask).hidden

    def states(self, params: Any, inputs: TokenInputs) -> jax.Array:
        """States that predict the response."""
        return response_hidden(self.model, params, inputs, prompt_length=self.sizes.prompt)

    def mask(self, inputs: TokenInputs) -> jax.Array:
        """Response tokens."""
        return inputs.mask[:, self.sizes.prompt :]

    def params(self, seed: int) -> Any:
        """Random parameters, as `model` takes them."""
        return normal_like(self.shapes, seed)

    def plain(self, params: Any) -> Any:
        """Parameters as `writer` takes them."""
        return params

    def split(self, axis_name: str | None) -> dict[str, Any]:
        """How the rows of a gradient step are split, over devices and in time."""
        return {"axis_name": axis_name, "microbatches": self.sizes.microbatches}

    def score_head(self) -> Any:
        """Parameters of `scorer`."""
        return scalar_head(self.scorer, jnp.zeros((1, 1, self.config.width)), jnp.ones((1, 1), bool))


def gen(s: Setup) -> Case:
    """Generation alone."""
    step = lambda params, fixed, batch, axis_name=None: (params, s.answer(params, batch))
    return Case(s.params(0), None, s.prompts, step, s.rows * s.sizes.response, s.write())


def supervised(s: Setup) -> Case:
    """Supervised fine-tuning on whole texts."""

    def step(state, fixed, batch, axis_name=None):
        del fixed
        made = sft.Batch(batch, s.mask(batch))
        return sft.update(state, made, config=sft.Config(), **s.split(axis_name))

    state = sft.init(s.params(0), s.log_probs, adamw())
    return Case(state, None, s.text, step, s.rows * s.length, s.read("train"))


def reward(s: Setup) -> Case:
    """A reward model on pairs of whole texts."""

    def scores(params: Any, inputs: TokenInputs) -> Any:
        return s.scorer.apply({"params": params["head"]}, s.hidden(params["trunk"], inputs), inputs.mask)

    def step(state, fixed, batch, axis_name=None):
        del fixed
        made = PreferenceBatch(batch[0], batch[1], jnp.ones(len(batch[0].tokens)))
        return reward_model.update(state, made, config=reward_model.Config(), **s.split(axis_name))

    params = {"trunk": without_head(s.params(0)), "head": s.score_head()}
    state = reward_model.init(params, scores, adamw())
    return Case(state, None, s.pair, step, 2 * s.rows * s.length, s.read("train", sides=2, head=False))


def dpo(s: Setup) -> Case:
    """DPO; the reference is read in every step."""

    def step(state, fixed, batch, axis_name=None):
        one, other = (preference.Completions(inputs, s.mask(inputs)) for inputs in batch)
        made = PreferenceBatch(one, other, jnp.ones(len(batch[0].tokens)))
        return preference.update(state, made, config=preference.Config(), reference=fixed, **s.split(axis_name))

    state = preference.init(s.params(0), s.log_probs, adamw())
    work = s.read("forward", sides=2) + s.read("train", sides=2)
    return Case(state, s.params(0), s.pair, step, 2 * s.rows * s.length, work)


def grouped(s: Setup, config: group.Config) -> Case:
    """Answers in groups, a reference, a reward that is a JAX function, one gradient step."""

    def step(state, fixed, batch, axis_name=None):
        rollout = s.answer(state.params, batch)
        made, told = group.experience(
            rollout.inputs,
            rollout.response_mask,
            rollout.log_probs,
            (jnp.sum(rollout.responses, axis=-1) % 7).astype(jnp.float32),
            s.log_probs(fixed, rollout.inputs),
            config=config,
            axis_name=axis_name,
        )
        state, metrics = group.update(state, made, config=config, **s.split(axis_name))
        return state, metrics | told

    state = group.init(s.params(0), s.log_probs, adamw())
    work = s.write() + s.read("forward") + s.read("train")
    return Case(state, s.params(0), s.prompts, step, s.rows * s.length, work)


def grpo(s: Setup) -> Case:
    """GRPO with its KL term."""
    return grouped(s, group.Config(group=s.sizes.group, kl_weight=0.04))


def rloo(s: Setup) -> Case:
    """RLOO with the KL in the reward."""
    settings = {"kl_weight": None, "kl_in_reward": 0.04, "reduce": sequence_sum_totals}
    surrogate = group.over_tokens(policy.surrogate)
    return grouped(s, group.Config(group=s.sizes.group, advantages=leave_one_out, surrogate=surrogate, **settings))


def ppo(s: Setup) -> Case:
    """AC-HF with a critic and a reward model of the actor's size, nothing shared."""

    def both(params, inputs):
        values = s.critic.apply({"params": params["critic"]}, s.states(params["value"], inputs))
        return ActorCritic(s.log_probs(params["actor"], inputs), values)

    def step(state, fixed, batch, axis_name=None):
        config, now = actor_critic.Config(), state.train.params
        rollout = s.answer(now["actor"], batch)
        inputs = rollout.inputs
        scores: Any = s.scorer.apply({"params": fixed["head"]}, s.hidden(fixed["judge"], inputs), inputs.mask)
        made, told = actor_critic.experience(
            inputs,
            rollout.response_mask,
            rollout.log_probs,
            s.log_probs(fixed["reference"], inputs),
            s.critic.apply({"params": now["critic"]}, s.states(now["value"], inputs)),
            scores,
            kl_coefficient=state.kl.coefficient,
            config=config,
            axis_name=axis_name,
        )
        order = jax.random.fold_in(batch["keys"].reshape(-1)[0], 1)
        epochs = {"epochs": s.sizes.epochs, "config": config}
        state, metrics = actor_critic.update_epochs(state, made, order, **epochs, **s.split(axis_name))
        return state, metrics | told

    critic = scalar_head(s.critic, jnp.zeros((1, s.config.width)))
    params = {"actor": s.params(0), "value": without_head(s.params(4)), "critic": critic}
    judge = without_head(s.params(3))
    fixed = {"reference": s.params(0), "judge": judge, "head": s.score_head()}
    state = actor_critic.init(params, both, adamw(), kl_coefficient=0.05)
    work = s.write() + s.read("forward") + s.read("forward", head=False, times=2)
    work += s.read("train", times=s.sizes.epochs) + s.read("train", head=False, times=s.sizes.epochs)
    return Case(state, fixed, s.prompts, step, s.rows * s.length, work)


def distill(s: Setup) -> Case:
    """A student that learns its teacher's whole distribution on its own answers."""

    def step(state, fixed, batch, axis_name=None):
        rollout = s.answer(state.params["student"], batch)
        seen = TeacherInputs(rollout.inputs, s.states(fixed, rollout.inputs))
        made = policy_distillation.Batch(seen, rollout.response_mask, jnp.ones(len(rollout.tokens)))
        table, config = {"teacher_table": output_table(fixed)}, policy_distillation.Config()
        return policy_distillation.update(state, made, config=config, frozen=table, **s.split(axis_name))

    pupil = student(s.model, prompt_length=s.sizes.prompt)
    state = policy_distillation.init({"student": s.params(0)}, pupil, adamw())
    work = s.write() + s.read("forward") + s.read("train")
    return Case(state, s.params(7), s.prompts, step, s.rows * s.length, work)


TASKS: dict[str, Callable[[Setup], Case]] = {
    "gen": gen,
    "sft": supervised,
    "reward": reward,
    "dpo": dpo,
    "grpo": grpo,
    "rloo": rloo,
    "ppo": ppo,
    "distill": distill,
}


def build(
    task: str,
    model: str,
    setup: Callable[[TransformerConfig, Sizes], Setup] = Setup,
    *,
    microbatches: int | None = None,
) -> Case:
    """The case of a task and a model; `microbatches` as in `sizes_of`."""
    return TASKS[task](setup(MODELS[model], sizes_of(task, model, microbatches)))
