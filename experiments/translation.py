"""Translation: short German phrases to English, from scripted comparisons by chrF.

Method. A decoder of about a million weights, from scratch, reads a German phrase and writes an English one.
  * Base (SFT): pairs of the training half.
  * Scripted comparisons: two sampled translations of a training phrase, of which the one with the higher chrF against
    the reference is preferred. A Bradley-Terry reward model on the base's frozen states learns them; it is all that
    AC-HF and PD get. The references reach them in no other way.
  * AC-HF and PD start from the base. So does "base, extra updates", which takes as many supervised updates as AC-HF
    takes updates: if AC-HF and PD do not beat that, the table says so.
Held-out phrases, greedy: corpus chrF and BLEU (sacrebleu) with 95 % bootstrap intervals over phrases.

Data. Debian's trans-de-en (GPL-2+), fetched by `apt-get download`, pinned by hash, never part of this repository. Where
apt is absent give `--pairs FILE`: lines of German, tab, English. `pip install 'rlhf_jax[translation]'`.

Expected curve. The learned reward climbs; whether chrF follows depends on how well the reward model ranks.

    python experiments/translation.py --out runs/translation --seeds 0,1,2 [--pairs FILE] [--smoke]
"""

import dataclasses
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax import constraints, masking
from rlhf_jax.algorithms import actor_critic, policy_distillation, reward_model, sft
from rlhf_jax.data.batches import pad_left, pad_right
from rlhf_jax.data.fetch import cache_folder
from rlhf_jax.errors import UserError, missing_extra
from rlhf_jax.generation.drawing import greedy
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.quickstart.context import adam
from rlhf_jax.quickstart.report import Plot, Report, Result, StageTime
from rlhf_jax.recipes import sequences
from rlhf_jax.recipes.run_folder import RunFolder, command_line, open_run
from rlhf_jax.recipes.sequences import Judged, Prompts, Task
from rlhf_jax.types import PreferenceBatch, Rollout, TokenInputs

try:
    from sacrebleu.metrics.bleu import BLEU  # pyright: ignore[reportMissingImports]
    from sacrebleu.metrics.chrf import CHRF  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise missing_extra(error.name or "sacrebleu", "translation", "score translations") from error

