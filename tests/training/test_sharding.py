"""sharding.py: rules place a transformer's whole state, rows are dealt evenly, and the numbers stay the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax import masking
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
        ("step", (), P()),
    ],
)
def test_rules(path, shape, spec):
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    (found,) = jax.tree.leaves(sharding.shardings(tree, sharding.make_mesh(data=1, fsdp=2, tensor=2)))
    assert found.spec == spec


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
