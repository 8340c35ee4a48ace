"""Checkpoints of a whole run: any pytree of arrays, keys and Python values, written at once or not at all.

A checkpoint ``DIRECTORY/STEP`` holds two Orbax items: ``state``, the arrays as nested dicts named by their paths (any
Orbax reader opens it without this library), and ``manifest``, JSON with the type and shape of every leaf, the Python
values, and the caller's metadata. Typed keys are stored as their key data and come back as keys.

What a run must put in so that it resumes to the same numbers: parameters, optimiser state, random keys, step,
controllers (KL coefficient, running moments) and data position.

Why `orbax.checkpoint.CheckpointManager`: its save, restore and retention are the same from the oldest supported release
on, while ``orbax.checkpoint.v1`` still lives under ``experimental``, where its functions were renamed between releases.
Saving is synchronous: when `Checkpoints.save` returns, the checkpoint is there.
"""

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Sharding

from rlhf_jax.errors import UserError

__all__ = ["Checkpoints", "Restored"]

FORMAT = 1
_LOGGING = threading.Lock()  # of the level that is changed while a checkpoint is read or written
_SHOWN = 10


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives back."""

    step: int  # the number of completed steps the checkpoint was saved under
    state: Any  # the pytree, structured, placed and typed like the target
    metadata: dict[str, Any]  # the caller's JSON


class Checkpoints:
    """The checkpoints in one directory, which one process writes at a time; a context manager.

    Args:
      directory: where they are, or will be; created by the first save.
      keep: how many of the latest checkpoints stay; older ones are deleted after a newer one is complete.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=2) as checkpoints:
    ...     checkpoints.save(10, {"key": jax.random.key(0), "w": jnp.ones(3), "epoch": 4}, metadata={"stage": "sft"})
    ...     restored = checkpoints.restore({"key": jax.random.key(9), "w": jnp.zeros(3), "epoch": 0})
    >>> restored.step, restored.state["w"].tolist(), restored.state["epoch"], restored.metadata
    (10, [1.0, 1.0, 1.0], 4, {'stage': 'sft'})
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._opened: ocp.CheckpointManager | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases Orbax's threads; the object may be used again afterwards."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first; what an interrupted save left behind is not among them."""
        if not self.directory.is_dir():
            return []
        self._manager().reload()
        return sorted(self._manager().all_steps())

    def latest(self) -> int | None:
        """The last complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes ``state`` under ``step``. A process killed at any moment leaves the earlier checkpoints as they were.

        Args:
          step: number of completed steps, larger than that of every checkpoint here.
          state: any pytree of JAX and NumPy arrays, typed keys, and Python bool, int, float and str leaves.
          metadata: a JSON-serialisable mapping to keep beside it.
        Raises:
          ValueError: ``step`` is not larger than the latest one, or a key of the state contains "/".
          TypeError: a leaf or the metadata is of another type.
          UserError: the checkpoint could not be written (disk full, no permission); nothing of it is left behind.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"step must be larger than the latest checkpoint's, {latest}, got {step}")
        leaves = _leaves(state)
        manifest = {"format": FORMAT, "leaves": {path: _describe(path, leaf) for path, leaf in leaves.items()}}
        manifest["metadata"] = dict(metadata or {})
        try:
            json.dumps(manifest)
        except TypeError as error:
            raise TypeError(f"metadata must be JSON-serialisable: {error}") from error
        stored = {path: _to_stored(leaf) for path, leaf in leaves.items() if _is_stored(manifest["leaves"][path])}
        items: dict[str, Any] = {"manifest": ocp.args.JsonSave(manifest)}
        if stored:
            items["state"] = ocp.args.StandardSave(traverse_util.unflatten_dict(stored, sep="/"))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            with _quiet():
                self._manager().save(step, args=ocp.args.Composite(**items), force=True)
        except (OSError, ValueError) as error:
            self.close()
            self._remove_unfinished()
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise
            raise UserError(
                f"Checkpoint {step} could not be written to {self.directory}: {_reason(error)}. Free space there or "
                "choose another folder; the checkpoints saved before are intact."
            ) from error

    def restore(self, target: Any, *, step: int | None = None) -> Restored:
        """Reads a checkpoint back, bit for bit.

        Args:
          target: a pytree of the structure wanted: a freshly initialised state, or `jax.ShapeDtypeStruct` leaves
            from `jax.eval_shape`. Its leaves say where arrays go: those with a sharding are restored onto it, whatever
            sharding they were saved from; NumPy arrays come back as NumPy arrays. Python values give only the type;
            a Python number also accepts a saved scalar array, which comes back as one.
          step: which checkpoint; the latest by default.
        Raises:
          UserError: there is no such checkpoint, it is damaged, or its tree does not fit the target (the message
            lists the paths that differ).
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"There is no checkpoint in {self.directory}: nothing to resume from.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"There is no checkpoint {step} in {self.directory}; there are {steps}.")
        manifest = self._read(step, manifest=ocp.args.JsonRestore())["manifest"]
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"Checkpoint {self.directory / str(step)} has format {manifest.get('format')}, and this version of "
                f"rlhf_jax reads format {FORMAT}: use the version that wrote it."
            )
        saved, wanted = manifest["leaves"], _leaves(target)
        if differences := _differences(saved, wanted):
            raise UserError(
                f"Checkpoint {self.directory / str(step)} does not fit this run: {differences}. Resume with the "
                "configuration it was saved with, or start in another folder."
            )
        places = {path: _place(saved[path], leaf) for path, leaf in wanted.items() if _is_stored(saved[path])}
        arrays: dict[str, Any] = {}
        if places:
            item = ocp.args.StandardRestore(traverse_util.unflatten_dict(places, sep="/"))
            arrays = traverse_util.flatten_dict(self._read(step, state=item)["state"], sep="/")
        leaves = [_from_stored(saved[path], arrays.pop(path, None), leaf) for path, leaf in wanted.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(target), leaves), manifest["metadata"])

    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=False)
            handlers = {"state": ocp.StandardCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
            self._opened = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._opened

    def _read(self, step: int, **items: Any) -> Any:
        try:
            with _quiet():
                return self._manager().restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"Checkpoint {self.directory / str(step)} is damaged: {_reason(error)}. Delete that folder to resume "
                "from the one before."
            ) from error

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)


