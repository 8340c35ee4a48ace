"""sharding.py: rules place a transformer's whole state, rows are dealt evenly, and the numbers stay the same."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax import masking
from rlhf_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from rlhf_jax.models.huggingface import FAMILIES
from rlhf_jax.models.stacked import stack_layers
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.training import sharding
from rlhf_jax.training.gradients import loss_and_gradients

CONFIG = TransformerConfig(
    vocab_size=32, width=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, tie_embeddings=False
)
MODEL = Transformer(CONFIG)
MESHES = [
    {"data": 4},
    {"data": 1, "fsdp": 4},
    {"data": 1, "tensor": 4},
    {"data": 1, "fsdp": 2, "tensor": 2},
    {"fsdp": 2},
]


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 3), jnp.int32)
    return MODEL.init(jax.random.key(0), tokens, tokens == 0, method="initialise")["params"]


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(6) < rng.integers(0, 7, 8)[:, None]
    return {"tokens": rng.integers(0, 32, (8, 6)), "mask": mask}


def step(state, batch, axis_name=None):
    def terms(params, rows):
        logits = MODEL.apply({"params": params}, rows["tokens"], rows["mask"], method="initialise")
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_probs, rows["tokens"][:, 1:, None], axis=-1)[..., 0]
        return {"nll": masking.token_totals(-picked, rows["mask"][:, 1:])}

    grads, metrics = loss_and_gradients(terms, state.params, batch, weights={"nll": 1.0}, axis_name=axis_name)
    return state.apply_gradients(grads=grads), metrics


def make_state(params):
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=optax.adam(1e-2))


@pytest.fixture(scope="module")
def expected(params, batch):
    return jax.jit(step)(make_state(params), batch)


def assert_same(actual, expected):
    tolerant = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(tolerant, jax.device_get(actual[0].params), jax.device_get(expected[0].params))
    tolerant(actual[1]["nll"], expected[1]["nll"])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_step_on_any_mesh_is_the_step_on_one_device(sizes, params, batch, expected):
    mesh = sharding.make_mesh(**sizes)
    state = sharding.shard(make_state(params), mesh)
    assert_same(jax.jit(step)(state, sharding.shard_batch(batch, mesh)), expected)


def test_a_pmapped_step_is_the_step_on_one_device(params, batch, expected):
    mapped = jax.pmap(functools.partial(step, axis_name="batch"), axis_name="batch")
    result = mapped(jax_utils.replicate(make_state(params)), sharding.split_devices(batch))
    assert_same(jax_utils.unreplicate(result), expected)


def test_every_matrix_of_the_model_and_its_moments_is_cut(params):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    state = sharding.shard(make_state(params), mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 2:
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size, name
        else:
            assert leaf.sharding.is_fully_replicated, name


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed/embedding", (8, 4), P("tensor", "fsdp")),
        ("head/embedding", (8, 4), P("tensor", "fsdp")),
        ("layer_0/attention/query/kernel", (4, 8), P("fsdp", "tensor")),
        ("layer_11/attention/out/kernel", (8, 4), P("tensor", "fsdp")),
        ("layer_3/mlp/gate/kernel", (4, 8), P("fsdp", "tensor")),
        ("layer_3/mlp/down/kernel", (8, 4), P("tensor", "fsdp")),
        ("layer_3/mlp_norm/scale", (4,), P()),
        ("head/kernel", (4, 2), P("fsdp", "tensor")),
        ("head/kernel", (4, 1), P("fsdp", None)),  # one output cannot be cut
        ("layer_3/mlp/down/kernel", (7, 4), P(None, "fsdp")),
        ("opt_state/0/v_row/embed/embedding", (8,), P("tensor")),  # a factored moment has fewer dimensions
        ("position_embed/embedding", (8, 4), P(None, "fsdp")),
        ("layers/attention/key/kernel", (3, 4, 8), P(None, "fsdp", "tensor")),  # stacked layers
        ("layers/mlp/down/kernel", (3, 4, 8, 4), P(None, None, "tensor", "fsdp")),  # stacked layers of experts
        ("layers/mlp/up/bias", (4, 8), P()),
        ("layer_0/mlp/router/kernel", (4, 8), P("fsdp", None)),
        ("decoder_1/cross/out/kernel", (8, 4), P("tensor", "fsdp")),
        ("critic/hidden/kernel", (4, 8), P("fsdp", "tensor")),
        ("critic/out/kernel", (4, 1), P("fsdp", None)),
        ("layer_0/mlp/up/kernel/codes", (4, 8), P("fsdp", "tensor")),  # quantised
        ("layer_0/mlp/down/kernel/base/scales", (2, 4), P("tensor", "fsdp")),  # quantised, under an adapter
        ("layer_0/mlp/down/kernel/down", (8, 2), P("tensor", None)),
        ("layer_0/mlp/down/kernel/up", (2, 4), P(None, "fsdp")),
        ("layer_0/attention/query/kernel/down", (4, 2), P("fsdp", None)),
        ("layer_0/attention/query/kernel/up", (2, 8), P(None, "tensor")),
        ("step", (), P()),
    ],
)
def test_rules(path, shape, spec):
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    (found,) = jax.tree.leaves(sharding.shardings(tree, sharding.make_mesh(data=1, fsdp=2, tensor=2)))
    assert found.spec == spec


SHAPE = {"vocab_size": 16, "width": 8, "num_layers": 2, "num_heads": 4, "head_dim": 4, "mlp_width": 16}
GEMMA = {"norm_offset": 1.0, "embedding_scale": 8**0.5, "activation": "gelu_tanh", "post_norms": True}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_width": 8}
DECODERS = {
    "llama": {"tie_embeddings": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "mistral": {"windows": (5,), "tie_embeddings": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"query_key_norm": True},
    "gemma": {"norm_offset": 1.0, "embedding_scale": 8**0.5},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"query_key_norm": True},
    "phi3": {"tie_embeddings": False},
    "mixtral": EXPERTS | {"tie_embeddings": False},
    "qwen3_moe": EXPERTS | {"query_key_norm": True, "dense_layers": (1,)},
    "gpt2": {"learned_positions": True, "norm": "layer", "qkv_bias": True, "gated": False, "max_length": 16},
}
SEQUENCES = {"t5": {"tie_embeddings": True, "gated": False}, "mt5": {}}


def shapes_of(name):
    """The parameters of a family, as shapes."""
    one = jnp.ones((1, 1), jnp.int32)
    if name in SEQUENCES:
        model = EncoderDecoder(EncoderDecoderConfig(**SHAPE, num_encoder_layers=2, **SEQUENCES[name]))
        inputs = (one, one > 0) * 2
    else:
        model, inputs = Transformer(TransformerConfig(**SHAPE, num_kv_heads=2, **DECODERS[name])), (one, one > 0)
    return jax.eval_shape(functools.partial(model.init, method="initialise"), jax.random.key(0), *inputs)["params"]


def test_every_family_is_known_here():
    assert {*DECODERS, *SEQUENCES} == set(FAMILIES)


@pytest.mark.parametrize("name", [*DECODERS, *SEQUENCES])
def test_every_matrix_of_every_family_is_cut(name):
    mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = shapes_of(name)
    trees = [shapes]
    if name in DECODERS and name != "qwen3_moe":  # whose layers differ
        trees.append(jax.eval_shape(stack_layers, shapes))
    for tree in trees:
        placed = jax.tree_util.tree_leaves_with_path(sharding.shardings(tree, mesh))
        for (path, found), leaf in zip(placed, jax.tree.leaves(tree), strict=True):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            axes = {axis for axis in found.spec if axis is not None}
            if path.endswith(("/scale", "/bias")) or path in ("encoder_bias/embedding", "decoder_bias/embedding"):
                assert not axes, path
            elif path.endswith(("router/kernel", "position_embed/embedding")):
                assert axes == {"fsdp"}, path
            else:
                assert axes == {"fsdp", "tensor"}, path
                assert leaf.size == 4 * np.prod(found.shard_shape(leaf.shape)), path


@pytest.mark.slow
def test_a_step_of_stacked_experts_is_compiled_for_eight_devices_ahead_of_time():
    """Nothing is allocated: each device would hold a quarter of the state, and of the rows a quarter."""
    program = textwrap.dedent(
        """
        import functools, jax, jax.numpy as jnp, optax
        from jax.sharding import NamedSharding, PartitionSpec as P
        from rlhf_jax.algorithms import sft
        from rlhf_jax.models.policies import token_policy
        from rlhf_jax.models.stacked import StackedTransformer, stack_layers
        from rlhf_jax.models.transformer import Transformer, TransformerConfig
        from rlhf_jax.training.sharding import make_mesh, shardings
        from rlhf_jax.types import TokenInputs

        config = TransformerConfig(vocab_size=256, width=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
                                   mlp_width=128, num_experts=4, experts_per_token=2, expert_width=64)
        model = Transformer(config, remat=jax.checkpoint_policies.nothing_saveable)
        apply_fn = token_policy(StackedTransformer(model), prompt_length=1)

        def start(key):
            one = jnp.ones((1, 1), jnp.int32)
            params = stack_layers(model.init(key, one, one > 0, method="initialise")["params"])
            return sft.init(params, apply_fn, optax.adamw(1e-4))

        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        placed = lambda tree, where: jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
        )
        state = jax.eval_shape(start, jax.random.key(0))
        state = placed(state, shardings(state, mesh))
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        batch = jax.eval_shape(lambda: sft.Batch(TokenInputs(jnp.ones((8, 17), jnp.int32), jnp.ones((8, 17), bool)),
                                                 jnp.ones((8, 16), bool)))
        batch = placed(batch, jax.tree.map(lambda _: rows, batch))
        step = jax.jit(functools.partial(sft.update, config=sft.Config()), donate_argnums=0)
        compiled = step.lower(state, batch).compile()
        memory = compiled.memory_analysis()
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        reduced = "all-reduce" in compiled.as_text()
        print(memory.argument_size_in_bytes / whole, memory.alias_size_in_bytes / whole, reduced)
        """
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | flags)
    assert ran.returncode == 0, ran.stderr
    held, reused, reduced = ran.stdout.split()
    assert 0.25 <= float(held) < 0.3
    assert 0.25 <= float(reused) < 0.3
    assert reduced == "True"


def test_own_rules_come_first_and_must_cover_everything():
    mesh = sharding.make_mesh()
    tree = {"actor": {"w": jnp.ones((8, 4))}, "b": jnp.ones(4)}
    rules = [("^actor/", P(("data", "fsdp"))), ("", P())]
    placed = sharding.shard(tree, mesh, rules)
    assert placed["actor"]["w"].addressable_shards[0].data.shape == (2, 4)
    with pytest.raises(ValueError, match="no sharding rule matches 'b'"):
        sharding.shardings(tree, mesh, rules[:1])


def test_mesh_sizes():
    assert dict(sharding.make_mesh(tensor=2).shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert set(sharding.make_mesh().axis_types) == {AxisType.Auto}
    assert sharding.make_mesh(data=2, devices=jax.devices()[:2]).size == 2
    with pytest.raises(ValueError, match=r"data=3.*for 4 devices"):
        sharding.make_mesh(data=3)
    with pytest.raises(ValueError, match="tensor=3"):
        sharding.make_mesh(tensor=3)
    with pytest.raises(ValueError, match="fsdp must be at least 1, got 0"):
        sharding.make_mesh(fsdp=0)


def test_rows_are_dealt_to_data_and_fsdp_devices_only():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    rows = sharding.shard_batch(np.arange(8), mesh)
    held = [np.asarray(part.data).tolist() for part in rows.addressable_shards]
    assert sorted(held) == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_devices_split_and_merge():
    x = {"x": np.arange(24).reshape(8, 3), "key": jax.random.split(jax.random.key(0), 8)}
    split = sharding.split_devices(x)
    assert split["x"].shape == (4, 2, 3)
    assert split["key"].shape == (4, 2)
    np.testing.assert_array_equal(sharding.merge_devices(split)["x"], x["x"])


def test_rows_that_cannot_be_dealt_are_refused():
    with pytest.raises(ValueError, match=r"rows of x must be a multiple of the 4 devices, got 6"):
        sharding.split_devices({"x": np.ones((6, 2))})
    with pytest.raises(ValueError, match=r"multiple of the 4 data · fsdp devices of this process, got 6"):
        sharding.shard_batch(np.ones((6, 2)), sharding.make_mesh())
    with pytest.raises(ValueError, match="got none"):
        sharding.split_devices({"x": np.float32(1)})
