"""data/pipeline.py: grain hands out what BatchStream does, and its state goes on where it was saved."""

import json

import numpy as np
import pytest

from rlhf_jax.data.batches import BatchStream, pad_right
from rlhf_jax.data.pipeline import PlanSource, batch_dataset
from rlhf_jax.errors import UserError

ITEMS = [list(range(1, size + 1)) for size in (3, 9, 1, 2, 12, 5, 7)]
OPTIONS = {"buckets": (4, 8, 16), "batch_size": 2}


def collate(planned):
    rows = [ITEMS[index] for index in planned.indices]
    return np.asarray(pad_right(rows, pad_id=0, length=planned.length)[0])


def source(epochs=3):
    return PlanSource([len(item) for item in ITEMS], **OPTIONS, seed=5, epochs=epochs)


def test_the_source_is_the_stream():
    batches = source()
    stream = BatchStream([len(item) for item in ITEMS], **OPTIONS, seed=5)
    expected = [next(stream) for _ in range(len(batches))]
    assert int(stream.position.epoch) == 3
    for index in (*range(len(batches)), 0, len(batches) - 1, 2):  # forward and at random
        found = batches[index]
        np.testing.assert_array_equal(found.indices, expected[index].indices)
        np.testing.assert_array_equal(found.valid, expected[index].valid)
        assert found.length == expected[index].length
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        source(epochs=0)


@pytest.mark.parametrize("done", [0, 1, 6])
def test_a_saved_state_goes_on_with_the_same_batches(done):
    pytest.importorskip("grain")
    dataset = batch_dataset(source(), collate).to_iter_dataset()
    whole = iter(dataset)
    for _ in range(done):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    rest = list(whole)
    assert len(rest) == len(source()) - done
    again = iter(dataset)
    again.set_state(state)
    for found, expected in zip(again, rest, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(rest[0], collate(source()[done]))


def test_without_grain_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(UserError, match=r"`grain`.*rlhf_jax\[data\]"):
        batch_dataset(source(), collate)
