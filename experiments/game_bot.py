"""Game bots: agents that learn from scripted feedback only, in games that are pure functions.

Method.
  * Preference RL (`learn`). An actor-critic plays; a scripted teacher compares pairs of short segments by their true
    return; an ensemble of Bradley-Terry reward models learns the comparisons; the actor-critic learns the ensemble's
    reward. The true reward is reported and reaches the learner through the teacher's answers alone. Pairs are asked
    where the ensemble disagrees most. An episode's end is seen by teacher and learner alike.
  * PD (`distil`). A small student learns the trained agent's soft targets, without human reward and with segments
    weighted by the learned human reward.
  * TAMER and COACH (`interactive`). A scripted trainer calls single steps right or wrong, half of them, 0.2 to 0.6
    seconds late (a step lasts 0.2 s, CartPole ten times slowed).
Every run is one jitted function of a key, vmapped over seeds. Scores are the mean true return of greedy episodes per
seed; the table shows the interquartile mean over seeds and the worst and best seed.

Data. None: gymnax CartPole-v1 and pgx minatar-breakout (`pip install 'rlhf_jax[games]'`). All feedback is scripted.

Expected curve. CartPole climbs from about 20 to 500 in 80 turns (164,000 steps) on 600 comparisons; TAMER and COACH in
120 lessons. Breakout on the learned reward should follow the same actor-critic on the true reward.

    python experiments/game_bot.py --out runs/game_bot [--games cartpole,tamer,coach,breakout] [--smoke]

A finished part is kept in the run folder; the same command goes on with the next one.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax import ensembles, environments, masking
from rlhf_jax.algorithms import policy_distillation
from rlhf_jax.environments import Environment, Trajectory
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import teachers
from rlhf_jax.losses import feedback as coaching
from rlhf_jax.losses import human_distillation, tamer
from rlhf_jax.models import control
from rlhf_jax.quickstart.report import Plot, Report, Result, Series, StageTime, write_report
from rlhf_jax.recipes import preference_control
from rlhf_jax.recipes.preference_control import Learner, acting, cut, learn, networks
from rlhf_jax.training.metrics import MetricsWriter

PARTS = ("cartpole", "tamer", "coach", "breakout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(preference_control.Config):
    """All numbers of a run, and its flags."""

    seed: int = 0
    seeds: int = 5
    # PD.
    student_hidden: int = 8
    student_steps: int = 300
    human_beta: float = 1.0  # in standard deviations of the segments' learned reward
    # TAMER and COACH.
    lessons: int = 120  # gradient steps, each after `lesson_steps` steps in `lesson_games` games
    lesson_games: int = 4
    lesson_steps: int = 64
    lesson_rate: float = 1e-2
    episodes: int = 16  # of every evaluation


BREAKOUT = {"rounds": 8, "pairs": 80, "turns": 10, "segment": 16, "filters": 8, "epochs": 3, "student_hidden": 32}
SMOKE = {"seeds": 2, "rounds": 2, "pairs": 8, "turns": 1, "batch": 4, "steps": 32, "segment": 8, "judge_steps": 4,
         "epochs": 1, "hidden": 8, "student_steps": 4, "lessons": 3, "lesson_steps": 8, "episodes": 2}  # fmt: skip


def distil(key: Array, game: Environment, learner: Learner, config: Config, *, human: bool) -> Any:
    """A small student on the trained agent's play: soft targets, with segments weighted by the learned human reward."""
    network, _ = networks(game, config)
    student = control.PolicyValueNet(game.actions, (config.student_hidden,), len(game.observation_shape))
    init_key, play_key, cut_key, loop_key = jax.random.split(key, 4)
    policy = acting(network, learner.agent.train.params)
    _, play = environments.rollout(game, policy, learner.games, play_key, steps=4 * config.steps)
    segments, _ = cut(play, cut_key, count=16 * config.batch, length=config.segment)
    totals = ensembles.mean(jax.vmap(learner.judges.apply_fn, (0, None))(learner.judges.params, segments))
    rated = jnp.ones(totals.shape, bool)
    weights = human_distillation.human_weights(masking.whiten(totals, rated), rated, beta=config.human_beta)
    logits = network.apply({"params": learner.agent.train.params}, segments.observations).logits
    inputs = control.ActionInputs(segments.observations, segments.actions, logits)
    every = policy_distillation.Batch(inputs, segments.mask, weights if human else jnp.ones_like(weights))
    params = student.init(init_key, segments.observations[:1, 0])["params"]
    state = policy_distillation.init(params, control.distilled(student), optax.adam(1e-2))

    def step(state: Any, key: Array) -> tuple[Any, None]:
        rows = jax.random.randint(key, (32,), 0, len(totals))
        batch = jax.tree.map(lambda x: x[rows], every)
        return policy_distillation.update(state, batch, config=policy_distillation.Config())[0], None

    state, _ = jax.lax.scan(step, state, jax.random.split(loop_key, config.student_steps))
    return acting(student, state.params, greedy=True)


