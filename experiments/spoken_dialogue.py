"""Spoken dialogue: replies that people's ratings of chats move, and what reward models of them learn.

Method. A small decoder learns from scratch to answer what was said last. Two linear Bradley-Terry reward models read
its frozen lower layers, averaged over what was said, and learn which of two chats was rated higher:
  * as collected: any two chats, and the log of their length is among the features;
  * length removed: chats of equal length only, length regressed out of features, and of scores of the base's replies.
AC-HF trains an actor for each; PD trains a smaller student from the base's soft targets, without and with human reward
(length removed). A judge as the second kind, from the other half of the chats and another layer, compares replies to
prompts of chats that nothing was trained on, as typed and as a recogniser might have misheard them (scripted: one word
in seven is dropped or becomes another with the same first letter; real speech is not involved).

Data. chitchat-dataset 0.9.0 (MIT), fetched by pip and verified; chats left at the default rating are not rated. People
rated whole chats, mostly by length, and the judge is only as good as its accuracy on held-out chats says, which the
table shows first: **nothing here shows that a reward model learnt wit.** A higher score means more like replies in
chats that were rated higher.

Expected curve. On the reward as collected replies should grow with the reward and the judge's score should not follow:
length hacking; with length removed they should stay as long as the base's. On the one seed measured so far neither
holds to the end: replies grow from 14 to 20 tokens and come back to 15, and with length removed shrink to 8.

    python experiments/spoken_dialogue.py --out runs/spoken_dialogue --seeds 0,1,2 [--smoke]
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import evaluation, kl, masking
from rlhf_jax.data.bpe import train_bpe
from rlhf_jax.data.fetch import fetch
from rlhf_jax.data.tokenizer import ByteTokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.dialogues import (
    CHITCHAT,
    Dialogue,
    load_dialogues,
)
from rlhf_jax.feedback.ratings import load_lexicon
from rlhf_jax.models import policies
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.quickstart.report import Plot, Report, Result, Sample, StageTime
from rlhf_jax.recipes.chat_policies import ac_hf, base_model, students
from rlhf_jax.recipes.chat_rewards import accuracy, calibrated, fit, score, seen_by
from rlhf_jax.recipes.chats import Config, Policy, World, exchanges, left, misheard, reply
from rlhf_jax.recipes.run_folder import RunFolder, command_line, open_run
from rlhf_jax.training.state import merge_params

ARMS = ("as collected", "length removed")
SMOKE = {"synthetic": True, "prompt_length": 6, "response_length": 6, "width": 16, "base_steps": 4, "base_batch": 8,
         "dialogue_tokens": 16, "comparisons": 64, "turns": 2, "batch": 8, "minibatches": 2, "student_steps": 2,
         "teacher_samples": 16, "eval_prompts": 16}  # fmt: skip


def made_up(rng: np.random.Generator) -> list[Dialogue]:
    """Made-up dialogues: words that people rated, a turn each; the rating grows with their mean and their number."""
    words = [item for item in load_lexicon() if item.text.isalpha() and item.text.isascii()]
    chats = [[words[i] for i in rng.integers(len(words), size=rng.integers(3, 9))] for _ in range(200)]
    return [Dialogue(tuple(w.text for w in c), 5 + sum(w.mean for w in c) / len(c) + len(c) / 2) for c in chats]


def open_world(config: Config, seed: int) -> World:
    rng = np.random.default_rng(seed)
    chats = made_up(rng) if config.synthetic else load_dialogues(fetch(CHITCHAT))
    order = rng.permutation(len(chats))
    train, held_out = ([chats[i] for i in half] for half in np.array_split(order, 2))
    turns = [turn for chat in train for turn in chat.turns]
    tokenizer = ByteTokenizer() if config.synthetic else train_bpe(turns, vocab_size=config.vocabulary)
    network = TransformerConfig(
        vocab_size=tokenizer.vocab_size, width=config.width, num_layers=config.layers, num_heads=4, num_kv_heads=2,
        head_dim=config.width // 4, mlp_width=3 * config.width, max_length=2 * config.dialogue_tokens,
    )  # fmt: skip
    return World(config, tokenizer, Transformer(network), train, held_out)


def judge_all(world: World, seed: int, base: Policy, agents: dict[str, Policy], judge: dict) -> tuple[dict, list[dict]]:
    """Every policy answers held-out prompts, as typed and misheard: figures, and what was said."""
    config, rng = world.config, np.random.default_rng((seed, 8))
    asked = [a for a, _ in exchanges(world.held_out)]
    asked = [asked[i] for i in rng.permutation(len(asked))[: config.eval_prompts]]
    reference = policies.token_policy(world.model, prompt_length=config.prompt_length)
    figures, rows = {}, [{"prompt": text} for text in asked]
    for noisy, texts in {"": asked, ", misheard": misheard(asked, rng, config.noise)}.items():
        prompts, scores = left(world, texts), {}
        for number, (name, policy) in enumerate(agents.items()):
            keys = jax.random.split(world.key(seed, 9, number), len(asked))
            rollout = jax.jit(lambda *a, policy=policy: reply(world, policy, a[:2], a[2], tap=None))(*prompts, keys)
            scores[name] = np.asarray(score(judge, *seen_by(world, base, rollout, config.judge_layer)))
            log_probs = reference(merge_params(base.trained, base.frozen), rollout.inputs)
            distance = jnp.sum(
                kl.k1(*masking.zero_outside(rollout.response_mask, rollout.raw_log_probs, log_probs)), -1
            )
            said = [[int(t) for t in r[m]] for r, m in zip(*map(np.asarray, (rollout.responses, rollout.response_mask)),
                                                           strict=True)]  # fmt: skip
            figures[name + noisy] = {
                "length": float(np.mean([len(r) for r in said])),
                "distinct-2": evaluation.distinct_n(said, 2),
                "KL": float(distance.mean()),
                "judge": float(scores[name].mean()),
                "win": evaluation.win_rate(scores[name], scores[against(name)], np.random.default_rng(0))._asdict(),
            }
            if not noisy:
                for row, answer in zip(rows, said, strict=True):
                    row[name] = world.tokenizer.decode(answer)
    return figures, rows


def against(name: str) -> str:
    return "PD" if name.startswith("PD") else "base"


def one_seed(folder: RunFolder, seed: int, config: Config) -> dict[str, Any]:
    world = open_world(config, seed)
    base = base_model(folder, seed, world)
    asked = [a for a, _ in exchanges(world.train)]
    order = np.random.default_rng((seed, 10)).permutation(len(asked))
    prompts = left(world, [asked[i] for i in order[: config.teacher_samples]])
    keys = jax.random.split(world.key(seed, 11), len(prompts[0]))
    own = jax.jit(lambda *a: reply(world, base, a[:2], a[2], tap=None))(*prompts, keys)
    layers = {"as collected": config.trunk, "length removed": config.trunk, "judge": config.judge_layer}
    scorers, told = {}, {}
    for name, layer in layers.items():
        matched, other = name != "as collected", name == "judge"
        scorer = fit(world, seed, base, world.held_out if other else world.train, layer, matched=matched)
        unseen = world.train if other else world.held_out
        told[name] = folder.once(f"seed_{seed}/accuracy {name}",
                                 partial(accuracy, world, seed, base, scorer, layer, unseen))  # fmt: skip
        scorers[name] = calibrated(scorer, *seen_by(world, base, own, layer), matched=matched)
    agents = {"base": base}
    for arm in ARMS:
        name = f"AC-HF, {arm}"
        agents[name] = ac_hf(folder, seed, world, base, prompts, scorers[arm], scorers["judge"], name)
    agents |= students(folder, seed, world, base, prompts, scorers["length removed"])
    judged = folder.once(f"seed_{seed}/judged", lambda: judge_all(world, seed, base, agents, scorers["judge"]))
    folder.samples(f"seed_{seed}", judged[1])
    return {"accuracy": told, "policies": judged[0], "samples": judged[1]}


def report(folder: RunFolder, found: dict[int, dict[str, Any]], config: Config) -> None:
    rows, first = [], min(found)
    for seed, result in found.items():
        for name, told in result["accuracy"].items():
            rows += [Result(f"seed {seed}: {name}, held-out {what}", f"{value:.1%}") for what, value in told.items()]
        for name, told in result["policies"].items():
            win = told["win"]
            words = f"length {told['length']:.1f}, distinct-2 {told['distinct-2']:.2f}, KL {told['KL']:.1f} nats"
            rows.append(Result(f"seed {seed}: {name} ({words}), judge's wins", f"{win['rate']:.1%}",
                               f"{win['low']:.1%} to {win['high']:.1%}"))  # fmt: skip
    plots = [
        Plot(title=title, x_label="turn", y_label=unit, series=[
            folder.series(f"seed_{first}/AC-HF, {arm}", metric, arm) for arm in ARMS
        ], note=f"Seed {first}.")
        for title, metric, unit in (("Length of replies", "policy/length", "tokens"),
                                    ("The reward that is learned", "human/score", "standard deviations"),
                                    ("The judge that only watches", "judge/score", "standard deviations"))
    ]  # fmt: skip
    samples = [Sample(r["prompt"], r["base"], r["AC-HF, length removed"]) for r in found[first]["samples"][:8]]
    told = {seed: {k: v for k, v in result.items() if k != "samples"} for seed, result in found.items()}
    notes = ["Wins: AC-HF against the base, PD with human reward against PD without.",
             "Ratings are of whole chats and mostly of their length; no reward model here is shown to know wit.",
             "Misheard prompts are scripted noise on text; no speech was synthesised or recognised."]  # fmt: skip
    page = Report(title="Replies moved by ratings of chats", results=rows, plots=plots, samples=samples, notes=notes,
                  stages=[StageTime(n, s) for n, s in folder.seconds.items()],
                  config=dataclasses.asdict(config))  # fmt: skip
    folder.finish({"synthetic": config.synthetic, "seeds": told}, page)


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/spoken_dialogue", smoke=SMOKE, arguments=arguments)
    with open_run(out, {"smoke": smoke, "data": CHITCHAT.member_sha256} | dataclasses.asdict(config)) as folder:
        found = {}
        for seed in seeds:
            found[seed] = one_seed(folder, seed, config)
            report(folder, found, config)
            for name, told in found[seed]["policies"].items():
                print(seed, name, {k: round(v, 3) for k, v in told.items() if k != "win"}, told["win"])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
