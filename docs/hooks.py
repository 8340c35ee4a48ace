"""Draws the figures while the documentation is built, so that none is committed."""

import pathlib
import sys

from mkdocs.structure.files import File

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import plots  # noqa: E402
import tree  # noqa: E402


def on_files(files, config):
    """Adds every figure as a generated SVG file."""
    for name, svg in {**plots.figures(), "family_tree": tree.figure()}.items():
        files.append(File.generated(config, f"figures/{name}.svg", content=svg))
    return files
