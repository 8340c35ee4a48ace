"""The quickstart's stages on real rated words: what a run leaves behind, how it stops and resumes, what it refuses."""

import dataclasses
import io
import json
import re
import shlex

import jax
import numpy as np
import pytest

from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.quickstart import run, settings
from rlhf_jax.quickstart.console import Console
from rlhf_jax.quickstart.report import duration
from rlhf_jax.training.loop import Interrupted

MICRO = dataclasses.replace(
    settings.tiny(seed=3),
    train_texts=400,
    judge_texts=400,
    base_steps=30,
    comparisons=512,
    reward_steps=50,
    turns=4,
    batch=16,
    minibatches=2,
    teacher_samples=128,
    start_steps=3,
    student_steps=4,
    student_batch=16,
    eval_prompts=32,
)


class StopAt(Console):
    """A console that asks for a stop once a stage has done some steps, as Ctrl-C would."""

    def __init__(self, stage, step):
        super().__init__(io.StringIO(), terminal=False)
        self.at = (stage, step)
        self.folder = None

    def stage(self, name, total, **options):
        manager = super().stage(name, total, **options)
        console = self

        class Watched:
            def __enter__(self):
                stage = manager.__enter__()
                update = stage.update

                def watched(done, *arguments, **options):
                    update(done, *arguments, **options)
                    if (name, done) == console.at:
                        console.folder.stop.ask()

                stage.update = watched
                return stage

            def __exit__(self, *error):
                return manager.__exit__(*error)

        return Watched()


def go(out, *, resume=False, console=None, chosen=MICRO):
    return run.quickstart(
        out, chosen, tiny=True, resume=resume, console=console or Console(io.StringIO(), terminal=False)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, go(out)


def numbers(results):
    return {name: value for name, value in results.items() if name not in ("seconds", "peak_memory_gib")}


def test_a_run_leaves_everything_it_promises(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert json.loads((out / "config.json").read_text())["settings"] == json.loads(
        json.dumps(dataclasses.asdict(MICRO))
    )
    page = (out / "report.html").read_text()
    assert "AC-HF against the base model" in page
    together = duration(sum(results["seconds"]["stages"].values()))
    assert f"together {together} " in re.sub(r"(<[^>]*>)+", " ", page)
    assert not re.search(r"(src|href)=['\"]http", page)  # self-contained
    assert len((out / "samples.jsonl").read_text().splitlines()) == MICRO.eval_prompts
    steps = [json.loads(line)["step"] for line in (out / "metrics" / "ac-hf.jsonl").read_text().splitlines()]
    assert steps == list(range(1, MICRO.turns + 1))


def test_figures_are_what_they_are_called(finished):
    _, results = finished
    assert abs(results["policies"]["base"]["kl"]) < 1e-2  # the base model is at no distance from itself
    assert results["policies"]["ac_hf"]["kl"] > 0
    for name in ("reward model", "tf-idf", "longer wins"):
        assert 0 <= results["accuracy"][name] <= 1
    assert results["accuracy"]["tf-idf"] > 0.55  # people's ratings of words can be learnt from
    for policy in results["policies"].values():
        assert 0 < policy["length"] <= MICRO.response_length
        assert 0 < policy["distinct_2"] <= 1
    for pair in results["wins"].values():
        for opinion in pair.values():
            assert 0 <= opinion["low"] <= opinion["rate"] <= opinion["high"] <= 1


@pytest.mark.parametrize(
    ("stage", "step"), [("AC-HF", 3), pytest.param("PD with human reward", 2, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch, stage, step):
    console = StopAt(stage, step)
    make = run.Folder.__init__

    def remember(self, *arguments, **options):
        make(self, *arguments, **options)
        console.folder = self

    monkeypatch.setattr(run.Folder, "__init__", remember)
    with pytest.raises(Interrupted) as stopped:
        go(tmp_path / "cut", console=console)
    assert (stopped.value.step, stopped.value.saved) == (step, True)
    resumed = go(tmp_path / "cut", resume=True)
    assert numbers(resumed) == numbers(finished[1])  # every figure, bit for bit
    for name in ("ac-hf", "pd-with-human-reward"):
        read = lambda folder: (folder / "metrics" / f"{name}.jsonl").read_text()  # noqa: B023
        assert read(tmp_path / "cut") == read(finished[0])


def test_folders_are_not_mixed_up(finished, tmp_path):
    out, _ = finished
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        go(out)
    with pytest.raises(UserError, match=r"other options \(seed\)"):
        go(out, resume=True, chosen=dataclasses.replace(MICRO, seed=4))
    with pytest.raises(UserError, match="holds no run to resume"):
        go(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_calibration_shows_each_pair_once():
    scores = np.array([0.0, 5.0])
    pairs = run.Comparisons(np.array([1, 1]), np.array([0, 0]), np.ones(2), 0)
    low, high = run.calibration(scores, pairs)
    assert (low.count, high.count) == (1, 1)
    assert (low.observed, high.observed) == (0.0, 1.0)


def test_the_command_line_speaks_in_sentences(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--sede", "1"])
    assert "unrecognized arguments: --sede" in capsys.readouterr().err
    assert cli.main(["quickstart", "--tiny", "--devices", "0"]) == 2
    assert "--devices must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["quickstart", "--tiny", "--devices", str(jax.device_count() + 1)]) == 2
    assert "more devices than JAX finds" in capsys.readouterr().err
    assert cli.main(["quickstart", "--tiny", "--resume", "--out", str(tmp_path / "no")]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


def test_an_old_jax_is_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.30")
    assert cli.main(["quickstart", "--tiny"]) == 2
    assert "JAX 0.8 or newer is needed, and 0.4.30 is installed" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    assert cli.main(["quickstart", "--tiny", "--out", str(tmp_path / "file" / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("rlhf-jax: ")
    assert "cannot be used: Not a directory" in message
    assert len(message.splitlines()) == 1


def test_the_command_that_resumes_repeats_every_option(tmp_path, monkeypatch, capsys):
    def interrupted(*_args, **_options):
        raise Interrupted(3, saved=True)

    monkeypatch.setattr("rlhf_jax.quickstart.run.quickstart", interrupted)
    out = tmp_path / "my runs"
    options = ["quickstart", "--tiny", "--seed", "3", "--devices", "2", "--out", str(out)]
    assert cli.main(options) == 130
    told = capsys.readouterr().out
    command = shlex.split(told[told.index("rlhf-jax") :])
    assert command == ["rlhf-jax", *options, "--resume"]
