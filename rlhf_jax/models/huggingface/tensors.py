"""Stored tensors and our parameters: which part of which belongs where.

A stored tensor is [out, in] (or [in, out] in GPT-2), and may hold several of our kernels one behind the other; our
stacked expert kernels take one stored tensor per expert. A plan is a list of `Stored`, one per tensor of the file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = [
    "Path",
    "Piece",
    "Stored",
    "assemble",
    "linear",
    "param_shapes",
    "params_from_tensors",
    "pieces_of",
    "table",
    "tensors_from_params",
    "vector",
]

Path = tuple[str, ...]


class Piece(NamedTuple):
    """A part of a stored tensor that belongs to one of our parameters."""

    path: Path  # our parameter
    size: int  # how much of the stored tensor's axis of outputs it takes
    expert: int | None = None  # its index in a parameter that stacks experts


class Stored(NamedTuple):
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  # one behind the other along the axis of outputs
    turned: bool = False  # stored [out, in]; our kernels are [in, out]

    @property
    def axis(self) -> int:
        """The axis along which the pieces stand."""
        return 0 if self.turned or len(self.shape) == 1 else len(self.shape) - 1


def table(name: str, path: Path, rows: int, width: int) -> Stored:
    """An embedding table [rows, width], the same on both sides."""
    return Stored(name, (rows, width), (Piece((*path, "embedding"), width),))


def vector(name: str, path: Path, size: int) -> Stored:
    """A vector, the same on both sides."""
    return Stored(name, (size,), (Piece(path, size),))


def linear(
    name: str,
    outputs: Sequence[tuple[Path, int]],
    inputs: int,
    *,
    bias: bool = False,
    turned: bool = True,
    expert: int | None = None,
) -> list[Stored]:
    """The weight, and the bias if there is one, of one or several kernels stored as one layer.

    Args:
      name: of the layer; ".weight" and ".bias" are added.
      outputs: (path, width) of each of our kernels.
      inputs: width of the input.
      bias: whether there is one.
      turned: stored [out, in] rather than [in, out].
      expert: index of the expert, if the kernels stack experts.
    """
    total = sum(size for _, size in outputs)
    shape = (total, inputs) if turned else (inputs, total)
    kernels = tuple(Piece((*path, "kernel"), size, expert) for path, size in outputs)
    stored = [Stored(f"{name}.weight", shape, kernels, turned)]
    if bias:
        stored.append(Stored(f"{name}.bias", (total,), tuple(Piece((*path, "bias"), size) for path, size in outputs)))
    return stored


class Source(NamedTuple):
    """Where one parameter, or one expert's part of it, is read from."""

    stored: Stored
    start: int  # along the stored tensor's axis of outputs
    piece: Piece


def pieces_of(plan: Sequence[Stored]) -> dict[Path, list[Source]]:
    """Our parameters and where each is read from; more than one source means stacked experts, in order."""
    found: dict[Path, list[Source]] = {}
    for stored in plan:
        start = 0
        for piece in stored.pieces:
            found.setdefault(piece.path, []).append(Source(stored, start, piece))
            start += piece.size
    return found


def _view(tensor: Any, source: Source) -> Any:
    """The part of a stored tensor, in our orientation; a view."""
    index = [slice(None)] * len(source.stored.shape)
    index[source.stored.axis] = slice(source.start, source.start + source.piece.size)
    part = tensor[tuple(index)]
    return part.T if source.stored.turned else part


def _shape(sources: Sequence[Source]) -> tuple[int, ...]:
    stored, size = sources[0].stored, sources[0].piece.size
    if len(stored.shape) == 1:
        return (size,)
    shape = (stored.shape[1] if stored.turned else stored.shape[0], size)
    return shape if sources[0].piece.expert is None else (len(sources), *shape)


def assemble(sources: Sequence[Source], read: Callable[[str], Any], index: tuple[slice, ...]) -> np.ndarray:
    """A part of one of our parameters, copied.

    Args:
      sources: where the parameter is read from.
      read: name -> stored tensor, best a memory map.
      index: the part wanted, one slice per axis of the parameter.
    """
    if sources[0].piece.expert is None:
        return np.array(_view(read(sources[0].stored.name), sources[0])[index], order="C")
    chosen = [_view(read(source.stored.name), source)[index[1:]] for source in sources[index[0]]]
    return np.stack(chosen)


def param_shapes(plan: Sequence[Stored]) -> dict[Path, tuple[int, ...]]:
    """The shape of each of our parameters."""
    return {path: _shape(sources) for path, sources in pieces_of(plan).items()}


def params_from_tensors(plan: Sequence[Stored], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Our nested parameters as NumPy arrays, from stored tensors that are all there and have the planned shapes."""
    params: dict[str, Any] = {}
    for path, sources in pieces_of(plan).items():
        whole = (slice(None),) * len(_shape(sources))
        insert(params, path, assemble(sources, tensors.__getitem__, whole))
    return params


def tensors_from_params(plan: Sequence[Stored], params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every stored tensor, one at a time."""
    for stored in plan:
        parts = []
        for piece in stored.pieces:
            leaf = _lookup(params, piece.path)
            part = np.asarray(jax.device_get(leaf if piece.expert is None else leaf[piece.expert]))
            parts.append(part.T if stored.turned else part)
        yield stored.name, np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, stored.axis))


def insert(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Puts a leaf into a nested dict."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _lookup(tree: Mapping[str, Any], path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree
