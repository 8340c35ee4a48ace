"""The translation script: its smoke run on a file of pairs."""

import importlib.util
import json
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "translation.py"


@pytest.fixture(scope="module")
def translation():
    for package in ("sacrebleu", "tokenizers", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is part of the extra translation")
    spec = importlib.util.spec_from_file_location("translation", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["translation"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_smoke_run_leaves_a_labelled_folder_and_resumes(translation, tmp_path, capsys):
    path = tmp_path / "pairs.tsv"
    things = [f"{a} {b}\t{c} {d}" for a, c in NUMBERS for b, d in NOUNS]
    path.write_text("\n".join(things))
    arguments = ["--smoke", "--pairs", str(path), "--out", str(tmp_path / "run")]
    translation.main(arguments)
    first = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(first)["feedback"] == "scripted"
    assert set(translation.WHO) <= set(json.loads(first)["seeds"]["0"])
    assert "scripted" in (tmp_path / "run" / "report.html").read_text()
    seconds = (tmp_path / "run" / "seconds.json").read_text()
    translation.main(arguments)
    assert (tmp_path / "run" / "results.json").read_text() == first
    assert (tmp_path / "run" / "seconds.json").read_text() == seconds
    capsys.readouterr()


NUMBERS = [("zwei", "two"), ("drei", "three"), ("vier", "four"), ("fünf", "five"), ("sechs", "six"), ("acht", "eight")]
NOUNS = [("Hunde", "dogs"), ("Katzen", "cats"), ("Autos", "cars"), ("Lampen", "lamps"), ("Türen", "doors"),
         ("Bäume", "trees"), ("Häuser", "houses"), ("Bücher", "books"), ("Räder", "wheels"), ("Blumen", "flowers"),
         ("Vögel", "birds"), ("Uhren", "clocks")]  # fmt: skip
