"""Measures the fixed workloads: ``python -m benchmarks.steps`` prints one JSON line per case.

Every case runs in a process of its own, so that memory, flags and compilations are its own:

    python -m benchmarks.steps --tasks sft dpo --models lm_small --devices 2
    python -m benchmarks.steps --tasks grpo --cache ~/.cache/rlhf_jax   # the second time compiles nothing
    python -m benchmarks.steps --tasks sft --profile                    # where the time goes, by operation

``limit_s`` is the time that the step's matrix products alone take here: each shape is timed inside one compiled loop
in the same process, before and after the step. ``utilisation`` is limit_s / step_s.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TASKS = ("gen", "sft", "reward", "dpo", "grpo", "rloo", "ppo", "distill")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--models", nargs="+", choices=("tiny", "lm_small", "gpt2_124m"), default=("lm_small",))
    parser.add_argument("--devices", type=int, default=2, help="host devices that the rows are split over")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after one that is not")
    parser.add_argument("--seconds", type=float, default=40.0, help="stop timing after about this long")
    parser.add_argument("--microbatches", type=int, help="parts that gradients are summed over, instead of the case's")
    parser.add_argument("--cache", help="folder of compiled programs that a second start reads")
    parser.add_argument("--flags", default="", help="more XLA_FLAGS")
    parser.add_argument("--no-limit", action="store_true", help="do not time the matrix products")
    parser.add_argument("--profile", action="store_true", help="add the operations that took longest")
    return parser.parse_args()


def matmul_seconds(products: list, devices: int) -> float:
    """Seconds that the products alone take, every shape timed in one compiled loop on all devices at once."""
    import jax
    import jax.numpy as jnp

    def train(x, w):  # forward, gradient of the input, gradient of the weights
        y = x @ w
        return y @ w.T, w + 1e-9 * (x.T @ y)

    def forward(x, w):  # x @ w and a second product that brings x back to its shape
        back = jax.lax.optimization_barrier(w.reshape(w.shape[::-1]))
        return (x @ w) @ back, w

    @functools.cache
    def seconds(kind: str, m: int, k: int, n: int) -> float:
        flops = {"train": 6, "forward": 4}[kind] * m * k * n
        repeats = max(2, min(200, int(1.5e10 / flops)))
        body = {"train": train, "forward": forward}[kind]
        loop = jax.pmap(lambda x, w: jax.lax.fori_loop(0, repeats, lambda _, c: body(*c), (x, w)))
        scale = (k * n) ** -0.25  # keeps the numbers near 1 over many rounds
        x = jnp.ones((devices, m // devices, k)) * 0.5
        w = jnp.broadcast_to(jnp.eye(k, n) * scale, (devices, k, n))
        jax.block_until_ready(loop(x, w))
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(loop(x, w))
            taken.append((time.perf_counter() - start) / repeats)
        return statistics.median(taken) * (0.5 if kind == "forward" else 1.0)

    return sum(count * seconds(kind, m, k, n) for kind, m, k, n, count in products)


def distributed(case: Any, devices: int) -> Any:
    """(state, fixed, batch) -> (state, result), jitted, rows split over the devices; the state is donated."""
    import jax
    from jax.sharding import PartitionSpec

    if devices == 1:
        return jax.jit(case.step, donate_argnums=0), lambda x: x, lambda x: x
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = PartitionSpec(), PartitionSpec("data")
    result = rows if case.fixed is None and not hasattr(case.state, "opt_state") else whole
    step = jax.shard_map(
        functools.partial(case.step, axis_name="data"),
        mesh=mesh,
        in_specs=(whole, whole, rows),
        out_specs=(whole, result),
        check_vma=False,
    )
    put = lambda spec: lambda tree: jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))
    return jax.jit(step, donate_argnums=0), put(whole), put(rows)


def peak_since_last() -> float:
    """GiB, the largest resident size since the last call; since the start where the system cannot forget it."""
    from rlhf_jax.training.memory import peak_memory_gib

    peak = peak_memory_gib()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def operations(folder: str) -> dict[str, float]:
    """Seconds by kind of operation, of a trace."""
    from jax.profiler import ProfileData

    total: Counter[str] = Counter()
    for path in Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    if not event.name.startswith(("Thread", "$", "end:")):
                        total[event.name.rstrip("0123456789").rstrip(".")] += event.duration_ns * 1e-9
    return {name: round(seconds, 4) for name, seconds in total.most_common(40)}


def measure(args: argparse.Namespace, task: str, model: str) -> dict[str, Any]:
    """One case, in this process."""
    import jax
    import numpy as np

    started = time.perf_counter()
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    from benchmarks import workloads
    from rlhf_jax.training.memory import release_memory

    jax.block_until_ready(jax.numpy.zeros(()))
    peaks = {"started": peak_since_last()}
    sizes = workloads.sizes_of(task, model, args.microbatches)
    parts = math.gcd(sizes.microbatches, sizes.rows * sizes.group // args.devices)  # of a device's rows
    case = workloads.build(task, model, microbatches=parts)
    strong = lambda tree: jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x, np.int32), tree)
    limit = lambda: None if args.no_limit else matmul_seconds(case.products, args.devices)
    limits = [limit()]
    release_memory()
    peak_since_last()  # that of the timing is nobody's
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    step, put_state, put_rows = distributed(case, args.devices)
    state, fixed = put_state(strong(case.state)), put_state(case.fixed)
    batches = [put_rows(case.batch(2 * seed)) for seed in range(3)]
    case = case._replace(state=None)
    jax.block_until_ready((state, fixed, batches))
    release_memory()
    peaks["built"] = peak_since_last()
    jax.monitoring.register_event_duration_secs_listener(listen)
    before = time.perf_counter()
    plan = step.lower(state, fixed, batches[0]).compile().memory_analysis()  # the call below finds it compiled
    release_memory()  # what the compiler has freed
    peaks["compiled"] = peak_since_last()
    state, result = jax.block_until_ready(step(state, fixed, batches[0]))
    first = time.perf_counter() - before
    ready = time.perf_counter() - started
    taken: list[float] = []
    began, cpu = time.perf_counter(), time.process_time()
    while len(taken) < args.steps and (len(taken) < 2 or time.perf_counter() - began < args.seconds):
        before = time.perf_counter()
        state, result = jax.block_until_ready(step(state, fixed, batches[len(taken) % 3]))
        taken.append(time.perf_counter() - before)
    cpu = (time.process_time() - cpu) / len(taken)
    peaks["steps"] = peak_since_last()
    finite = all(bool(jax.numpy.isfinite(x).all()) for x in jax.tree.leaves(result) if x.dtype == jax.numpy.float32)
    count, seconds = len(compiled), sum(compiled)
    limits.append(limit())
    median = statistics.median(taken)
    known = [x for x in limits if x is not None]
    limit_s = statistics.mean(known) if known else None
    record = {
        "task": task,
        "model": model,
        "devices": args.devices,
        "microbatches": parts,
        "step_s": round(median, 4),
        "step_s_min": round(min(taken), 4),
        "steps": len(taken),
        "cpu_s": round(cpu, 4),
        "tokens_per_s": round(case.tokens / median, 1),
        "gflop": round(case.flops / 1e9, 2),
        "gflop_per_s": round(case.flops / median / 1e9, 2),
        "limit_s": limit_s and round(limit_s, 4),
        "utilisation": limit_s and round(limit_s / median, 3),
        "compilations": count,
        "compile_s": round(seconds, 2),
        "first_step_s": round(first, 2),
        "start_to_first_step_s": round(ready, 2),
        "peak_rss_gib": round(max(peaks.values()), 3),
        "peaks_gib": {phase: round(peak, 3) for phase, peak in peaks.items()},
        "temporary_gib": round(plan.temp_size_in_bytes / 2**30, 3),
        "finite": finite,
        "jax": jax.__version__,
    }
    if args.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(step(state, fixed, batches[0]))
            record["operations_s"] = operations(folder)
    return record


def main() -> None:
    """One process per case; a single case runs in this one."""
    args = parse()
    cases = [(model, task) for model in args.models for task in args.tasks]
    if len(cases) == 1:
        flags = f"--xla_force_host_platform_device_count={args.devices} {args.flags}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        print(json.dumps(measure(args, cases[0][1], cases[0][0])), flush=True)
        return
    taken = {"--tasks", "--models"}
    rest: list[str] = []
    skipping = False
    for word in sys.argv[1:]:
        skipping = word in taken or (skipping and not word.startswith("-"))
        rest += [] if skipping else [word]
    for model, task in cases:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.steps", *rest, "--tasks", task, "--models", model], check=True
        )


if __name__ == "__main__":
    main()
