"""The stages of a quickstart run. Each is a few pure, jitted functions and the loop that feeds them.

Base model -> reward model and judge -> AC-HF -> PD -> judging. A stage takes what earlier stages made and returns what
later ones need; `Run.loop` makes each of them resumable. Steps are functions of (state, index): rows and keys are drawn
from the seed, the stage and the index, so a resumed run sees what an uninterrupted one would have seen.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax import kl, masking
from rlhf_jax.algorithms import actor_critic, policy_distillation, reward_model, sft
from rlhf_jax.feedback.comparisons import Comparisons, single_rater_comparisons
from rlhf_jax.feedback.ratings import RatedText
from rlhf_jax.generation.sampler import generate
from rlhf_jax.logprobs import head_log_probs, response_states
from rlhf_jax.losses.human_distillation import human_weights
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, output_table
from rlhf_jax.quickstart.material import Material, Tokens, pack, prompts
from rlhf_jax.quickstart.settings import Settings
from rlhf_jax.training.sharding import shard_batch
from rlhf_jax.training.state import merge_params, split_params
from rlhf_jax.types import PreferenceBatch, Rollout, TokenInputs

__all__ = [
    "Judged",
    "Policy",
    "RewardModels",
    "Run",
    "Samples",
    "ac_hf",
    "base_model",
    "continuations",
    "judged",
    "policy_distillation_students",
    "reward_models",
    "teacher_samples",
]

HEAD = ScalarHead()
CRITIC = ScalarHead(hidden=128, scale=0.0)
ENCODE_ROWS = 128


class Policy(NamedTuple):
    """A language model at work: its network, its parameters in two parts, on the mesh."""

    model: Transformer
    trained: dict
    frozen: dict


class RewardModels(NamedTuple):
    """A reward model and an independent judge; each {"head", "mean", "deviation"} over another layer's features."""

    reward: dict
    judge: dict


class Samples(NamedTuple):
    """Continuations of training prefixes by the base model, on the host."""

    inputs: TokenInputs  # [N, P + R], the trunk below the student's first trained layer
    response_mask: Any  # [N, R]
    teacher_hidden: Any  # [N, R, D] final hidden states that predict the response
    prefix_state: np.ndarray  # [N, D] trunk activations at the end of the prefix, the critic's view of it
    scores: np.ndarray  # [N] of the reward model

    @property
    def standard_scores(self) -> np.ndarray:
        """[N] scores in standard deviations from their mean, the unit of human reward in what follows."""
        return (self.scores - self.scores.mean()) / self.scores.std()


class Judged(NamedTuple):
    """Continuations of held-out prefixes by one policy, judged."""

    texts: list[str]  # prefix and continuation
    continuations: list[str]
    scores: np.ndarray  # [N] of the judge
    lengths: np.ndarray  # [N] tokens
    responses: list[list[int]]
    reference_kl: np.ndarray  # [N] nats per continuation: Σ log π - log π_base


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage works with."""

    settings: Settings
    material: Material
    mesh: Mesh
    loop: Callable[..., Any]  # (stage, step, state, total) -> state, resumable; see quickstart.run

    @property
    def model(self) -> Transformer:
        """The decoder."""
        return Transformer(self.material.config)

    def key(self, *path: int) -> Array:
        """A key for one purpose: the seed folded with the path."""
        return functools.reduce(jax.random.fold_in, path, jax.random.key(self.settings.seed))

    def rng(self, *path: int) -> np.random.Generator:
        """A NumPy generator for one purpose."""
        return np.random.default_rng((self.settings.seed, *path))

    def copy_everywhere(self, tree: Any) -> Any:
        """Replicates a pytree on the mesh."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split_rows(self, tree: Any) -> Any:
        """Deals rows to the devices."""
        return shard_batch(tree, self.mesh)


def _layers_from(first: int) -> Callable[[str], bool]:
    """Predicate: the final norm and the layers from `first` on; everything if first == 0."""

    def chosen(path: str) -> bool:
        name = path.split("/")[0]
        return first == 0 or name == "final_norm" or (name.startswith("layer_") and int(name[6:]) >= first)

    return chosen


