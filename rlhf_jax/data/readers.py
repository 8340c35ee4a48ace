"""Files and data set objects as rows that know where they come from: JSONL, JSON, Parquet, Arrow, `datasets`.

No pickle is opened. Arrow and Parquet need pyarrow; Arrow files are memory-mapped and rows made when asked for.
"""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.examples import Example
from rlhf_jax.data.formats import Format, detect_format
from rlhf_jax.errors import UserError, missing_extra

__all__ = ["Rows", "read_examples", "read_rows"]

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow")


class Rows(Sequence[Mapping[str, Any]]):
    """Rows of a table: any sequence of dicts, with the columns and the place of each row.

    Args:
      rows: a list of dicts, or anything with `column_names`, `__len__` and `__getitem__`, as `datasets.Dataset` has.
      name: of the source, for errors.
      lines: the line of each row in that source, if it has lines.

    >>> rows = Rows([{"prompt": "a"}, {"prompt": "b", "id": 3}], "here")
    >>> rows.column_names, rows.place(1)
    (('prompt', 'id'), 'here, row 1')
    """

    def __init__(self, rows: Any, name: str, *, lines: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.name = name
        self.lines = lines
        names = getattr(rows, "column_names", None)
        if isinstance(names, Mapping):
            raise UserError(f"{name} has the splits {', '.join(names)}; choose one of them")
        if not hasattr(rows, "__len__"):
            raise UserError(f"{name} is a stream without an end that is known; give a list of the rows you want of it")
        self.column_names = tuple(dict.fromkeys(key for row in rows for key in row)) if names is None else tuple(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self.rows[index] for index in range(len(self)))

    @property
    def places(self) -> list[str]:
        """Where each row stands, as `names` for the functions that make batches."""
        return [self.place(index) for index in range(len(self))]

    def place(self, index: int) -> str:
        """Where a row stands: file and line, or the number of the row from 0."""
        return f"{self.name}, row {index}" if self.lines is None else f"{self.name}:{self.lines[index]}"


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """The rows of a file: .jsonl, .jsonl.gz, .json (a list of objects), .parquet or .arrow (file or stream).

    Raises: UserError that names file and line for what is broken, or the extra that is missing.
    """
    path = Path(path)
    suffix = next((each for each in _SUFFIXES if path.name.endswith(each)), None)
    if suffix is None:
        raise UserError(f"{path} is none of the files that can be read: {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path} is not a file; give an existing one")
    if suffix in (".parquet", ".arrow"):
        return Rows(_Table(_table(path, suffix)), str(path))
    try:
        text = (gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); fetch it again") from None
    return _json(path, text) if suffix == ".json" else _json_lines(path, text)


def read_examples(rows: Rows, kind: Format | None = None) -> list[Example]:
    """All rows as examples of one kind, by default that of the columns (`detect_format`).

    Raises: UserError that names the row which lacks something.

    >>> read_examples(Rows([{"prompt": "1 + 1 =", "completion": " 2", "id": 7}], "sums"))
    [PromptCompletion(prompt='1 + 1 =', completion=' 2', tools=None)]
    """
    if not len(rows):
        raise UserError(f"{rows.name} has no rows")
    try:
        kind = detect_format(rows.column_names) if kind is None else kind
    except UserError as error:
        raise UserError(f"{rows.name}: {error}") from None
    examples = []
    for index, row in enumerate(rows):
        try:
            examples.append(kind.example(row))
        except UserError as error:
            raise UserError(f"{rows.place(index)}: {error}") from None
    return examples


def _json_lines(path: Path, text: str) -> Rows:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: this line is not JSON ({error}); correct or delete it") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found a {type(row).__name__}")
        rows.append(row)
        lines.append(number)
    return Rows(rows, str(path), lines=lines)


def _json(path: Path, text: str) -> Rows:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs into a .jsonl file" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: this is not JSON ({error.msg}){hint}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of JSON objects, found another JSON value")
    return Rows(rows, str(path))


class _Table:
    """A table of pyarrow, one row at a time."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.column_names = table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.table.slice(index, 1).to_pylist()[0]


def _table(path: Path, suffix: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing_extra("pyarrow", "data", f"read {suffix} files") from None
    try:
        if suffix == ".parquet":
            return pq.read_table(str(path), memory_map=True)
        source = pa.memory_map(str(path))
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or not an {suffix} file ({error}); fetch it again") from None
