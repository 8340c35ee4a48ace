"""Compiled operations, bytes and compilations of tiny fixed programs are what they were."""

import copy
import importlib
import json
import pathlib
import sys

import jax
import pytest

ROOT = str(pathlib.Path(__file__).parents[1])


@pytest.fixture(scope="module")
def counted():
    sys.path.insert(0, ROOT)
    yield importlib.import_module("benchmarks.counted")
    sys.path.remove(ROOT)


@pytest.mark.slow  # the bytes that XLA counts for one program also depend on the machine that compiles it
def test_compiled_work_is_as_expected(counted):
    expected = json.loads(counted.EXPECTED.read_text())
    if jax.__version__ != expected["jax"]:
        pytest.skip(f"counts were taken with jax {expected['jax']}, this is {jax.__version__}")
    assert counted.differences(counted.count_all(), expected) == []


def test_what_moved_is_said(counted):
    expected = json.loads(counted.EXPECTED.read_text())
    moved = copy.deepcopy(expected)
    moved["cases"]["dpo"]["flops"] *= 1.03
    moved["cases"]["gen"]["compilations"] += 1
    moved["cases"]["gen"]["bytes_accessed"] *= 1.01  # within the tolerance
    del moved["cases"]["grpo"]
    told = counted.differences(moved, expected)
    assert [line.split(" is ")[0] for line in told] == ["dpo: flops", "gen: compilations", "grpo: not measured"]
