"""docs/data.md: its examples run, and its table has every format."""

import pathlib
import re

from rlhf_jax.data import FORMATS

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_examples_run():
    scope = {}
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", TEXT)
    for block in blocks:
        exec(block, scope)
    assert scope["batch"].chosen.tokens.shape == (1, 32)
    assert scope["pair"].prompt == "Q: Why? A:"
    assert scope["kto_batch"].mismatched.mask.shape == (2, 6)
    assert len(blocks) == 4


def test_the_table_has_every_format():
    rows = [line.split("|")[2] for line in TEXT.splitlines() if line.startswith("| ") and "columns" not in line]
    shown = {choice.strip().removesuffix(" (best first)") for row in rows for choice in row.split(";")}
    assert {", ".join(each.columns) for each in FORMATS} <= {choice.removeprefix("or ") for choice in shown}
