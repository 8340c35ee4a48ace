"""The safetensors format: a length, a JSON header, and raw little-endian numbers behind it.

Files are memory-mapped: opening one reads its header alone, and a tensor is a view until somebody copies it. The
header is checked against the file before anything is read, so a file that was cut short is noticed at once.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rlhf_jax.errors import UserError

__all__ = ["SafetensorsFile", "write_safetensors"]

_DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000


class SafetensorsFile:
    """A memory-mapped file. `file[name]` is a read-only view of a tensor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads and checks the header.

        Raises: UserError if the file is absent, cut short, longer than its header says, or not safetensors.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist or is not a file")
        size = self.path.stat().st_size
        if size < 8:
            raise UserError(f"{self.path} is cut short: {size} bytes, expected a header; fetch it again")
        self._bytes = np.memmap(self.path, np.uint8, "r")
        length = int(self._bytes[:8].view("<u8")[0])
        if length > min(size - 8, _LONGEST_HEADER):
            raise UserError(
                f"{self.path} is cut short or not a safetensors file: its header would be {length:,} bytes long, the "
                f"file has {size:,}; fetch it again"
            )
        try:
            header = json.loads(self._bytes[8 : 8 + length].tobytes())
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {name: _entry(entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{self.path} is not a safetensors file: its header does not read ({error})") from None
        self._start = 8 + length
        self._check(size)

    def _check(self, size: int) -> None:
        for name, (dtype, shape, start, stop) in self._entries.items():
            if not 0 <= start <= stop or stop - start != dtype.itemsize * math.prod(shape):
                raise UserError(
                    f"{self.path} is damaged: {name}, {dtype} {list(shape)}, should take "
                    f"{dtype.itemsize * math.prod(shape):,} bytes, its header says {stop - start:,}; fetch it again"
                )
        expected = self._start + max((stop for *_, stop in self._entries.values()), default=0)
        if size != expected:
            problem = "cut short" if size < expected else "longer than its header says"
            raise UserError(f"{self.path} is {problem}: {size:,} bytes, expected {expected:,}; fetch it again")

    def keys(self) -> list[str]:
        """Names of the tensors, in the file's order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entries[name][1]

    def dtype(self, name: str) -> np.dtype:
        """Number format of a tensor, without reading it."""
        return self._entries[name][0]

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, start, stop = self._entries[name]
        raw = self._bytes[self._start + start : self._start + stop]
        if (self._start + start) % dtype.itemsize:
            raw = raw.copy()  # a header whose length is no multiple of 8 leaves tensors out of line
        return raw.view(dtype).reshape(shape)


def _entry(entry: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"number format {entry['dtype']!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]), int(start), int(stop)


def write_safetensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, one tensor in memory at a time; the file appears only when it is whole.

    Args:
      path: of the file.
      shapes: name -> (shape, dtype) of every tensor, in the order in which they come.
      tensors: (name, array) in that order.
      metadata: strings to keep in the header.
    Raises:
      ValueError: what comes is not what `shapes` announced.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        size = np.dtype(dtype).itemsize * math.prod(shape)
        entry = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, offset + size]}
        header[name] = entry
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            announced = iter(shapes.items())
            for name, array in tensors:
                expected = next(announced, None)
                if expected is None or expected[0] != name or expected[1] != (array.shape, array.dtype):
                    raise ValueError(f"expected the tensor {expected}, got {name} {array.dtype} {array.shape}")
                file.write(np.ascontiguousarray(array).data if array.dtype.kind != "V" else array.tobytes())
            if (missing := next(announced, None)) is not None:
                raise ValueError(f"the tensor {missing} did not come")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
