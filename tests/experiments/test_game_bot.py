"""The game-bot script: its statistics, its smoke run, and that a finished part is not done again."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from rlhf_jax.errors import UserError

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


def test_an_unknown_part_is_refused(game_bot, tmp_path):
    with pytest.raises(UserError, match="tetris"):
        game_bot.main(["--games", "tetris", "--out", str(tmp_path)])
