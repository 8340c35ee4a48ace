"""Generation of ragged work: ``python -m benchmarks.ragged`` prints one JSON line per way of serving the same queue.

Prompts of 8 to 120 tokens ask for responses of 4 to 200 (`--longest`), both log-normal (heavy-tailed); the last two
tokens of a prompt say how many it wants. `dense` has as many tokens, all rows alike; `share` is a way's real tokens per
second over its. Rows are split over the devices; each device serves its own.

    python -m benchmarks.ragged --model lm_small --prompts 64 --slots 16 --devices 2
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT, RESPONSE = (8, 120), (4, 200)  # shortest and longest


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "lm_small", "gpt2_124m"), default="lm_small")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16, help="rows that are generated at a time, on all devices")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--longest", type=int, default=RESPONSE[1], help="tokens of the longest response")
    parser.add_argument("--widths", type=int, default=3, help="parts of the cache that the queue's steps can run on")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the ways take turns")
    return parser.parse_args()


def lengths(count: int, longest: int = RESPONSE[1]) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and response lengths [count]."""
    rng = np.random.default_rng(0)
    draw = lambda median, spread, ends: np.clip(rng.lognormal(np.log(median), spread, count).astype(int), *ends)
    return draw(32, 0.7, PROMPT), draw(40, 1.0, (RESPONSE[0], longest))


def left_padded(prompts: np.ndarray, room: int, wanted: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts [N, room] of the given lengths that end with the response length wanted, and their mask."""
    mask = np.arange(room)[None] >= room - prompts[:, None]
    tokens = np.random.default_rng(seed).integers(4, 64, mask.shape) * mask
    tokens[:, -1] = wanted % 64  # 64 is the smallest vocabulary here
    tokens[:, -2] = wanted // 64
    return tokens.astype(np.int32), mask


def ways(args: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """What serves the queue: name -> a call that returns [N] response lengths, and the tokens it should write."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from benchmarks import workloads
    from rlhf_jax.generation.history import History
    from rlhf_jax.generation.refill import generate_queue
    from rlhf_jax.generation.sampler import generate
    from rlhf_jax.models.transformer import Transformer

    model = Transformer(workloads.MODELS[args.model])
    mesh = Mesh(jax.devices()[: args.devices], ("data",))
    whole, rows = PartitionSpec(), PartitionSpec("data")
    params = workloads.normal_like(workloads.shapes(model.config), 0)
    params = jax.device_put(params, NamedSharding(mesh, whole))
    slots = args.slots // args.devices

    def stop(history: History) -> jax.Array:
        written = jnp.sum(history.response_mask, axis=-1)
        said = lambda back: jnp.take_along_axis(history.tokens, (history.tokens.shape[1] - back - written)[:, None], 1)
        return written >= (64 * said(2) + said(1))[:, 0]

    def served(way: Callable[..., jax.Array], tokens: np.ndarray, mask: np.ndarray) -> Callable[[], jax.Array]:
        step = jax.shard_map(way, mesh=mesh, in_specs=(whole, rows, rows, rows), out_specs=rows, check_vma=False)
        keys = jax.random.split(jax.random.key(0), len(tokens))
        return functools.partial(
            jax.jit(step), params, *(jax.device_put(x, NamedSharding(mesh, rows)) for x in (tokens, mask, keys))
        )

    def batch(length: int, params: Any, tokens: jax.Array, mask: jax.Array, keys: jax.Array) -> jax.Array:
        rollout = generate(model, params, tokens, mask, keys, length=length, end_token=-1, pad_token=0, stop=stop)
        return jnp.sum(rollout.response_mask, axis=-1)

    def queue(params: Any, tokens: jax.Array, mask: jax.Array, keys: jax.Array) -> jax.Array:
        settings = {"length": args.longest, "end_token": -1, "pad_token": 0, "stop": stop}
        done = generate_queue(model, params, tokens, mask, keys, slots=slots, widths=args.widths, **settings)
        return jnp.sum(done.rollout.response_mask, axis=-1)

    def batches(order: np.ndarray, *, dense: bool = False) -> Callable[[], np.ndarray]:
        calls = []
        for part in np.split(order, len(order) // args.slots):
            own = prompts[part], responses[part]
            if dense:
                own = tuple(np.full(len(part), round(x.mean())) for x in (prompts, responses))
            room, length = int(own[0].max()), int(own[1].max()) if dense else args.longest
            if not dense:
                room = min(-(-room // 32) * 32, PROMPT[1])  # few shapes, few compilations
            calls.append(served(functools.partial(batch, length), *left_padded(own[0], room, own[1])))
        return lambda: np.concatenate([np.asarray(call()) for call in calls])

    prompts, responses = lengths(args.prompts, args.longest)
    first_come = np.arange(args.prompts)
    all_rows = served(queue, *left_padded(prompts, PROMPT[1], responses))
    calls = {
        "dense": batches(first_come, dense=True),
        "batches, first come": batches(first_come),
        "batches, by prompt length": batches(np.argsort(prompts, kind="stable")),
        "queue": lambda: np.asarray(all_rows()),
    }
    total = int(responses.sum())
    return calls, {name: total if name != "dense" else round(responses.mean()) * args.prompts for name in calls}


def main() -> None:
    """Times all ways in turns."""
    args = parse()
    flags = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    calls, expected = ways(args)
    for name, call in calls.items():
        if (written := int(call().sum())) != expected[name]:
            raise RuntimeError(f"{name} wrote {written} tokens, expected {expected[name]}")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    speed = {name: expected[name] / statistics.median(seconds) for name, seconds in taken.items()}
    for name, seconds in taken.items():
        found = {
            "way": name,
            "model": args.model,
            "devices": args.devices,
            "prompts": args.prompts,
            "slots": args.slots,
        }
        found |= {"tokens": expected[name], "seconds": round(statistics.median(seconds), 4)}
        found |= {"tokens_per_s": round(speed[name], 1), "share": round(speed[name] / speed["dense"], 3)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
