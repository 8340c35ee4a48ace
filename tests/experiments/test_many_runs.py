"""The script that maps whole runs: every setting is reported, and the mapped run is the run alone."""

import importlib.util
import json
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "many_runs.py"


@pytest.mark.slow
def test_mapped_runs_are_the_runs_alone(tmp_path):
    spec = importlib.util.spec_from_file_location("many_runs", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--smoke", "--out", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["smoke"] is True
    assert results["feedback"] == "scripted"
    assert len({(r["seed"], r["kl_coefficient"], r["learning_rate"]) for r in results["runs"]}) == 8
    assert results["times"]["largest_difference"] < 1e-5
