"""state.py: what frozen parameters cost, and what they do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from rlhf_jax import masking
from rlhf_jax.training.gradients import loss_and_gradients
from rlhf_jax.training.sharding import make_mesh, shard, shard_batch
from rlhf_jax.training.state import (
    init_train_state,
    map_paths,
    merge_params,
    on_host,
    path_matches,
    split_params,
    trainable,
)

LAYERS, WIDTH, ROWS = 6, 32, 64
HAS_HOST = jax.__version_info__ >= (0, 9)  # earlier versions have one memory on a CPU
UPPER = path_matches(r"^layer_[45]/")


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index in range(LAYERS):
            x = nn.tanh(nn.Dense(WIDTH, name=f"layer_{index}")(x))
        return x


@pytest.fixture(scope="module")
def params():
    return Tower().init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]


@pytest.fixture(scope="module")
def batch():
    return jax.random.normal(jax.random.key(1), (ROWS, WIDTH))


def terms(params, x):
    return {"fit": masking.token_totals(jnp.square(Tower().apply({"params": params}, x)), jnp.ones_like(x, bool))}


def floats(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def step_on_part(state, frozen, x):
    merged = lambda trained, rows: terms(merge_params(trained, frozen), rows)
    grads, _ = loss_and_gradients(merged, state.params, x, weights={"fit": 1.0})
    return state.apply_gradients(grads=grads)


def step_on_whole(state, x, *, report_norm=False):
    grads, _ = loss_and_gradients(terms, state.params, x, weights={"fit": 1.0})
    state = state.apply_gradients(grads=grads)
    return (state, optax.tree.norm(grads)) if report_norm else state


def make_state(params, optimizer):
    return TrainState.create(apply_fn=Tower().apply, params=params, tx=optimizer)


def test_split_and_merge_are_inverse(params):
    trained, frozen = split_params(params, UPPER)
    assert set(trained) == {"layer_4", "layer_5"}
    assert set(frozen) == {f"layer_{i}" for i in range(4)}
    merged = merge_params(frozen, trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))


def test_both_ways_to_freeze_train_the_same_leaves_to_the_same_values(params, batch):
    trained, frozen = split_params(params, UPPER)
    part = jax.jit(step_on_part)(make_state(trained, optax.adam(1e-2)), frozen, batch)
    whole = jax.jit(step_on_whole)(make_state(params, trainable(optax.adam(1e-2), UPPER)), batch)
    moved, still = split_params(whole.params, UPPER)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), moved, part.params)
    jax.tree.map(np.testing.assert_array_equal, still, frozen)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(trained), strict=True))


def test_frozen_leaves_have_no_optimiser_state(params):
    trained, _ = split_params(params, UPPER)
    per_moment = floats(trained)
    assert per_moment == floats(params) // 3
    assert floats(trainable(optax.adam(1e-2), UPPER).init(params)) == 2 * per_moment + 1
    assert floats(trainable(optax.adam(1e-2), lambda path: True).init(params)) == 2 * floats(params) + 1


def test_no_gradient_is_computed_for_split_off_leaves(params, batch):
    """Forward 6 layers, backward 2 of them: one product per forward layer, and per trained layer one for its kernel
    and one for its input, except the lowest."""
    product = 2 * ROWS * WIDTH * WIDTH

    def products(step, *args):
        return jax.jit(step).lower(*args).compile().cost_analysis()["flops"] / product

    trained, frozen = split_params(params, UPPER)
    part = products(step_on_part, make_state(trained, optax.sgd(0.1)), frozen, batch)
    whole_state = make_state(params, trainable(optax.sgd(0.1), UPPER))
    assert LAYERS + 3 <= part < LAYERS + 4
    assert products(step_on_whole, whole_state, batch) < LAYERS + 4  # removed as dead code ...
    reporting = functools.partial(step_on_whole, report_norm=True)
    assert products(reporting, whole_state, batch) > 3 * LAYERS - 1  # ... unless something reads them


def test_an_optimiser_for_every_leaf_is_the_optimiser_itself(params, batch):
    plain = step_on_whole(make_state(params, optax.adam(1e-2)), batch)
    wrapped = step_on_whole(make_state(params, trainable(optax.adam(1e-2), lambda path: True)), batch)
    jax.tree.map(np.testing.assert_array_equal, plain.params, wrapped.params)


def test_mistakes_are_named(params):
    with pytest.raises(ValueError, match=r"none of the 12 parameters.*layer_0/"):
        split_params(params, path_matches("^block_"))
    with pytest.raises(ValueError, match=r"share.*layer_0/bias"):
        merge_params(params, {"layer_0": {"bias": 0}})


def test_paths_of_any_pytree_can_be_mapped(params):
    state = make_state(params, optax.adam(1e-2))
    paths = jax.tree.leaves(map_paths(lambda path, _: path, state))
    assert "params/layer_0/kernel" in paths
    assert any(path.endswith("mu/layer_0/kernel") for path in paths)


def spaces(optimizer_state):
    """Where arrays of the optimiser's state are, and where single numbers are."""
    where = lambda leaf: leaf.aval.memory_space
    leaves = jax.tree.leaves(optimizer_state)
    return {where(x) for x in leaves if x.ndim}, {where(x) for x in leaves if not x.ndim}


@pytest.mark.parametrize("fsdp", [1, 4])
def test_moments_wait_on_the_host_and_change_no_number(params, batch, fsdp):
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    mesh = make_mesh(data=1, fsdp=fsdp, devices=jax.devices()[:fsdp])
    place = lambda tree: shard(tree, mesh) if fsdp > 1 else tree
    rows = shard_batch(batch, mesh) if fsdp > 1 else batch
    step = jax.jit(step_on_whole, donate_argnums=0)
    here, there = (
        init_train_state(place(jax.tree.map(jnp.copy, params)), Tower().apply, optimizer)
        for optimizer in (optax.adamw(1e-2), on_host(optax.adamw(1e-2)))
    )
    placements = jax.tree.map(lambda x: x.sharding.spec, there.opt_state[0].mu) if fsdp > 1 else None
    for _ in range(3):
        if HAS_HOST:
            assert spaces(there.opt_state) == ({host}, {device})
            assert spaces(here.opt_state) == ({device}, {device})
        here, there = step(here, rows), step(there, rows)
    jax.tree.map(np.testing.assert_array_equal, (here.params, here.opt_state), (there.params, there.opt_state))
    if fsdp > 1:
        assert jax.tree.map(lambda x: x.sharding.spec, there.opt_state[0].mu) == placements
    if HAS_HOST:
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host"}


def test_a_program_for_an_accelerator_moves_the_moments_in_and_out(params, batch):
    state = make_state(params, on_host(optax.adamw(1e-2)))
    moments = 2 * len(jax.tree.leaves(params))
    for platform in ("cuda", "tpu"):
        program = jax.jit(step_on_whole).trace(state, batch).lower(lowering_platforms=(platform,)).as_text()
        moved = [line for line in program.splitlines() if "@annotate_device_placement" in line]
        assert [sum(f'"{kind}"' in line for line in moved) for kind in ("device", "pinned_host")] == [moments] * 2


def test_an_optimiser_on_the_host_runs_in_a_scan(params, batch):
    state = make_state(params, on_host(optax.adamw(1e-2)))
    loop = jax.jit(lambda state: jax.lax.scan(lambda s, _: (step_on_whole(s, batch), None), state, length=2)[0])
    after, expected = loop(state), step_on_whole(step_on_whole(state, batch), batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after.params, expected.params)
    if HAS_HOST:
        assert spaces(after.opt_state)[0] == {jax.memory.Space.Host}
