"""Metrics on the host: one transfer from the device, one JSON object per line in a file that survives being killed.

A metrics file has one line per step, ``{"step": 3, "policy/loss": 0.25, ...}``. Lines are flushed as they are written,
a torn last line is ignored by the reader, and a resumed run first drops the lines behind the step it resumes from, so
that no step is ever there twice. Steps count up through a file: stages that each count from 0 get a file each.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from rlhf_jax.errors import UserError

__all__ = ["MetricsWriter", "host_metrics", "read_metrics"]


def host_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as Python floats, fetched from the device in one transfer.

    Args:
      metrics: {name: scalar array or number}.
    Raises:
      ValueError: a metric is not a scalar (metrics of a ``pmap`` still have their device axis: unreplicate them).

    >>> import jax.numpy as jnp
    >>> host_metrics({"loss": jnp.float32(0.5), "tokens": 12})
    {'loss': 0.5, 'tokens': 12.0}
    """
    fetched = jax.device_get(dict(metrics))
    for name, value in fetched.items():
        if np.ndim(value):
            raise ValueError(
                f"metric {name} must be a scalar, got shape {np.shape(value)}; after pmap take "
                "flax.jax_utils.unreplicate(metrics)"
            )
    return {name: float(value) for name, value in fetched.items()}


class MetricsWriter:
    """Appends one line per step to a JSONL file; a context manager.

    Args:
      path: the file; its folder is created.
      resume_after: the number of completed steps that a run resumes from: lines of later steps are dropped first, 0
        drops all. ``None`` keeps everything that is there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsWriter(f"{folder}/metrics.jsonl") as writer:
    ...         writer.write(1, {"loss": 0.5})
    ...         writer.write(2, {"loss": 0.25})
    ...     with MetricsWriter(f"{folder}/metrics.jsonl", resume_after=1) as writer:
    ...         writer.write(2, {"loss": 0.125}, stage="sft")
    ...     read_metrics(f"{folder}/metrics.jsonl")
    [{'step': 1, 'loss': 0.5}, {'step': 2, 'stage': 'sft', 'loss': 0.125}]
    """

    def __init__(self, path: str | Path, *, resume_after: int | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                last = math.inf if resume_after is None else resume_after
                kept = [line for line in read_metrics(self.path) if line["step"] <= last]
                temporary = self.path.with_name(self.path.name + ".tmp")
                temporary.write_text("".join(map(_encode, kept)), encoding="utf-8")
                temporary.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Metrics cannot be written to {self.path}: {error.strerror or error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Every line was flushed when it was written, so there is nothing left that could be lost."""
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, step: int, metrics: Mapping[str, float], **labels: str | int) -> None:
        """Appends ``{"step": step, **labels, **metrics}`` and flushes it.

        Raises:
          UserError: the disk is full.
        """
        try:
            self._file.write(_encode({"step": step, **labels, **metrics}))
            self._file.flush()
        except OSError as error:
            raise UserError(f"Metrics cannot be written to {self.path}: {error.strerror or error}.") from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was torn by a kill is left out.

    Raises:
      UserError: the file cannot be read, or a line in its middle is not a JSON object with a step.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"Metrics cannot be read from {path}: {error.strerror or error}.") from error
    *whole, _ = text.split("\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(_decode(line))
        except ValueError as error:
            raise UserError(
                f"Line {number} of {path} is not a metrics line: {line[:80]!r}. Delete that line to go on."
            ) from error
    return lines


# JSON has no NaN or infinity: they are written as strings, and read back as numbers.
_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _encode(line: Mapping[str, Any]) -> str:
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _decode(text: str) -> dict[str, Any]:
    line = json.loads(text)
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError("no step")
    return {name: _NAMES.get(value, value) if isinstance(value, str) else value for name, value in line.items()}