def interactive(key: Array, game: Environment, config: Config, *, method: str) -> tuple[Any, Array, Array]:
    """TAMER or COACH on CartPole: the scripted trainer says +1 where a linear controller would act alike, else -1."""
    network = control.PolicyValueNet(game.actions, (config.hidden,), 1)
    init_key, game_key, loop_key = jax.random.split(key, 3)
    params = network.init(init_key, jnp.zeros((1, 4)))["params"]
    adam = optax.adam(config.lesson_rate)
    games = environments.reset(game, game_key, batch=config.lesson_games)
    gains = jnp.array([1.0, 1.6, 18.0, 3.0])  # of the trainer: position, speed, angle, its speed

    def loss(params: Any, play: Trajectory, signals: teachers.Signals) -> Array:
        logits, mask = network.apply({"params": params}, play.observations).logits, jnp.ones(play.rewards.shape, bool)
        taken = lambda x: jnp.take_along_axis(x, play.actions[..., None], axis=-1)[..., 0]
        if method == "tamer":  # the logits are the predicted human reward of each action
            starts = jnp.broadcast_to(jnp.arange(mask.shape[1]) * 0.2, mask.shape)
            credit = tamer.delay_credit(signals.times, starts, starts + 0.2, mask)
            reachable = jnp.sum(credit, axis=-1) > 0.5  # signals after the stretch's end have nothing to be about
            return masking.token_mean(
                tamer.tamer(taken(logits), credit, mask, signals.values), signals.given & reachable
            )
        arrivals = jnp.round(signals.times / 0.2 - 1).astype(jnp.int32)
        heard = jnp.zeros_like(signals.values)
        heard = jax.vmap(lambda x, t, v: x.at[t].add(v, mode="drop"))(heard, arrivals, signals.values)
        credited = coaching.human_returns(coaching.shift_feedback(heard, mask, delay=1), mask, discount=0.5)
        return masking.token_mean(coaching.coach(taken(jax.nn.log_softmax(logits)), credited), mask)

    def lesson(carry: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
        params, optimizer, games = carry
        play_key, trainer_key = jax.random.split(key)

        def policy(key: Array, observations: Array) -> Array:
            if method == "coach":
                return acting(network, params)(key, observations)
            best = acting(network, params, greedy=True)(key, observations)
            return jnp.where(jax.random.bernoulli(key, 0.1, best.shape), 1 - best, best)

        games, play = environments.rollout(game, policy, games, play_key, steps=config.lesson_steps)
        right = play.actions == (jnp.einsum("...d,d->...", play.observations, gains) > 0)
        signals = teachers.delayed_signals(jnp.where(right, 1.0, -1.0), trainer_key)
        updates, optimizer = adam.update(jax.grad(loss)(params, play, signals), optimizer)
        returned = jnp.sum(play.rewards) / jnp.maximum(jnp.sum(play.ended), 1)
        return (optax.apply_updates(params, updates), optimizer, games), (returned, jnp.sum(signals.given))

    start = (params, adam.init(params), games)
    (params, _, _), (curve, given) = jax.lax.scan(lesson, start, jax.random.split(loop_key, config.lessons))
    return acting(network, params, greedy=True), curve, jnp.sum(given)


# --- the run ----------------------------------------------------------------------------------------------------------


def part(name: str, key: Array, game: Environment, config: Config) -> dict[str, Array]:
    """Everything that one seed of a part does: true returns of greedy episodes and learning curves, by name."""
    keys = jax.random.split(key, 8)
    score = lambda policy, key: jnp.mean(environments.episode_returns(game, policy, key, episodes=config.episodes))
    if name in ("tamer", "coach"):
        policy, curve, given = interactive(keys[0], game, config, method=name)
        return {"score/" + name: score(policy, keys[1]), "curve/" + name: curve, "count/signals": given}
    network = networks(game, config)[0]
    agent = lambda learner: acting(network, learner.agent.train.params, greedy=True)
    learner, curve = learn(keys[0], game, config)
    answers = learner.answers
    out = {"score/preferences": score(agent(learner), keys[1]), "curve/preferences": curve}
    out |= {"count/comparisons": jnp.sum(answers.given), "count/ties": jnp.sum(answers.first_wins == 0.5)}
    out["score/student"] = score(distil(keys[2], game, learner, config, human=False), keys[3])
    out["score/student, human reward"] = score(distil(keys[2], game, learner, config, human=True), keys[3])
    true, out["curve/true reward"] = learn(keys[0], game, config, true=True)
    return out | {"score/true reward": score(agent(true), keys[1])}


def interquartile_mean(scores: np.ndarray) -> float:
    """The mean of the middle half: of 5 seeds the middle 3."""
    cut = len(scores) // 4
    return float(np.mean(np.sort(scores)[cut : len(scores) - cut]))


def run_part(name: str, config: Config) -> dict[str, Any]:
    game = environments.pgx("minatar-breakout") if name == "breakout" else environments.gymnax("CartPole-v1")
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    result = jax.device_get(jax.jit(jax.vmap(partial(part, name, game=game, config=config)))(keys))
    return {key: value.tolist() for key, value in result.items()} | {"seconds": time.perf_counter() - start}


def goal(name: str, who: str, found: dict[str, Any]) -> float | None:
    if name == "breakout" and who == "preferences":
        return 0.9 * interquartile_mean(np.array(found["score/true reward"]))
    return {("cartpole", "preferences"): 450.0, ("tamer", "tamer"): 400.0, ("coach", "coach"): 400.0}.get((name, who))


def report(folder: Path, found: dict[str, dict[str, Any]], configs: dict[str, Config], smoke: bool) -> None:
    rows, plots, table = [], [], {}
    metrics = MetricsWriter(folder / "metrics.jsonl", resume_after=-1)
    for name, result in found.items():
        for key, value in result.items():
            kind, _, who = key.partition("/")
            if kind == "score":
                iqm, wanted = interquartile_mean(np.array(value)), None if smoke else goal(name, who, result)
                met = None if wanted is None else iqm >= wanted
                spread = f"{min(value):.1f} to {max(value):.1f} (all seeds)"
                rows.append(Result(f"{name}: {who}", f"{iqm:.1f}", spread, f">= {wanted:.1f}" if wanted else "", met))
                table[f"{name}/{who}"] = {"interquartile_mean": iqm, "seeds": value, "goal": wanted, "met": met}
            elif kind == "count":
                rows.append(Result(f"{name}: scripted {who} per seed", f"{np.mean(value):.0f}"))
                table[f"{name}/scripted {who}"] = value
        curves = {k.partition("/")[2]: np.median(v, axis=0) for k, v in result.items() if k.startswith("curve/")}
        series = [Series(who, list(range(1, len(y) + 1)), y.tolist()) for who, y in curves.items()]
        for step in range(len(next(iter(curves.values())))):
            metrics.write(step, {f"true/{who}": float(y[step]) for who, y in curves.items()}, stage=name)
        note = "Median over seeds of a turn's true reward per finished episode (all of it where none finished)."
        plots.append(Plot(title=name, x_label="turn", y_label="true return per episode", series=series, note=note))
    results = {"smoke": smoke, "feedback": "scripted", "results": table}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    page = Report(
        title="Game bots from scripted feedback" + " (smoke run)" * smoke,
        summary="Agents that learn from a scripted teacher's feedback. Interquartile means of the true return.",
        results=rows,
        plots=plots,
        stages=[StageTime(name, result["seconds"]) for name, result in found.items()],
        config={name: dataclasses.asdict(config) for name, config in configs.items()},
        notes=["All feedback is scripted; no person took part.", "The interval column spans the worst and best seed."],
    )
    write_report(folder / "report.html", page)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/game_bot"))
    parser.add_argument("--games", default=",".join(PARTS), help="which parts, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers: does it run?")
    for field in dataclasses.fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default))
    flags = vars(parser.parse_args(arguments))
    folder, smoke, parts = flags.pop("out"), flags.pop("smoke"), flags.pop("games").split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        raise UserError(f"--games has {unknown[0]!r}, but the parts are {', '.join(PARTS)}.")
    given, found, configs = {name: value for name, value in flags.items() if value is not None}, {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts:
        config = Config(**((BREAKOUT if name == "breakout" else {}) | (SMOKE if smoke else {}) | given))
        stored, wanted = folder / f"{name}.json", {"config": repr(config), "smoke": smoke}
        kept = json.loads(stored.read_text()) if stored.exists() else {}
        if {key: kept.get(key) for key in wanted} != wanted:
            kept = wanted | {"found": run_part(name, config)}
            stored.write_text(json.dumps(kept))
        found[name], configs[name] = kept["found"], config
        report(folder, found, configs, smoke)
        print(name, {k: round(interquartile_mean(np.array(v)), 1) for k, v in found[name].items() if k[:5] == "score"})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
