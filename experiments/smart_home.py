"""Smart home: spoken-style commands to intent and slots, from scripted feedback, without opening the house unasked.

Method. A decoder of about half a million weights, from scratch, reads a command in English or German and writes
the intent, its slots, and "<do>" or "<ask>": act at once, or have the household confirm.
  * Base (SFT): commands of the *demonstrated* templates with hassil's parse; "<do>" and "<ask>" by a coin.
  * Feedback, on commands of the *feedback* templates, whose parses no model is shown. Verifiable: the answer agrees
    with hassil or not. Scripted comparisons: a household compares two answers that both do the right thing; it does not
    want to be asked; 5 % of its answers are mistakes. A Bradley-Terry reward model on the base's frozen embeddings
    learns them.
  * Cost: unlocking, or opening a door, gate or garage, without asking. A Lagrange multiplier holds its share among
    commands that open the house at `limit`. Few commands do: they are a fifth of the feedback's.
  * AC-HF with and without the constraint, GRPO and PD with it, and the base trained on for as many extra updates of as
    many rows on its demonstrations. The PD student starts from its teacher, the base: without human reward it would
    stay there.
All figures are measured on *unseen* templates: exact match of intent and all slots (greedy), violations per 1,000
commands that open the house and needless questions (sampled).

Data. Templates of home-assistant-intents (Apache-2.0), sampled and parsed back by hassil (Apache-2.0); tested with
2026.10.27 and 3.12.1: `pip install 'rlhf_jax[smart-home]'`. Nobody took part: all feedback is scripted.

Expected curve. Agreement on feedback templates climbs from the base's level; unconstrained AC-HF stops asking, and
constrained runs keep asking where the house would be opened.

    python experiments/smart_home.py --out runs/smart_home --seeds 0,1,2 [--smoke]
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import evaluation
from rlhf_jax.data.home_commands import Command, sample_commands
from rlhf_jax.feedback import teachers
from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.drawing import greedy
from rlhf_jax.quickstart.report import Report, Result, StageTime
from rlhf_jax.recipes import bench, pooled_reward, sequences
from rlhf_jax.recipes.bench import Bench
from rlhf_jax.recipes.commands import Data, Seen, look, prepare
from rlhf_jax.recipes.run_folder import RunFolder, command_line, compile_quickly, open_run, script, versions
from rlhf_jax.recipes.sequences import FREE, Constraint, Judged, Prompts
from rlhf_jax.types import PreferenceBatch, Rollout

WHO = ("base", "base, extra updates", "AC-HF, no constraint", "AC-HF", "GRPO", "PD")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(bench.Settings):
    """All numbers of a run, and its flags."""

    templates: int = 10_000  # at most this many per language
    per_template: int = 6  # commands sampled from each
    demonstrated: float = 0.25  # share of the templates
    unseen: float = 0.2
    vocabulary: int = 700
    width: int = 96
    prompt_length: int = 26
    length: int = 18
    base_updates: int = 1_200
    turns: int = 150
    actor_rate: float = 6e-4
    comfort: float = 3.0  # most that the household's reward model adds to the 1 of a right answer
    beta: float = 0.5
    limit: float = 0.01  # of violations among commands that open the house
    multiplier: float = 3.0  # to start from
    multiplier_rate: float = 0.5
    most: float = 0.05  # violations that a turn counts at most: a fast multiplier then climbs evenly
    judged: int = 1_500  # unseen commands that are measured, and answers to those that open the house


SMOKE = {"templates": 12, "per_template": 1, "vocabulary": 500, "width": 32, "layers": 1, "base_updates": 4,
         "batch": 32, "base_rate": 6e-4, "comparisons": 64, "turns": 2, "answers": 64, "pool": 64, "chunk": 2,
         "judged": 8}  # fmt: skip


def judge(rollout: Rollout, truth: Any, _: Array, *, mark: dict[str, int], liked: Any, comfort: float) -> Judged:
    """1 to 1 + `comfort` for agreement with hassil, by what the household's reward model says; 0 for anything else.

    The model is asked about right answers alone, and its score is squashed: a wrong one could please it without end.
    """
    seen = look(rollout, truth, mark)
    rewards = jnp.where(seen.right, 1.0 + comfort * jax.nn.sigmoid(liked(rollout)), 0.0)
    return Judged(rewards, seen.violates.astype(jnp.float32), truth[1])


def compared(data: Data, base: Any, key: Array, *, count: int, mistakes: ArrayLike) -> PreferenceBatch:
    """Features of the base's answers, two to each of some feedback commands, and the household's choices.

    It is asked where both agree with hassil; other pairs weigh nothing.
    """
    keys = jax.random.split(key, 3)
    rows = data.feedback.rows(jax.random.randint(keys[0], (count,), 0, len(data.feedback.tokens)))
    rollout = sequences.act(data.task, base, rows, keys[1], samples=2)
    seen = look(rollout, sequences.repeated(rows.truth, 2), data.tokenizer.control_ids)
    (one, other), right, features = (
        (x[0::2], x[1::2]) for x in (-1.0 * seen.asks, seen.right, pooled_reward.words(base, rollout))
    )
    answers = teachers.compare(one, other, keys[2], mistakes=mistakes, equal_within=0.5)
    answers = answers._replace(given=answers.given & right[0] & right[1])
    return teachers.preference_batch(*features, answers)


def measure(data: Data, see: Any, params: Any, key: Array) -> dict[str, Any]:
    """What a policy does with unseen templates; greedy for exact match, sampled for questions and violations."""
    best, said = see(params, data.unseen, key, True)
    drawn = see(params, data.unseen, key, False)[0]
    risky = see(params, data.openings, key, False)[0]
    harmless = ~np.asarray(data.unseen.truth[1])
    found = {"exact": best.right, "questions": np.asarray(drawn.asks)[harmless], "violations": risky.violates}
    end = data.task.end_token
    say = lambda ids: data.tokenizer.decode(ids[: ids.index(end) if end in ids else None], control_tokens=True)
    said = [say(ids) for ids in np.asarray(said[:40]).tolist()]
    right = np.asarray(best.right).astype(int).tolist()
    return {name: float(np.mean(value)) for name, value in found.items()} | {"right": right, "said": said}


def run_seed(folder: RunFolder, config: Config, seed: int, commands: list[Command]) -> dict[str, Any]:
    shares = {"demonstrated": config.demonstrated, "unseen": config.unseen, "judged": config.judged}
    data = prepare(commands, config, seed, **shares)
    own, mark = Bench(folder, seed, data.task, config), data.tokenizer.control_ids

    @jax.jit
    def see(params: Any, prompts: Prompts, key: Array, best: Array) -> tuple[Seen, Array]:
        choose = lambda keys, logits: jnp.where(best, greedy(keys, logits), categorical(keys, logits))
        rollout = sequences.act(data.task, params, prompts, key, choose=choose)
        return look(rollout, prompts.truth, mark), rollout.responses

    def judged(name: str, train: Callable[[], Any]) -> dict[str, Any]:
        params = train()
        told = folder.once(f"seed_{seed}/{name} measured", lambda: measure(data, see, params, own.key(9)))
        rows = zip(data.commands, told.pop("said"), strict=False)
        rows = [{"command": row.text, "parse": row.parse, "said": said} for row, said in rows]
        folder.samples(f"seed_{seed}/{name}", rows)
        return told

    ask = jax.jit(functools.partial(compared, data, count=config.comparisons))

    def household() -> Any:
        """The reward model of its comparisons."""
        return jax.jit(pooled_reward.fit)(ask(base, own.key(3, 0), mistakes=0.05))

    def accuracy() -> float:
        """How often that is right about fresh ones."""
        return float(jax.jit(pooled_reward.accuracy)(scorer, ask(base, own.key(3, 2), mistakes=0.0)))

    base = bench.base_model(own, data.demonstrations)
    train = {"base": lambda: base, "base, extra updates": lambda: bench.trained_on(own, base, data.demonstrations)}
    every = lambda arms: {name: functools.partial(judged, name, arm) for name, arm in arms.items()}
    *plain, scorer = folder.together(every(train) | {"household": household}).values()
    liked = lambda rollout: pooled_reward.score(scorer, pooled_reward.words(base, rollout))
    verdict = functools.partial(judge, mark=mark, liked=liked, comfort=config.comfort)
    limited = Constraint(config.limit, config.multiplier_rate, config.multiplier, config.most)
    arms = bench.ac_hf(own, base, data.feedback, verdict, {"AC-HF, no constraint": FREE, "AC-HF": limited}) | {
        "GRPO": lambda: bench.grpo(own, base, data.feedback, verdict, limited),
        "PD": lambda: bench.pd(own, base, data.feedback, verdict, limited),
    }
    *learnt, right_about = folder.together(every(arms) | {"accuracy": accuracy}).values()
    found: dict[str, Any] = dict(zip(WHO, [*plain, *learnt], strict=True))
    right = {name: np.array(told.pop("right")) for name, told in found.items()}
    for name in WHO[1:]:  # paired, over the same commands: a gain is 2 · (share of wins) - 1
        wins = evaluation.win_rate(right[name], right["base, extra updates"], np.random.default_rng(0))
        gain = {f"gain{end}": 2.0 * value - 1.0 for end, value in zip(("", " low", " high"), wins, strict=True)}
        found[name] |= gain
    return found | {"household model": {"accuracy": right_about}}


def report(folder: RunFolder, config: Config, found: dict[int, dict[str, Any]], smoke: bool) -> Report:
    rows, first = [], next(iter(found))
    for seed, told in found.items():
        for who in WHO:
            gain = "{:+.1%} ({:+.1%} to {:+.1%}) against the base's extra updates".format(
                *(told[who].get(f"gain{end}", 0.0) for end in ("", " low", " high"))
            )
            rows += [
                Result(f"seed {seed}, {who}: exact match", f"{told[who]['exact']:.1%}", gain if who in WHO[2:] else ""),
                Result(f"seed {seed}, {who}: violations per 1,000 openings", f"{1000 * told[who]['violations']:.0f}"),
                Result(f"seed {seed}, {who}: needless questions", f"{told[who]['questions']:.1%}"),
            ]
        accuracy = told["household model"]["accuracy"]
        rows.append(Result(f"seed {seed}: household's reward model, fresh scripted pairs", f"{accuracy:.1%}"))
    curves = functools.partial(bench.curves, folder, first)
    return Report(
        title="Smart home: commands to intents from scripted feedback" + " (smoke run)" * smoke,
        summary="Exact match on unseen templates, and how often the house is opened without asking.",
        results=rows,
        plots=[
            curves("Reward", "agreement and comfort", WHO[2:5], "human/reward"),
            curves("Violations on feedback templates", "share of openings", WHO[2:5], "constraint/cost"),
            curves("Multiplier", "λ", WHO[3:5], "constraint/multiplier"),
            curves("Base", "nats per token", WHO[:1], "sft/loss"),
        ],
        stages=[StageTime(name, seconds) for name, seconds in folder.seconds.items()],
        config=dataclasses.asdict(config),
        notes=[
            "All feedback is scripted: agreement with hassil, and a scripted household's comparisons.",
            f"Intervals are 95 % paired bootstrap intervals over commands. Curves are those of seed {first}.",
        ],
    )


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/smart_home", smoke=SMOKE, arguments=arguments)
    if smoke:
        compile_quickly()
    packages = ("home-assistant-intents", "hassil", "tokenizers")
    needed = versions("smart-home", "sample and parse commands", *packages)
    with open_run(out, dataclasses.asdict(config) | {"smoke": smoke, "versions": needed}) as folder:
        sample = functools.partial(sample_commands, per_template=config.per_template, most=config.templates)
        commands = [Command(**row) for row in folder.once("commands", lambda: [row._asdict() for row in sample()])]
        found = {}
        for seed in seeds:
            found[seed] = folder.once(f"seed_{seed}", lambda seed=seed: run_seed(folder, config, seed, commands))
            results = {"feedback": "scripted", "smoke": smoke, "seeds": found}
            folder.finish(results, report(folder, config, found, smoke))
            print(seed, {who: {k: round(v, 3) for k, v in found[seed][who].items()} for who in WHO})


if __name__ == "__main__":
    script(main)
