"""Counts of tiny fixed programs that no clock can blur: ``python -m benchmarks.counted`` prints them as JSON.

Per case: floating-point operations and bytes accessed of the step as it is written, as XLA's cost analysis counts them
(the body of a loop once), and how often two steps in a row compile: `WRITTEN`, the same on every machine. What XLA made
of it, bytes accessed when compiled and bytes of temporary buffers, depends on the processor and on flags. `EXPECTED`
holds what all are meant to be; after a change that is meant to move them, write it anew with ``--write``.
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.workloads import build

TASKS = ("gen", "dpo", "grpo")
WRITTEN = ("flops", "bytes_accessed", "compilations")
EXPECTED = Path(__file__).with_name("counted.json")


def count(task: str) -> dict[str, float]:
    """The counts of a case at the tiny size, on one device."""
    case = build(task, "tiny")
    traces = []

    def step(state: Any, fixed: Any, batch: Any) -> Any:
        traces.append(task)
        return case.step(state, fixed, batch)

    state, fixed, batch = jax.tree.map(jax.numpy.asarray, (case.state, case.fixed, case.batch(0)))
    run = jax.jit(step)
    lowered = run.lower(state, fixed, batch)
    compiled = lowered.compile()
    for _ in range(2):
        state, _ = run(state, fixed, batch)
    written: Any = lowered.cost_analysis()
    made: Any = compiled.cost_analysis()
    planned: Any = compiled.memory_analysis()
    return {
        "flops": float(written["flops"]),
        "bytes_accessed": float(written["bytes accessed"]),
        "compilations": float(len(traces)),
        "compiled_bytes_accessed": float(made["bytes accessed"]),
        "temporary_bytes": float(planned.temp_size_in_bytes),
    }


def count_all() -> dict[str, Any]:
    """The counts of all cases, and the version of JAX that they belong to."""
    return {"jax": jax.__version__, "cases": {task: count(task) for task in TASKS}}


def differences(
    found: dict[str, Any], expected: dict[str, Any], *, names: Collection[str] = WRITTEN, tolerance: float = 0.02
) -> list[str]:
    """Which of the named counts moved by more than the tolerance, in words; compilations must agree exactly."""
    told = []
    for task in sorted({*found["cases"], *expected["cases"]}):
        now, then = found["cases"].get(task), expected["cases"].get(task)
        if now is None or then is None:
            told.append(f"{task}: {'not measured' if now is None else 'not expected'}")
            continue
        for name in names:
            value = then[name]
            allowed = 0.0 if name == "compilations" else tolerance * value
            if not np.abs(now[name] - value) <= allowed:
                told.append(f"{task}: {name} is {now[name]:.6g}, expected {value:.6g}")
    return told


def main() -> None:
    """Prints the counts, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write them to {EXPECTED.name}")
    found = json.dumps(count_all(), indent=2)
    if parser.parse_args().write:
        EXPECTED.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
