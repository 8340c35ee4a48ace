"""The house as CONTRIBUTING describes it: imports point upward only, and no algorithm imports another."""

import ast
import pathlib

import pytest

import rlhf_jax

PACKAGE = pathlib.Path(rlhf_jax.__file__).parent
FLOORS = (
    {"types", "errors"},
    {"masking"},
    {  # array functions, one published equation each
        "_chunked_head",
        "advantages",
        "constraints",
        "ensembles",
        "evaluation",
        "group_advantages",
        "kl",
        "logprobs",
        "pass_at_k",
        "returns",
        "reward_scales",
        "rewards",
        "teacher_chunks",
        "token_advantages",
        "vocabulary_chunks",
    },
    {"losses", "models"},
    {"generation", "feedback", "data", "training", "testing", "debug", "environments"},
    {"algorithms"},
    {"quickstart", "recipes"},
    {"cli", "__main__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The rooms of rlhf_jax that a file imports, anywhere in it, apart from what only type checkers see."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf_jax":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [name.name for name in node.names]


def test_every_file_has_a_floor():
    assert {room(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_upward(path):
    below = {name for name in imported(path) if FLOOR[name] > FLOOR[room(path)]}
    assert not below, f"{path.name} imports from floors below its own: {sorted(below)}"


def test_siblings_keep_apart():
    for path in FILES:
        if room(path) == "algorithms" and path.name != "__init__.py":
            assert "algorithms" not in set(imported(path)), f"{path.name} imports another algorithm"
        if room(path) == "losses":
            assert "models" not in set(imported(path)), f"the loss {path.name} knows a network"
