"""The dialogue script: its smoke run is labelled, resumes, and noise is what it is said to be; scorers lose length."""

import importlib.util
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.recipes.chat_rewards import calibrated, score
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


def test_a_matched_scorer_is_blind_to_the_length_of_replies():
    rng = np.random.default_rng(0)
    lengths = jnp.asarray(np.log(rng.integers(1, 30, size=200)), jnp.float32)
    features = jnp.stack([lengths + 0.1 * jnp.asarray(rng.normal(size=200)), jnp.asarray(rng.normal(size=200))], axis=1)
    blank = {"weights": jnp.ones(2), "slope": jnp.float32(1), "offset": jnp.zeros(()), "scale": jnp.ones(())}
    for matched in (False, True):
        scores = score(calibrated(blank, features, lengths, matched=matched), features, lengths)
        assert abs(float(scores.mean())) < 1e-4
        assert abs(float(scores.std()) - 1) < 1e-3
        pull = np.corrcoef(scores, lengths)[0, 1]
        assert abs(pull) < 1e-3 if matched else pull > 0.5


@pytest.mark.slow
def test_the_smoke_run_leaves_a_run_folder_and_resumes(script, tmp_path, capsys):
    arguments = ["--smoke", "--out", str(tmp_path)]
    script.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    seconds = (tmp_path / "seconds.json").read_text()
    assert results["synthetic"] is True
    assert set(results["seeds"]["0"]["policies"]) >= {"base", "AC-HF, as collected", "AC-HF, length removed", "PD"}
    assert results["seeds"]["0"]["policies"]["base"]["win"]["rate"] == 0.5
    page = (tmp_path / "report.html").read_text()
    assert "no reward model here is shown to know wit" in page
    assert "scripted noise" in page
    script.main(arguments)
    assert (tmp_path / "seconds.json").read_text() == seconds
    assert json.loads((tmp_path / "results.json").read_text()) == results
    capsys.readouterr()
