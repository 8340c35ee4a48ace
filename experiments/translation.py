"""Translation: short German phrases to English, from scripted comparisons by chrF.

Method. A decoder of about a million weights, from scratch, reads a German phrase and writes an English one.
  * Base (SFT): all pairs but those of some phrases of common words, which are held out or kept for feedback.
  * Scripted comparisons: two sampled translations of a feedback phrase, of which the one with the higher chrF against
    the reference is preferred. A Bradley-Terry reward model on the base's frozen states learns them; it is all that
    AC-HF and PD get. The references reach nobody in any other way.
  * AC-HF and PD start from the base. So does "base, extra updates", which takes as many supervised updates as AC-HF
    takes updates: if AC-HF and PD do not beat that, the table says so.
Held-out phrases, greedy: mean chrF of a phrase, corpus BLEU (sacrebleu), 95 % bootstrap intervals over phrases.

Data. Debian's trans-de-en (GPL-2+), fetched by `apt-get download`, pinned by hash, never part of this repository. Where
apt is absent give `--pairs FILE`: lines of German, tab, English. `pip install 'rlhf_jax[translation]'`.

Expected curve. The learned reward climbs; whether chrF follows depends on how well the reward model ranks.

    python experiments/translation.py --out runs/translation --seeds 0,1,2 [--pairs FILE] [--smoke]
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.algorithms import sft
from rlhf_jax.data.bpe import train_bpe
from rlhf_jax.data.tokenizer import BPETokenizer
from rlhf_jax.errors import UserError, missing_extra
from rlhf_jax.feedback import teachers
from rlhf_jax.generation.drawing import greedy
from rlhf_jax.quickstart.report import Report, Result, StageTime
from rlhf_jax.recipes import bench, pooled_reward, sequences
from rlhf_jax.recipes.bench import Bench
from rlhf_jax.recipes.phrases import load_pairs
from rlhf_jax.recipes.run_folder import RunFolder, command_line, open_run
from rlhf_jax.recipes.sequences import FREE, Judged, Prompts, Task
from rlhf_jax.types import PreferenceBatch, Rollout

try:
    from sacrebleu.metrics.bleu import BLEU  # pyright: ignore[reportMissingImports]
    from sacrebleu.metrics.chrf import CHRF  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise missing_extra(error.name or "sacrebleu", "translation", "score translations") from error

WHO = ("base", "base, extra updates", "AC-HF", "PD")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(bench.Settings):
    """All numbers of a run, and its flags."""

    pairs: str = ""  # a file of German, tab, English; nothing fetches Debian's dictionary
    common: int = 10  # pairs in which the words of held-out and feedback phrases occur at least
    held_out: int = 1_000
    feedback: int = 6_000  # phrases whose translations nobody is shown
    prompt_length: int = 15
    length: int = 15
    base_updates: int = 3_000
    batch: int = 96
    comparisons: int = 8_000  # scripted
    turns: int = 100
    actor_rate: float = 6e-4
    kl_coefficient: float = 0.3  # reward (log-odds) per nat, here and in beta: AC-HF and PD have one optimum
    beta: float = 0.3


SMOKE = {"common": 1, "held_out": 12, "feedback": 24, "vocabulary": 300, "width": 32, "layers": 1, "base_updates": 4,
         "comparisons": 64, "turns": 2, "answers": 64, "pool": 64, "chunk": 2}  # fmt: skip


class Data(NamedTuple):
    """Pairs as tokens."""

    task: Task
    tokenizer: BPETokenizer
    demonstrations: sft.Batch
    feedback: Prompts  # truth: row numbers
    held_out: Prompts
    pairs: tuple[list[tuple[str, str]], list[tuple[str, str]]]  # of feedback, and held out


def prepare(pairs: list[tuple[str, str]], config: Config, seed: int) -> Data:
    """Holds phrases of common words out, some to be measured and some for feedback; packs."""
    words = lambda pair: {(side, word) for side in (0, 1) for word in re.findall(r"\w+", pair[side].lower())}
    times = Counter(word for pair in pairs for word in words(pair))
    order = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    common = [pair for pair in order if min((times[word] for word in words(pair)), default=0) >= config.common]
    if len(common) < config.held_out + config.feedback:
        raise UserError(
            f"{config.held_out + config.feedback} pairs of common words are needed; {len(common)} are there"
        )
    apart = common[: config.held_out + config.feedback]
    hidden = set(apart)
    shown = [pair for pair in order if pair not in hidden]
    tokenizer = train_bpe((f" {text}" for pair in shown for text in pair), vocab_size=config.vocabulary)
    task, tokens = bench.task(tokenizer, config), lambda text: tokenizer.encode(f" {text}")
    fits = lambda pair: len(tokens(pair[0])) < config.prompt_length and len(tokens(pair[1])) < config.length
    shown, held, rated = (
        [pair for pair in part if fits(pair)] for part in (shown, apart[: config.held_out], apart[config.held_out :])
    )
    ask = lambda rows: [[*tokens(german), tokenizer.bos_id] for german, _ in rows]
    asked, feedback, tested = (bench.prompts(task, ask(rows), jnp.arange(len(rows))) for rows in (shown, rated, held))
    demonstrations = bench.demonstrations(task, asked, [tokens(english) for _, english in shown])
    return Data(task, tokenizer, demonstrations, feedback, tested, (rated, held))


# --- feedback and figures ---------------------------------------------------------------------------------------------


def judge(rollout: Rollout, truth: Any, states: Array, *, scorer: Any) -> Judged:
    """The learned reward, in log-odds; nothing is limited."""
    scores = pooled_reward.score(scorer, pooled_reward.pooled(states, rollout.response_mask))
    return Judged(scores, jnp.zeros_like(scores), jnp.zeros(scores.shape, bool))


def written(data: Data, responses: Array) -> list[str]:
    return [data.tokenizer.decode(ids).strip() for ids in np.asarray(responses).tolist()]


def compared(data: Data, base: Any, key: Array, count: int) -> tuple[PreferenceBatch, PreferenceBatch]:
    """Features of the base's translations, two to a phrase, and which has the higher chrF; a fifth held back."""
    keys, chrf = jax.random.split(key, 4), CHRF()
    rows = data.feedback.rows(jax.random.randint(keys[0], (count,), 0, len(data.pairs[0])))
    references = [data.pairs[0][i][1] for i in np.asarray(rows.truth)]

    @jax.jit
    def sample(base: Any, rows: Prompts, key: Array) -> tuple[Array, Array]:
        rollout = sequences.act(data.task, base, rows, key)
        return pooled_reward.features(data.task, base, rollout), rollout.responses

    features, said = zip(*(sample(base, rows, k) for k in keys[1:3]), strict=True)
    one, other = (
        jnp.array([chrf.sentence_score(text, [right]).score for text, right in zip(texts, references, strict=True)])
        for texts in (written(data, responses) for responses in said)
    )
    answers, cut = teachers.compare(one, other, keys[3], equal_within=1e-3), int(0.8 * count)
    parts = [jax.tree.map(lambda x, part=part: x[part], (*features, answers)) for part in (np.s_[:cut], np.s_[cut:])]
    learnt, fresh = (teachers.preference_batch(*part) for part in parts)
    return learnt, fresh


