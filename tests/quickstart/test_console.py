"""console.py: plain lines where nobody watches, live bars on a terminal, text that stays text."""

import io
import re
import runpy
import sys

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.quickstart import console
from rlhf_jax.quickstart.console import Console
from rlhf_jax.quickstart.report import Result, Sample


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def plain(clock, width=80):
    file = io.StringIO()
    return Console(file, terminal=False, width=width, clock=clock), file


def live(clock, width=100):
    file = io.StringIO()
    return Console(file, terminal=True, width=width, clock=clock), file


def screen(text):
    """What is left visible: control sequences removed, the last state of each redrawn line kept."""
    frames = re.split(r"\x1b\[\d*A|\r", text)
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame) for frame in frames]


def lines(file):
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_plain_lines_at_every_quarter(clock):
    console, file = plain(clock)
    with console, console.stage("Reward model", 40) as stage:
        for done in range(1, 41):
            clock.now += 0.5
            stage.update(done, {"reward/accuracy": done / 50, "loss": 0.12345})
    assert stage.seconds == 20.0
    assert lines(file) == [
        "Reward model: 40 steps",
        "Reward model: 10/40, 15 s left  accuracy 0.2  loss 0.123",
        "Reward model: 20/40, 10 s left  accuracy 0.4  loss 0.123",
        "Reward model: 30/40, 5 s left  accuracy 0.6  loss 0.123",
        "Reward model: done in 20.0 s  accuracy 0.8  loss 0.123",
    ]
    assert "\x1b" not in file.getvalue()


def test_slow_stages_show_that_they_are_alive(clock):
    console, file = plain(clock)
    with console, console.stage("AC-HF", 1000) as stage:
        for done in range(1, 4):
            clock.now += 20
            stage.update(done)
    assert lines(file) == ["AC-HF: 1000 steps", "AC-HF: 2/1000, 5 h 32 min left", "AC-HF: done in 1 min 0 s"]


def test_a_resumed_stage_counts_its_pace_from_where_it_went_on(clock):
    console, file = plain(clock)
    with console, console.stage("AC-HF", 40, start=20) as stage:
        assert stage.left() is None
        clock.now += 5
        stage.update(30)
        assert stage.left() == 5.0
    assert lines(file)[:2] == ["AC-HF: 40 steps, 20 done before", "AC-HF: 30/40, 5 s left"]


def test_downloads_are_shown_in_megabytes_with_what_is_being_done(clock):
    console, file = plain(clock)
    with console, console.stage("Model", 90_000_000, unit="bytes") as stage:
        clock.now += 2
        stage.update(60_000_000, total=120_000_000, note="downloading")
        stage.update(120_000_000, note="verifying")
    assert lines(file) == ["Model: 90.0 MB", "Model: 60.0/120.0 MB, 2 s left  downloading", "Model: done in 2.0 s"]


def test_metrics_of_one_last_name_keep_their_first(clock):
    console, file = plain(clock)
    with console, console.stage("AC-HF", 1) as stage:
        stage.update(1, {"policy/loss": 1.0, "value/loss": 2.0, "policy/kl": 3.0})
    assert lines(file)[-1].endswith("policy loss 1  value loss 2  kl 3")


@pytest.mark.parametrize("make", [plain, live])
def test_a_command_to_copy_stays_on_one_line(clock, make):
    command = "rlhf-jax quickstart --out " + "a-long-folder-name/" * 8 + " --resume"
    console, file = make(clock)
    with console:
        console.say(command)
    assert command in file.getvalue()


@pytest.mark.parametrize("make", [plain, live])
def test_an_interrupted_stage_says_where_it_stopped(clock, make):
    console, file = make(clock)

    def press_ctrl_c(stage):
        clock.now += 3
        stage.update(7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), console, console.stage("AC-HF", 40) as stage:
        press_ctrl_c(stage)
    assert stage.seconds == 3.0
    shown = file.getvalue()
    assert ("AC-HF: stopped at 7/40 after 3.0 s" in shown) if make is plain else ("7/40" in screen(shown)[-2])
    assert "done" not in shown


