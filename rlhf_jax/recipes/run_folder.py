"""The folder of an experiment's run: what was asked for, what was measured, and how it goes on after an interruption.

::

    RUN/config.json            the configuration; the same command resumes, another one is refused
    RUN/checkpoints/STAGE/     Orbax checkpoints of a stage's whole state
    RUN/metrics/STAGE.jsonl    one line per step of a stage
    RUN/results/NAME.json      a figure that was computed once
    RUN/samples/NAME.jsonl     what the models said
    RUN/seconds.json           how long each stage has run
    RUN/results.json, report.html

`stage` trains and `once` measures; both return at once what an earlier process has finished. If steps are functions of
(state, index) and figures functions of states, an interrupted run ends in the table of an uninterrupted one. What does
not depend on each other may run `together`, in threads: neither a small program nor its compilation fills two cores.
`command_line` turns a frozen dataclass into flags, `compile_quickly` is for small runs, `script` ends for a shell.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from rlhf_jax.errors import UserError, missing_extra
from rlhf_jax.quickstart.report import Report, Series, duration, write_report
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import Interrupted, StopRequest, run, stop_on_signals
from rlhf_jax.training.metrics import MetricsWriter, host_metrics, read_metrics

__all__ = ["Command", "RunFolder", "command_line", "compile_quickly", "open_run", "script", "versions"]

C = TypeVar("C")
T = TypeVar("T")


class Command(NamedTuple, Generic[C]):
    """What was typed."""

    config: C
    out: Path
    seeds: list[int]
    smoke: bool


def command_line(
    config: type[C], description: str | None, out: str, *, smoke: Mapping[str, Any], arguments: list[str] | None = None
) -> Command[C]:
    """Reads ``--out``, ``--seeds 0,1,2``, ``--smoke`` and one flag per field of a dataclass.

    Args:
      config: a frozen dataclass whose fields all have defaults, of bool, int, float or str.
      description: its first line is shown by ``--help``.
      out: the default of ``--out``.
      smoke: the fields that ``--smoke`` sets; flags that are typed go before them.
      arguments: what was typed; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(out), help="the run's folder")
    parser.add_argument("--seeds", default="0", help="which seeds, separated by commas; those done before are kept")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers: does it run?")
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        yes_or_no: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        kind = yes_or_no if isinstance(field.default, bool) else {"type": type(field.default)}
        parser.add_argument("--" + field.name.replace("_", "-"), default=None, **kind)
    typed = vars(parser.parse_args(arguments))
    path, seeds, tiny = typed.pop("out"), typed.pop("seeds"), typed.pop("smoke")
    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise UserError(f"--seeds takes numbers separated by commas, got {seeds!r}.")
    given = {name: value for name, value in typed.items() if value is not None}
    return Command(config(**((dict(smoke) if tiny else {}) | given)), path, [int(s) for s in seeds.split(",")], tiny)


def compile_quickly() -> None:
    """Programs that compile in a third of the time and run slowly, if JAX has not computed anything yet."""
    jax.config.update("jax_disable_most_optimizations", True)
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # 0.12 aborts at the flag
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")


