"""The smart-home script: what feedback sees in answers, that templates are kept apart, and its smoke run."""

import importlib.util
import json
import pathlib
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import home_commands
from rlhf_jax.data.home_commands import Command
from rlhf_jax.errors import UserError
from rlhf_jax.recipes import commands
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
    return smart_home.sample_commands(per_template=2, most=60)


def test_commands_are_what_hassil_reads(rows):
    assert {row.language for row in rows} == {"en", "de"}
    unlocking = [row for row in rows if row.intent == "HassTurnOff" and row.slots.get("domain") == "lock"]
    assert unlocking
    assert all(row.opens for row in unlocking)
    assert not any(row.opens for row in rows if row.intent == "HassGetState")
    assert len({(row.language, row.text) for row in rows}) == len(rows)
    of_template = Counter(row.template for row in rows)
    opening = {row.template for row in rows if row.opens}
    assert max(of_template[name] for name in of_template.keys() - opening) <= 2
    assert 2 < max(of_template[name] for name in opening) <= 2 * home_commands.RARE


def test_sets_share_neither_templates_nor_texts():
    make = lambda number, text, opens: Command("en", f"en {number}", text, "HassTurnOn", {}, opens)
    commands = [make(n, f"text {n} {i}", n < 5) for n in range(20) for i in range(2)] + [make(3, "text 9 0", True)]
    sets = home_commands.split_templates(commands, (0.4, 0.8), np.random.default_rng(0))
    templates = [{row.template for row in own} for own in sets]
    assert [len(own) for own in templates] == [8, 8, 4]
    assert len(set.union(*templates)) == 20
    assert [sum(row.opens for row in own if row.text.endswith("1")) for own in sets] == [2, 2, 1]
    texts = [row.text for own in sets for row in own]
    assert sorted(texts) == sorted(set(texts))
    assert len(texts) == 40


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(home_commands, "hassil", None)
    with pytest.raises(UserError, match="smart-home"):
        home_commands.sample_commands(per_template=1)


def test_templates_are_kept_apart_and_feedback_sees_agreement_questions_and_violations(smart_home, rows):
    config = smart_home.Config(**smart_home.SMOKE)
    data = commands.prepare(rows, config, 0, demonstrated=0.3, unseen=0.3, judged=64)
    prompt = data.demonstrations.inputs.tokens[:, : config.prompt_length]
    shown = {tuple(row.tolist()) for row in prompt}
    assert data.commands
    assert not shown & {tuple(row.tolist()) for row in np.asarray(data.unseen.tokens)}

    opening = int(np.flatnonzero(np.asarray(data.openings.truth[1]))[0])
    answer = data.openings.truth[0][opening]
    mark = data.tokenizer.control_ids
    said = jnp.stack([jnp.where(answer == mark["<do>"], mark[word], answer) for word in ("<do>", "<ask>", "<end>")])
    said = jnp.concatenate([said, said[:1].at[0, 0].set(mark["<pad>"])])  # the last is no intent at all
    blank = jnp.zeros((4, 1), jnp.int32)
    rollout = Rollout(jnp.concatenate([blank, said], 1), said == said, said != mark["<pad>"], blank, blank)
    seen = commands.look(rollout, (jnp.stack([answer] * 4), jnp.ones(4, bool)), mark)
    assert seen.right.tolist() == [True, True, False, False]
    assert seen.asks.tolist() == [False, True, False, False]
    assert seen.violates.tolist() == [True, False, True, False]


def test_the_household_compares_two_answers_to_one_command_and_wants_no_question(smart_home, rows, monkeypatch):
    config = smart_home.Config(**smart_home.SMOKE)
    data = commands.prepare(rows, config, 0, demonstrated=0.3, unseen=0.3, judged=64)
    mark = data.tokenizer.control_ids

    def act(task, base, prompts, key, *, samples):  # right answers: the first of a pair acts, the second asks
        said = jnp.repeat(prompts.truth[0], samples, axis=0)
        said = jnp.where((said == mark["<do>"]) & (jnp.arange(len(said)) % 2 == 1)[:, None], mark["<ask>"], said)
        blank = jnp.zeros((len(said), 1), jnp.int32)
        return Rollout(jnp.concatenate([blank, said], 1), said == said, said != mark["<pad>"], blank, blank)

    asks = lambda base, rollout: jnp.any(rollout.responses == mark["<ask>"], axis=-1)[:, None].astype(jnp.float32)
    monkeypatch.setattr(smart_home.sequences, "act", act)
    monkeypatch.setattr(smart_home.pooled_reward, "words", asks)
    pairs = smart_home.compared(data, None, jax.random.key(0), count=16, mistakes=0.0)
    assert pairs.weight.tolist() == [1.0] * 16 + [0.0] * 16  # the other order of a pair, which nobody chose
    assert (pairs.chosen[:16].ravel().tolist(), pairs.rejected[:16].ravel().tolist()) == ([0.0] * 16, [1.0] * 16)


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
