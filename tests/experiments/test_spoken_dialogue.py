"""The dialogue script: its smoke run is labelled and resumes, noise is what it is said to be, and speech goes round."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from rlhf_jax.data.tokenizer import ByteTokenizer
from rlhf_jax.recipes import speech
from rlhf_jax.recipes.chats import World, misheard
from rlhf_jax.recipes.run_folder import open_run

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


def test_the_end_of_a_prompt_is_spoken_and_what_was_heard_is_answered(script, tmp_path, monkeypatch):
    world = World(script.Config(prompt_length=12), ByteTokenizer(), None, None, ([], [0]), [], [])  # type: ignore
    monkeypatch.setattr(speech, "recogniser", lambda: "an ear 1.0")
    monkeypatch.setattr(speech, "hear", lambda text: text.replace("fine", "wine"))
    heard = script.hear_all(world, 0, ["How are you? A fine day", "No"])
    assert heard["said"] == ["A fine day"[-11:].rjust(11), "No"]
    assert heard["heard"] == [" A wine day", "No"]
    assert heard["word error rate"] == 1 / 4
    assert "an ear 1.0" in heard["how"]

    spoken = {}
    monkeypatch.setattr(speech, "espeak", lambda: "somewhere")
    monkeypatch.setattr(
        speech, "speak", lambda text, path: spoken.update({path.relative_to(tmp_path).as_posix(): text})
    )
    rows = [{"AC-HF, length removed, misheard": text} for text in ("cheers", "")]
    with open_run(tmp_path, {}) as folder:
        told = script.round_trip(folder, heard, rows, 2)
    assert told.startswith("espeak-ng spoke 3 files")
    assert spoken == {"samples/speech/0_question.wav": " A fine day", "samples/speech/0_reply.wav": "cheers",
                      "samples/speech/1_question.wav": "No"}  # fmt: skip
    lines = (tmp_path / "samples" / "speech" / "exchanges.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (first["asked"], first["heard"], first["answered"]) == (" A fine day", " A wine day", "cheers")
    assert len(lines) == 2


def test_without_a_recogniser_noise_is_scripted(script, monkeypatch):
    world = World(script.Config(noise=0.5), ByteTokenizer(), None, None, ([], []), [], [])  # type: ignore
    monkeypatch.setattr(speech, "recogniser", lambda: None)
    monkeypatch.setattr(speech, "hear", None)
    heard = script.hear_all(world, 0, ["alpha beta gamma delta"] * 50)
    assert heard["how"].startswith("scripted noise")
    assert 0.2 < heard["word error rate"] < 0.4  # half of the noise puts in the one word that begins so


@pytest.mark.slow
def test_the_smoke_run_leaves_a_run_folder_and_resumes(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speech, "recogniser", lambda: None)
    arguments = ["--smoke", "--out", str(tmp_path)]
    script.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    seconds = (tmp_path / "seconds.json").read_text()
    assert results["synthetic"] is True
    wanted = {"base", "AC-HF, as collected", "AC-HF, length removed", "PD, human reward"}
    assert set(results["policies"]) >= wanted
    assert results["policies"]["base"]["win"]["rate"] == 0.5
    assert len(results["curves"]["as collected"]["policy/length"][0]) == 2
    # The logarithm of the length is taken off, so of the length itself little is left.
    assert abs(results["accuracy"]["0"]["judge"]["correlation with the length of replies"]) < 0.1
    page = (tmp_path / "report.html").read_text()
    assert "no reward model here is shown to know wit" in page
    assert "made-up chats and ratings" in page
    assert "Misheard prompts: scripted noise, as espeak-ng or pocketsphinx is not here" in page
    assert results["misheard"]["how"].startswith("scripted noise")
    assert ("espeak-ng is not here" in page) == (speech.espeak() is None)
    script.main(arguments)
    assert (tmp_path / "seconds.json").read_text() == seconds
    assert json.loads((tmp_path / "results.json").read_text()) == results
    capsys.readouterr()
