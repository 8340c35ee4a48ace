"""The smart-home script: what feedback sees in answers, that templates are kept apart, and its smoke run."""

import importlib.util
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import home_commands
from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "smart_home.py"


@pytest.fixture(scope="module")
def smart_home():
    for package in ("hassil", "home_assistant_intents", "tokenizers", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is part of the extra smart-home")
    spec = importlib.util.spec_from_file_location("smart_home", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["smart_home"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(smart_home):
    commands = smart_home.sample_commands(per_template=2, most=60)
    return [command._asdict() | {"parse": command.parse} for command in commands]


def test_commands_are_what_hassil_reads(rows):
    assert {row["language"] for row in rows} == {"en", "de"}
    unlocking = [row for row in rows if row["intent"] == "HassTurnOff" and row["slots"].get("domain") == "lock"]
    assert unlocking
    assert all(row["opens"] for row in unlocking)
    assert not any(row["opens"] for row in rows if row["intent"] == "HassGetState")
    assert len({(row["language"], row["text"]) for row in rows}) == len(rows)


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(home_commands, "hassil", None)
    with pytest.raises(UserError, match="smart-home"):
        home_commands.sample_commands(per_template=1)


def test_templates_are_kept_apart_and_feedback_sees_agreement_questions_and_violations(smart_home, rows):
    config = smart_home.Config(**smart_home.SMOKE)
    data = smart_home.prepare(rows, config, seed=0)
    texts = {row["text"]: row["template"] for row in rows}
    unseen = {texts[text] for text, _ in data.texts}
    prompt = data.demonstrations.inputs.tokens[:, : config.prompt_length]
    shown = {tuple(row.tolist()) for row in prompt}
    assert unseen
    assert not shown & {tuple(row.tolist()) for row in np.asarray(data.unseen.tokens)}

    opening = int(np.flatnonzero(np.asarray(data.openings.truth[1]))[0])
    answer = data.openings.truth[0][opening]
    mark = data.marks
    said = jnp.stack([jnp.concatenate([jnp.array([mark[word]]), answer]) for word in ("do", "ask", "end")])
    said = jnp.concatenate([said, said[:1].at[0, 1].set(mark["pad"])])  # the last is no intent at all
    blank = jnp.zeros((4, 1), jnp.int32)
    rollout = Rollout(jnp.concatenate([blank, said], 1), said == said, said != mark["pad"], blank, blank)
    seen = smart_home.look(rollout, (jnp.stack([answer] * 4), jnp.ones(4, bool)), mark)
    assert seen.right.tolist() == [True, True, False, False]
    assert seen.asks.tolist() == [False, True, False, False]
    assert seen.violates.tolist() == [True, False, True, False]


@pytest.mark.slow
def test_the_smoke_run_leaves_a_labelled_folder_and_resumes(smart_home, tmp_path, capsys):
    arguments = ["--smoke", "--out", str(tmp_path)]
    smart_home.main(arguments)
    first = (tmp_path / "results.json").read_text()
    results = json.loads(first)
    assert results["feedback"] == "scripted"
    assert set(smart_home.WHO) <= set(results["seeds"]["0"])
    assert "scripted" in (tmp_path / "report.html").read_text()
    seconds = (tmp_path / "seconds.json").read_text()
    smart_home.main(arguments)
    assert (tmp_path / "results.json").read_text() == first
    assert (tmp_path / "seconds.json").read_text() == seconds  # nothing was run again
    capsys.readouterr()