PACKAGE, SHA256 = "trans-de-en=1.9-6", "45f6b4cf1c434776fba6811d7bc522efabb5425c43ba8afd0e289bf9e2e53df4"
CRITIC, HEAD = ScalarHead(hidden=64, scale=0.0), ScalarHead(hidden=32)
WHO = ("base", "base, extra updates", "AC-HF", "PD")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All numbers of a run, and its flags."""

    pairs: str = ""  # a file of German, tab, English; nothing fetches Debian's dictionary
    count: int = 30_000  # pairs to learn from
    held_out: int = 1_000
    vocabulary: int = 2_000
    width: int = 128
    layers: int = 3
    length: int = 20  # tokens of either side
    base_updates: int = 1_500
    batch: int = 64
    base_rate: float = 2e-3
    comparisons: int = 3_000  # scripted
    turns: int = 120  # of AC-HF, 128 translations each
    actor_rate: float = 2e-4
    kl_coefficient: float = 0.05
    pool: int = 1_536  # phrases that the teacher of PD translates 8 times
    beta: float = 1.0  # in standard deviations of the learned reward
    student_updates: int = 500
    chunk: int = 50  # updates per compiled call


SMOKE = {"count": 200, "held_out": 32, "vocabulary": 300, "width": 32, "layers": 1, "base_updates": 4,
         "comparisons": 64, "turns": 2, "pool": 64, "student_updates": 4, "chunk": 2}  # fmt: skip


# --- pairs ------------------------------------------------------------------------------------------------------------


def dictionary() -> str:
    """Debian's German-English dictionary, fetched once by Debian's client and checked."""
    kept = cache_folder() / "trans-de-en-1.9-6" / "de-en"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError("Debian's apt-get and dpkg-deb are not here to fetch trans-de-en; give --pairs FILE instead")
    with tempfile.TemporaryDirectory() as folder:
        told = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True)
        found = list(Path(folder).glob("*.deb"))
        if told.returncode or not found:
            reason = (told.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"apt-get could not fetch {PACKAGE} ({reason}); give --pairs FILE instead")
        if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != SHA256:
            raise UserError(f"{PACKAGE} is not the file that was expected: its SHA-256 is {digest} instead of {SHA256}")
        subprocess.run(["dpkg-deb", "-x", str(found[0]), folder], check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "usr/share/trans/de-en", kept)
    return kept.read_text(encoding="utf-8")


def read_dictionary(text: str) -> list[tuple[str, str]]:
    """Phrases that stand opposite each other, without remarks in brackets, of two to eight words on both sides."""
    clean = lambda phrase: " ".join(re.sub(r"\{[^}]*\}|\[[^]]*\]|\([^)]*\)|/[^/]*/|<[^>]*>", " ", phrase).split())
    pairs: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("#") or " :: " not in line:
            continue
        sides = [[group.split(";") for group in side.split("|")] for side in line.split(" :: ", 1)]
        for german, english in zip(*sides, strict=False):
            one, other = clean(german[0]), clean(english[0])
            if 2 <= len(one.split()) <= 8 and 2 <= len(other.split()) <= 8:
                pairs.setdefault(one, other)
    return list(pairs.items())


def load_pairs(config: Config) -> list[tuple[str, str]]:
    if not config.pairs:
        return read_dictionary(dictionary())
    try:
        lines = Path(config.pairs).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--pairs {config.pairs} cannot be read: {error.strerror}") from None
    if bad := [number for number, line in enumerate(lines, 1) if line.count("\t") != 1]:
        raise UserError(f"Line {bad[0]} of {config.pairs} is not German, tab, English")
    return list({german: (german, english) for german, english in (line.split("\t") for line in lines)}.values())


class Data(NamedTuple):
    """Pairs as tokens."""

    task: Task
    tokenizer: Tokenizer
    demonstrations: sft.Batch
    train: Prompts  # truth: row numbers
    held_out: Prompts
    references: list[str]  # of the training phrases
    sources: list[str]  # of the held-out ones
    held_out_references: list[str]


def prepare(pairs: list[tuple[str, str]], config: Config, seed: int) -> Data:
    """Splits by German phrase, trains the tokenizer on the training half, packs."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = [pairs[i] for i in order[: config.count + config.held_out]]
    if len(chosen) < config.count + config.held_out:
        raise UserError(f"{config.count + config.held_out} pairs are needed, but there are {len(chosen)}")
    held, train = chosen[: config.held_out], chosen[config.held_out :]
    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    special = ["<pad>", "<end>", "<to>"]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary, special_tokens=special, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text for pair in train for text in pair), trainer)
    cut = lambda text: tokenizer.encode(text).ids[: config.length - 1]

    def prompts(rows: list[tuple[str, str]]) -> Prompts:
        tokens, mask = pad_left([[*cut(german), 2] for german, _ in rows], pad_id=0, length=config.length)
        return Prompts(tokens, mask, jnp.arange(len(rows)))

    asked = prompts(train)
    tokens, mask = pad_right([[*cut(english), 1] for _, english in train], pad_id=0, length=config.length)
    together = TokenInputs(jnp.concatenate([asked.tokens, tokens], 1), jnp.concatenate([asked.mask, mask], 1))
    shape = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(),
        width=config.width,
        num_layers=config.layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=config.width // 4,
        mlp_width=3 * config.width,
    )
    task = Task(Transformer(shape), config.length, config.length, end_token=1, pad_token=0)
    german, english = zip(*held, strict=True)
    references = [reference for _, reference in train]
    demonstrations = sft.Batch(together, mask)
    return Data(task, tokenizer, demonstrations, asked, prompts(held), references, list(german), list(english))


# --- feedback and figures ---------------------------------------------------------------------------------------------


def pooled(states: Array, mask: Array) -> Array:
    """[B, D] mean state of a translation."""
    return masking.masked_mean(states, jnp.broadcast_to(mask[..., None], states.shape), axis=-2)


def judge(rollout: Rollout, truth: Any, states: Array, *, model: Any) -> Judged:
    """The learned reward, in standard deviations; nothing is limited."""
    scores = HEAD.apply({"params": model["head"]}, pooled(states, rollout.response_mask))
    scores = (scores - model["mean"]) / model["deviation"]
    return Judged(scores, jnp.zeros_like(scores), scores != scores)


def written(data: Data, responses: Array) -> list[str]:
    return [text.strip() for text in data.tokenizer.decode_batch(np.asarray(responses).tolist())]


