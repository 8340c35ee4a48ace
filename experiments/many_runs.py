"""Many runs at once: a whole RLHF run is a pure function, so seeds, KL coefficients and learning rates are `vmap`ped.

Method. A tiny decoder (two layers of width 32 over 16 tokens) with random weights answers prompts of two tokens; the
scripted reward is the share of tokens from the upper half of the vocabulary. RLOO (`algorithms.group`) with the KL to
the start in its reward trains it: every turn generates 4 answers to each of 8 prompts, compares them and takes a step.
A run is ``run(key, kl_coefficient, learning_rate)``; all settings together are

    runs = jax.vmap(run)(keys, kl_coefficients, learning_rates)

and compile once; several devices take an equal share each. The script measures what eight runs cost beside one. Nobody
took part: the reward is scripted.

Expected table. A weaker pull (smaller coefficient) and a larger learning rate reach more reward at more KL.

    python experiments/many_runs.py [--turns 200] [--out runs/many_runs.json] [--smoke]

A CPU counts as one device; XLA_FLAGS="--xla_force_host_platform_device_count=2" makes two of it.
"""

import argparse
import functools
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from rlhf_jax.algorithms import group
from rlhf_jax.generation.sampler import generate
from rlhf_jax.group_advantages import leave_one_out
from rlhf_jax.models.policies import token_policy
from rlhf_jax.models.transformer import Transformer, TransformerConfig

VOCABULARY, PROMPTS, PROMPT, RESPONSE, GROUP = 16, 8, 2, 8, 4
MODEL = Transformer(
    TransformerConfig(
        vocab_size=VOCABULARY, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64
    )
)
SEEDS, KL_COEFFICIENTS, LEARNING_RATES = (0, 1), (0.03, 0.3), (3e-3, 1e-2)


class Curve(NamedTuple):
    """What a run reports, per turn."""

    reward: Array  # [turns] mean share of wanted tokens
    kl: Array  # [turns] nats per answer


def run(key: Array, kl_coefficient: Array, learning_rate: Array, *, turns: int) -> Curve:
    """A whole RLHF run from random weights; every argument but `turns` is traced."""
    init_key, run_key = jax.random.split(key)
    one = jnp.ones((1, 1), jnp.int32)
    reference = dict(MODEL.init(init_key, one, one > 0, method="initialise")["params"])
    log_probs = token_policy(MODEL, prompt_length=PROMPT)
    config = group.Config(group=GROUP, advantages=leave_one_out, kl_weight=None, kl_in_reward=kl_coefficient)
    state = group.init(reference, log_probs, optax.adam(learning_rate))

    def turn(state, key):
        prompt_key, answer_key = jax.random.split(key)
        prompts = jax.random.randint(prompt_key, (PROMPTS, PROMPT), 0, VOCABULARY)
        keys = jax.random.split(answer_key, PROMPTS * GROUP)
        answer = functools.partial(generate, length=RESPONSE, end_token=-1, pad_token=0, samples=GROUP)
        rollout = answer(MODEL, dict(state.params), prompts, jnp.ones(prompts.shape, bool), keys)
        rewards = jnp.mean(rollout.responses >= VOCABULARY // 2, axis=-1)
        known = log_probs(reference, rollout.inputs)
        batch, told = group.experience(
            rollout.inputs, rollout.response_mask, rollout.log_probs, rewards, known, config=config
        )
        state, _ = group.update(state, batch, config=config)
        return state, Curve(told["human/score"], told["policy/kl"])

    return jax.lax.scan(turn, state, jax.random.split(run_key, turns))[1]


def seconds(function, *arguments, repeats: int = 3) -> float:
    """Median time of a compiled function."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main(arguments: list[str] | None = None) -> None:
    """Runs all settings at once, then one alone, and prints both times and what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--smoke", action="store_true", help="five turns, for a test")
    args = parser.parse_args(arguments)
    turns = 5 if args.smoke else args.turns

    settings = [(s, k, r) for s in SEEDS for k in KL_COEFFICIENTS for r in LEARNING_RATES]
    seeds, coefficients, rates = (jnp.asarray(column) for column in zip(*settings, strict=True))
    single = functools.partial(run, turns=turns)
    devices = math.gcd(len(settings), jax.device_count())
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("runs",))
    share = PartitionSpec("runs")
    split = jax.shard_map(jax.vmap(single), mesh=mesh, in_specs=share, out_specs=share, check_vma=False)
    together, alone = jax.jit(split), jax.jit(single)
    many = jax.vmap(jax.random.key)(seeds), coefficients, rates
    curves = jax.device_get(together(*many))
    first = jax.device_get(alone(*(x[0] for x in many)))
    ends = (x[:, -max(1, turns // 10) :].mean(axis=1).tolist() for x in curves)
    names = ("seed", "kl_coefficient", "learning_rate", "reward", "kl")
    rows = [dict(zip(names, (*setting, *end), strict=True)) for setting, *end in zip(settings, *ends, strict=True)]
    one_s, all_s = seconds(alone, *(x[0] for x in many)), seconds(together, *many)
    times = {
        "turns": turns,
        "runs": len(settings),
        "devices": devices,
        "one_s": one_s,
        "all_s": all_s,
        "ratio": all_s / one_s,
    }
    times |= {"largest_difference": float(abs(curves.reward[0] - first.reward).max())}
    print("seed  KL coefficient  learning rate  reward  KL (nats per answer)")
    for row in rows:
        print("{seed:4}  {kl_coefficient:14}  {learning_rate:13}  {reward:6.3f}  {kl:.3f}".format(**row))
    told = "{runs} runs of {turns} turns on {devices} device(s): {all_s:.3f} s, one: {one_s:.3f} s, ratio {ratio:.2f}"
    print(told.format(**times))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"times": times, "runs": rows, "smoke": args.smoke, "feedback": "scripted"}))


if __name__ == "__main__":
    main()
