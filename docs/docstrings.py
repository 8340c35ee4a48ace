"""Brings the library's compact docstrings into the form that the documentation builder reads.

Sections follow each other without blank lines, errors and references stand on one line, examples are bare doctests.
"""

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"(?m)^(Args|Returns|Attributes):$")
SENTENCE = re.compile(r"(?m)^(Raises|Reference|References):\s*(?=\S|\n\s+\S)")
ADDRESS = re.compile(r"(?<![<(])https://[^\s;,)]+")
TABLE = re.compile(r"(?m)^(=+(?: +=+)+)\n((?:.+\n)+?)\1\n((?:.+\n)+?)\1$")
DOCTEST = re.compile(r"(?m)^>>> .*(?:\n(?!\s*$).*)*")


def table(match: re.Match[str]) -> str:
    """A simple table of reStructuredText as one of Markdown."""
    starts = [column.start() for column in re.finditer("=+", match[1])]
    ends = [*starts[1:], None]

    def cells(line: str) -> str:
        return "| " + " | ".join(line[i:j].strip() for i, j in zip(starts, ends, strict=True)) + " |"

    rows = [cells(line) for line in (*match[2].splitlines(), *match[3].splitlines())]
    return "\n".join([rows[0], "| " + " | ".join("---" for _ in starts) + " |", *rows[1:]])


def readable(docstring: str) -> str:
    """The same docstring with blank lines between sections and doctests as code.

    >>> print(readable("A sum.\\nArgs:\\n  x: [B].\\nRaises: TypeError."))
    A sum.
    <BLANKLINE>
    Args:
      x: [B].
    <BLANKLINE>
    **Raises**: TypeError.
    """
    text = SECTION.sub(r"\n\1:", docstring)
    text = SENTENCE.sub(r"\n**\1**: ", text)
    text = DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)
    text = TABLE.sub(table, text)
    text = ADDRESS.sub(r"<\g<0>>", text)
    text = re.sub(r"(?m)::$", ":", text)
    return re.sub(r"\n{3,}", "\n\n", text)


class Compact(Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
