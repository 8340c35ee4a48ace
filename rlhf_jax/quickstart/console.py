"""What the user sees while the quickstart runs: a bar per stage with the time left, a result table, samples.

On a terminal the bars are live. Where there is none (a file, a pipe, CI) each stage writes a plain line at every
quarter, and at least twice a minute. What a model wrote is printed as text: it cannot style or drive the terminal.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rlhf_jax.errors import missing_extra
from rlhf_jax.quickstart.report import Result, Sample, duration, printable

try:
    from rich import box
    from rich import console as rich_console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
    from rich.table import Column, Table
    from rich.text import Text
except ImportError as error:
    raise missing_extra("rich", "quickstart", "show progress") from error

__all__ = ["Console", "Stage"]

_NAME_WIDTH = 24
_BAR_WIDTH = 14
_HEARTBEAT = 30.0  # seconds between plain lines, at most


class Stage:
    """One stage in progress, from `Console.stage`.

    Attributes:
      name: as shown.
      done: how far it is.
      total: where it ends.
      seconds: how long it ran, once it has ended; None before.
    """

    def __init__(self, console: "Console", name: str, total: int, start: int, unit: str) -> None:
        self.name, self.total, self.done, self.unit = name, total, start, unit
        self.seconds: float | None = None
        self._console = console
        self._started = console.clock()
        self._start = start
        self._metrics = ""
        self._note = ""
        self._quarter = 4 * start // max(total, 1)
        self._spoken = self._started
        self._task: TaskID | None = None

    def update(
        self, done: int, metrics: Mapping[str, float] | None = None, *, total: int | None = None, note: str = ""
    ) -> None:
        """Shows how far the stage is.

        Args:
          done: units completed since the beginning (also after resuming), not since the last call.
          metrics: the latest values, shown by the last part of their names.
          total: a corrected total, for downloads.
          note: words to show instead of metrics until the next call.
        """
        self.done = done
        self.total = self.total if total is None else total
        self._note = note
        if metrics is not None:
            self._metrics = _figures(metrics)
        self._console._show(self)

    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return self._console.clock() - self._started

    def left(self) -> float | None:
        """Seconds until the end at the pace so far; None before the first unit."""
        gained = self.done - self._start
        return self.elapsed() / gained * max(self.total - self.done, 0) if gained > 0 else None

    def latest(self) -> str:
        """The note while there is one, else the latest metrics."""
        return self._note if self._note and self.seconds is None else self._metrics

    def amount(self) -> str:
        """How far in words: ``"50/200"``, or in MB for bytes."""
        if self.unit == "bytes":
            return f"{self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB"
        return f"{self.done}/{self.total}"


class Console:
    """The quickstart's output; a context manager.

    Args:
      file: where to write; standard output by default.
      terminal: whether to draw live bars; found out by default.
      width: columns; found out by default.
      clock: seconds that only go up.

    >>> with Console(terminal=False, width=60, clock=lambda: 0.0) as console:
    ...     with console.stage("Reward model", 2) as stage:
    ...         stage.update(2, {"reward/accuracy": 0.75})
    Reward model: 2 steps
    Reward model: done in 0.0 s  accuracy 0.75
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        terminal: bool | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        file = sys.stdout if file is None else file
        encoding = (getattr(file, "encoding", None) or "utf-8").lower().replace("-", "")
        if encoding != "utf8" and hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # type: ignore[attr-defined]  # what a model writes may not be in it
        self.clock = clock
        self._rich = rich_console.Console(file=file, force_terminal=terminal, width=width, highlight=False)
        self._live = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._progress: Progress | None = None
        self._running: list[Stage] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settle()

    def say(self, text: str = "") -> None:
        """Prints a line, unbroken so that it can be copied; above the bars of a running stage, below ended ones."""
        if not self._running:
            self._settle()
        self._rich.print(Text(printable(text)), soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, *, start: int = 0, unit: str = "steps") -> Iterator[Stage]:
        """Shows a stage while the block runs.

        Args:
          name: what is being done.
          total: how many units it takes.
          start: units already done, when resuming.
          unit: what is counted; ``"bytes"`` are shown as MB.
        """
        stage = Stage(self, name, total, start, unit)
        self._running.append(stage)
        if self._live:
            if self._progress is None:
                self._progress = Progress(*_columns(), console=self._rich, refresh_per_second=4)
                self._progress.start()
            stage._task = self._progress.add_task(name, total=total, completed=start, stage=stage)
        else:
            resumed = f", {start} done before" if start else ""
            size = f"{total / 1e6:.1f} MB" if unit == "bytes" else f"{total} {unit}"
            self._line(f"{name}: {size}{resumed}")
        try:
            yield stage
        except BaseException:
            self._end(stage, f"stopped at {stage.amount()} after {duration(stage.elapsed())}")
            raise
        self._end(stage, f"done in {duration(stage.elapsed())}")

    def results(self, results: Sequence[Result]) -> None:
        """Prints the result table."""
        self._settle()
        goals = any(result.goal for result in results)
        table = Table(box=box.SIMPLE_HEAD if self._live else None, pad_edge=False)
        for title in ["", "measured", "95 % interval", *(["goal", ""] if goals else [])]:
            table.add_column(title, overflow="fold")
        for result in results:
            cells = [Text(result.name), Text(result.value, style="bold"), Text(result.interval)]
            table.add_row(*cells, *([Text(result.goal), _verdict(result.met)] if goals else []))
        self._print(table)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Prints continuations before and after training, one sample under the other."""
        self._settle()
        for sample in samples:
            self._rich.print()
            table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 1))
            table.add_row(Text("prefix", style="dim"), Text(printable(sample.prefix), style="bold"))
            for label, text, score in (
                ("before", sample.before, sample.before_score),
                ("after", sample.after, sample.after_score),
            ):
                judged = Text("" if score is None else f"  (judge {score:.2f})", style="dim")
                table.add_row(Text(label, style="dim"), Text(printable(text.strip())) + judged)
            self._print(table)

    def _print(self, table: Table) -> None:
        self._rich.print(table, soft_wrap=False)

    def _line(self, text: str) -> None:
        self._rich.print(Text(text), soft_wrap=True)

    def _show(self, stage: Stage) -> None:
        if self._progress is not None and stage._task is not None:
            self._progress.update(stage._task, completed=stage.done, total=stage.total)
            return
        quarter = 4 * stage.done // max(stage.total, 1)
        now = self.clock()
        if stage.done < stage.total and (quarter > stage._quarter or now - stage._spoken >= _HEARTBEAT):
            stage._quarter, stage._spoken = quarter, now
            left = stage.left()
            pace = "" if left is None else f", {_about(left)} left"
            self._line(f"{stage.name}: {stage.amount()}{pace}  {stage.latest()}".rstrip())

    def _end(self, stage: Stage, words: str) -> None:
        stage.seconds = stage.elapsed()
        self._running.remove(stage)
        if self._progress is not None and stage._task is not None:
            self._progress.stop_task(stage._task)
            self._progress.refresh()
        else:
            self._line(f"{stage.name}: {words}  {stage._metrics}".rstrip())

    def _settle(self) -> None:
        """Lets the bars drawn so far stand, so that what follows is printed below them."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _verdict(met: bool | None) -> Text:
    return Text("") if met is None else Text("met", style="green") if met else Text("missed", style="bold red")


