"""The documentation names what exists, shows all of the core, and its examples keep the contract."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import sys

import pytest

import rlhf_jax
from rlhf_jax import losses, testing
from rlhf_jax.testing import Case, check_contract

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXT = {page.relative_to(DOCS).as_posix(): page.read_text() for page in PAGES}


def blocks(page):
    return re.findall(r"(?ms)^```python\n(.*?)^```", TEXT[page])


@pytest.mark.parametrize("page", TEXT)
def test_every_function_that_a_page_names_exists(page):
    prose = re.sub(r"(?ms)^```.*?^```", "", TEXT[page])
    for module, name in re.findall(r"`([a-z_]+)\.([a-z_0-9]+)", prose):
        if module in ("jax", "rlhf_jax", "docs"):
            continue
        found = [p for p in (rlhf_jax, losses, testing) if (pathlib.Path(p.__path__[0]) / f"{module}.py").exists()]
        assert found, f"{page}: no module {module}"
        assert name in importlib.import_module(f"{found[0].__name__}.{module}").__all__, f"{page}: {module}.{name}"


def test_the_reference_has_every_module_of_the_core():
    shown = set(re.findall(r"^::: rlhf_jax\.(\S+)", "\n".join(TEXT.values()), re.M))
    public = {f"losses.{m.name}" for m in pkgutil.iter_modules(losses.__path__) if not m.name.startswith("_")}
    modules = {m.name for m in pkgutil.iter_modules(rlhf_jax.__path__) if not m.ispkg and not m.name.startswith("_")}
    around = {"cli", "environments", "errors", "evaluation", "types", "vocabulary_chunks"}  # the last is in logprobs
    assert public | modules - around <= shown
    for module in shown:
        importlib.import_module(f"rlhf_jax.{module}")


def test_the_family_tree_names_public_functions_once():
    sys.path.insert(0, str(DOCS))
    import tree

    names = tree.names()
    assert len(names) == len(set(names)) > 70
    for name in names:
        module, _, function = name.partition(".")
        assert function in importlib.import_module(f"rlhf_jax.losses.{module}").__all__, name


def test_the_page_of_probes_has_a_row_for_each():
    sys.path.insert(0, str(DOCS.parent / "tests" / "probes"))
    import optima

    rows = [line for line in TEXT["probes.md"].splitlines() if line.startswith("| ") and "---" not in line]
    named = {row.split("|")[1].strip() for row in rows} - {"algorithm"}
    assert named == {probe.name for probe in optima.PROBES} | set(optima.BIASED)
    for probe in optima.PROBES:
        (row,) = [row for row in rows if row.startswith(f"| {probe.name} |")]
        assert float(row.split("|")[4].strip().removeprefix("< ")) < probe.tolerance


def test_the_first_example_keeps_the_contract():
    scope = {}
    exec(blocks("index.md")[0], scope)
    case = Case(
        "BT:log_prob BT:log_prob B BT:mask ->",
        knobs={"clip": 0.2},
        static={"group": 2},
        rows_together=2,
        stopped=("old_log_probs", "rewards"),
        skip={"dtypes": "whatever its caller gives"},
    )
    assert check_contract(scope["grpo_loss"], case)["garbage"] == "passed"


def test_the_page_on_testing_lists_every_check():
    listed = re.findall(r"(?m)^\| `(\w+)` \|", TEXT["testing.md"])
    assert listed == list(testing.CHECKS)
    assert all(inspect.getdoc(check) for check in testing.CHECKS.values())
