"""checkpoint.py: bit for bit, whatever the leaf, onto any sharding; all or nothing; clear refusals."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError
from rlhf_jax.training import sharding
from rlhf_jax.training.checkpoint import Checkpoints

OPTIMIZER = optax.adam(1e-3)


class Controller(NamedTuple):
    coefficient: jax.Array
    seen: jax.Array


def run_state(seed):
    """Everything a run holds: train state, keys, controller, data position, odd types."""
    key = jax.random.key(seed)
    params = {
        "embed": {"embedding": jax.random.normal(key, (8, 4))},
        "norm": {"scale": jnp.ones(4, jnp.bfloat16) * seed},
    }
    rng = np.random.default_rng(seed)
    return {
        "actor": TrainState.create(apply_fn=None, params=params, tx=OPTIMIZER),
        "key": key,
        "keys": [jax.random.split(key, (2, 3)), jax.random.key(seed, impl="rbg")],
        "controller": Controller(jnp.float32(0.1 * seed), jnp.int32(seed)),
        "odd": (
            jnp.array([jnp.nan, -0.0, jnp.inf]),
            jnp.array([True, False]),
            jnp.uint32([2**32 - 1]),
            jnp.zeros((0, 3), jnp.int8),
            np.array([2**63 + seed], np.uint64),
            rng.normal(size=(2, 2)),
            np.float64(seed) / 3,
        ),
        "data": {
            "position": 2**100 + seed,
            "epoch": seed,
            "name": f"reviews {seed}",
            "share": seed / 7,
            "shuffled": seed > 1,
        },
        "nothing": None,
        "empty": {},
    }


def bits(leaf):
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    return (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) if hasattr(leaf, "dtype") else (type(leaf), leaf)


def assert_bit_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, wanted in jax.tree_util.tree_leaves_with_path(expected):
        found = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
        assert bits(found) == bits(wanted), path
        assert isinstance(found, jax.Array) == isinstance(wanted, jax.Array), path


def test_a_whole_run_comes_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(7, run_state(1), metadata={"stage": "sft", "config": {"lr": 1e-3}})
        assert_bit_equal(checkpoints.restore(run_state(2)).state, run_state(1))
    with Checkpoints(tmp_path / "run") as reopened:
        step, state, metadata = reopened.restore(run_state(3))
    assert (step, metadata) == (7, {"stage": "sft", "config": {"lr": 1e-3}})
    assert_bit_equal(state, run_state(1))


def test_training_goes_on_to_the_same_bits(tmp_path):
    @jax.jit
    def step(state):
        key, noise = jax.random.split(state["key"])
        grads = jax.tree.map(lambda p: p * jax.random.normal(noise, p.shape, p.dtype), state["train"].params)
        return {"train": state["train"].apply_gradients(grads=grads), "key": key}

    def fresh():
        return {"train": run_state(1)["actor"], "key": jax.random.key(5)}

    straight = fresh()
    for index in range(6):
        straight = step(straight)
        if index == 2:
            with Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(3, straight)
    with Checkpoints(tmp_path) as checkpoints:
        resumed = checkpoints.restore(fresh()).state  # its step is still the Python int 0
    for _ in range(3):
        resumed = step(resumed)
    assert_bit_equal(resumed, straight)


def test_restoring_works_from_shapes_alone(tmp_path):
    state = {"w": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3), "none": jnp.zeros(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(jax.eval_shape(lambda: state)).state
    assert_bit_equal(restored, state)


def test_restoring_onto_another_sharding(tmp_path):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    pair = sharding.make_mesh(data=2, devices=jax.devices()[:2])
    state = {"embed": {"embedding": jnp.arange(32.0).reshape(8, 4)}, "key": jax.random.key(1), "scale": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, sharding.shard(state, mesh))
        everywhere = NamedSharding(pair, P())
        targets = {
            "one device": jax.tree.map(jnp.zeros_like, {name: state[name] for name in ("embed", "scale")}),
            "two devices": jax.device_put({name: state[name] for name in ("embed", "scale")}, everywhere),
            "mesh": sharding.shard({name: state[name] for name in ("embed", "scale")}, mesh),
        }
        for name, target in targets.items():
            target["key"] = jax.device_put(state["key"], target["scale"].sharding)
            restored = checkpoints.restore(target).state
            assert_bit_equal(restored, state)
            for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
                assert found.sharding == wanted.sharding, name
                assert found.committed == wanted.committed, name
    assert restored["embed"]["embedding"].sharding.spec == P("tensor", "fsdp")


def test_the_last_n_are_kept_and_any_of_them_can_be_restored(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 5, 9):
            checkpoints.save(step, {"w": jnp.float32([step])})
        assert checkpoints.steps() == [5, 9]
        assert checkpoints.restore({"w": jnp.zeros(1)}, step=5).state["w"] == 5
        assert checkpoints.restore({"w": jnp.zeros(1)}).step == 9
        with pytest.raises(ValueError, match="larger than the latest checkpoint's, 9, got 9"):
            checkpoints.save(9, {"w": jnp.zeros(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "9"]


def test_arrays_are_readable_by_any_orbax_reader(tmp_path):
    import orbax.checkpoint as ocp

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, run_state(1))
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(tmp_path / "1" / "state")
    np.testing.assert_array_equal(
        tree["actor"]["params"]["embed"]["embedding"], run_state(1)["actor"].params["embed"]["embedding"]
    )


KILLED = """
    import os, pathlib, signal, sys, threading
    import jax.numpy as jnp
    from rlhf_jax.training.checkpoint import Checkpoints

    folder = pathlib.Path(sys.argv[1])

    def kill_in_the_middle():
        while not list(folder.glob("2.*tmp*/state*/*")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"w": jnp.full((500_000,), 1.0)})
    threading.Thread(target=kill_in_the_middle, daemon=True).start()
    checkpoints.save(2, {f"w{i}": jnp.full((500_000,), 2.0) for i in range(40)})