class _Words(ProgressColumn):
    """A column of a stage's words."""

    def __init__(self, words: Callable[[Stage], str], style: str, column: Column) -> None:
        self._words, self._style = words, style
        super().__init__(table_column=column)

    def render(self, task: Task) -> Text:
        return Text(self._words(task.fields["stage"]), style=self._style, no_wrap=True, overflow="ellipsis")


def _time(stage: Stage) -> str:
    if stage.seconds is not None:
        return duration(stage.seconds)
    left = stage.left()
    return "" if left is None else f"{_about(left)} left"


def _figures(metrics: Mapping[str, float]) -> str:
    """Metrics by the last part of their names; by both parts where two would read alike."""
    last = [name.split("/")[-1] for name in metrics]
    alike = lambda name: last.count(name.split("/")[-1]) > 1
    names = [name.replace("/", " ") if alike(name) else name.split("/")[-1] for name in metrics]
    return "  ".join(f"{name} {value:.3g}" for name, value in zip(names, metrics.values(), strict=True))


def _about(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds <= 59 else duration(seconds)


def _columns() -> list[ProgressColumn]:
    """Only the last column gives way on a narrow terminal."""
    return [
        _Words(lambda stage: stage.name, "", Column(no_wrap=True, min_width=_NAME_WIDTH)),
        BarColumn(bar_width=_BAR_WIDTH, table_column=Column(no_wrap=True, min_width=_BAR_WIDTH)),
        _Words(Stage.amount, "", Column(no_wrap=True, justify="right", min_width=7)),
        _Words(_time, "cyan", Column(no_wrap=True, min_width=10)),
        _Words(Stage.latest, "dim", Column()),
    ]
