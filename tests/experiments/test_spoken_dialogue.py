"""The dialogue script: its smoke run is labelled and resumes, and noise is what it is said to be."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from rlhf_jax.recipes import speech
from rlhf_jax.recipes.chats import misheard

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "spoken_dialogue.py"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("vaderSentiment")
    spec = importlib.util.spec_from_file_location("spoken_dialogue", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["spoken_dialogue"] = module
    spec.loader.exec_module(module)
    return module


def test_noise_changes_about_as_many_words_as_it_says():
    texts = [f"alpha beta gamma delta a{i} b{i}" for i in range(200)]
    assert misheard(texts, np.random.default_rng(0), 0.0) == texts
    noisy = misheard(texts, np.random.default_rng(0), 0.5)
    words = lambda texts: sum(len(text.split()) for text in texts)
    assert abs(words(noisy) / words(texts) - 0.75) < 0.03  # half of the noise drops a word
    letters = {word[0] for text in noisy for word in text.split()}
    assert letters <= set("abgd")


@pytest.mark.slow
def test_the_smoke_run_leaves_a_run_folder_and_resumes(script, tmp_path, capsys):
    arguments = ["--smoke", "--out", str(tmp_path)]
    script.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    seconds = (tmp_path / "seconds.json").read_text()
    assert results["synthetic"] is True
    wanted = {"base", "AC-HF, as collected", "AC-HF, length removed", "PD, human reward"}
    assert set(results["policies"]) >= wanted
    assert results["policies"]["base"]["win"]["rate"] == 0.5
    assert len(results["curves"]["as collected"]["policy/length"][0]) == 2
    assert abs(results["accuracy"]["0"]["judge"]["correlation with the length of replies"]) < 1e-3
    page = (tmp_path / "report.html").read_text()
    assert "no reward model here is shown to know wit" in page
    assert "scripted noise" in page
    assert ("espeak-ng is not here" in page) == (speech.espeak() is None)
    script.main(arguments)
    assert (tmp_path / "seconds.json").read_text() == seconds
    assert json.loads((tmp_path / "results.json").read_text()) == results
    capsys.readouterr()
