"""The run folder: an interrupted run ends as an uninterrupted one, and a folder of another run is refused."""

import dataclasses
import functools
import gc
import json
import threading
import time

import jax.numpy as jnp
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.quickstart.report import Plot, Report, Result
from rlhf_jax.recipes.run_folder import command_line, open_run, script
from rlhf_jax.training.loop import Interrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rate: float = 0.1
    steps: int = 5
    word: str = "a"
    loud: bool = False


def counting(calls, folder=None, stop_at=None):
    """A step that notes its indices, and asks for a stop at one of them."""

    def step(state, index):
        calls.append(index)
        if index == stop_at:
            folder._stop.ask()
        return {"w": state["w"] * 0.5 + index}, {"loss": state["w"][0]}

    return step


START = {"w": jnp.ones(2)}


def test_an_interrupted_stage_goes_on_to_the_same_state_and_metrics(tmp_path):
    said, calls = [], []
    with open_run(tmp_path / "whole", {}, say=said.append) as folder:
        whole = folder.stage("seed_0/base", counting([]), START, 6)
        lines = folder.series("seed_0/base", "loss", "loss")
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted), open_run(cut, {}, say=said.append) as folder:
        folder.stage("seed_0/base", counting(calls, folder, stop_at=3), START, 6)
    with open_run(cut, {}, say=said.append) as folder:
        state = folder.stage("seed_0/base", counting(calls), START, 6)
        again = folder.stage("seed_0/base", counting(calls), START, 6)  # done: not a step more
        assert folder.series("seed_0/base", "loss", "loss") == lines
    assert calls == [0, 1, 2, 3, 4, 5]
    assert state["w"].tolist() == whole["w"].tolist() == again["w"].tolist()
    assert json.loads((cut / "seconds.json").read_text())["seed_0/base"] > 0
    assert [line.split(":")[0] for line in said] == ["seed_0/base", "seed_0/base"]  # the interrupted one ends silently


def test_figures_are_computed_once_and_not_after_a_stop(tmp_path):
    with open_run(tmp_path, {}, say=lambda _: None) as folder:
        assert folder.once("seed_0", lambda: {"exact": (1, 2)}) == {"exact": [1, 2]}
        folder._stop.ask()
        with pytest.raises(Interrupted):
            folder.once("seed_1", lambda: 1)
    with open_run(tmp_path, {}, say=lambda _: None) as folder:
        assert folder.once("seed_0", lambda: pytest.fail("measured again")) == {"exact": [1, 2]}


def test_calls_run_together_and_come_back_by_name(tmp_path):
    begun, done = threading.Event(), threading.Event()

    def first():
        begun.set()
        return done.wait(timeout=60)  # ends after the other, which waits for its beginning

    def second():
        waited = begun.wait(timeout=60)
        done.set()
        return waited

    with open_run(tmp_path, {}, say=lambda _: None) as folder:
        calls = {name: functools.partial(folder.once, name, work) for name, work in (("b", first), ("a", second))}
        assert list(folder.together(calls).items()) == [("b", True), ("a", True)]
        assert folder.together({}) == {}
    assert set(json.loads((tmp_path / "seconds.json").read_text())) == {"a", "b"}


def test_what_fails_stops_what_runs_beside_it_and_is_what_is_raised(tmp_path):
    calls, begun = [], threading.Event()

    def long(state, index):
        begun.set()
        while not folder._stop.asked:
            time.sleep(0.01)
        return counting(calls)(state, index)

    def wrong():
        assert begun.wait(timeout=60)
        raise UserError("no such file")

    with open_run(tmp_path, {}, say=lambda _: None) as folder, pytest.raises(UserError, match="no such file"):
        folder.together({"long": lambda: folder.stage("long", long, START, 6), "wrong": wrong})
    assert calls == [0]  # and that step is kept
    with open_run(tmp_path, {}, say=lambda _: None) as folder:
        folder.together({"long": lambda: folder.stage("long", counting(calls), START, 6)})
    assert calls == [0, 1, 2, 3, 4, 5]


def test_another_configuration_is_refused_by_name(tmp_path):
    with open_run(tmp_path, {"rate": 0.1, "data": "ab"}):
        pass
    other = {"rate": 0.1, "data": "cd", "steps": 3}
    words = r"data was 'ab' and is 'cd'; steps was None and is 3"
    with pytest.raises(UserError, match=words), open_run(tmp_path, other):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == {"rate": 0.1, "data": "ab"}


def test_samples_and_report(tmp_path):
    pytest.importorskip("matplotlib")
    with open_run(tmp_path, {}, say=lambda _: None) as folder:
        folder.stage("base", counting([]), START, 3)
        folder.samples("seed_0", [{"said": "Grüße"}, {"said": "x"}])
        plot = Plot(title="Loss", x_label="step", y_label="nats", series=[folder.series("base", "loss", "base")])
        folder.finish({"a": 1}, Report(title="T", results=[Result("base", "1")], plots=[plot]))
    assert (tmp_path / "samples/seed_0.jsonl").read_text("utf-8").splitlines()[0] == '{"said": "Grüße"}'
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_flags_come_from_the_fields(tmp_path):
    arguments = ["--smoke", "--steps", "2", "--loud", "--seeds", "0,2", "--out", str(tmp_path)]
    typed = command_line(Config, "What.\nMore.", "runs/x", smoke={"steps": 1, "rate": 1.0}, arguments=arguments)
    assert typed == (Config(rate=1.0, steps=2, loud=True), tmp_path, [0, 2], True)
    plain = command_line(Config, None, "runs/x", smoke={"steps": 1}, arguments=[])
    assert (plain.config, str(plain.out), plain.seeds, plain.smoke) == (Config(), "runs/x", [0], False)
    with pytest.raises(UserError, match="--seeds"):
        command_line(Config, None, "runs/x", smoke={}, arguments=["--seeds", "0,b"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("no such file"), "no such file"), (Interrupted(3, saved=True), 130), (KeyboardInterrupt(), 130)],
)
def test_a_script_ends_with_one_line_for_what_the_user_did(error, code, capsys, monkeypatch):
    for setting in ("freeze", "set_threshold"):  # of the process, which is the tests' here
        monkeypatch.setattr(gc, setting, lambda *_: None)

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        script(main)
    assert ended.value.code == code
    assert ("same command" in capsys.readouterr().err) == (code == 130)