def learned_reward(data: Data, base: Any, key: Array, config: Config) -> tuple[Any, float]:
    """A reward model of chrF's scripted comparisons, and its accuracy on a fifth of them that it has not seen."""
    keys, chrf, both = jax.random.split(key, 4), CHRF(), []
    rows = data.train.rows(jax.random.randint(keys[0], (config.comparisons,), 0, len(data.references)))

    @jax.jit
    def sample(base: Any, rows: Prompts, key: Array) -> tuple[Array, Array]:
        rollout = sequences.act(data.task, base, rows, key)
        states = policies.response_hidden(data.task.model, base, rollout.inputs, prompt_length=config.length)
        return pooled(states, rollout.response_mask), rollout.responses

    for k in keys[1:3]:
        features, responses = sample(base, rows, k)
        references = [data.references[i] for i in np.asarray(rows.truth)]
        texts = written(data, responses)
        scores = [chrf.sentence_score(t, [r]).score for t, r in zip(texts, references, strict=True)]
        both.append((features, np.array(scores)))
    (first, one), (second, other) = both
    better, differ = jnp.asarray(one > other)[:, None], jnp.asarray(one != other, jnp.float32)
    chosen, rejected = jnp.where(better, first, second), jnp.where(better, second, first)
    learnt = jnp.arange(len(one)) < 0.8 * len(one)
    apply = lambda params, features: HEAD.apply({"params": params}, features)
    state = reward_model.init(HEAD.init(keys[3], first[:1])["params"], apply, optax.adamw(3e-3, weight_decay=1e-2))
    pairs = PreferenceBatch(chosen, rejected, differ * learnt)
    update = lambda state, _: reward_model.update(state, pairs, config=reward_model.Config())
    state = jax.jit(lambda state: jax.lax.scan(update, state, None, length=300)[0])(state)
    scores = apply(state.params, jnp.concatenate([first, second]))
    right = (apply(state.params, chosen) > apply(state.params, rejected)).astype(jnp.float32)
    accuracy = float(masking.masked_mean(right, (differ > 0) & ~learnt))
    return {"head": state.params, "mean": jnp.mean(scores), "deviation": jnp.std(scores)}, accuracy


def measure(data: Data, see: Any, params: Any, key: Array) -> dict[str, Any]:
    """Corpus chrF and BLEU of greedy translations of held-out phrases, with 95 % bootstrap intervals."""
    texts, found = written(data, see(params, data.held_out, key)), {}
    for name, metric in (("chrF", CHRF()), ("BLEU", BLEU())):
        score = metric.corpus_score(texts, [data.held_out_references], n_bootstrap=500)
        found[name] = {"score": float(score.score), "half": float(score._ci)}
    return found | {"said": texts[:40]}