def measure(data: Data, see: Any, params: Any) -> dict[str, Any]:
    """Greedy translations of held-out phrases: mean chrF of a phrase, corpus BLEU, half a 95 % interval of each."""
    texts, references = written(data, see(params, data.held_out)), [english for _, english in data.pairs[1]]
    chrf = CHRF()
    each = [chrf.sentence_score(text, [right]).score for text, right in zip(texts, references, strict=True)]
    bleu = BLEU().corpus_score(texts, [references], n_bootstrap=500)
    return {
        "chrF": {"score": float(np.mean(each)), "half": bootstrap(each)},
        "BLEU": {"score": float(bleu.score), "half": float(bleu._ci)},
        "each": [float(score) for score in each],
        "said": texts[:40],
    }


def bootstrap(scores: Any) -> float:
    """Half the 95 % bootstrap interval of a mean."""
    rows = np.random.default_rng(0).integers(0, len(scores), (1_000, len(scores)))
    low, high = np.percentile(np.asarray(scores)[rows].mean(axis=1), (2.5, 97.5))
    return float(high - low) / 2.0


def run_seed(folder: RunFolder, config: Config, seed: int, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    data, found, each = prepare(pairs, config, seed), {}, {}
    own = Bench(folder, seed, data.task, config)
    answer = functools.partial(sequences.act, data.task, key=own.key(9), choose=greedy)
    see = jax.jit(lambda params, prompts: answer(params, prompts).responses)

    def judged(name: str, params: Any) -> None:
        told = folder.once(f"seed_{seed}/{name} measured", lambda: measure(data, see, params))
        said = zip(data.pairs[1], told.pop("said"), strict=False)
        rows = [{"german": german, "reference": english, "said": text} for (german, english), text in said]
        folder.samples(f"seed_{seed}/{name}", rows)
        each[name] = np.array(told.pop("each"))
        if "base, extra updates" in each:  # paired, over the same phrases
            gains = each[name] - each["base, extra updates"]
            told["gain"] = {"score": float(gains.mean()), "half": bootstrap(gains)}
        found[name] = told

    base = bench.base_model(own, data.demonstrations)
    judged("base", base)
    judged("base, extra updates", bench.trained_on(own, base, data.demonstrations))
    learnt, fresh = compared(data, base, own.key(3, 0), config.comparisons)
    scorer = jax.jit(pooled_reward.fit)(learnt)
    found["reward model"] = {"accuracy": float(pooled_reward.accuracy(scorer, fresh))}
    verdict = functools.partial(judge, scorer=scorer)
    for name, params in bench.ac_hf(own, base, data.feedback, verdict, {"AC-HF": FREE}):
        judged(name, params)
    judged("PD", bench.pd(own, base, data.feedback, verdict, FREE))
    return found


def report(folder: RunFolder, config: Config, found: dict[int, dict[str, Any]], smoke: bool) -> Report:
    rows, first = [], next(iter(found))
    for seed, told in found.items():
        for metric, who in ((metric, who) for metric in ("chrF", "BLEU") for who in WHO):
            score = told[who][metric]
            rows.append(Result(f"seed {seed}, {who}: {metric}", f"{score['score']:.1f}", f"± {score['half']:.1f}"))
        for who in WHO[2:]:
            gain = told[who]["gain"]
            note = f"± {gain['half']:.1f} against the base's extra updates, paired"
            rows.append(Result(f"seed {seed}, {who}: gain in chrF", f"{gain['score']:+.1f}", note))
        accuracy = told["reward model"]["accuracy"]
        rows.append(Result(f"seed {seed}: reward model, unseen scripted pairs", f"{accuracy:.1%}"))
    curves = functools.partial(bench.curves, folder, first)
    return Report(
        title="Translation from scripted comparisons by chrF" + " (smoke run)" * smoke,
        summary="Greedy translations of held-out phrases. AC-HF and PD have to beat the base trained on.",
        results=rows,
        plots=[
            curves("Base", "nats per token", WHO[:1], "sft/loss"),
            curves("Learned reward", "log-odds", WHO[2:3], "human/reward"),
        ],
        stages=[StageTime(name, seconds) for name, seconds in folder.seconds.items()],
        config=dataclasses.asdict(config),
        notes=["All comparisons are scripted by chrF; no person took part.", f"Curves are those of seed {first}."],
    )


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/translation", smoke=SMOKE, arguments=arguments)
    pairs = load_pairs(config.pairs)
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