"""


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    folder = tmp_path / "run"
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert len(list(folder.iterdir())) == 2  # the half-written one is there, under its temporary name
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1]
        step, state, _ = checkpoints.restore({"w": jnp.zeros(500_000)})
        assert step == 1
        assert (state["w"] == 1).all()
        checkpoints.save(2, {"w": jnp.zeros(3)})
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


def test_a_tree_that_does_not_fit_is_refused_with_the_paths(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            4, {"params": {"w": jnp.zeros((3, 4)), "old": jnp.zeros(1)}, "name": "a", "key": jax.random.key(0)}
        )
        target = {
            "params": {"w": jnp.zeros((3, 5)), "new": jnp.zeros(1)},
            "name": jnp.zeros(()),
            "key": jax.random.key(0, impl="rbg"),
        }
        with pytest.raises(UserError) as refusal:
            checkpoints.restore(target)
    message = str(refusal.value)
    for words in (
        str(tmp_path / "4"),
        "it lacks params/new",
        "only it has params/old",
        "params/w is float32[3, 4] there and float32[3, 5] here",
        "name is str there and float32[] here",
        "key is key<fry>[] there and key<rbg>[] here",
        "start in another folder",
    ):
        assert words in message


def test_another_format_is_refused(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(1)})
        monkeypatch.setattr("rlhf_jax.training.checkpoint.FORMAT", 2)
        with pytest.raises(UserError, match=r"has format 1, and this version of rlhf_jax reads format 2"):
            checkpoints.restore({"w": jnp.zeros(1)})


def test_long_lists_of_differences_are_cut(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(1)})
        with pytest.raises(UserError, match=r"a09 and 15 more"):
            checkpoints.restore({f"a{i:02}": jnp.zeros(1) for i in range(25)})


def test_nothing_to_restore_is_said(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        with pytest.raises(UserError, match=r"no checkpoint in .*none"):
            checkpoints.restore({"w": jnp.zeros(1)})
        assert not (tmp_path / "none").exists()
        checkpoints.save(2, {"w": jnp.zeros(1)})
        with pytest.raises(UserError, match=r"no checkpoint 3 in .*; there are \[2\]"):
            checkpoints.restore({"w": jnp.zeros(1)}, step=3)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)})

        def fail(*args, **kwargs):
            (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
            raise ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")

        monkeypatch.setattr(checkpoints._manager(), "save", fail)
        with pytest.raises(UserError, match=r"Checkpoint 2 could not be written to .*: no space left on the device"):
            checkpoints.save(2, {"w": jnp.ones(3)})
        assert [p.name for p in tmp_path.iterdir()] == ["1"]

        def fail_otherwise(*args, **kwargs):
            raise ValueError("something else")

        monkeypatch.setattr(checkpoints._manager(), "save", fail_otherwise)
        with pytest.raises(ValueError, match="something else"):
            checkpoints.save(2, {"w": jnp.ones(3)})
        assert checkpoints.restore({"w": jnp.zeros(3)}).state["w"].tolist() == [1, 1, 1]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written to .*file"):
        Checkpoints(tmp_path / "file").save(1, {"w": jnp.ones(3)})


def data_files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and "_sharding" not in p.name)


@pytest.mark.parametrize("damage", ["truncated", "scrambled", "missing"])
def test_a_damaged_checkpoint_is_named_never_silently_wrong(tmp_path, damage):
    state = {"w": jax.random.normal(jax.random.key(0), (200,)), "step": 3}
    with Checkpoints(tmp_path / "good") as checkpoints:
        checkpoints.save(1, state)
    refusals = []
    for index, file in enumerate(data_files(tmp_path / "good")):
        copy = tmp_path / str(index)
        shutil.copytree(tmp_path / "good", copy)
        victim = copy / file.relative_to(tmp_path / "good")
        content = victim.read_bytes()
        if damage == "missing":
            victim.unlink()
        elif damage == "truncated":
            victim.write_bytes(content[: len(content) // 2])
        else:
            victim.write_bytes(random.Random(0).randbytes(len(content)))
        with Checkpoints(copy) as checkpoints:
            try:
                restored = checkpoints.restore({"w": jnp.zeros(200), "step": 0})
            except UserError as error:
                refusals.append(str(copy) in str(error))
            else:
                assert_bit_equal(restored.state, state)
    assert len(refusals) >= 2
    assert all(refusals)


@pytest.mark.parametrize(
    ("state", "metadata", "error", "words"),
    [
        ({"f": print}, {}, TypeError, "f must be an array.*builtin_function"),
        ({"w": 1}, {"x": {1, 2}}, TypeError, "metadata must be JSON-serialisable"),
        ({"a/b": 1, "a": {"b": 2}}, {}, ValueError, "must not contain '/', got 'a/b'"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_writing(tmp_path, state, metadata, error, words):
    with Checkpoints(tmp_path / "run") as checkpoints, pytest.raises(error, match=words):
        checkpoints.save(1, state, metadata=metadata)
    assert not (tmp_path / "run").exists()


def test_values_alone_and_numbers_that_became_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"step": 3})
        assert checkpoints.restore({"step": 0}).state == {"step": 3}
        checkpoints.save(2, {"step": jnp.int32(8)})
        step = checkpoints.restore({"step": 0}).state["step"]
    assert bits(step) == bits(jnp.int32(8))
    assert isinstance(step, jax.Array)
    assert not step.committed
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(pathlib.Path("x"), keep=0)
