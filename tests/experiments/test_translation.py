"""The translation script: what it holds out, how it measures, and its smoke run on a file of pairs."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from rlhf_jax.errors import UserError

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


def test_phrases_apart_are_of_common_words_and_nobody_is_shown_them(translation):
    pairs = [(f"{a} {b}", f"{c} {d}") for a, c in NUMBERS for b, d in NOUNS] + [("ein Wal", "a whale")]
    config = translation.Config(**translation.SMOKE | {"common": 6, "known": 2, "prompt_length": 20, "length": 20})
    data = translation.prepare(pairs, config)
    feedback, held_out = data.pairs
    assert (len(feedback), len(held_out)) == (24, 12)
    assert not set(feedback) & set(held_out)
    assert len(data.demonstrations.mask) == len(pairs) - 36 - 1  # nor are words demonstrated that occur once
    whole = translation.prepare(pairs, dataclasses.replace(config, known=1))
    assert len(whole.demonstrations.mask) == len(pairs) - 36
    shown = whole.tokenizer.decode(np.asarray(whole.demonstrations.inputs.tokens).ravel())
    assert "whale" in shown
    assert not any(f"{german} {english}" in shown for german, english in feedback + held_out)
    with pytest.raises(UserError, match="36 pairs of common words are needed; 0 are there"):
        translation.prepare(pairs, dataclasses.replace(config, common=100))


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
