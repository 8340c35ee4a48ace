"""Measures the memory of the fixed workloads: ``python -m benchmarks.memory`` prints one row per case.

    python -m benchmarks.memory --tasks dpo ppo --models gpt2_124m --ways lean

Every case runs in a process of its own, on one device, with the state donated. Two ways of the same work:

* ``plain``: the decoder as it is, every activation kept;
* ``lean``: stacked layers, each recomputed in the backward pass (`rlhf_jax.models.stacked`), and on a CPU the schedule
  of least memory.

Columns, in MiB: ``model`` is what one model's parameters take; ``needed`` what no step can do without: parameters,
their gradients and Adam's two moments of all that is trained, and the parameters of frozen models; ``compiled`` what
XLA has planned, arguments and temporary buffers; ``resident`` the largest resident size of the whole process, of which
``started`` was there before the work began.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

TASKS = ("sft", "reward", "dpo", "grpo", "ppo", "distill")
MODELS = ("tiny", "lm_small", "gpt2_124m")
WAYS = ("plain", "lean")
SCHEDULE: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
COLUMNS = ("model", "needed", "compiled", "resident", "started")


def resident() -> float:
    """MiB, the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def lean(config: Any, sizes: Any) -> Any:
    """A `workloads.Setup` that keeps the activations of one layer at a time."""
    import jax

    from benchmarks import workloads
    from rlhf_jax.models.policies import token_policy
    from rlhf_jax.models.stacked import StackedTransformer, stack_layers, unstack_layers
    from rlhf_jax.models.transformer import Transformer

    class Lean(workloads.Setup):
        def __init__(self) -> None:
            super().__init__(config, sizes)
            recomputed = Transformer(config, remat=jax.checkpoint_policies.nothing_saveable)
            self.model = StackedTransformer(recomputed)
            self.shapes = jax.eval_shape(stack_layers, self.shapes)
            self.log_probs = token_policy(self.model, prompt_length=sizes.prompt)

        def plain(self, params: Any) -> Any:
            return unstack_layers(params)

    return Lean()


def compile_step(task: str, model: str, way: str) -> tuple[Any, Any, Any]:
    """(compiled step with a donated state, its case, the state as the step takes it)."""
    import jax
    import jax.numpy as jnp

    from benchmarks import workloads

    case = workloads.build(task, model, *([lean] if way == "lean" else []), microbatches=1)
    state = jax.tree.map(jnp.asarray, case.state)
    lowered = jax.jit(case.step, donate_argnums=0).lower(state, case.fixed, case.batch(0))
    options = SCHEDULE if way == "lean" and jax.default_backend() == "cpu" else None
    compiled = lowered.compile(compiler_options=options)
    return compiled, case._replace(state=None), state


def measure(task: str, model: str, way: str, steps: int) -> dict[str, Any]:
    """One case, in this process."""
    import jax

    from benchmarks import workloads
    from rlhf_jax.models.quantisation import stored_bytes

    jax.block_until_ready(jax.numpy.zeros(()))
    started = resident()
    compiled, case, state = compile_step(task, model, way)
    trained = getattr(state, "train", state).params
    one_model = stored_bytes(workloads.shapes(workloads.MODELS[model]))
    needed = stored_bytes(state) + stored_bytes(trained) + stored_bytes(case.fixed)
    plan = compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    for seed in range(steps):
        state, result = jax.block_until_ready(compiled(state, case.fixed, case.batch(2 * seed)))
    finite = all(bool(jax.numpy.isfinite(x).all()) for x in jax.tree.leaves(result))
    sizes = {"model": one_model, "needed": needed, "compiled": planned + plan.temp_size_in_bytes}
    told = {name: round(size / 2**20, 1) for name, size in sizes.items()}
    told |= {"resident": round(resident(), 1), "started": round(started, 1)}
    return {"task": task, "model_name": model, "way": way} | told | {"finite": finite, "jax": jax.__version__}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=("lm_small",))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="measure the one case in this process and print JSON")
    return parser.parse_args()


def row(told: dict[str, Any]) -> str:
    """A row of the table."""
    multiple = told["resident"] / told["model"]
    sizes = [f"{told[name]:,.0f}" for name in COLUMNS]
    return f"| {' | '.join((told['model_name'], told['task'], told['way'], *sizes, f'{multiple:.1f}'))} |"


def main() -> None:
    """One process per case."""
    args = parse()
    cases = [(model, task, way) for model in args.models for task in args.tasks for way in args.ways]
    if args.json:
        for model, task, way in cases:
            print(json.dumps(measure(task, model, way, args.steps)), flush=True)
        return
    print(f"| {' | '.join(('model', 'task', 'way', *COLUMNS, 'resident / model'))} |")
    print(f"|{' --- |' * (4 + len(COLUMNS))}")
    for model, task, way in cases:
        choice = ["--models", model, "--tasks", task, "--ways", way, "--steps", str(args.steps)]
        command = [sys.executable, "-m", "benchmarks.memory", "--json", *choice]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(row(told), flush=True)


if __name__ == "__main__":
    main()
