"""Translation: short German phrases to English, from scripted comparisons by chrF.

Method. A decoder of about a million weights, from scratch, reads a German phrase and writes an English one.
  * Base (SFT), one for all seeds: phrases, and single words that occur in them, if no word occurs once only. Some
    phrases of common words are kept from it, to be measured or for feedback.
  * Scripted comparisons: two sampled translations of a feedback phrase, of which the one closer to the reference is
    preferred, by chrF++ with precision weighed like recall: plain chrF prefers long answers. The base, trained whole
    on them, becomes a reward model that says what each token adds; it is all that AC-HF and PD get. The references
    reach nobody in any other way.
  * AC-HF and PD start from the base. So does "base, extra updates", which takes as many supervised updates as AC-HF
    takes updates: if AC-HF and PD do not beat that, the table says so.
Seeds draw feedback phrases, comparisons and samples anew. Held-out phrases, greedy: mean chrF of a phrase and corpus
BLEU (sacrebleu); 95 % bootstrap intervals over phrases, paired for gains.

Data. Debian's trans-de-en (GPL-2+), fetched by `apt-get download`, pinned by hash, never part of this repository. Where
apt is absent give `--pairs FILE`: lines of German, tab, English. `pip install 'rlhf_jax[translation]'`.

Expected curve. The learned reward climbs and chrF does not follow: the reward model ranks 57 % of unseen pairs right.

    python experiments/translation.py --out runs/translation --seeds 0,1,2 [--pairs FILE] [--smoke]
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.algorithms import sft
from rlhf_jax.data.bpe import train_bpe
from rlhf_jax.data.tokenizer import BPETokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import teachers
from rlhf_jax.generation.drawing import greedy
from rlhf_jax.quickstart.report import Report, Result, StageTime
from rlhf_jax.recipes import bench, sequences, token_reward
from rlhf_jax.recipes.bench import Bench
from rlhf_jax.recipes.phrases import load_pairs
from rlhf_jax.recipes.run_folder import RunFolder, command_line, compile_quickly, open_run, script, versions
from rlhf_jax.recipes.sequences import FREE, Judged, Prompts, Task
from rlhf_jax.recipes.translation_scores import BALANCED, METRICS, chrf, gain, half, scores
from rlhf_jax.types import PreferenceBatch, Rollout

WHO = ("base", "base, extra updates", "AC-HF", "PD")
Pairs = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(bench.Settings):
    """All numbers of a run, and its flags."""

    pairs: str = ""  # a file of German, tab, English; nothing fetches Debian's dictionary
    common: int = 10  # pairs in which the words of held-out and feedback phrases occur at least
    known: int = 2  # ... and those of phrases that are demonstrated
    held_out: int = 2_000
    feedback: int = 6_000  # phrases whose translations nobody is shown
    vocabulary: int = 3_000
    prompt_length: int = 12
    length: int = 12
    base_updates: int = 3_600
    batch: int = 64
    asked: int = 4_000  # of them, by each seed
    comparisons: int = 12_000  # scripted
    scorer_updates: int = 300
    scorer_rate: float = 5e-4
    turns: int = 100
    actor_rate: float = 6e-4
    kl_coefficient: float = 0.3  # reward (log-odds) per nat, here and in beta: AC-HF and PD have one optimum
    beta: float = 0.3


SMOKE = {"common": 1, "known": 1, "held_out": 12, "feedback": 24, "vocabulary": 300, "prompt_length": 24, "length": 24,
         "width": 32, "layers": 1, "base_updates": 4, "batch": 32, "base_rate": 6e-4, "asked": 24,
         "comparisons": 64, "scorer_updates": 2, "turns": 2, "answers": 64, "pool": 64, "chunk": 2}  # fmt: skip


class Data(NamedTuple):
    """Pairs as tokens."""

    task: Task
    tokenizer: BPETokenizer
    demonstrations: sft.Batch
    feedback: Prompts  # truth: row numbers
    held_out: Prompts
    pairs: tuple[Pairs, Pairs]  # of feedback, and held out


def prepare(pairs: Pairs, config: Config) -> Data:
    """Holds phrases of common words out, some to be measured and some for feedback; packs. No seed counts here."""
    words = [{(side, word) for side in (0, 1) for word in re.findall(r"\w+", pair[side].lower())} for pair in pairs]
    phrase = np.array([min(len(text.split()) for text in pair) > 1 for pair in pairs])
    times = Counter(word for row in np.flatnonzero(phrase) for word in words[row])
    rarest = np.array([min((times[word] for word in each), default=0) for each in words])
    order = np.random.default_rng(0).permutation(len(pairs))
    common, wanted = order[(phrase & (rarest >= config.common))[order]], config.held_out + config.feedback
    if len(common) < wanted:
        raise UserError(f"{wanted} pairs of common words are needed; {len(common)} are there")
    held, rated = np.split(common[:wanted], [config.held_out])
    known = np.setdiff1d(order[rarest[order] >= config.known], common[:wanted])
    tokenizer = train_bpe((f" {text}" for row in known for text in pairs[row]), vocab_size=config.vocabulary)
    task, tokens = bench.task(tokenizer, config), lambda text: tokenizer.encode(f" {text}")
    fits = lambda pair: len(tokens(pair[0])) < config.prompt_length and len(tokens(pair[1])) < config.length
    shown, held, rated = ([pairs[row] for row in part if fits(pairs[row])] for part in (known, held, rated))
    ask = lambda rows: [[*tokens(german), tokenizer.bos_id] for german, _ in rows]
    asked, feedback, tested = (bench.prompts(task, ask(rows), jnp.arange(len(rows))) for rows in (shown, rated, held))
    demonstrations = bench.demonstrations(task, asked, [tokens(english) for _, english in shown])
    return Data(task, tokenizer, demonstrations, feedback, tested, (rated, held))


# --- feedback and figures ---------------------------------------------------------------------------------------------


def judge(rollout: Rollout, truth: Any, states: Array, *, task: Task, scorer: Any) -> Judged:
    """What every token adds to the learned reward, in log-odds; nothing is limited."""
    added = token_reward.parts(task, scorer, rollout.inputs)
    return Judged(added, jnp.zeros_like(added), jnp.zeros(added.shape, bool))


def written(data: Data, responses: Array) -> list[str]:
    return [data.tokenizer.decode(ids).strip() for ids in np.asarray(responses).tolist()]


def compared(data: Data, sample: Any, asked: Prompts, rows: Pairs, key: Array, count: int) -> PreferenceBatch:
    """Two sampled translations of each of `count` phrases, and which of the two is closer by `BALANCED` chrF."""
    keys = jax.random.split(key, 4)
    asked = asked.rows(jax.random.randint(keys[0], (count,), 0, len(asked.tokens)))
    references = [rows[row][1] for row in np.asarray(asked.truth)]
    said = [sample(asked, key) for key in keys[1:3]]
    one, other = (jnp.asarray(chrf(written(data, rollout.responses), references, **BALANCED)) for rollout in said)
    answers = jax.jit(functools.partial(teachers.compare, equal_within=1e-3))(one, other, keys[3])
    return jax.jit(teachers.preference_batch)(said[0].inputs, said[1].inputs, answers)


def measure(data: Data, see: Any, params: Any) -> dict[str, Any]:
    """Greedy translations of held-out phrases and their scores."""
    texts = written(data, see(params, data.held_out))
    return scores(texts, [english for _, english in data.pairs[1]]) | {"said": texts[:40]}


def run_seed(own: Bench, data: Data, base: Any, config: Config) -> dict[str, Any]:
    """Feedback phrases, comparisons, samples and everything learnt are of the seed; the base is everyone's."""
    greedily = functools.partial(sequences.act, data.task, key=own.key(9), choose=greedy)
    see = jax.jit(lambda params, asked: greedily(params, asked).responses)

    def judged(name: str, train: Callable[[], Any]) -> dict[str, Any]:
        params = train()
        told = own.folder.once(f"seed_{own.seed}/{name} measured", lambda: measure(data, see, params))
        said = zip(data.pairs[1], told.pop("said"), strict=False)
        rows = [{"german": german, "reference": english, "said": text} for (german, english), text in said]
        own.folder.samples(f"seed_{own.seed}/{name}", rows)
        return told

    some = np.random.default_rng(own.seed).permutation(len(data.pairs[0]))[: config.asked]
    asked = data.feedback.rows(jnp.asarray(some))
    act = jax.jit(functools.partial(sequences.act, data.task))
    ask = functools.partial(compared, data, functools.partial(act, base))

    def reward_model() -> Any:
        told = ask(asked, data.pairs[0], own.key(3, 0), config.comparisons)
        return bench.reward_model(own, base, told, updates=config.scorer_updates, rate=config.scorer_rate)

    def ranked() -> dict[str, float]:
        """How often the reward model is right about fresh comparisons."""
        right, shares = jax.jit(functools.partial(token_reward.accuracy, data.task)), {}
        for place, (where, prompts) in enumerate({"seen phrases": asked, "unseen phrases": data.held_out}.items()):
            fresh = ask(prompts, data.pairs[place], own.key(3, place + 1), config.comparisons // 4)
            shares[f"reward model, {where}"] = float(right(scorer, fresh))
        return shares

    train = {"base": lambda: base, "base, extra updates": lambda: bench.trained_on(own, base, data.demonstrations)}
    every = lambda arms: {name: functools.partial(judged, name, arm) for name, arm in arms.items()}
    *plain, scorer = own.folder.together(every(train) | {"reward model": reward_model}).values()
    verdict = functools.partial(judge, task=data.task, scorer=scorer)
    arms = bench.ac_hf(own, base, asked, verdict, {"AC-HF": FREE})
    arms["PD"] = lambda: bench.pd(own, base, asked, verdict, FREE)
    *learnt, shares = own.folder.together(every(arms) | {"ranked": ranked}).values()
    found: dict[str, Any] = dict(zip(WHO, [*plain, *learnt], strict=True))
    for name in WHO[2:]:
        found[name]["gain"] = {metric: gain(found[name][metric], found[WHO[1]][metric]) for metric in METRICS}
    for name, metric in ((name, metric) for name in WHO for metric in METRICS):
        found[name][metric]["half"] = half(found[name][metric].pop("draws"))
    return found | shares


def report(folder: RunFolder, config: Config, found: dict[int, dict[str, Any]], smoke: bool) -> Report:
    rows, first = [], next(iter(found))
    for seed, told in found.items():
        for metric, who in ((metric, who) for metric in METRICS for who in WHO):
            score = told[who][metric]
            rows.append(Result(f"seed {seed}, {who}: {metric}", f"{score['score']:.1f}", f"± {score['half']:.1f}"))
            if gains := told[who].get("gain"):
                note = f"± {gains[metric]['half']:.1f} against the base's extra updates, paired"
                rows.append(Result(f"seed {seed}, {who}: gain in {metric}", f"{gains[metric]['score']:+.1f}", note))
        for name in (name for name in told if name.startswith("reward model")):
            rows.append(Result(f"seed {seed}, {name}: unseen scripted pairs", f"{told[name]:.1%}"))
    return Report(
        title="Translation from scripted comparisons by chrF" + " (smoke run)" * smoke,
        summary="Greedy translations of held-out phrases. AC-HF and PD have to beat the base trained on.",
        results=rows,
        plots=[
            bench.curves(folder, 0, "Base", "nats per token", WHO[:1], "sft/loss"),
            bench.curves(folder, first, "Reward model", "accuracy", ("reward model",), "reward/accuracy"),
            bench.curves(folder, first, "Learned reward", "log-odds", WHO[2:3], "human/reward"),
        ],
        stages=[StageTime(name, seconds) for name, seconds in folder.seconds.items()],
        config=dataclasses.asdict(config),
        notes=["All comparisons are scripted by chrF; no person took part.", f"Curves are those of seed {first}."],
    )


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/translation", smoke=SMOKE, arguments=arguments)
    if smoke:
        compile_quickly()
    needed = versions("translation", "score translations and learn a vocabulary", "sacrebleu", "tokenizers")
    pairs = load_pairs(config.pairs, most=1_000 if smoke else None)
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()
    with open_run(out, dataclasses.asdict(config) | {"smoke": smoke, "data": digest, "versions": needed}) as folder:

        @functools.cache
        def shared() -> tuple[Data, Any]:
            data = prepare(pairs, config)
            return data, bench.base_model(Bench(folder, 0, data.task, config), data.demonstrations)

        def measured(seed: int) -> dict[str, Any]:
            data, base = shared()
            return run_seed(Bench(folder, seed, data.task, config), data, base, config)

        found = {}
        for seed in seeds:
            found[seed] = folder.once(f"seed_{seed}", functools.partial(measured, seed))
            results = {"feedback": "scripted", "smoke": smoke, "seeds": found}
            folder.finish(results, report(folder, config, found, smoke))
            print(seed, {who: {m: round(found[seed][who][m]["score"], 1) for m in METRICS} for who in WHO})


if __name__ == "__main__":
    script(main)
