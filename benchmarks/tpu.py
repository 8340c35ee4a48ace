"""Compiles the fixed workloads for a TPU, without one: ``python -m benchmarks.tpu`` prints one row per case.

    python -m benchmarks.tpu --tasks sft ppo --models lm_small --chips 1 4 --kernels splash none

The compiler comes with `pip install 'jax[tpu]'` and runs on any x86 Linux; compiling takes minutes for a larger model.
A case is the whole step, in bfloat16 or float32: rows are shared by the chips, the state is on all of them and donated.
``none`` forms the scores of attention, ``splash`` does without (`rlhf_jax.models.fused_attention`).

Columns, per chip: ``arguments`` and ``temporaries`` MiB of its memory, ``GFLOP`` as the compiler counts them (loops'
bodies once, kernels not at all), how often a kernel is called, and seconds to compile.
"""

import argparse
import dataclasses
import os
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # what is not compiled for the TPU, such as random weights
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is looked for
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import workloads
from rlhf_jax.models.fused_attention import splash
from rlhf_jax.models.policies import token_policy
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.training.sharding import make_mesh

KERNELS = {"splash": splash, "none": None}


def compile_step(args: argparse.Namespace, task: str, model: str, chips: int, kernel: str) -> Any:
    """The compiled step of a case."""

    class Setup(workloads.Setup):
        def __init__(self, config: Any, sizes: workloads.Sizes) -> None:
            response = args.length - sizes.prompt if args.length else sizes.response
            super().__init__(config, dataclasses.replace(sizes, response=response))
            self.writer = self.model = Transformer(config, kernel=KERNELS[kernel])
            self.log_probs = token_policy(self.model, prompt_length=sizes.prompt)

    case = workloads.build(task, model, Setup, microbatches=1)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    mesh = make_mesh(data=chips, devices=topology.devices[:chips])

    def placed(tree: Any, spec: P) -> Any:
        where, half = NamedSharding(mesh, spec), jnp.dtype(args.dtype)
        kind = lambda x: half if x.dtype == jnp.float32 else x.dtype
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind(x), sharding=where), tree)

    state = jax.tree.map(jnp.asarray, case.state)
    arguments = placed(state, P()), placed(case.fixed, P()), placed(case.batch(0), P("data"))
    with jax.set_mesh(mesh):
        return jax.jit(case.step, donate_argnums=0).lower(*arguments).compile()


def main() -> None:
    """A row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=workloads.TASKS, default=list(workloads.TASKS))
    parser.add_argument("--models", nargs="+", choices=workloads.MODELS, default=["lm_small"])
    parser.add_argument("--chips", nargs="+", type=int, default=[1])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["splash"])
    parser.add_argument("--length", type=int, help="tokens of a text, instead of the workload's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--topology", default="v5e:2x2", help="generation, and how its chips are joined")
    args = parser.parse_args()
    print("| model | task | chips | kernel | arguments | temporaries | GFLOP | kernel calls | seconds |")
    print("|" + " --- |" * 9)
    for model, task, chips, kernel in (
        (model, task, chips, kernel)
        for model in args.models
        for task in args.tasks
        for chips in args.chips
        for kernel in args.kernels
    ):
        start = time.perf_counter()
        compiled = compile_step(args, task, model, chips, kernel)
        plan = compiled.memory_analysis()
        sizes = [f"{size / 2**20:,.0f}" for size in (plan.argument_size_in_bytes, plan.temp_size_in_bytes)]
        calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
        counted = [f"{compiled.cost_analysis()['flops'] / 1e9:,.1f}", str(calls), f"{time.perf_counter() - start:.0f}"]
        print(f"| {' | '.join((model, task, str(chips), kernel, *sizes, *counted))} |", flush=True)


if __name__ == "__main__":
    main()