def test_live_bars_stand_when_the_stage_is_over(clock):
    console, file = live(clock)
    with console:
        for name in ("Base model", "Reward model"):
            with console.stage(name, 40) as stage:
                clock.now += 10
                stage.update(20, {"loss": 1.5})
                console._progress.refresh()
                assert "10 s left" in screen(file.getvalue())[-1]
                clock.now += 10
                stage.update(40, {"loss": 0.5})
        console.say("All done")
    frames = screen(file.getvalue())
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back
    last = "\n".join(frames[-3:])
    assert re.search(r"Base model +━+ +40/40 20.0 s +loss 0.5", last)
    assert re.search(r"Reward model +━+ +40/40 20.0 s +loss 0.5", last)
    assert file.getvalue().rstrip().endswith("All done")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_live_lines_fit_the_terminal(clock, width):
    console, file = live(clock, width)
    with console, console.stage("PD without human reward", 400) as stage:
        clock.now += 1
        stage.update(200, {"distillation/cross_entropy": 3.21, "policy/kl": 0.5, "reward/mean": -0.25, "entropy": 2.0})
        console._progress.refresh()
    for frame in screen(file.getvalue()):
        for line in frame.splitlines():
            assert len(line) <= width
        if "200/400" in frame:
            assert "PD without human reward" in frame
            assert "━" in frame


@pytest.mark.parametrize("make", [plain, live])
def test_what_a_model_writes_stays_text(clock, make):
    console, file = make(clock)
    sample = Sample(
        "[bold]I[/bold] think", "bad \x1b]0;title\x07 \x1b[2J [red]x[/red]", " good :smile: {0}", -0.5, 1.25
    )
    with console:
        console.say("[link=x]plain[/link] \x1b[31m")
        console.samples([sample, Sample("p", "b", "a")])
    shown = file.getvalue()
    for words in (
        "[link=x]plain[/link] �[31m",
        "[bold]I[/bold] think",
        "bad �]0;title� �[2J [red]x[/red]",
        "good :smile: {0}",
        "(judge -0.50)",
        "(judge 1.25)",
    ):
        assert words in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not re.search(r"\x1b(?!\[[0-9;]*m)", shown)
    assert shown.count("judge") == 2


def test_the_result_table(clock):
    console, file = plain(clock, 100)
    with console:
        console.results(
            [
                Result("AC-HF against base", "81.3 %", "76.0 to 85.9 %", "≥ 75 %", True),
                Result("distinct-2", "55 %", goal="≥ 60 %", met=False),
                Result("pairs", "1,234"),
            ]
        )
    assert [re.split(r"  +", line.strip()) for line in lines(file)] == [
        ["measured", "95 % interval", "goal"],
        ["AC-HF against base", "81.3 %", "76.0 to 85.9 %", "≥ 75 %", "met"],
        ["distinct-2", "55 %", "≥ 60 %", "missed"],
        ["pairs", "1,234"],
    ]


def test_without_goals_there_is_no_goal_column(clock):
    console, file = plain(clock)
    with console:
        console.results([Result("pairs", "1,234")])
    assert "goal" not in file.getvalue()


def test_results_and_lines_come_below_finished_bars(clock):
    console, file = live(clock)
    with console:
        with console.stage("Judging", 1) as stage:
            console.say("while it runs")
            stage.update(1)
        console.results([Result("pairs", "1,234")])
        assert console._progress is None
        with console.stage("Once more", 1) as stage:
            stage.update(1)
    text = file.getvalue()
    assert text.index("while it runs") < text.rindex("Judging") < text.index("1,234") < text.index("Once more")


def test_a_narrow_encoding_replaces_instead_of_failing(clock):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with Console(file, terminal=False, width=60, clock=clock) as console:
        console.samples([Sample("caf\u00e9", "\u2764", "ok")])
    file.flush()
    assert b"caf?" in raw.getvalue()


def test_no_total_is_no_division_by_zero(clock):
    console, file = plain(clock)
    with console, console.stage("Nothing", 0) as stage:
        stage.update(0)
    assert lines(file) == ["Nothing: 0 steps", "Nothing: done in 0.0 s"]


def test_a_missing_rich_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(UserError, match=r"`rich` is needed to show progress: pip install 'rlhf_jax\[quickstart\]'"):
        runpy.run_path(console.__file__)
