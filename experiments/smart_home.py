"""Smart home: spoken-style commands to intent and slots, from scripted feedback, without opening the house unasked.

Method. A decoder of about half a million weights, from scratch, reads a command in English or German and writes
"<do>" or "<ask>" (act at once, or have the household confirm), the intent, and its slots.
  * Base (SFT): commands of the *demonstrated* templates with hassil's parse; "<do>" and "<ask>" by a coin.
  * Feedback, on commands of the *feedback* templates, whose parses no model is shown. Verifiable: the answer agrees
    with hassil or not. Scripted comparisons: a household compares two answers to the same command; it wants the right
    thing done, and it does not want to be asked; 5 % of its answers are mistakes. A Bradley-Terry reward model on the
    base's frozen states learns them.
  * Cost: unlocking, or opening a door, gate or garage, without asking. A Lagrange multiplier holds its share among
    commands that open the house at `limit`.
  * AC-HF with and without the constraint, GRPO and PD with it, and the base trained on for as many extra updates on
    its demonstrations as AC-HF takes. The PD student starts from its teacher, the base: without human reward it would
    stay there.
All figures are measured on *unseen* templates: exact match of intent and all slots (greedy), violations per 1,000
commands that open the house and needless questions (sampled).

Data. Templates of home-assistant-intents (Apache-2.0), sampled and parsed back by hassil (Apache-2.0); tested with
2026.10.27 and 3.12.1: `pip install 'rlhf_jax[smart-home]'`. Nobody took part: all feedback is scripted.

Expected curve. Agreement on feedback templates climbs from the base's level; unconstrained AC-HF stops asking
altogether (violations near 1,000), constrained runs keep asking where the house would be opened.

    python experiments/smart_home.py --out runs/smart_home --seeds 0,1,2 [--smoke]
"""

import dataclasses
import functools
import importlib.metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax import constraints, masking
from rlhf_jax.algorithms import actor_critic, group, policy_distillation, reward_model, sft
from rlhf_jax.data.batches import pad_left, pad_right
from rlhf_jax.data.home_commands import HOUSEHOLD as HOUSE
from rlhf_jax.data.home_commands import OPENS, sample_commands
from rlhf_jax.errors import UserError, missing_extra
from rlhf_jax.feedback import teachers
from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.drawing import greedy
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.quickstart.context import adam
from rlhf_jax.quickstart.report import Plot, Report, Result, StageTime
from rlhf_jax.recipes import sequences
from rlhf_jax.recipes.run_folder import RunFolder, command_line, open_run
from rlhf_jax.recipes.sequences import Judged, Prompts, Task
from rlhf_jax.types import Rollout, TokenInputs

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise missing_extra("tokenizers", "smart-home", "train a tokenizer") from error

