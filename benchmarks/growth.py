"""How time and memory of a GRPO step grow: ``python -m benchmarks.growth --svg docs/growth.svg`` measures and draws.

One size at a time is varied around a small model; the rest stays. `exponent` is the slope in the log-log plot between
the two largest sizes: 1 is linear, 0 does not grow. A step is rollout, reference, advantages and one gradient step in
one program on one device; memory is what XLA plans for its temporaries (`memory_analysis`), which no clock can blur.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

AXES = {
    "prompts": (2, 4, 8, 16),
    "prompt length": (16, 32, 64, 128),
    "response length": (16, 32, 64, 128),
    "answers per prompt": (2, 4, 8, 16),
    "vocabulary": (1024, 2048, 4096, 8192),
    "layers": (1, 2, 4, 8),
}


def cases() -> Any:
    """(axis, size, a case) for every point."""
    from benchmarks.workloads import MODELS, Setup, Sizes, grpo

    config, sizes = dataclasses.replace(MODELS["lm_small"], num_layers=2), Sizes(4, 32, 32, group=4)
    vary = {
        "prompts": lambda n: (config, dataclasses.replace(sizes, rows=n)),
        "prompt length": lambda n: (config, dataclasses.replace(sizes, prompt=n)),
        "response length": lambda n: (config, dataclasses.replace(sizes, response=n)),
        "answers per prompt": lambda n: (config, dataclasses.replace(sizes, group=n)),
        "vocabulary": lambda n: (dataclasses.replace(config, vocab_size=n), sizes),
        "layers": lambda n: (dataclasses.replace(config, num_layers=n), sizes),
    }
    for axis, points in AXES.items():
        for size in points:
            yield axis, size, grpo(Setup(*vary[axis](size)))


def measure(case: Any, steps: int) -> tuple[float, float]:
    """Median seconds of a step and MiB of temporaries."""
    import jax

    batch = case.batch(0)
    compiled = jax.jit(case.step).lower(case.state, case.fixed, batch).compile()
    jax.block_until_ready(compiled(case.state, case.fixed, batch))
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(compiled(case.state, case.fixed, batch))
        taken.append(time.perf_counter() - start)
    planned: Any = compiled.memory_analysis()
    return statistics.median(taken), planned.temp_size_in_bytes / 2**20


def exponent(points: list[dict[str, Any]], quantity: str) -> float:
    """Slope between the two largest sizes in the log-log plot."""
    last, end = points[-2:]
    return math.log(end[quantity] / last[quantity]) / math.log(end["size"] / last["size"])


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time above, memory below, a column per axis; dashed: linear from the largest size down."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rlhf_jax", "font.size": 9})
    figure, rows = plt.subplots(2, len(found), figsize=(2.3 * len(found), 4.6), sharex="col", sharey="row")
    for axes, quantity, label in zip(rows, ("seconds", "mib"), ("seconds per step", "MiB of temporaries"), strict=True):
        axes[0].set_ylabel(label)
        for axis, (name, points) in zip(axes, found.items(), strict=True):
            sizes, values = [p["size"] for p in points], [p[quantity] for p in points]
            axis.loglog(sizes, values, "o-", color="#1f5fa8")
            axis.loglog(sizes, [values[-1] * x / sizes[-1] for x in sizes], "--", color="0.6", linewidth=1)
            axis.set_xticks(sizes, [str(x) for x in sizes])
            axis.minorticks_off()
            axis.set_title(f"exponent {exponent(points, quantity):.2f}", fontsize=9)
            axis.grid(alpha=0.3)
            if quantity == "mib":
                axis.set_xlabel(name)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Measures every point, prints a JSON line each, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per point")
    parser.add_argument("--svg", type=Path, help="file for the figure")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, size, case in cases():
        seconds, mib = measure(case, args.steps)
        point = {"axis": axis, "size": size, "seconds": round(seconds, 4), "mib": round(mib, 1)}
        found.setdefault(axis, []).append(point)
        print(json.dumps(point), flush=True)
    for axis, points in found.items():
        exponents = {quantity: round(exponent(points, quantity), 2) for quantity in ("seconds", "mib")}
        print(json.dumps({"axis": axis, "exponent": exponents}), flush=True)
    if args.svg:
        draw(found, args.svg)


if __name__ == "__main__":
    main()