def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with clipping, a short warm-up and a linear descent to a tenth."""
    warm_up = max(1, steps // 20)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(rate / warm_up, rate, warm_up),
            optax.linear_schedule(rate, 0.1 * rate, steps - warm_up),
        ],
        [warm_up],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))


# --- 1. base model ----------------------------------------------------------------------------------------------------


def base_model(run: Run) -> Policy:
    """Fine-tunes the model on rated texts of the training half, so that it writes such texts.

    Returns the base policy, split at the trunk: the layers below are shared by everything that follows.
    """
    settings = run.settings
    texts = pack(run.material.tokenizer, [item.text for item in run.material.train], settings.text_length)
    trained, frozen = split_params(run.material.params, _layers_from(settings.base_from))
    frozen = run.copy_everywhere(frozen)
    state = sft.init(
        run.copy_everywhere(trained),
        policies.token_policy(run.model, prompt_length=1),
        _adam(settings.base_rate, settings.base_steps),
    )
    update = jax.jit(functools.partial(sft.update, config=sft.Config()), donate_argnums=0)

    def step(state: Any, index: int) -> tuple[Any, dict[str, Array]]:
        rows = run.rng(1, index).choice(len(texts.tokens), settings.base_batch, replace=False)
        tokens, mask = map(jnp.asarray, (texts.tokens[rows], texts.mask[rows]))
        batch = sft.Batch(TokenInputs(tokens, mask), mask[:, 1:])
        return update(state, run.split_rows(batch), frozen=frozen)

    state = run.loop("base model", step, state, settings.base_steps)
    upper, trunk = split_params(merge_params(state.params, frozen), _layers_from(settings.trunk))
    return Policy(run.model, upper, trunk)


# --- 2. reward model and judge ----------------------------------------------------------------------------------------


def _pooled(activations: Array, mask: Array) -> Array:
    return masking.masked_mean(activations, jnp.broadcast_to(mask[..., None], activations.shape), axis=-2)


def score(head: dict, activations: Array, mask: Array) -> Array:
    """[B] scores of sequences from one layer's activations [B, T, D]: mean over tokens, standardise, linear head."""
    return _score_features(head, _pooled(activations, mask))


def _score_features(head: dict, features: Array) -> Array:
    standard = (features - head["mean"][None]) / head["deviation"][None]
    return HEAD.apply({"params": head["head"]}, standard)


