"""The game-bot script: its statistics, its smoke run, and that a finished part is not done again."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from rlhf_jax import environments
from rlhf_jax.errors import UserError
from rlhf_jax.recipes import preference_control

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "game_bot.py"


@pytest.fixture(scope="module")
def game_bot():
    for package in ("six", "gymnax", "pgx"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("game_bot", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["game_bot"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("scores", "wanted"), [([0, 1, 2, 3, 100], 2.0), ([1, 5], 3.0), ([9, 1, 2, 3], 2.5)])
def test_interquartile_mean(game_bot, scores, wanted):
    assert game_bot.interquartile_mean(np.array(scores, float)) == wanted


def test_the_smoke_run_leaves_a_labelled_run_folder_and_resumes(game_bot, tmp_path, capsys):
    arguments = ["--smoke", "--games", "tamer", "--seeds", "0,1", "--out", str(tmp_path)]
    game_bot.main(arguments)
    seconds = (tmp_path / "seconds.json").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["smoke"] is True
    assert results["feedback"] == "scripted"
    assert len(results["results"]["tamer/tamer"]["seeds"]) == 2
    assert "scripted" in (tmp_path / "report.html").read_text()
    game_bot.main(arguments)
    assert (tmp_path / "seconds.json").read_text() == seconds  # nothing was run again
    assert json.loads((tmp_path / "results.json").read_text()) == results
    with pytest.raises(UserError, match="other options"):
        game_bot.main([*arguments, "--lessons", "2"])
    capsys.readouterr()


@pytest.mark.slow
def test_the_small_cartpole_run_measures_the_agents_that_whole_runs_give(game_bot, tmp_path, capsys):
    """A whole run is one function of a key; the script cuts it into rounds, and names whom it has measured."""
    arguments = ["--smoke", "--turns", "3", "--rate", "0.01", "--seeds", "0,1,2", "--out", str(tmp_path)]
    game_bot.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    config = dataclasses.replace(game_bot.Config(), **(game_bot.SMOKE | {"turns": 3, "rate": 0.01}))
    game, keys = environments.gymnax("CartPole-v1"), jax.vmap(jax.random.key)(np.arange(3))

    def measured(key, true):
        network, test_key = preference_control.networks(game, config)[0], jax.random.split(key)[1]
        begun = preference_control.start(jax.random.split(key)[0], game, config)
        learnt = preference_control.learn(key, game, config, true=true)[0]
        act = lambda who: preference_control.acting(network, who.agent.train.params, greedy=True)
        return [game_bot.mean_return(game, config, act(who), test_key) for who in (begun, learnt)]

    runs = (jax.jit(jax.vmap(functools.partial(measured, true=true)))(keys) for true in (False, True))
    (before, learnt), (_, true) = jax.device_get(tuple(runs))
    wanted = {"before training": before, "preferences": learnt, "true reward": true}
    assert len({tuple(value.tolist()) for value in wanted.values()}) == 3
    for who, value in wanted.items():
        np.testing.assert_allclose(results[f"cartpole/{who}"]["seeds"], value, rtol=1e-6, err_msg=who)
    assert results["cartpole/scripted comparisons"] == [config.rounds * config.pairs] * 3
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/gif") == 2
    seconds = (tmp_path / "seconds.json").read_text()
    game_bot.main(arguments)
    assert (tmp_path / "seconds.json").read_text() == seconds  # nothing was run again
    capsys.readouterr()


def test_an_unknown_part_is_refused(game_bot, tmp_path):
    with pytest.raises(UserError, match="tetris"):
        game_bot.main(["--games", "tetris", "--out", str(tmp_path)])
