"""docs/memory.md: its examples run and do what it says, its numbers are those of the optimisers."""

import functools
import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models.policies import token_policy
from rlhf_jax.models.quantisation import int8, nf4, quantise, stored_bytes
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.training.state import path_matches

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks():
    """What each example leaves behind; the second goes on where the first has ended."""
    scope, kept = {}, []
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", TEXT):
        exec(block, scope)
        kept.append(dict(scope))
    return kept


def test_a_donated_state_is_used_again(blocks):
    first = blocks[0]
    assert first["memory"].alias_size_in_bytes >= stored_bytes(first["state"]) > 3 * stored_bytes(first["params"])
    before, arrays = first["state"], lambda state: jax.tree.leaves((state.params, state.opt_state))
    places = {leaf.unsafe_buffer_pointer() for leaf in arrays(before)}
    after, _ = first["compiled"](before, first["batch"], reference=first["reference"])
    assert all(leaf.is_deleted() for leaf in arrays(before))
    assert {leaf.unsafe_buffer_pointer() for leaf in arrays(after)} == places


def test_written_parameters_are_the_plain_ones(blocks):
    first = blocks[0]
    assert jax.tree.structure(first["written"]) == jax.tree.structure(first["params"])
    assert float(first["metrics"]["preference/loss"]) == pytest.approx(np.log(2.0), rel=1e-5)


def test_the_reference_duplicates_the_upper_layers_alone(blocks):
    scope = blocks[1]
    config, params, reference = scope["config"], scope["params"], scope["reference"]
    layers = config.num_layers - scope["first"]
    assert set(reference) == {"layer_4", "layer_5", "final_norm", "embed"}
    assert reference["embed"]["embedding"] is params["embed"]["embedding"]
    assert reference["layer_4"]["mlp"]["up"]["kernel"] is not params["layer_4"]["mlp"]["up"]["kernel"]
    copied = stored_bytes({name: part for name, part in reference.items() if name != "embed"})
    assert copied == layers * stored_bytes(params["layer_0"]) + stored_bytes(params["final_norm"])
    assert set(scope["state"].params) == {"layer_4", "layer_5", "final_norm"}
    assert stored_bytes(scope["state"].opt_state) < 2.1 * copied

    inputs = scope["batch"].chosen.inputs
    whole = token_policy(Transformer(config), prompt_length=4)(params, inputs)
    np.testing.assert_allclose(scope["policy"](reference, inputs), whole, rtol=1e-5, atol=1e-5)
    assert float(scope["metrics"]["preference/loss"]) == pytest.approx(np.log(2.0), rel=1e-5)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), scope["state"].params, scope["trained"])
    assert all(jax.tree.leaves(moved))


def test_an_optimiser_on_the_host_takes_the_same_step(blocks):
    before, after = blocks[1], blocks[2]
    assert before["metrics"]["preference/loss"] == after["metrics"]["preference/loss"]
    jax.tree.map(np.testing.assert_array_equal, before["state"].params, after["state"].params)
    if jax.__version_info__ >= (0, 9):  # earlier versions have one memory on a CPU
        assert after["kinds"] == {"pinned_host"}


@pytest.fixture(scope="module")
def memory():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.memory")
    sys.path.remove(str(ROOT))


def test_optimisers_keep_what_the_table_says(memory):
    from benchmarks.workloads import MODELS, shapes

    params = shapes(MODELS["gpt2_124m"])
    rows = re.findall(r"(?m)^\| `(\w+\(1e-5.*?\))` \| (\d+) \| (\S+) \|$", TEXT)
    assert len(rows) == 6
    for call, size, multiple in rows:
        optimizer = eval(call, vars(optax) | {"jnp": jnp})
        kept = stored_bytes(jax.eval_shape(optimizer.init, params))
        assert f"{kept / 2**20:.0f}" == size, call
        assert f"{kept / stored_bytes(params):.1f}" == multiple, call


def test_few_bits_take_what_the_table_says():
    sizes = {"vocab_size": 49152, "width": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    model = Transformer(TransformerConfig(**sizes, head_dim=64, mlp_width=1536))
    one = jnp.ones((1, 1), jnp.int32)
    init = functools.partial(model.init, method="initialise")
    params = jax.eval_shape(init, jax.random.key(0), one, one > 0)["params"]
    kernels = path_matches("kernel$")
    ways = {"float32": None, "`int8`": int8, "`nf4`, `block=32`": functools.partial(nf4, block=32), "`nf4`": nf4}
    rows = re.findall(r"(?m)^\| (float32|`(?:int8|nf4)`.*?) \| (\d+) \| (\S+) \| ", TEXT)
    assert [name for name, *_ in rows] == list(ways)
    numbers = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(params) if "kernel" in str(path))
    for name, size, bits in rows:
        way = ways[name]
        small = jax.eval_shape(lambda p, way=way: p if way is None else quantise(p, kernels, to=way), params)
        stored = stored_bytes(small)
        assert f"{stored / 2**20:.0f}" == size
        assert f"{8 * (stored - stored_bytes(params) + 4 * numbers) / numbers:.1f}" == bits


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "reward", "dpo", "grpo", "ppo", "distill"])
def test_every_algorithm_uses_its_state_again_and_needs_less_the_lean_way(memory, task):
    plans = {}
    for way in memory.WAYS:
        compiled, _, state = memory.compile_step(task, "lm_small", way)
        plans[way] = compiled.memory_analysis()
        assert plans[way].alias_size_in_bytes >= stored_bytes(state), way
    assert plans["lean"].temp_size_in_bytes < 0.7 * plans["plain"].temp_size_in_bytes


def test_a_row_of_the_table(memory):
    told = {"task": "dpo", "model_name": "lm_small", "way": "lean", "model": 20.0, "needed": 100.4, "compiled": 1190.6}
    told |= {"resident": 1400.0, "started": 200.2}
    assert memory.row(told) == "| lm_small | dpo | lean | 20 | 100 | 1,191 | 1,400 | 200 | 70.0 |"
