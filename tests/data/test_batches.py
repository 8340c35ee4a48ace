"""data/batches.py: padding on the right sides, nothing dropped, and a position that resumes to the same batches."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.batches import (
    BatchStream,
    DataPosition,
    bucket_length,
    epoch_plan,
    pad_left,
    pad_right,
    preference_batch,
    token_batch,
)
from rlhf_jax.errors import UserError

PAD = 99
ROW = st.lists(st.integers(0, 50), max_size=6)
TEACHES = st.tuples(ROW, ROW.filter(len)).filter(lambda row: len(row[0]) + len(row[1]) > 1)
ROWS = st.lists(TEACHES, min_size=1, max_size=5)
LENGTHS = st.lists(st.integers(0, 16), min_size=1, max_size=60)
BUCKETS = (4, 8, 16)


def pad_by_hand(prompt, response, prompt_length, response_length):
    tokens, mask, targets = [], [], []
    for slot in range(prompt_length + response_length):
        in_prompt = slot - (prompt_length - len(prompt))
        in_response = slot - prompt_length
        if 0 <= in_prompt < len(prompt):
            entry = (prompt[in_prompt], True, False)
        elif 0 <= in_response < len(response):
            entry = (response[in_response], True, in_response > 0 or bool(prompt))
        else:
            entry = (PAD, False, False)
        for values, value in zip((tokens, mask, targets), entry, strict=True):
            values.append(value)
    return tokens, mask, targets


@given(rows=ROWS, spare=st.integers(0, 3))
def test_token_batch_equals_padding_by_hand(rows, spare):
    prompts, responses = zip(*rows, strict=True)
    p, r = (max(map(len, side)) + spare for side in (prompts, responses))
    batch = token_batch(prompts, responses, pad_id=PAD, prompt_length=p, response_length=r)
    expected = [pad_by_hand(*row, p, r) for row in rows]
    assert batch.tokens.dtype == np.int32
    assert batch.mask.dtype == batch.loss_mask.dtype == np.bool_
    for found, index in ((batch.tokens, 0), (batch.mask, 1), (batch.loss_mask, 2)):
        assert found.tolist() == [row[index] for row in expected]
    assert not np.asarray(batch.loss_mask)[:, :1].any()
    left, right = pad_left(prompts, pad_id=PAD, length=p), pad_right(responses, pad_id=PAD, length=r)
    for whole, part in ((batch.tokens[:, :p], left[0]), (batch.mask[:, :p], left[1])):
        np.testing.assert_array_equal(whole, part)
    for whole, part in ((batch.tokens[:, p:], right[0]), (batch.mask[:, p:], right[1])):
        np.testing.assert_array_equal(whole, part)


def test_rows_that_only_fill_up_count_for_nothing():
    arguments = {"pad_id": PAD, "prompt_length": 2, "response_length": 3, "valid": [True, False]}
    batch = token_batch([[1], [1]], [[2, 3], [2, 3]], **arguments)
    assert batch.loss_mask.sum(axis=1).tolist() == [2, 0]
    assert batch.mask.sum(axis=1).tolist() == [3, 3]  # real tokens, so that attention has something to look at
    pairs = preference_batch([[1], [1]], [[2, 3], [2, 3]], [[4], [4]], **arguments)
    assert pairs.weight.tolist() == [1.0, 0.0]
    assert pairs.weight.dtype == np.float32
    np.testing.assert_array_equal(pairs.chosen.tokens, batch.tokens)
    assert pairs.rejected.tokens.tolist() == [[PAD, 1, 4, PAD, PAD]] * 2
    assert pairs.rejected.loss_mask.sum(axis=1).tolist() == [1, 0]


def test_mistakes_are_named():
    options = {"pad_id": PAD, "prompt_length": 2, "response_length": 2}
    with pytest.raises(ValueError, match=r"responses\[1\] has 3 tokens but only 2 slots"):
        token_batch([[1], [1]], [[1], [1, 2, 3]], **options)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 3 tokens"):
        token_batch([[1, 2, 3]], [[1]], **options)
    with pytest.raises(ValueError, match=r"a:2, in responses, has 3 tokens but only 2 slots"):
        token_batch([[1], [1]], [[1], [1, 2, 3]], **options, names=["a:1", "a:2"])
    with pytest.raises(ValueError, match="must pair up, got 1 and 2"):
        token_batch([[1]], [[1], [2]], **options)
    with pytest.raises(ValueError, match="valid must be 1 bools"):
        token_batch([[1]], [[1]], **options, valid=np.array([1]))
    with pytest.raises(ValueError, match=r"no bucket in .* holds length 17"):
        epoch_plan([17], buckets=BUCKETS, batch_size=2, seed=0, epoch=0)
    for lengths, batch_size in (([], 2), ([1], 0)):
        with pytest.raises(ValueError, match="at least one item"):
            epoch_plan(lengths, buckets=BUCKETS, batch_size=batch_size, seed=0, epoch=0)
    stream = BatchStream([1, 2], buckets=BUCKETS, batch_size=2, position=DataPosition(seed=0, epoch=0, step=1))
    with pytest.raises(ValueError, match=r"position\.step is 1 but an epoch has 1 batches"):
        next(stream)


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ([1], [], "a:2 has nothing to learn: none of its 1 tokens"),
        ([], [1], "a:2 has nothing to learn"),
        ([1], [2, PAD], f"a:2 holds the padding token {PAD} at 2; if texts end with it"),
        ([7, 7], [1], "a:2 begins with the begin token twice"),
        ([7], [7], "a:2 begins with the begin token twice"),
    ],
)
def test_rows_that_would_go_wrong_in_silence_are_named(prompt, response, message):
    prompts, responses, sound = [[1], prompt], [[3], response], [[3], [4]]
    options = {"pad_id": PAD, "prompt_length": 2, "response_length": 2, "bos_id": 7}
    with pytest.raises(UserError, match=message):
        token_batch(prompts, responses, **options, names=["a:1", "a:2"])
    with pytest.raises(UserError, match=message.replace("a:2", "row 1")):
        preference_batch(prompts, sound if prompt in ([1], [7]) else responses, responses, **options)
    filled = token_batch(prompts, responses, **options, valid=[True, False])
    assert filled.loss_mask.any(-1).tolist() == [True, False]


@given(length=st.integers(0, 16))
def test_bucket_is_the_smallest_that_holds(length):
    assert bucket_length(length, (16, 4, 8)) == next(bucket for bucket in BUCKETS if bucket >= length)


@given(lengths=LENGTHS, batch_size=st.integers(1, 7), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_an_epoch_shows_every_item_exactly_once_in_few_shapes(lengths, batch_size, seed, epoch):
    plan = epoch_plan(lengths, buckets=BUCKETS, batch_size=batch_size, seed=seed, epoch=epoch)
    seen = [index for batch in plan for index in batch.indices[batch.valid].tolist()]
    assert sorted(seen) == list(range(len(lengths)))
    short = {}
    for batch in plan:
        assert batch.indices.shape == batch.valid.shape == (batch_size,)
        assert batch.length in BUCKETS
        assert batch.valid[0]
        assert all(bucket_length(lengths[index], BUCKETS) == batch.length for index in batch.indices)
        short[batch.length] = short.get(batch.length, 0) + (not batch.valid.all())
    assert max(short.values()) <= 1


def test_epochs_and_seeds_shuffle_differently():
    plans = {
        tuple(
            np.concatenate(
                [b.indices for b in epoch_plan([1] * 40, buckets=[4], batch_size=8, seed=s, epoch=e)]
            ).tolist()
        )
        for s in range(3)
        for e in range(3)
    }
    assert len(plans) == 9
    buckets = [b.length for b in epoch_plan([1, 9] * 40, buckets=BUCKETS, batch_size=4, seed=0, epoch=0)]
    assert buckets not in (sorted(buckets), sorted(buckets, reverse=True))


def as_lists(batch):
    return batch.indices.tolist(), batch.valid.tolist(), batch.length


@given(lengths=LENGTHS, batch_size=st.integers(1, 7), done=st.integers(0, 30), seed=st.integers(0, 99))
def test_a_stream_goes_on_exactly_from_any_saved_position(lengths, batch_size, done, seed):
    options = {"buckets": BUCKETS, "batch_size": batch_size}
    whole = BatchStream(lengths, **options, seed=seed)
    for _ in range(done):
        next(whole)
    saved = json.dumps(vars(whole.position))  # as a checkpoint would: through plain numbers
    as_arrays = jax.tree.map(np.asarray, whole.position)  # or as arrays
    rest = [as_lists(next(whole)) for _ in range(12)]
    for position in (DataPosition(**json.loads(saved)), as_arrays):
        resumed = BatchStream(lengths, **options, seed=seed + 1, position=position)
        assert [as_lists(next(resumed)) for _ in range(12)] == rest
        assert resumed.position == whole.position
    again = BatchStream(lengths, **options, seed=seed)
    next(again)
    again.position = as_arrays
    assert [as_lists(batch) for batch, _ in zip(again, range(12), strict=False)] == rest


def test_the_stream_is_epoch_after_epoch():
    lengths, options = [3, 9, 1, 2, 12, 5], {"buckets": BUCKETS, "batch_size": 2}
    stream = BatchStream(lengths, **options, seed=5)
    for epoch in range(3):
        for step, batch in enumerate(plan := epoch_plan(lengths, **options, seed=5, epoch=epoch)):
            assert stream.position == DataPosition(seed=5, epoch=epoch, step=step)
            assert as_lists(next(stream)) == as_lists(batch)
        assert plan