CRITIC, HOUSEHOLD = ScalarHead(hidden=64, scale=0.0), ScalarHead(hidden=32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All numbers of a run, and its flags."""

    templates: int = 10_000  # at most this many per language
    per_template: int = 6  # commands sampled from each
    vocabulary: int = 700
    width: int = 96
    layers: int = 3
    prompt_length: int = 26
    length: int = 18
    base_updates: int = 2_000
    batch: int = 64
    base_rate: float = 2e-3
    comparisons: int = 2_000  # scripted
    turns: int = 150  # of AC-HF and GRPO, 128 answers each
    actor_rate: float = 3e-4
    kl_coefficient: float = 0.02
    comfort: float = 0.3  # reward per standard deviation of the household's reward model
    limit: float = 0.01  # of violations among commands that open the house
    multiplier_rate: float = 0.3
    pool: int = 1_536  # prompts that the teacher of PD answers 8 times
    beta: float = 0.25
    student_updates: int = 600
    chunk: int = 50  # updates per compiled call
    judged: int = 1_500  # unseen commands that are measured


SMOKE = {"templates": 60, "per_template": 2, "vocabulary": 300, "width": 32, "layers": 1, "base_updates": 4,
         "comparisons": 64, "turns": 2, "pool": 64, "student_updates": 4, "chunk": 2, "judged": 64}  # fmt: skip


# --- commands ---------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Commands of three disjoint sets of templates, as tokens."""

    task: Task
    tokenizer: Tokenizer
    marks: dict[str, Any]  # ids of the tokens that feedback looks for
    demonstrations: sft.Batch
    feedback: Prompts
    unseen: Prompts
    openings: Prompts  # the unseen ones that open the house, repeated
    texts: list[tuple[str, str]]  # of the unseen ones: command and parse


def prepare(rows: list[dict[str, Any]], config: Config, seed: int) -> Data:
    """Splits templates 45 : 35 : 20, trains the tokenizer on the demonstrated ones, and packs everything."""
    rng, sets, seen = np.random.default_rng(seed), ([], [], []), set()
    templates = {row["template"]: (row["language"], row["opens"]) for row in rows}
    for kind in sorted(set(templates.values())):
        members = [t for t, k in templates.items() if k == kind]
        cuts = [round(0.45 * len(members)), round(0.8 * len(members))]
        for own, part in zip(sets, np.split(rng.permutation(members), cuts), strict=True):
            own += [row for row in rows if row["template"] in set(part.tolist())]
    for own in sets:  # a text of two templates counts for the first set alone
        own[:] = list({row["text"]: row for row in own if row["text"] not in seen}.values())
        seen |= {row["text"] for row in own}
    risky = [f"domain={d}" for d in HOUSE["en"]] + [f"device_class={d}" for d in OPENS]
    special = ["<pad>", "<end>", "<asked>", "<do>", "<ask>", *sorted({row["intent"] for row in rows}), *risky]
    special += sorted({f"{slot}=" for row in rows for slot in row["slots"]})
    tokenizer = Tokenizer(models.BPE())
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary, special_tokens=special, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((f"{row['text']} {row['parse']}" for row in sets[0]), trainer)
    mark: dict[str, Any] = {name: tokenizer.token_to_id(f"<{name}>") for name in ("pad", "end", "asked", "do", "ask")}
    mark |= {"off": tokenizer.token_to_id("HassTurnOff"), "on": tokenizer.token_to_id("HassTurnOn")}
    mark |= {"lock": tokenizer.token_to_id("domain=lock")}
    mark |= {"doors": np.array([tokenizer.token_to_id(f"device_class={kind}") for kind in OPENS])}
    encode = lambda text: tokenizer.encode(text).ids
    fits = lambda row: len(encode(row["text"])) < config.prompt_length and len(encode(row["parse"])) < config.length - 1
    learnt, rated, unseen = ([row for row in own if fits(row)] for own in sets)
    learnt = learnt + [row for row in learnt if row["opens"]] * 5
    rated = rated + [row for row in rated if row["opens"]] * 5
    unseen = [unseen[i] for i in rng.permutation(len(unseen))[: config.judged]]
    left = functools.partial(pad_left, pad_id=mark["pad"], length=config.prompt_length)
    right = functools.partial(pad_right, pad_id=mark["pad"])

    def prompts(rows: list[dict[str, Any]]) -> Prompts:
        tokens, mask = left([[*encode(row["text"]), mark["asked"]] for row in rows])
        answers, _ = right([[*encode(row["parse"]), mark["end"]] for row in rows], length=config.length - 1)
        return Prompts(tokens, mask, (answers, jnp.array([row["opens"] for row in rows])))

    asked = prompts(learnt * 2)
    coin = [mark["do"]] * len(learnt) + [mark["ask"]] * len(learnt)
    answers = [[c, *encode(row["parse"]), mark["end"]] for c, row in zip(coin, learnt * 2, strict=True)]
    tokens, mask = right(answers, length=config.length)
    together = TokenInputs(jnp.concatenate([asked.tokens, tokens], 1), jnp.concatenate([asked.mask, mask], 1))
    size: dict[str, Any] = {"width": config.width, "num_layers": config.layers, "num_heads": 4, "num_kv_heads": 4}
    shape = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(), head_dim=config.width // 4, mlp_width=3 * config.width, **size
    )
    task = Task(Transformer(shape), config.prompt_length, config.length, mark["end"], mark["pad"])
    opening = [row for row in unseen if row["opens"]]
    if not opening:
        raise UserError("No unseen command opens the house, so there is nothing to measure: raise --templates.")
    texts = [(row["text"], row["parse"]) for row in unseen]
    repeated = [opening[i] for i in np.resize(np.arange(len(opening)), min(config.judged, 512))]
    demonstrations = sft.Batch(together, mask)
    return Data(task, tokenizer, mark, demonstrations, prompts(rated), prompts(unseen), prompts(repeated), texts)


