"""Game bots: agents that learn from scripted feedback only, in games that are pure functions.

Method.
  * Preference RL (`learn`). An actor-critic plays; a scripted teacher compares pairs of short segments by their true
    return; an ensemble of Bradley-Terry reward models learns the comparisons; the actor-critic learns the ensemble's
    reward. The true reward is reported and reaches the learner through the teacher's answers alone. Pairs are asked
    where the ensemble disagrees most. An episode's end is seen by teacher and learner alike.
  * PD (`control_distillation`). A small student learns the trained agent's soft targets, without human reward and with
    every step weighted by what it gained in learned human reward.
  * TAMER and COACH (`step_feedback`). A scripted trainer calls single steps right or wrong, half of them, 0.2 to 0.6
    seconds late (a step lasts 0.2 s, CartPole ten times slowed).
Every part is a pure function of a key, vmapped over seeds and jitted. Scores are the mean true return of greedy
episodes per seed; the table shows the interquartile mean over seeds and the worst and best seed.

Data. None: gymnax CartPole-v1 and pgx minatar-breakout (`pip install 'rlhf_jax[games]'`). All feedback is scripted.

Expected curve. CartPole climbs from about 20 to 500 in 160 turns (328,000 steps) on 600 comparisons; TAMER and COACH in
120 lessons. Breakout on the learned reward should follow the same actor-critic on the true reward.

    python experiments/game_bot.py --out runs/game_bot --seeds 0,1,2,3,4 [--games cartpole,breakout] [--smoke]

The folder holds report.html with clips before and after, metrics, samples, checkpoints of every other round; the same
command goes on after an interruption.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import environments
from rlhf_jax.environments import Environment
from rlhf_jax.errors import UserError
from rlhf_jax.quickstart.report import Clip, Plot, Report, Result, Series, StageTime
from rlhf_jax.recipes import clips, control_distillation, step_feedback
from rlhf_jax.recipes.control_distillation import distil, student_network
from rlhf_jax.recipes.preference_control import Learner, acting, networks, one_round, start
from rlhf_jax.recipes.run_folder import RunFolder, command_line, compile_quickly, open_run, script

PARTS = ("cartpole", "tamer", "coach", "breakout")
AGENTS = ("before training", "preferences", "true reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(control_distillation.Config, step_feedback.Config):
    """All numbers of a run, and its flags."""

    games: str = ",".join(PARTS)
    episodes: int = 64  # of every evaluation


BREAKOUT = {"rounds": 8, "pairs": 160, "turns": 20, "segment": 16, "filters": 8, "epochs": 3, "student_hidden": 32,
            "judge_steps": 120, "normalise": True}  # fmt: skip
SMOKE = {"rounds": 2, "pairs": 8, "turns": 1, "batch": 4, "steps": 32, "segment": 8, "judge_steps": 4,
         "epochs": 1, "hidden": 8, "student_steps": 4, "lessons": 3, "lesson_steps": 8, "episodes": 2,
         "games": "cartpole"}  # fmt: skip


def mean_return(game: Environment, config: Config, policy: Any, key: Array) -> Array:
    return jnp.mean(environments.episode_returns(game, policy, key, episodes=config.episodes))


def train(
    folder: RunFolder, name: str, begin: Learner, keys: Array, game: Environment, config: Config, *, true: bool
) -> Learner:
    """Preference RL, or the same actor-critic on the true reward, of all seeds at once; a step is a round."""

    @jax.jit
    def play_round(learners: Learner, index: Array) -> tuple[Learner, dict[str, Array]]:
        round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        go = lambda learner, key: one_round(learner, index, key, game, config, true=true)
        learners, returned = jax.vmap(go)(learners, round_keys)
        each = jnp.mean(returned, axis=1)
        return learners, {"true/return": jnp.median(each), "true/worst": jnp.min(each), "true/best": jnp.max(each)}

    return folder.stage(name, lambda x, i: play_round(x, jnp.int32(i)), begin, config.rounds, save_every=2)


def with_distillation(folder: RunFolder, name: str, keys: Array, game: Environment, config: Config) -> dict[str, Any]:
    """Preference RL, both students, and the same actor-critic on the true reward: true returns of greedy episodes."""
    both = jax.vmap(jax.random.split)(keys)  # as in `learn`: a key to start with and one for the rounds
    begin = jax.jit(jax.vmap(lambda key: start(key, game, config)))(both[:, 0])
    network, small = networks(game, config)[0], student_network(game, config)

    def measure(key: Array, learner: Learner, agents: dict[str, Any]) -> dict[str, Array]:
        pd_key, test_key = jax.random.split(key)
        returned = lambda network, params: mean_return(game, config, acting(network, params, greedy=True), test_key)
        of_agents = jax.vmap(lambda params: returned(network, params))(stacked(list(agents.values())))
        students = jax.vmap(lambda human: distil(pd_key, game, learner, config, human))(jnp.array([False, True]))
        of_students = jax.vmap(lambda params: returned(small, params))(students)
        who = (*agents, "student", "student, human reward")
        scores = {f"score/{w}": s for w, s in zip(who, (*of_agents, *of_students), strict=True)}
        given, ties = learner.answers.given, learner.answers.first_wins == 0.5
        return scores | {"count/comparisons": jnp.sum(given), "count/ties": jnp.sum(ties)}

    actors = lambda *learners: {who: x.agent.train.params for who, x in zip(AGENTS, learners, strict=True)}
    rounds = lambda who: train(folder, f"{name}/{who}", begin, both[:, 1], game, config, true=who == "true_reward")
    work: dict[str, Callable[[], Any]] = {who: functools.partial(rounds, who) for who in ("preferences", "true_reward")}
    work["measure"] = lambda: jax.jit(jax.vmap(measure)).lower(keys, begin, actors(begin, begin, begin)).compile()
    learner, true, measured = folder.together(work).values()
    agents = actors(begin, learner, true)
    first = stacked([jax.tree.map(lambda x: x[0], agents[who]) for who in AGENTS[:2]])
    calls: dict[str, Callable[[], Any]] = {
        "scores": lambda: host(measured(keys, learner, agents)),
        "clips": lambda: record(folder, name, game, first, keys[0], config),
    }
    return folder.together(calls)["scores"]


def stacked(trees: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def host(found: dict[str, Array]) -> dict[str, list[float]]:
    return {key: value.tolist() for key, value in jax.device_get(found).items()}


def record(folder: RunFolder, name: str, game: Environment, params: Any, key: Array, config: Config) -> None:
    """Clips of one episode of the first seed, before training and after, at most 500 steps of each."""
    paths = [folder.path / "samples" / f"{name}_{when}.gif" for when in ("before", "after")]
    frame = clips.board_frame if len(game.observation_shape) == 3 else clips.cart_pole_frame
    policy = lambda params: acting(networks(game, config)[0], params, greedy=True)
    seen = clips.episode_observations(game, policy, params, key, steps=min(500, game.time_limit))
    for path, episode in zip(paths, seen, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clips.gif(episode, frame))


def from_single_steps(_: RunFolder, name: str, keys: Array, game: Environment, config: Config) -> dict[str, Any]:
    """TAMER or COACH; seconds, so it is one program."""
    method = name.split("/")[-1]
    learn = {"tamer": step_feedback.TAMER, "coach": step_feedback.COACH}[method]

    def measure(key: Array) -> dict[str, Array]:
        learn_key, test_key = jax.random.split(key)
        policy, curve, given = step_feedback.learn(learn_key, game, step_feedback.cart_pole_trainer, learn, config)
        return {f"score/{method}": mean_return(game, config, policy, test_key), "curve": curve, "count/signals": given}

    return host(jax.jit(jax.vmap(measure))(keys))


def interquartile_mean(scores: np.ndarray) -> float:
    """The mean of the middle half: of 5 seeds the middle 3."""
    cut = len(scores) // 4
    return float(np.mean(np.sort(scores)[cut : len(scores) - cut]))


def goal(name: str, who: str, found: dict[str, Any]) -> float | None:
    if name == "breakout" and who == "preferences":
        return 0.9 * interquartile_mean(np.array(found["score/true reward"]))
    return {("cartpole", "preferences"): 450.0, ("tamer", "tamer"): 400.0, ("coach", "coach"): 400.0}.get((name, who))


def plot(folder: RunFolder, tag: str, name: str, result: dict[str, Any]) -> Plot:
    series = (
        [Series(name, list(range(len(result["curve"][0]))), np.median(result["curve"], axis=0).tolist())]
        if "curve" in result
        else [folder.series(f"{tag}/{name}/{who}", "true/return", who) for who in ("preferences", "true_reward")]
    )
    note = (
        "Median over seeds of the true reward per episode that ended meanwhile, so it can exceed what one episode "
        "reaches; it is reported and never learned from."
    )
    return Plot(title=name, x_label="lesson" if "curve" in result else "round", y_label="true return", series=series,
                note=note)  # fmt: skip


def report(folder: RunFolder, tag: str, found: dict[str, dict[str, Any]], configs: dict[str, Any], smoke: bool) -> None:
    rows, table = [], {}
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
    files = [folder.path / "samples" / tag / f"{n}_{w}.gif" for n in found for w in ("before", "after")]
    page = Report(
        title="Game bots from scripted feedback" + " (smoke run)" * smoke,
        summary="Agents that learn from a scripted teacher's feedback. Interquartile means of the true return.",
        results=rows,
        plots=[plot(folder, tag, name, result) for name, result in found.items()],
        clips=[
            Clip(f.stem.replace("_", ", "), f.read_bytes(), "One episode, first seed.") for f in files if f.exists()
        ],
        stages=[StageTime(name, seconds) for name, seconds in folder.seconds.items()],
        config=configs,
        notes=["All feedback is scripted; no person took part.", "The interval column spans the worst and best seed."],
    )
    folder.finish({"smoke": smoke, "feedback": "scripted", "results": table}, page)


def main(arguments: list[str] | None = None) -> None:
    config, out, seeds, smoke = command_line(Config, __doc__, "runs/game_bot", smoke=SMOKE, arguments=arguments)
    if smoke:
        compile_quickly()
    changed = {name: value for name, value in vars(config).items() if value != getattr(Config(), name)}
    parts, tag = config.games.split(","), "seeds_" + "_".join(map(str, seeds))
    if unknown := [name for name in parts if name not in PARTS]:
        raise UserError(f"--games has {unknown[0]!r}, but the parts are {', '.join(PARTS)}.")
    own = {"breakout": BREAKOUT}
    configs = {name: dataclasses.replace(Config(), **(own.get(name, {}) | changed)) for name in parts}
    settings = {name: dataclasses.asdict(c) | {"games": ""} for name, c in configs.items()}
    keys = jax.vmap(jax.random.key)(np.array(seeds))
    with open_run(out, {"config": dataclasses.asdict(config) | {"games": ""}, "smoke": smoke}) as folder:
        games = {n: environments.pgx("minatar-breakout") if n == "breakout" else environments.gymnax("CartPole-v1")
                 for n in parts}  # fmt: skip
        works = {n: from_single_steps if n in ("tamer", "coach") else with_distillation for n in parts}
        part = lambda n: folder.once(f"{tag}/{n}", lambda: works[n](folder, f"{tag}/{n}", keys, games[n], configs[n]))
        found = folder.together({n: functools.partial(part, n) for n in parts})
        report(folder, tag, found, settings, smoke)
        for name, told in found.items():
            print(name, {k: round(interquartile_mean(np.array(v)), 1) for k, v in told.items() if k[:5] == "score"})


if __name__ == "__main__":
    script(main)
