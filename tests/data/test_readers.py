"""data/readers.py: the same rows from every kind of file, and broken ones named by file and line."""

import gzip
import json

import pytest

from rlhf_jax.data.examples import PromptCompletion
from rlhf_jax.data.readers import Rows, read_examples, read_rows
from rlhf_jax.errors import UserError

ROWS = [
    {"prompt": "a\u2028b", "completion": "é", "id": 1},
    {"prompt": "c", "completion": "d", "id": 2},
    {"prompt": "e", "completion": "f", "id": 3},
]
EXAMPLES = [PromptCompletion(row["prompt"], row["completion"]) for row in ROWS]


def write(path, rows=ROWS):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            parquet.write_table(table, path, row_group_size=2)
        else:
            writer = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
            with writer(str(path), table.schema) as file:
                file.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "file.arrow", "stream.arrow"])
def test_every_file_gives_the_same_rows(tmp_path, name):
    rows = read_rows(write(tmp_path / name))
    assert list(rows) == ROWS
    assert (len(rows), rows[-1], rows[1:]) == (3, ROWS[-1], ROWS[1:])
    assert rows.column_names == ("prompt", "completion", "id")
    assert read_examples(rows) == EXAMPLES
    assert rows.places == [rows.place(index) for index in range(3)]
    with pytest.raises(IndexError):
        rows[3]


class DataSet:
    """As the package `datasets` has them."""

    column_names = ["prompt", "completion", "id"]  # noqa: RUF012

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


def test_data_set_objects_are_rows():
    assert read_examples(Rows(DataSet(), "hub")) == EXAMPLES
    splits = DataSet()
    splits.column_names = {"train": ["prompt"], "test": ["prompt"]}
    with pytest.raises(UserError, match="hub has the splits train, test"):
        Rows(splits, "hub")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl:3: this line is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', r"a\.jsonl:2: expected a JSON object, found a list"),
        ("a.json", b'[\n{"a": 1},\n}', r"a\.json:3: this is not JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"a\.json:2: .*belongs into a \.jsonl file"),
        ("a.json", b'{"a": 1}', "expected a list of JSON objects"),
        ("a.jsonl", b"\xff", "cannot be read as text"),
        ("a.jsonl.gz", b"no gzip", "cannot be read as text"),
        ("a.pkl", b"", "none of the files that can be read"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_tables_are_named(tmp_path, name):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="damaged or not an"):
        read_rows(path)


def test_rows_that_lack_something_are_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "g", "completion": None}])
    with pytest.raises(UserError, match=r"a\.jsonl:7: completion is missing"):
        read_examples(read_rows(path))
    with pytest.raises(UserError, match="here: no format has the columns"):
        read_examples(Rows([{"a": 1}], "here"))
    with pytest.raises(UserError, match="here has no rows"):
        read_examples(Rows([], "here"))
    with pytest.raises(UserError, match="not a file"):
        read_rows(tmp_path / "b.json")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"rlhf_jax\[data\]"):
        read_rows(tmp_path / "a.parquet")