def _features(run: Run, trunk: dict, items: Sequence[RatedText], layers: tuple[int, int]) -> np.ndarray:
    """[2, N, D] mean activations entering two layers. Rows go through in two lengths, so short ones cost less."""
    model, (lower, upper) = run.model, layers
    texts = pack(run.material.tokenizer, [item.text for item in items], run.settings.text_length)

    @jax.jit
    def encode(params: dict, tokens: Array, mask: Array) -> Array:
        out = model.apply({"params": params}, tokens, mask, last=upper, tap=lower)
        return jnp.stack([_pooled(out.tap, mask), _pooled(out.hidden, mask)])

    lengths, width = texts.mask.sum(axis=-1), texts.mask.shape[-1]
    features = np.zeros((2, len(lengths), model.config.width), np.float32)
    for shortest, longest in ((0, (2 * width) // 3), ((2 * width) // 3, width)):
        chosen = np.flatnonzero((lengths > shortest) & (lengths <= longest))
        for start in range(0, len(chosen), ENCODE_ROWS):
            rows = chosen[start : start + ENCODE_ROWS]
            padded = np.resize(rows, ENCODE_ROWS)
            batch = run.split_rows((texts.tokens[padded, :longest], texts.mask[padded, :longest]))
            features[:, rows] = np.asarray(encode(trunk, *batch))[:, : len(rows)]
    return features


def _fit(settings: Settings, key: Array, features: np.ndarray, comparisons: Comparisons) -> dict:
    """A linear Bradley-Terry reward head on standardised features."""
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    standard = jnp.asarray((features - mean) / deviation)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(settings.reward_rate, settings.reward_steps), weight_decay=settings.reward_decay
    )

    def fit(key: Array, standard: Array, chosen: Array, rejected: Array) -> dict:
        params = HEAD.init(key, standard[:1])["params"]
        state = reward_model.init(params, lambda params, x: HEAD.apply({"params": params}, x), optimizer)
        pairs = PreferenceBatch(standard[chosen], standard[rejected], jnp.ones(chosen.shape))
        update = lambda state, _: reward_model.update(state, pairs, config=reward_model.Config())
        return dict(jax.lax.scan(update, state, None, length=settings.reward_steps)[0].params)

    head = jax.jit(fit)(key, standard, comparisons.chosen, comparisons.rejected)
    return {"head": head, "mean": jnp.asarray(mean), "deviation": jnp.asarray(deviation)}


def reward_models(run: Run, base: Policy) -> tuple[RewardModels, np.ndarray]:
    """Trains the reward model on the training half and the judge on the other half, from single raters' comparisons.

    Returns both, and how the reward model scores the judge's texts, which it has never seen.
    """
    settings, material = run.settings, run.material
    width = run.model.config.width
    blank = {
        "head": HEAD.init(run.key(2), jnp.zeros((1, width)))["params"],
        "mean": jnp.zeros(width),
        "deviation": jnp.zeros(width),
    }
    state = run.copy_everywhere({"models": RewardModels(blank, blank), "held_out": jnp.zeros(settings.judge_texts)})
    layers = (settings.judge_layer, settings.trunk)

    def fit(index: int, items: Sequence[RatedText], features: np.ndarray) -> dict:
        comparisons = single_rater_comparisons(run.rng(2, index), items, settings.comparisons)
        return _fit(settings, run.key(2, index), features, comparisons)

    def step(state: dict, index: int) -> tuple[dict, dict[str, Array]]:
        models, held_out = state["models"], state["held_out"]
        items = (material.train, material.judge)[index]
        for_judge, for_reward = _features(run, base.frozen, items, layers)
        if index == 0:
            models = models._replace(reward=fit(0, items, for_reward))
        else:
            models = models._replace(judge=fit(1, items, for_judge))
            held_out = jax.jit(_score_features)(models.reward, for_reward)
        return run.copy_everywhere({"models": models, "held_out": held_out}), {}

    state = run.loop("reward model and judge", step, state, 2)
    return state["models"], np.asarray(state["held_out"])


# --- continuations ----------------------------------------------------------------------------------------------------


def _continue(run: Run, policy: Policy, tap: int | None) -> Callable[..., Rollout]:
    """(trained, frozen, prompts, mask, keys) -> Rollout."""
    tokenizer, length = run.material.tokenizer, run.settings.response_length

    def program(trained: dict, frozen: dict, tokens: Array, mask: Array, keys: Array) -> Rollout:
        return generate(
            policy.model,
            merge_params(trained, frozen),
            tokens,
            mask,
            keys,
            length=length,
            end_token=tokenizer.eos_id,
            pad_token=tokenizer.eos_id,
            tap=tap,
        )

    return program


def continuations(run: Run, policy: Policy, beginnings: Tokens, key: Array, *, tap: int | None = None) -> list[Rollout]:
    """Continues every beginning once; batches of ENCODE_ROWS rows, the last one filled up with repetitions."""
    program = jax.jit(_continue(run, policy, tap))
    keys = jax.random.split(key, len(beginnings.tokens))
    batches = []
    for start in range(0, len(beginnings.tokens), ENCODE_ROWS):
        rows = np.resize(np.arange(start, min(start + ENCODE_ROWS, len(beginnings.tokens))), ENCODE_ROWS)
        inputs = run.split_rows((beginnings.tokens[rows], beginnings.mask[rows], keys[rows]))
        batches.append(program(policy.trained, policy.frozen, *inputs))
    return batches


def teacher_samples(run: Run, base: Policy, models: RewardModels) -> Samples:
    """What the base model makes of training prefixes, with its hidden states and the reward model's scores."""
    settings = run.settings
    pool = prompts(run.material, run.material.train, settings.prompt_length)
    rows = np.resize(run.rng(4).permutation(len(pool.tokens)), settings.teacher_samples)
    first = settings.student_from
    beginnings = Tokens(pool.tokens[rows], pool.mask[rows])
    batches = continuations(run, base, beginnings, run.key(4), tap=first or None)

    @jax.jit
    def look(trained: dict, frozen: dict, reward: dict, rollout: Rollout) -> tuple[Array, Array, Array]:
        params, start = merge_params(trained, frozen), rollout.trunk if first else rollout.tokens
        out = base.model.apply({"params": params}, start, rollout.mask, first=first, tap=settings.trunk)
        states = response_states(out.hidden, prompt_length=settings.prompt_length)
        return states, out.tap[:, settings.prompt_length - 1], score(reward, out.tap, rollout.mask)

    looked = [jax.device_get(look(base.trained, base.frozen, models.reward, rollout)) for rollout in batches]

    def gather(parts: Iterable[Any]) -> Any:
        return np.concatenate([np.asarray(part) for part in parts])[: settings.teacher_samples]

    return Samples(
        TokenInputs(
            gather(b.tokens for b in batches),
            gather(b.mask for b in batches),
            gather(b.trunk for b in batches) if first else None,
        ),
        gather(b.response_mask for b in batches),
        *(gather(column) for column in zip(*looked, strict=True)),
    )


# --- 3. AC-HF ---------------------------------------------------------------------------------------------------------


def ac_hf(run: Run, base: Policy, models: RewardModels, samples: Samples) -> tuple[Policy, dict]:
    """Actor-critic with human feedback: the actor continues prefixes, the human reward model scores, both learn.

    A turn is one program: generate, score, evaluate reference and critic, advantages, all gradient steps. Trunk
    activations are computed once, by generation. Scores are in standard deviations of the base model's own scores.

    Returns the actor and the critic's parameters.
    """
    settings = run.settings
    pool = prompts(run.material, run.material.train, settings.prompt_length)
    total = settings.turns * settings.minibatches
    critic = CRITIC.init(run.key(3), jnp.zeros((1, run.model.config.width)))["params"]
    optimizer = optax.partition(
        {"actor": _adam(settings.actor_rate, total), "critic": optax.adam(settings.critic_rate)},
        lambda params: {name: name for name in params},
    )
    apply_fn = policies.actor_critic(run.model, CRITIC, prompt_length=settings.prompt_length, first=settings.trunk)
    reference_fn = policies.token_policy(run.model, prompt_length=settings.prompt_length, first=settings.trunk)
    config = actor_critic.Config(value_weight=1.0, kl_target=settings.kl_target, kl_horizon=settings.kl_horizon)
    start = {"actor": jax.tree.map(jnp.copy, base.trained), "critic": run.copy_everywhere(critic)}
    state = actor_critic.init(start, apply_fn, optimizer, kl_coefficient=settings.kl_coefficient)
    act = _continue(run, base, settings.trunk)
    centre, spread = float(samples.scores.mean()), float(samples.scores.std())

    def turn(state, reference, trunk, reward, tokens, mask, keys, key):
        actor = state.train.params["actor"]
        rollout = act(actor, trunk, tokens, mask, keys)
        inputs = rollout.inputs
        assert rollout.trunk is not None  # asked for by tap
        scores = (score(reward, rollout.trunk, rollout.mask) - centre) / spread
        reference_log_probs = reference_fn(merge_params(reference, trunk), inputs)
        values = apply_fn({"actor": merge_params(actor, trunk), "critic": state.train.params["critic"]}, inputs).values
        batch, told = actor_critic.experience(
            inputs,
            rollout.response_mask,
            rollout.log_probs,
            reference_log_probs,
            values,
            scores,
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

    state = run.loop("AC-HF", step, state, settings.turns)
    return base._replace(trained=state.train.params["actor"]), state.train.params["critic"]


# --- 4. PD ------------------------------------------------------------------------------------------------------------


def policy_distillation_students(run: Run, base: Policy, critic: dict, samples: Samples) -> tuple[Policy, Policy]:
    """Two students of the base model, without and with human feedback, from one start and for the same steps.

    Both learn from the same samples of the base model; they differ in `human_weights` alone, which is 1 for the first.
    The reward is taken relative to the critic's value of the prefix: a shift that depends on the prefix alone leaves
    the optimum π_T exp(r / β) / Z(prefix) where it is, and takes the luck of the prefix out of the weights.
    """
    settings = run.settings
    model = Transformer(dataclasses.replace(run.model.config, num_layers=len(settings.student_layers)))
    teacher = merge_params(base.trained, base.frozen)
    own = {name: part for name, part in teacher.items() if not name.startswith("layer_")}
    own |= {f"layer_{number}": teacher[f"layer_{source}"] for number, source in enumerate(settings.student_layers)}
    trained, frozen = split_params(own, _layers_from(settings.student_from))
    teacher_table = output_table(teacher)
    apply_fn = policies.student(model, prompt_length=settings.prompt_length, first=settings.student_from)
    update = jax.jit(
        functools.partial(policy_distillation.update, config=policy_distillation.Config()), donate_argnums=0
    )
    everyone = jnp.ones(settings.teacher_samples)
    expected = CRITIC.apply({"params": jax.device_get(critic)}, samples.prefix_state)
    liked = human_weights(samples.standard_scores - expected, everyone > 0, beta=settings.human_beta)

    def learn(stage: str, number: int, start: dict, weights: Array, steps: int) -> dict:
        state = policy_distillation.init(
            {"student": jax.tree.map(jnp.copy, start)}, apply_fn, _adam(settings.student_rate, steps)
        )
        probabilities, importance = policy_distillation.proposal(weights)

        def step(state, index):
            rows = run.rng(5, number, index).choice(len(weights), settings.student_batch, p=np.asarray(probabilities))
            taught = policies.TeacherInputs(samples.inputs, samples.teacher_hidden)
            everything = policy_distillation.Batch(taught, samples.response_mask, weights, importance)
            batch = jax.tree.map(lambda x: np.asarray(x)[rows], everything)
            fixed = {"student": frozen, "teacher_table": teacher_table}
            return update(state, run.split_rows(batch), frozen=fixed)

        return run.loop(stage, step, state, steps).params["student"]

    start = learn("PD: common start", 0, trained, everyone, settings.start_steps)
    plain = learn("PD without human reward", 1, start, everyone, settings.student_steps)
    human = learn("PD with human reward", 1, start, liked, settings.student_steps)
    return Policy(model, plain, frozen), Policy(model, human, frozen)


# --- 5. judging -------------------------------------------------------------------------------------------------------


def judged(run: Run, policy: Policy, base: Policy, models: RewardModels, key: Array) -> Judged:
    """Continues held-out prefixes of the judge's half and lets the judge score the result."""
    settings, tokenizer = run.settings, run.material.tokenizer
    pool = prompts(run.material, run.material.judge, settings.prompt_length)
    beginnings = Tokens(pool.tokens[: settings.eval_prompts], pool.mask[: settings.eval_prompts])

    @jax.jit
    def look(trained: dict, frozen: dict, judge: dict, rollout: Rollout) -> tuple[Array, Array]:
        """The judge's scores, and Σ log π - log π_base, in one pass of the base model."""
        params = merge_params(trained, frozen)
        out = base.model.apply({"params": params}, rollout.tokens, rollout.mask, tap=settings.judge_layer)
        states = response_states(out.hidden, prompt_length=settings.prompt_length)
        reference = head_log_probs(states, output_table(params), rollout.responses)
        distance = kl.k1(*masking.zero_outside(rollout.response_mask, rollout.raw_log_probs, reference))
        return score(judge, out.tap, rollout.mask), jnp.sum(distance, axis=-1)

    batches = continuations(run, policy, beginnings, key)
    looked = [jax.device_get(look(base.trained, base.frozen, models.judge, rollout)) for rollout in batches]
    rows = [
        row for b in jax.device_get(batches) for row in zip(b.tokens, b.mask, b.responses, b.response_mask, strict=True)
    ]
    rows = rows[: len(beginnings.tokens)]
    responses = [[int(token) for token in response[mask]] for _, _, response, mask in rows]
    return Judged(
        texts=[tokenizer.decode([int(t) for t in tokens[mask]]) for tokens, mask, _, _ in rows],
        continuations=[tokenizer.decode(response) for response in responses],
        scores=np.concatenate([scores for scores, _ in looked])[: len(rows)],
        lengths=np.array([len(response) for response in responses]),
        responses=responses,
        reference_kl=np.concatenate([distance for _, distance in looked])[: len(rows)],
    )
