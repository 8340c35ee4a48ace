"""The quickstart from end to end: material, stages, results, report; and how it stops and resumes."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import evaluation
from rlhf_jax.data.fetch import MODEL, RATINGS, cached_path, fetch
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import baselines
from rlhf_jax.feedback.comparisons import Comparisons, comparison_quality, mean_comparisons, single_rater_comparisons
from rlhf_jax.quickstart import stages
from rlhf_jax.quickstart.console import Console
from rlhf_jax.quickstart.context import Run
from rlhf_jax.quickstart.judging import Judged
from rlhf_jax.quickstart.judging import judged as judge_policy
from rlhf_jax.quickstart.material import load_full, load_tiny
from rlhf_jax.quickstart.report import Bin, Interval, Plot, Report, Result, Sample, Series, StageTime, write_report
from rlhf_jax.quickstart.rewards import reward_models
from rlhf_jax.quickstart.settings import Settings
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import Interrupted, StopRequest, run, stop_on_signals
from rlhf_jax.training.memory import peak_memory_gib, release_memory
from rlhf_jax.training.metrics import MetricsWriter, host_metrics, read_metrics
from rlhf_jax.training.sharding import make_mesh

__all__ = ["quickstart"]

SAVE_EVERY = 8
HELD_OUT_PAIRS = 3_000


class Folder:
    """A run's folder: configuration, metrics, checkpoints, samples, report. One process at a time writes to it."""

    def __init__(self, path: Path, settings: Settings, *, tiny: bool, resume: bool, console: Console) -> None:
        self.path, self.console = path, console
        self.stop: StopRequest | None = None
        self.seconds: dict[str, float] = {}
        config = json.loads(json.dumps({"tiny": tiny, "settings": dataclasses.asdict(settings)}))
        written = path / "config.json"
        if resume:
            if not written.is_file():
                raise UserError(
                    f"{path} holds no run to resume: it has no config.json; leave --resume out to start one"
                )
            if (before := json.loads(written.read_text())) != config:
                changed = sorted(
                    name
                    for name in config["settings"]
                    if before.get("settings", {}).get(name) != config["settings"][name]
                )
                raise UserError(
                    f"{path} was started with other options ({', '.join(changed) or 'tiny'}); resume it with the same "
                    "ones, or choose another --out"
                )
        elif written.is_file():
            raise UserError(f"{path} already holds a run; add --resume to go on with it, or choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        write_text(written, json.dumps(config, indent=2))

    def loop(self, stage: str, step: Callable[..., Any], state: Any, total: int) -> Any:
        """Runs a stage from its last checkpoint, or from the start; keeps the whole state of every few steps."""
        name = file_name(stage)
        with Checkpoints(self.path / "checkpoints" / name, keep=1) as checkpoints:
            done = checkpoints.latest() or 0
            if done:
                state = checkpoints.restore(state).state
            began = time.perf_counter()
            metrics_path = self.path / "metrics" / f"{name}.jsonl"
            with (
                self.console.stage(stage, total, start=done) as bar,
                MetricsWriter(metrics_path, resume_after=done) as writer,
            ):

                def on_step(index: int, metrics: Any) -> None:
                    numbers = host_metrics(metrics)
                    writer.write(index, numbers)
                    bar.update(index, numbers)

                state = run(
                    step,
                    state,
                    range(done, total),
                    save=checkpoints.save,
                    save_every=SAVE_EVERY,
                    on_step=on_step,
                    stop=self.stop,
                )
            self.seconds[stage] = time.perf_counter() - began
        release_memory()
        return state

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """What a stage has measured, one entry per step."""
        return read_metrics(self.path / "metrics" / f"{file_name(stage)}.jsonl")

    @contextlib.contextmanager
    def timed(self, stage: str, total: int = 1) -> Iterator[Any]:
        """Shows and times a stage that is done again when the run resumes."""
        if self.stop is not None and self.stop.asked:
            raise Interrupted(0, saved=False)
        began = time.perf_counter()
        with self.console.stage(stage, total) as bar:
            yield bar
        self.seconds[stage] = time.perf_counter() - began
        release_memory()


def file_name(stage: str) -> str:
    """A stage's name as a file name."""
    return stage.lower().replace(": ", "-").replace(" ", "-")


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def quickstart(out: Path, settings: Settings, *, tiny: bool, resume: bool, console: Console) -> dict[str, Any]:
    """Runs everything and leaves a folder with the report; returns the results as plain data.

    Raises:
      UserError: with one sentence for the user.
      Interrupted: at Ctrl-C, after saving.
    """
    folder = Folder(out, settings, tiny=tiny, resume=resume, console=console)
    began = time.perf_counter()
    if not tiny:
        fetch_all(console)
    began_work = time.perf_counter()
    with stop_on_signals() as folder.stop:
        with folder.timed("model and ratings") as bar:
            material = load_tiny(settings) if tiny else load_full(settings)
            bar.update(1)
        mesh = make_mesh(devices=jax.devices()[: settings.devices])
        context = Run(settings, material, mesh, folder.loop)
        base = stages.base_model(context)
        models, held_out = reward_models(context, base)
        with folder.timed("samples of the base model") as bar:
            samples = stages.teacher_samples(context, base, models)
            bar.update(1)
        actor = stages.ac_hf(context, base, models, samples)
        plain, human = stages.policy_distillation_students(context, base, samples)
        policies = {"base": base, "ac_hf": actor, "pd": plain, "pd_human": human}
        judged: dict[str, Judged] = {}
        with folder.timed("judging", len(policies)) as bar:
            for number, (name, policy) in enumerate(policies.items()):
                judged[name] = judge_policy(context, policy, base, models, context.key(6, number))
                bar.update(number + 1)
    results = summarise(context, judged, held_out)
    results["seconds"] = {
        "stages": dict(folder.seconds),
        "after_downloads": time.perf_counter() - began_work,
        "total": time.perf_counter() - began,
    }
    results["peak_memory_gib"] = peak_memory_gib()
    write_text(out / "results.json", json.dumps(results, indent=2))
    write_samples(out / "samples.jsonl", judged)
    page = report(folder, context, judged, results)
    write_report(out / "report.html", page)
    console.results(page.results)
    console.samples(page.samples[:3])
    return results


def fetch_all(console: Console) -> None:
    """Fetches model and ratings through the package client, saying what for."""
    for artefact in (MODEL, RATINGS):
        if cached_path(artefact).is_file():
            continue
        console.say(f"Fetching {artefact.purpose} ({artefact.package} {artefact.version}, {artefact.license})")
        with console.stage(f"download {artefact.package}", artefact.size, unit="bytes") as bar:
            fetch(artefact, progress=lambda told: bar.update(told.done, total=told.total, note=told.step))


# --- results ----------------------------------------------------------------------------------------------------------


def summarise(context: Run, judged: dict[str, Judged], held_out: np.ndarray) -> dict[str, Any]:
    """All figures of a run, from what the stages have left."""
    settings, material = context.settings, context.material
    train, unseen = list(material.train), list(material.judge)
    pairs = single_rater_comparisons(context.rng(2, 0), train, settings.comparisons)  # those it was trained on
    test = mean_comparisons(context.rng(7), unseen, HELD_OUT_PAIRS, min_gap=1.0)
    texts = [item.text for item in unseen]
    tf_idf = {"analyzer": "char_wb", "ngrams": (1, 4)} if material.words else {}
    accuracy = {
        "reward model": baselines.pair_accuracy(held_out, test),
        "tf-idf": baselines.pair_accuracy(
            baselines.tfidf_scores([item.text for item in train], pairs, texts, **tf_idf), test
        ),
        "longer wins": baselines.pair_accuracy(baselines.length_scores(texts), test),
    }
    single = single_rater_comparisons(context.rng(8), unseen, HELD_OUT_PAIRS)
    wins = {}
    for name, (one, other) in {"ac_hf": ("ac_hf", "base"), "pd_human": ("pd_human", "pd")}.items():
        lexicon = [baselines.lexicon_scores(judged[policy].texts) for policy in (one, other)]
        wins[name] = {
            "judge": evaluation.win_rate(judged[one].scores, judged[other].scores, context.rng(9))._asdict(),
            "lexicon": evaluation.win_rate(lexicon[0], lexicon[1], context.rng(9))._asdict(),
        }
    return {
        "seed": settings.seed,
        "feedback": comparison_quality(pairs, train)._asdict(),
        "accuracy": accuracy,
        "single_rater_accuracy": baselines.pair_accuracy(held_out, single),
        "calibration": [bin._asdict() for bin in calibration(held_out, single)],
        "wins": wins,
        "policies": {
            name: {
                "judge_score": float(result.scores.mean()),
                "kl": float(result.reference_kl.mean()),
                "length": float(result.lengths.mean()),
                "distinct_2": evaluation.distinct_n(result.responses, 2),
            }
            for name, result in judged.items()
        },
    }


def calibration(scores: np.ndarray, comparisons: Comparisons) -> list[evaluation.ReliabilityBin]:
    """Predicted against observed preference of single raters; each pair is shown once, in an order of its own."""
    margin = scores[comparisons.chosen] - scores[comparisons.rejected]
    flip = np.arange(len(margin)) % 2 == 1
    probability = 1.0 / (1.0 + np.exp(-np.where(flip, -margin, margin).astype(np.float64)))
    return evaluation.reliability(probability, ~flip)


def write_samples(path: Path, judged: dict[str, Judged]) -> None:
    """One line per held-out prefix, with every policy's text and judge score."""
    rows = [
        {name: {"text": result.texts[row], "score": float(result.scores[row])} for name, result in judged.items()}
        for row in range(len(judged["base"].texts))
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- report -----------------------------------------------------------------------------------------------------------

WHO = {
    "base": "base model",
    "ac_hf": "AC-HF",
    "pd": "PD without human reward",
    "pd_human": "PD with human reward",
}


def report(folder: Folder, context: Run, judged: dict[str, Judged], results: dict[str, Any]) -> Report:
    """What the run has to show, in words and figures."""
    wins, policies, accuracy = results["wins"], results["policies"], results["accuracy"]
    goals = {"ac_hf": 0.75, "pd_human": 0.65}
    against = {"ac_hf": "AC-HF against the base model", "pd_human": "PD with human reward against PD without"}
    second = {"ac_hf": "AC-HF, VADER lexicon's opinion", "pd_human": "PD, VADER lexicon's opinion"}
    # A byte-level model of a few thousand weights is there to show the machinery; its figures have no goals.
    goal = (lambda name: goals[name]) if not context.material.words else (lambda name: None)
    diversity = policies["ac_hf"]["distinct_2"] / max(policies["base"]["distinct_2"], 1e-9)
    table = [win_row(against[name], wins[name]["judge"], goal(name)) for name in goals]
    table += [win_row(second[name], wins[name]["lexicon"], None) for name in goals]
    ranked = accuracy["reward model"] > max(accuracy["tf-idf"], accuracy["longer wins"])
    real = not context.material.words
    table += [
        limit_row("AC-HF, KL to the base (nats per continuation)", policies["ac_hf"]["kl"], "{:.1f}", 12.0, real),
        limit_row("AC-HF, distinct-2 against the base's", diversity, "{:.0%}", 0.6, real, at_least=True),
        Result(
            "reward model, held-out pairs",
            f"{accuracy['reward model']:.1%}",
            goal=f"> {max(accuracy['tf-idf'], accuracy['longer wins']):.1%}" if real else "",
            met=ranked if real else None,
        ),
        Result("tf-idf on the same pairs", f"{accuracy['tf-idf']:.1%}"),
        Result("longer wins", f"{accuracy['longer wins']:.1%}"),
        Result("mean tokens: base, AC-HF", ", ".join(f"{policies[p]['length']:.1f}" for p in ("base", "ac_hf"))),
        Result("time after downloads", f"{results['seconds']['after_downloads']:.0f} s"),
        Result("peak memory", f"{results['peak_memory_gib']:.1f} GiB"),
    ]
    turns = folder.metrics("AC-HF")
    over = lambda entries, name: Series(name.split("/")[-1], [m["step"] for m in entries], [m[name] for m in entries])
    renamed = lambda series, name: dataclasses.replace(series, name=name)
    distilled = {
        "without human reward": folder.metrics("PD without human reward"),
        "with human reward": folder.metrics("PD with human reward"),
    }
    plots = [
        Plot(
            title="Human reward",
            x_label="turn",
            y_label="standard deviations",
            series=[renamed(over(turns, "human/score"), "AC-HF")],
            note="What the actor's continuations add to the reward model's score of the prefix. The first turn is the "
            "base model's.",
        ),
        Plot(
            title="Distance from the base model",
            x_label="turn",
            y_label="nats per continuation",
            series=[renamed(over(turns, "policy/kl"), "KL(actor, base)")],
        ),
        Plot(
            title="Critic",
            x_label="turn",
            y_label="explained variance",
            series=[renamed(over(turns, "value/explained_variance"), "critic")],
            note="Share of the variance of returns that the critic foresaw.",
        ),
        Plot(
            title="Distillation",
            x_label="step",
            y_label="nats per token",
            series=[renamed(over(entries, "distillation/forward_kl"), name) for name, entries in distilled.items()],
            note="KL(base, student) per token. Human reward moves a student away from merely copying.",
        ),
    ]
    order = np.argsort(-np.abs(judged["ac_hf"].scores - judged["base"].scores), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, 8).astype(int)]  # from the largest change to the smallest
    samples = [
        Sample(
            prefix=judged["base"].texts[i].removesuffix(judged["base"].continuations[i]),
            before=judged["base"].continuations[i],
            after=judged["ac_hf"].continuations[i],
            before_score=float(judged["base"].scores[i]),
            after_score=float(judged["ac_hf"].scores[i]),
        )
        for i in spread
    ]
    feedback, together = results["feedback"], sum(folder.seconds.values())  # they follow each other
    return Report(
        title="rlhf_jax quickstart",
        summary=(
            f"A language model learnt from what single people said about {context.material.what}. A judge trained on "
            "the other half of the ratings, which training never touched, compared its continuations of held-out "
            f"prefixes with the base model's: AC-HF won {wins['ac_hf']['judge']['rate']:.1%}, and PD with human reward "
            f"won {wins['pd_human']['judge']['rate']:.1%} against PD without."
        ),
        results=table,
        plots=plots,
        win_rates=[Interval(against[name], *wins[name]["judge"].values(), goal=goal(name)) for name in goals],
        calibration=[Bin(**bin) for bin in results["calibration"]],
        accuracies=accuracy,
        samples=samples,
        stages=[*(StageTime(*stage) for stage in folder.seconds.items()), StageTime("together", together)],
        config=dataclasses.asdict(context.settings),
        notes=[
            f"Feedback: {feedback['count']:,} pairs from human ratings: one person rated this text above that one. "
            f"Single raters agreed with the mean rating in {feedback['mean_agreement']:.0%} of them, and "
            f"{feedback['tie_rate']:.0%} of the draws were ties and are left out.",
            "The judge reads another layer of the same frozen trunk and was trained on other texts, by other ratings.",
            "Intervals are 95 % percentile-bootstrap intervals over held-out prefixes.",
            f"Seed {context.settings.seed}; resume or repeat with the settings in config.json.",
        ],
    )


def win_row(name: str, win: dict[str, float], goal: float | None) -> Result:
    """A win rate as a line of the table."""
    return Result(
        name,
        f"{win['rate']:.1%}",
        f"{win['low']:.1%} to {win['high']:.1%}",
        goal="" if goal is None else f">= {goal:.0%}",
        met=None if goal is None else win["rate"] >= goal,
    )


def limit_row(name: str, value: float, shown: str, limit: float, real: bool, *, at_least: bool = False) -> Result:
    """A figure with an upper (or lower) limit as a line of the table."""
    sign = ">=" if at_least else "<="
    met = value >= limit if at_least else value <= limit
    return Result(
        name, shown.format(value), goal=f"{sign} {shown.format(limit)}" if real else "", met=met if real else None
    )