def versions(extra: str, purpose: str, *packages: str) -> dict[str, str]:
    """Versions of what a run depends on, for its config.json.

    Args:
      extra: the extra of rlhf_jax that brings the packages.
      purpose: what they are needed for, as the end of "... is needed to".
      packages: names of distributions.
    Raises:
      UserError: one is not installed; names it and the extra.
    """
    try:
        return {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise missing_extra(error.name or "", extra, purpose) from None


class RunFolder:
    """A run's folder; `open_run` makes one. One process at a time writes to it.

    Attributes:
      path: where it is.
      seconds: how long each stage and figure took, earlier processes included.
    """

    def __init__(self, path: Path, stop: StopRequest, say: Callable[[str], None]) -> None:
        self.path, self._stop, self._say, self._lock = path, stop, say, threading.Lock()
        stored = path / "seconds.json"
        self.seconds: dict[str, float] = json.loads(stored.read_text()) if stored.exists() else {}

    def stage(
        self, name: str, step: Callable[[Any, int], tuple[Any, Any]], state: Any, total: int, *, save_every: int = 0
    ) -> Any:
        """The state after ``total`` steps, ``state, metrics = step(state, index)``, from the last checkpoint on.

        Args:
          name: of the stage, and of its files; "/" makes folders.
          step: a function of its arguments; jitted by the caller. It may stand for a compiled chunk of updates.
          state: what the stage starts from: any pytree that `Checkpoints` takes.
          total: steps of the whole stage.
          save_every: steps between checkpoints; 0 saves at the end and on interruption.
        """
        with Checkpoints(self.path / "checkpoints" / name, keep=1) as checkpoints:
            done = checkpoints.latest() or 0
            state = checkpoints.restore(state).state if done else state
            if done >= total:
                return state
            with self._timed(name), MetricsWriter(self._metrics(name), resume_after=done) as writer:
                state = run(
                    step,
                    state,
                    range(done, total),
                    save=checkpoints.save,
                    save_every=save_every or total,
                    on_step=lambda index, metrics: writer.write(index, host_metrics(metrics)),
                    stop=self._stop,
                )
        return state

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure()`` returns, as JSON keeps it; measured unless an earlier process has done so."""
        stored = self.path / "results" / f"{name}.json"
        if not stored.exists():
            if self._stop.asked:
                raise Interrupted(0, saved=False)
            with self._timed(name):
                found = measure()
            self.write(stored.relative_to(self.path), json.dumps(found, indent=1))
        return json.loads(stored.read_text(encoding="utf-8"))

    def together(self, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """What calls that do not need each other return, by name; each has a thread, which sees no context managers.

        Raises:
          What the first call that failed raised, after the others have stopped as at Ctrl-C.
        """
        found: dict[str, T] = {}
        errors: list[BaseException] = []

        def call(name: str, work: Callable[[], T]) -> None:
            try:
                found[name] = work()
            except BaseException as error:
                errors.append(error)
                self._stop.ask()

        threads = [threading.Thread(target=call, args=each, daemon=True) for each in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return {name: found[name] for name in calls}

    def samples(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes ``samples/NAME.jsonl``, one object per line."""
        self.write(f"samples/{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def series(self, stage: str, metric: str, name: str) -> Series:
        """A metric of a stage as a line of a plot."""
        lines = [line for line in read_metrics(self._metrics(stage)) if metric in line]
        return Series(name, [line["step"] for line in lines], [line[metric] for line in lines])

    def finish(self, results: Mapping[str, Any], page: Report) -> None:
        """Writes ``results.json`` and ``report.html``."""
        self.write("results.json", json.dumps(results, indent=1))
        write_report(self.path / "report.html", page)

    def write(self, name: str | Path, text: str) -> None:
        """Writes a file of the folder under a temporary name and renames it."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    def _metrics(self, stage: str) -> Path:
        return self.path / "metrics" / f"{stage}.jsonl"

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
                self.write("seconds.json", json.dumps(self.seconds, indent=1))
        self._say(f"{name}: {duration(self.seconds[name])}")


@contextlib.contextmanager
def open_run(path: Path, config: Mapping[str, Any], *, say: Callable[[str], None] = print) -> Iterator[RunFolder]:
    """Opens a run's folder, new or begun earlier; inside the block Ctrl-C stops after the step that is running.

    Args:
      path: the folder; created if it is not there.
      config: all that determines the numbers, as JSON: settings, versions and hashes of data; not the seeds.
      say: told a line at the end of every stage.
    Raises:
      UserError: the folder was begun with another configuration, named by its entries.
      Interrupted: at Ctrl-C, after saving; the same command goes on from there.
    """
    wanted, written = json.loads(json.dumps(config)), path / "config.json"
    before = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else wanted
    changed = [k for k in sorted(before.keys() | wanted.keys()) if before.get(k) != wanted.get(k)]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)!r} and is {wanted.get(name)!r}" for name in changed)
        raise UserError(f"{path} was begun with other options ({told}); keep to those, or choose another --out")
    with stop_on_signals() as stop:
        folder = RunFolder(path, stop, say)
        folder.write("config.json", json.dumps(wanted, indent=1))
        yield folder


def script(main: Callable[[], None]) -> None:
    """Calls an experiment's `main`: what the user can mend is one line, Ctrl-C says how to go on.

    Raises:
      SystemExit: with the message of a `UserError`; with 130 after Ctrl-C, also before the run's folder is open.
    """
    gc.freeze()  # what was imported stays; looking through it again and again takes a second of a small run
    gc.set_threshold(50_000, 20, 20)
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
    except (Interrupted, KeyboardInterrupt):
        print("Stopped; what was finished is kept, and the same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
