"""Where arrays live: a named mesh with path-based sharding rules, and the leading device axis of ``pmap``.

Two engines, one program. Under ``jit`` with arrays placed by `shard` and `shard_batch`, XLA inserts the communication
and ``axis_name`` stays ``None`` everywhere. Under ``pmap``, state is replicated with `flax.jax_utils.replicate`, rows
are dealt by `split_devices`, and ``axis_name`` names the mapped axis.

The mesh has three axes: ``data`` (rows), ``fsdp`` (rows, and parameters cut up between uses) and ``tensor`` (matrix
products cut up). An axis of size 1 costs nothing, so the same rules serve a laptop and a pod.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.training.state import map_paths

__all__ = [
    "TRANSFORMER_RULES",
    "Rules",
    "make_mesh",
    "merge_devices",
    "shard",
    "shard_batch",
    "shardings",
    "split_devices",
]

Rules = Sequence[tuple[str, P | Callable[[int], P]]]

_KERNEL = r"/kernel(/base)?(/codes|/scales)?$"  # plain, quantised, under an adapter


def _last(*axes: str | None) -> Callable[[int], P]:
    """The spec that cuts a leaf's last dimensions, whatever stands before them: stacked layers, experts."""
    return lambda dimensions: P(*(None,) * (dimensions - len(axes)), *axes)


# Kernels are [..., in, out]. Products alternate: cut by column, then by row, so that one all-reduce closes each pair.
TRANSFORMER_RULES: Rules = (
    (r"(^|/)(embed|head)/embedding$", _last("tensor", "fsdp")),  # [V, D]
    (r"(^|/)position_embed/embedding$", _last(None, "fsdp")),  # [positions, D]
    (r"(attention|cross)/(query|key|value)" + _KERNEL, _last("fsdp", "tensor")),  # [D, heads · head_dim]
    (r"(attention|cross)/out" + _KERNEL, _last("tensor", "fsdp")),  # [heads · head_dim, D]
    (r"mlp/(gate|up)" + _KERNEL, _last("fsdp", "tensor")),  # [D, mlp_width], of every expert
    (r"mlp/down" + _KERNEL, _last("tensor", "fsdp")),  # [mlp_width, D], of every expert
    (r"mlp/router/kernel$", _last("fsdp", None)),  # [D, E]
    (r"(query|key|value|gate|up)/kernel/down$", _last("fsdp", None)),  # adapters [in, r], [r, out] lie as their kernels
    (r"(query|key|value|gate|up)/kernel/up$", _last(None, "tensor")),
    (r"(out|down)/kernel/down$", _last("tensor", None)),
    (r"(out|down)/kernel/up$", _last(None, "fsdp")),
    (r"(^|/)(head|hidden|out)/kernel$", _last("fsdp", "tensor")),  # [D, outputs] of scalar heads
    (r"", P()),  # norms, biases, scalars: a copy everywhere
)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes ``data``, ``fsdp`` and ``tensor``, whose collectives XLA chooses (``AxisType.Auto``).

    Args:
      data: copies of the model that share the rows; -1 takes all devices that the other axes leave.
      fsdp: parts that parameters and optimiser state are cut into; rows are shared among them as well.
      tensor: parts that each matrix product is cut into.
      devices: devices to use; all of them by default.
    Returns:
      The mesh of data · fsdp · tensor devices.
    Raises:
      ValueError: a size is out of range, or the product is not the number of devices.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size in {"fsdp": fsdp, "tensor": tensor, "data": data}.items():
        if size < 1 and not (name == "data" and size == -1):
            raise ValueError(f"mesh axis {name} must be at least 1, got {size}")
    sizes = (len(devices) // (fsdp * tensor) if data == -1 else data, fsdp, tensor)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"data · fsdp · tensor must equal the number of devices, got data={data}, fsdp={fsdp}, tensor={tensor} "
            f"for {len(devices)} devices"
        )
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(tree: Any, mesh: Mesh, rules: Rules = TRANSFORMER_RULES) -> Any:
    """The sharding of every leaf: that of the first rule whose regular expression is found in the leaf's path.

    Optimiser moments carry their parameter's path, so the rules for parameters place a whole ``TrainState``.
    A dimension that its mesh axes do not divide is not cut, nor is one that a leaf does not have.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.
      rules: (regular expression, partition spec) in order, or a function from the number of a leaf's dimensions to the
        spec; the empty expression matches every path.
    Returns:
      The same pytree of `NamedSharding`, as ``jit``'s in_shardings or for `rlhf_jax.training.checkpoint`.
    Raises:
      ValueError: no rule matches a path.

    >>> params = {"embed": {"embedding": np.ones((8, 4))}, "final_norm": {"scale": np.ones(4)}}
    >>> [tuple(s.spec) for s in jax.tree.leaves(shardings(params, make_mesh(devices=jax.devices()[:1])))]
    [('tensor', 'fsdp'), ()]
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]

    def place(path: str, leaf: Any) -> NamedSharding:
        for pattern, spec in compiled:
            if pattern.search(path):
                axes = spec(np.ndim(leaf)) if callable(spec) else spec
                return NamedSharding(mesh, P(*map(axis_of, np.shape(leaf), tuple(axes))))
        raise ValueError(
            f"no sharding rule matches {path!r}; end the rules with ('', PartitionSpec()) to copy the rest"
        )

    def axis_of(size: int, axes: Any) -> Any:
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        return None if size % math.prod(mesh.shape[name] for name in names) else axes

    return map_paths(place, tree)


def shard(tree: Any, mesh: Mesh, rules: Rules = TRANSFORMER_RULES) -> Any:
    """Places every leaf of params or a ``TrainState`` on the mesh as `shardings` says.

    >>> placed = shard({"head": {"kernel": np.ones((4, 2))}}, make_mesh(devices=jax.devices()[:1]))
    >>> tuple(placed["head"]["kernel"].sharding.spec)
    ('fsdp', 'tensor')
    """
    return jax.device_put(tree, shardings(tree, mesh, rules))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Deals the rows of every leaf [B, ...] to the ``data`` and ``fsdp`` axes; ``tensor`` devices share rows.

    With several processes each gives its own rows, and B counts those.

    Raises:
      ValueError: the rows cannot be dealt evenly.

    >>> tuple(shard_batch(np.ones((4, 3)), make_mesh(devices=jax.devices()[:1])).sharding.spec)
    (('data', 'fsdp'),)
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"] // jax.process_count()
    _check_rows(batch, parts, "data · fsdp devices of this process")
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    if jax.process_count() == 1:
        return jax.device_put(batch, rows)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch)


def split_devices(batch: Any, devices: int | None = None) -> Any:
    """Reshapes every leaf [B, ...] to [N, B / N, ...] for ``pmap``; N is ``jax.local_device_count()`` by default.

    Raises:
      ValueError: N does not divide the rows.

    >>> split_devices(np.arange(6), 2).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    devices = jax.local_device_count() if devices is None else devices
    _check_rows(batch, devices, "devices")
    return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)


def merge_devices(batch: Any) -> Any:
    """Reshapes every leaf [N, B / N, ...] back to [B, ...]; the inverse of `split_devices`.

    >>> merge_devices(np.arange(6).reshape(2, 3)).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), batch)


def _check_rows(batch: Any, parts: int, what: str) -> None:
    def check(path: str, leaf: Any) -> None:
        shape = np.shape(leaf)
        if not shape or shape[0] % parts:
            rows = shape[0] if shape else "none"
            raise ValueError(f"the rows of {path or 'batch'} must be a multiple of the {parts} {what}, got {rows}")

    map_paths(check, batch)