def run_seed(folder: RunFolder, config: Config, seed: int, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    data, root, found = prepare(pairs, config, seed), jax.random.key(seed), {}
    task, chunks = data.task, lambda updates: max(1, updates // config.chunk)
    key = lambda *path: functools.reduce(jax.random.fold_in, path, root)
    see = jax.jit(lambda params, prompts, key: sequences.act(task, params, prompts, key, choose=greedy).responses)

    def stage(number: int, name: str, step: Any, state: Any, total: int) -> Any:
        """`step(state, key)`, `total` times."""
        return folder.stage(f"seed_{seed}/{name}", lambda s, index: step(s, key(number, index)), state, total)

    def judged(number: int, name: str, params: Any) -> None:
        told = folder.once(f"seed_{seed}/{name} measured", lambda: measure(data, see, params, key(number, 9)))
        said = zip(data.sources, data.held_out_references, told.pop("said"), strict=False)
        rows = [{"german": german, "reference": english, "said": text} for german, english, text in said]
        folder.samples(f"seed_{seed}/{name}", rows)
        found[name] = told

    answering, one = policies.token_policy(task.model, prompt_length=config.length), jnp.zeros((1, 1), jnp.int32)
    fresh = jax.jit(lambda key: task.model.init(key, one, one == 0, method="initialise")["params"])(key(0))
    supervise = functools.partial(sequences.supervise, updates=config.chunk, rows=config.batch)
    learn = jax.jit(lambda state, key: supervise(state, data.demonstrations, key))
    start = sft.init(fresh, answering, adam(config.base_rate, config.base_updates))
    base = stage(1, "base", learn, start, chunks(config.base_updates)).params
    judged(1, "base", base)
    extra = sft.init(base, answering, adam(config.actor_rate, 2 * config.turns))
    judged(2, "base, extra updates", stage(2, "base, extra updates", learn, extra, chunks(2 * config.turns)).params)

    model, accuracy = learned_reward(data, base, key(3), config)
    found["reward model"] = {"accuracy": accuracy}
    look, per_call = functools.partial(judge, model=model), max(1, min(config.chunk // 5, config.turns))
    optimizer: Any = {"actor": adam(config.actor_rate, 2 * config.turns), "critic": optax.adam(1e-3)}
    agent = actor_critic.init(
        {"actor": base, "critic": CRITIC.init(key(4), jnp.zeros((1, config.width)))["params"]},
        sequences.actor_critic_policy(task, CRITIC),
        optax.partition(optimizer, lambda tree: {name: name for name in tree}),
        kl_coefficient=config.kl_coefficient,
    )
    knobs = {"task": task, "judge": look, "turns": per_call, "rows": 128, "minibatches": 2}
    knobs |= {"config": actor_critic.Config(value_weight=0.5)}
    act = jax.jit(lambda state, key: sequences.learn(state, base, data.train, key, **knobs))
    learner = sequences.Learner(agent, constraints.init_lagrange())
    judged(5, "AC-HF", stage(5, "AC-HF", act, learner, config.turns // per_call).agent.train.params["actor"])

    rating = jax.jit(functools.partial(sequences.rate, task, judge=look, samples=8))
    some = np.resize(np.random.default_rng(seed).permutation(len(data.references)), (-(-config.pool // 64), 64))
    parts = [rating(base, data.train.rows(jnp.asarray(p)), key(8, i)) for i, p in enumerate(some)]
    rated = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    weights, _ = jax.jit(functools.partial(sequences.tilt, beta=config.beta))(rated)
    compare = policies.student(task.model, prompt_length=config.length)
    student = policy_distillation.init({"student": base}, compare, adam(config.actor_rate, config.student_updates))
    taught = functools.partial(sequences.distil, task=task, updates=config.chunk, rows=config.batch)
    copy = jax.jit(lambda state, key: taught(state, base, rated, weights, key))
    judged(10, "PD", stage(10, "PD", copy, student, chunks(config.student_updates)).params["student"])
    return found


def report(folder: RunFolder, config: Config, found: dict[int, dict[str, Any]], smoke: bool) -> Report:
    rows = [
        Result(
            f"seed {seed}, {who}: {metric}",
            f"{told[who][metric]['score']:.1f}",
            f"± {told[who][metric]['half']:.1f}",
        )
        for seed, told in found.items()
        for metric in ("chrF", "BLEU")
        for who in WHO
    ]
    right = [told["reward model"]["accuracy"] for told in found.values()]
    rows.append(Result("reward model, unseen scripted pairs", f"{np.mean(right):.1%}"))
    first = next(iter(found))
    draw = lambda title, names, metric: Plot(
        title=title,
        x_label="chunk of updates",
        y_label=metric,
        series=[folder.series(f"seed_{first}/{name}", metric, name) for name in names],
    )
    return Report(
        title="Translation from scripted comparisons by chrF" + " (smoke run)" * smoke,
        summary="Greedy translations of held-out phrases. AC-HF and PD have to beat the base trained on.",
        results=rows,
        plots=[draw("Base", WHO[:1], "sft/loss"), draw("Learned reward", WHO[2:3], "human/reward")],
        stages=[StageTime(name, seconds) for name, seconds in folder.seconds.items()],
        config=dataclasses.asdict(config),
        notes=["All comparisons are scripted by chrF; no person took part.", f"Curves are those of seed {first}."],
    )


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/translation", smoke=SMOKE, arguments=arguments)
    pairs = load_pairs(config)
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()
    with open_run(out, dataclasses.asdict(config) | {"smoke": smoke, "data": digest}) as folder:
        found = {}
        for seed in seeds:
            found[seed] = folder.once(f"seed_{seed}", lambda seed=seed: run_seed(folder, config, seed, pairs))
            results = {"feedback": "scripted", "smoke": smoke, "seeds": found}
            folder.finish(results, report(folder, config, found, smoke))
            print(seed, {who: {m: round(found[seed][who][m]["score"], 1) for m in ("chrF", "BLEU")} for who in WHO})


if __name__ == "__main__":
    main()