# --- leaves -----------------------------------------------------------------------------------------------------------


def _leaves(tree: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [jax.tree_util.keystr((entry,), simple=True) for entry in key_path] or ["state"]
        if slashed := [name for name in names if "/" in name]:
            raise ValueError(f"keys of the state must not contain '/', got {slashed[0]!r}")
        named["/".join(names)] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(path: str, leaf: Any) -> dict[str, Any]:
    """A leaf's entry in the manifest."""
    if _is_key(leaf):
        implementation = {"impl": jax.random.key_impl(leaf)} if isinstance(leaf, jax.Array) else {}
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} | implementation
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) and leaf.dtype != object:
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if isinstance(leaf, bool | int | float | str):
        return {"type": type(leaf).__name__, "value": leaf}
    raise TypeError(f"{path} must be an array, a key or a Python bool, int, float or str, got {type(leaf).__name__}")


def _is_stored(entry: Mapping[str, Any]) -> bool:
    """Whether Orbax holds the leaf: values are in the manifest, and an empty array is its shape and type."""
    return "dtype" in entry and 0 not in entry["shape"]


def _to_stored(leaf: Any) -> Any:
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    # With several processes, an array that each process has for itself is the same on all: the first one writes it.
    own = isinstance(leaf, jax.Array) and jax.process_count() > 1 and leaf.is_fully_addressable
    return np.asarray(leaf) if own or isinstance(leaf, np.generic) else leaf


def _text(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']}{entry['shape']}" if "dtype" in entry else entry["type"]


def _fits(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if "type" in wanted and "dtype" in saved:  # a Python number became an array when its step was compiled
        return saved["shape"] == [] and wanted["type"] != "str" and "key" not in saved["dtype"]
    return _text(saved) == _text(wanted)


def _differences(saved: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    wanted = {path: _describe(path, leaf) for path, leaf in target.items()}
    changed = [
        f"{path} is {_text(saved[path])} there and {_text(entry)} here"
        for path, entry in wanted.items()
        if path in saved and not _fits(saved[path], entry)
    ]
    listings = {
        "it lacks": sorted(wanted.keys() - saved.keys()),
        "only it has": sorted(saved.keys() - wanted.keys()),
        "": changed,
    }
    return "; ".join(f"{title} {_listing(paths)}".strip() for title, paths in listings.items() if paths)


def _listing(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _sharding(leaf: Any) -> Sharding | None:
    """Where a restored array goes, or None for wherever JAX would put a new one."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None


def _place(saved: Mapping[str, Any], leaf: Any) -> Any:
    """The abstract array that Orbax restores a leaf into; through host memory where no sharding is asked for."""
    sharding = _sharding(leaf)
    if _is_key(leaf) or sharding is None:
        return _host_array(saved, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _host_array(saved: Mapping[str, Any], leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return np.zeros(data.shape, data.dtype)
    return np.zeros(saved["shape"], np.dtype(saved["dtype"]))


def _from_stored(saved: Mapping[str, Any], stored: Any, leaf: Any) -> Any:
    if "type" in saved:
        return saved["value"]
    stored = _host_array(saved, leaf) if stored is None else stored
    if _is_key(leaf):
        keys = jax.random.wrap_key_data(jnp.array(stored), impl=saved["impl"])
        return keys if _sharding(leaf) is None else jax.device_put(keys, _sharding(leaf))
    if isinstance(leaf, np.ndarray):
        return stored
    if isinstance(leaf, np.generic):
        return stored[()]
    if isinstance(stored, jax.Array):
        return stored
    placed = jnp.array(stored)
    return placed if _sharding(leaf) is None else jax.device_put(placed, _sharding(leaf))


def _reason(error: BaseException) -> str:
    if "No space left" in str(error):
        return "no space left on the device"
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs the tracebacks of its threads; the error that follows says it in one sentence."""
    logger = logging.getLogger("absl")
    with _LOGGING:
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