# --- feedback ---------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What is checked about answers."""

    right: Array  # [B] bool, intent and slots agree with hassil's parse
    asks: Array  # [B] bool
    violates: Array  # [B] bool, opens the house without asking


def look(rollout: Rollout, truth: Any, mark: dict[str, Any]) -> Seen:
    said = rollout.responses
    has = lambda ids: jnp.any(jnp.isin(said, jnp.asarray(ids)), axis=-1)
    opens = (has(mark["off"]) & has(mark["lock"])) | (has(mark["on"]) & has(mark["doors"]))
    asks = said[:, 0] == mark["ask"]
    right = jnp.all(said[:, 1:] == truth[0], axis=-1) & (asks | (said[:, 0] == mark["do"]))
    return Seen(right, asks, opens & ~asks)


def pooled(states: Array, mask: Array) -> Array:
    """[B, D] mean state of an answer."""
    return masking.masked_mean(states, jnp.broadcast_to(mask[..., None], states.shape), axis=-2)


def judge(rollout: Rollout, truth: Any, states: Array, *, data: Data, household: Any, comfort: float) -> Judged:
    """1 for agreement with hassil, plus what the household's reward model says; the cost is a violation."""
    seen = look(rollout, truth, data.marks)
    liked = HOUSEHOLD.apply({"params": household["head"]}, pooled(states, rollout.response_mask))
    liked = (liked - household["mean"]) / household["deviation"]
    return Judged(seen.right + comfort * liked, seen.violates.astype(jnp.float32), truth[1])


def household_model(data: Data, base: Any, key: Array, config: Config) -> tuple[Any, Array]:
    """The household's reward model from scripted comparisons, and its accuracy on fresh ones without mistakes."""
    keys = jax.random.split(key, 6)

    def compared(keys: Array, mistakes: float) -> tuple[Array, Array, teachers.Answers]:
        rows = data.feedback.rows(jax.random.randint(keys[0], (config.comparisons,), 0, len(data.feedback.tokens)))
        both = []
        for k in jax.random.split(keys[1]):
            rollout = sequences.act(data.task, base, rows, k)
            seen = look(rollout, rows.truth, data.marks)
            states = policies.response_hidden(data.task.model, base, rollout.inputs, prompt_length=config.prompt_length)
            both += [pooled(states, rollout.response_mask), 2.0 * seen.right - 1.0 * seen.asks]
        return both[0], both[2], teachers.compare(both[1], both[3], keys[2], mistakes=mistakes, equal_within=0.5)

    first, second, answers = compared(keys[:3], 0.05)
    params = HOUSEHOLD.init(keys[3], first[:1])["params"]
    apply = lambda params, features: HOUSEHOLD.apply({"params": params}, features)
    state = reward_model.init(params, apply, optax.adamw(3e-3, weight_decay=1e-2))
    pairs = teachers.preference_batch(first, second, answers)
    update = lambda state, _: reward_model.update(state, pairs, config=reward_model.Config())
    state, _ = jax.lax.scan(update, state, None, length=300)
    scores = apply(state.params, jnp.concatenate([first, second]))
    one, other, fresh = compared(jax.random.split(keys[4], 3), 0.0)
    agrees = ((apply(state.params, one) > apply(state.params, other)) == (fresh.first_wins > 0.5)).astype(jnp.float32)
    household = {"head": state.params, "mean": jnp.mean(scores), "deviation": jnp.std(scores)}
    return household, masking.masked_mean(agrees, fresh.first_wins != 0.5)


def watch(data: Data) -> Any:
    """(params, prompts, key, best) -> what is seen of the answers, and the answers; compiled once for all policies."""

    def see(params: Any, prompts: Prompts, key: Array, best: bool) -> tuple[Seen, Array]:
        rollout = sequences.act(data.task, params, prompts, key, choose=greedy if best else categorical)
        return look(rollout, prompts.truth, data.marks), rollout.responses

    return jax.jit(see, static_argnames="best")


