"""The benchmarks that are not steps: what ragged work is, and what growth means."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _from_the_clone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_ragged_work_is_heavy_tailed_within_its_ends():
    from benchmarks import ragged

    for found, (least, most) in zip(ragged.lengths(2_000), (ragged.PROMPT, ragged.RESPONSE), strict=True):
        assert (found.min(), found.max()) == (least, most)
        assert np.mean(found) > 1.1 * np.median(found)


def test_prompts_say_how_much_they_ask_for():
    from benchmarks import ragged

    lengths, wanted = np.array([8, 3]), np.array([4, 199])
    tokens, mask = ragged.left_padded(lengths, 8, wanted)
    np.testing.assert_array_equal(mask.sum(axis=1), lengths)
    np.testing.assert_array_equal(64 * tokens[:, -2] + tokens[:, -1], wanted)
    assert tokens.max() < 64


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponent_of_a_power(power):
    from benchmarks.growth import exponent

    points = [{"size": size, "seconds": 3.0 * size**power} for size in (1, 4, 16)]
    assert exponent(points, "seconds") == pytest.approx(power)


@pytest.mark.slow
def test_every_way_writes_what_was_asked_for():
    sizes = ["--model", "tiny", "--prompts", "8", "--slots", "4", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.ragged", *sizes]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in told.splitlines()]
    assert [row["share"] for row in rows if row["way"] == "dense"] == [1.0]
    assert len({row["tokens"] for row in rows if row["way"] != "dense"}) == 1
