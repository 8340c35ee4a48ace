"""Compiled operations, bytes and compilations of tiny fixed programs are what they were."""

import copy
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = str(pathlib.Path(__file__).parents[1])


@pytest.fixture(scope="module")
def counted():
    sys.path.insert(0, ROOT)
    yield importlib.import_module("benchmarks.counted")
    sys.path.remove(ROOT)


def expected_here(counted):
    expected = json.loads(counted.EXPECTED.read_text())
    if jax.__version__ != expected["jax"]:
        pytest.skip(f"counts were taken with jax {expected['jax']}, this is {jax.__version__}")
    return expected


def test_written_work_is_as_expected(counted):
    assert counted.differences(counted.count_all(), expected_here(counted)) == []


@pytest.mark.slow  # what XLA compiles depends on the processor, and on the flags that tests are compiled with
def test_compiled_work_is_as_expected(counted):
    expected = expected_here(counted)
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "benchmarks.counted"]
    told = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True).stdout
    assert counted.differences(json.loads(told), expected, names=expected["cases"]["gen"]) == []


def test_what_moved_is_said(counted):
    expected = json.loads(counted.EXPECTED.read_text())
    moved = copy.deepcopy(expected)
    moved["cases"]["dpo"]["flops"] *= 1.03
    moved["cases"]["gen"]["compilations"] += 1
    moved["cases"]["gen"]["bytes_accessed"] *= 1.01  # within the tolerance
    del moved["cases"]["grpo"]
    told = counted.differences(moved, expected)
    assert [line.split(" is ")[0] for line in told] == ["dpo: flops", "gen: compilations", "grpo: not measured"]