def measure(data: Data, see: Any, params: Any, key: Array) -> dict[str, Any]:
    """What a policy does with unseen templates; greedy for exact match, sampled for questions and violations."""
    best, said = see(params, data.unseen, key, best=True)
    drawn = see(params, data.unseen, key, best=False)[0]
    risky = see(params, data.openings, key, best=False)[0]
    safe = ~np.asarray(data.unseen.truth[1])
    say = lambda ids: data.tokenizer.decode(ids.tolist(), skip_special_tokens=False).replace("<pad>", "")
    found = {"exact": best.right, "questions": drawn.asks[safe], "violations": risky.violates}
    return {name: float(np.mean(value)) for name, value in found.items()} | {"said": list(map(say, said[:40]))}


# --- the run ----------------------------------------------------------------------------------------------------------


def run_seed(folder: RunFolder, config: Config, seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    data, root, found = prepare(rows, config, seed), jax.random.key(seed), {}
    task, chunks = data.task, lambda updates: max(1, updates // config.chunk)
    key = lambda *path: functools.reduce(jax.random.fold_in, path, root)
    see = watch(data)
    answering = policies.token_policy(task.model, prompt_length=config.prompt_length)

    def stage(number: int, name: str, step: Any, state: Any, total: int) -> Any:
        """`step(state, key)`, `total` times."""
        return folder.stage(f"seed_{seed}/{name}", lambda s, index: step(s, key(number, index)), state, total)

    def judged(number: int, name: str, params: Any) -> None:
        told = folder.once(f"seed_{seed}/{name} measured", lambda: measure(data, see, params, key(number, 9)))
        folder.samples(f"seed_{seed}/{name}", [
            {"command": text, "parse": parse, "said": said}
            for (text, parse), said in zip(data.texts, told.pop("said"), strict=False)
        ])  # fmt: skip
        found[name] = told

    supervise = functools.partial(sequences.supervise, updates=config.chunk, rows=config.batch)
    one = jnp.zeros((1, 1), jnp.int32)
    fresh = jax.jit(lambda key: task.model.init(key, one, one == 0, method="initialise")["params"])(key(0))
    start = sft.init(fresh, answering, adam(config.base_rate, config.base_updates))
    learn = jax.jit(lambda state, key: supervise(state, data.demonstrations, key))
    base = stage(1, "base", learn, start, chunks(config.base_updates)).params
    judged(1, "base", base)
    extra = sft.init(base, answering, adam(config.actor_rate, 2 * config.turns))
    extra = stage(2, "base, extra updates", learn, extra, chunks(2 * config.turns))
    judged(2, "base, extra updates", extra.params)

    household, accuracy = jax.jit(lambda base, key: household_model(data, base, key, config))(base, key(3))
    found["household model"] = {"accuracy": float(accuracy)}
    look = functools.partial(judge, data=data, household=household, comfort=config.comfort)
    per_call = max(1, min(config.chunk // 5, config.turns))
    turns = {"task": task, "judge": look, "turns": per_call, "minibatches": 2, "limit": config.limit}
    optimizer = lambda: adam(config.actor_rate, 2 * config.turns)
    critic = CRITIC.init(key(4), jnp.zeros((1, config.width)))["params"]
    both = optax.partition({"actor": optimizer(), "critic": optax.adam(1e-3)}, lambda tree: {k: k for k in tree})
    agent = actor_critic.init(
        {"actor": base, "critic": critic},
        sequences.actor_critic_policy(task, CRITIC),
        both,
        kl_coefficient=config.kl_coefficient,
    )
    knobs = turns | {"rows": 128, "config": actor_critic.Config(value_weight=0.5)}
    act = jax.jit(functools.partial(sequences.learn, reference=base, prompts=data.feedback, **knobs))
    for number, name, ascent in ((5, "AC-HF, no constraint", 0.0), (6, "AC-HF", config.multiplier_rate)):
        step = lambda state, key, ascent=ascent: act(state, key=key, multiplier_rate=ascent)
        start = sequences.Learner(agent, constraints.init_lagrange())
        state = stage(number, name, step, start, config.turns // per_call)
        judged(number, name, state.agent.train.params["actor"])
    knobs = turns | {"rows": 16, "multiplier_rate": config.multiplier_rate}
    knobs |= {"config": group.Config(group=8, kl_weight=config.kl_coefficient)}
    act = jax.jit(lambda state, key: sequences.learn_in_groups(state, base, data.feedback, key, **knobs))
    grouped = sequences.GroupLearner(group.init(base, answering, optimizer()), constraints.init_lagrange())
    judged(7, "GRPO", stage(7, "GRPO", act, grouped, config.turns // per_call).train.params)

    rating = jax.jit(functools.partial(sequences.rate, task, judge=look, samples=8))
    some = np.resize(np.random.default_rng(seed).permutation(len(data.feedback.tokens)), (-(-config.pool // 64), 64))
    parts = [rating(base, data.feedback.rows(jnp.asarray(p)), key(8, i)) for i, p in enumerate(some)]
    rated = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    ascent = {"limit": config.limit, "multiplier_rate": 1.0, "steps": 500}
    weights, lagrange = jax.jit(functools.partial(sequences.tilt, beta=config.beta, **ascent))(rated)
    found["PD multiplier"] = {"multiplier": float(lagrange.multiplier)}
    student = policy_distillation.init(
        {"student": base},
        policies.student(task.model, prompt_length=config.prompt_length),
        adam(config.actor_rate, config.student_updates),
    )
    taught = functools.partial(sequences.distil, task=task, updates=config.chunk, rows=config.batch)
    copy = jax.jit(lambda state, key: taught(state, base, rated, weights, key))
    judged(10, "PD", stage(10, "PD", copy, student, chunks(config.student_updates)).params["student"])
    return found


WHO = ("base", "base, extra updates", "AC-HF, no constraint", "AC-HF", "GRPO", "PD")
COLUMNS = {
    "exact": ("exact match on unseen templates", "{:.1%}", 1),
    "violations": ("violations per 1,000 commands that open the house (sampled)", "{:.0f}", 1000),
    "questions": ("needless questions (sampled)", "{:.1%}", 1),
}


def report(folder: RunFolder, config: Config, found: dict[int, dict[str, Any]], smoke: bool) -> Report:
    show = lambda who, column: [COLUMNS[column][2] * seed[who][column] for seed in found.values()]
    rows = [
        Result(f"{who}: {title}", text.format(np.mean(values)), ", ".join(map(text.format, values)))
        for column, (title, text, _) in COLUMNS.items()
        for who in WHO
        for values in [show(who, column)]
    ]
    accuracy = [seed["household model"]["accuracy"] for seed in found.values()]
    rows.append(Result("household's reward model, fresh scripted pairs", f"{np.mean(accuracy):.1%}"))
    first = next(iter(found))
    curve = lambda names, metric: [folder.series(f"seed_{first}/{name}", metric, name) for name in names]
    plot = lambda title, y, names, metric: Plot(
        title=title, x_label="chunk of updates", y_label=y, series=curve(names, metric)
    )
    return Report(
        title="Smart home: commands to intents from scripted feedback" + " (smoke run)" * smoke,
        summary="Exact match on unseen templates, and how often the house is opened without asking. Means over seeds.",
        results=rows,
        plots=[
            plot("Reward", "agreement and comfort", WHO[2:5], "human/reward"),
            plot("Violations on feedback templates", "share of openings", WHO[2:5], "constraint/cost"),
            plot("Multiplier", "λ", WHO[3:5], "constraint/multiplier"),
            plot("Base", "nats per token", WHO[:1], "sft/loss"),
        ],
        stages=[StageTime(name, seconds) for name, seconds in folder.seconds.items()],
        config=dataclasses.asdict(config),
        notes=[
            "All feedback is scripted: agreement with hassil, and a scripted household's comparisons.",
            f"The interval column lists the seeds: {', '.join(map(str, found))}. Curves are those of seed {first}.",
        ],
    )


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/smart_home", smoke=SMOKE, arguments=arguments)
    versions = {name: importlib.metadata.version(name) for name in ("home-assistant-intents", "hassil", "tokenizers")}
    with open_run(out, dataclasses.asdict(config) | {"smoke": smoke, "versions": versions}) as folder:
        sample = functools.partial(sample_commands, per_template=config.per_template, most=config.templates)
        rows = folder.once("commands", lambda: [row._asdict() | {"parse": row.parse} for row in sample()])
        found = {}
        for seed in seeds:
            found[seed] = folder.once(f"seed_{seed}", lambda seed=seed: run_seed(folder, config, seed, rows))
            results = {"feedback": "scripted", "smoke": smoke, "seeds": found}
            folder.finish(results, report(folder, config, found, smoke))
            print(seed, {who: {k: round(v, 3) for k, v in found[seed][who].items()} for who in WHO})


if __name__ == "__main__":
    main()
