"""data/packing.py: nothing dropped, padding bounded, buckets best of all, and packed equals unpacked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.batches import bucket_length, pad_right
from rlhf_jax.data.packing import choose_buckets, pack, packed_batch, unpack
from rlhf_jax.errors import UserError
from rlhf_jax.models.transformer import Transformer, TransformerConfig

CAPACITY = 12
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=40)


def fewest_rows(lengths, capacity):
    """By trying: each item into each row that is there, or into a new one."""
    best = len(lengths)

    def place(item, loads):
        nonlocal best
        if len(loads) >= best:
            return
        if item == len(lengths):
            best = len(loads)
            return
        for row in range(len(loads)):
            if loads[row] + lengths[item] <= capacity:
                place(item + 1, [*loads[:row], loads[row] + lengths[item], *loads[row + 1 :]])
        place(item + 1, [*loads, lengths[item]])

    place(0, [])
    return best


@given(lengths=LENGTHS)
def test_every_item_is_packed_once_and_padding_is_bounded(lengths):
    rows = pack(lengths, CAPACITY)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    loads = sorted(sum(lengths[item] for item in row) for row in rows)
    assert all(0 < load <= CAPACITY for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > CAPACITY
    assert len(rows) < 2 * sum(lengths) / CAPACITY + 1


@given(lengths=st.lists(st.integers(1, CAPACITY), max_size=7))
def test_rows_are_few(lengths):
    assert 9 * len(pack(lengths, CAPACITY)) <= 11 * fewest_rows(lengths, CAPACITY) + 6


@given(lengths=st.lists(st.integers(2, CAPACITY), max_size=40), seed=st.integers(0, 99))
def test_unpacking_gives_the_texts_back(lengths, seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 50, size).tolist() for size in lengths]
    targets = [[*(rng.integers(0, 2, size - 1) > 0).tolist(), True] for size in lengths]
    rows = pack(lengths, CAPACITY)
    batch = packed_batch(texts, targets, rows, pad_id=99, length=CAPACITY + 1)
    assert [part.tolist() for part in unpack(batch.tokens, batch.segments, rows)] == texts
    assert [p.tolist() for p in unpack(batch.positions, batch.segments, rows)] == [list(range(n)) for n in lengths]
    for found, wanted in zip(unpack(batch.loss_mask, batch.segments, rows), targets, strict=True):
        assert found.tolist() == [False, *wanted[1:]]
    padding = ~np.asarray(batch.mask)
    assert padding.sum() == batch.tokens.size - sum(lengths)
    assert not np.asarray(batch.segments)[padding].any()
    assert not np.asarray(batch.loss_mask)[padding].any()
    assert (np.asarray(batch.tokens)[padding] == 99).all()


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=15), count=st.integers(1, 4), multiple=st.integers(1, 4)
)
def test_buckets_are_the_best_of_all_choices(lengths, count, multiple):
    slots = lambda buckets: sum(bucket_length(length, buckets) for length in lengths)
    found = choose_buckets(lengths, count, multiple=multiple)
    assert len(found) <= count
    assert list(found) == sorted(set(found))
    assert all(bucket % multiple == 0 for bucket in found)
    longest = -(-max(lengths) // multiple) * multiple
    others = range(multiple, longest, multiple)
    few = min(count - 1, len(others))
    best = min(slots((*some, longest)) for k in range(few + 1) for some in itertools.combinations(others, k))
    assert slots(found) == best


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="item 1 has length 9"):
        pack([1, 9], 8)
    with pytest.raises(ValueError, match="item 0 has length 0"):
        pack([0], 8)
    with pytest.raises(ValueError, match="row 0 have more than 3"):
        packed_batch([[1, 2], [3, 4]], None, [[0, 1]], pad_id=0, length=3)
    with pytest.raises(ValueError, match="text 0 has 2 tokens and 1 targets"):
        packed_batch([[1, 2]], [[True]], [[0]], pad_id=0, length=3)
    for text, targets, message in (
        ([1, 1, 2], [True] * 3, "a:1 begins with the begin token twice"),
        ([1, 0], [True] * 2, "a:1 holds the padding token 0 at 1"),
        ([1, 2], [True, False], "a:1 has nothing to learn"),
    ):
        with pytest.raises(UserError, match=message):
            packed_batch([text], [targets], [[0]], pad_id=0, length=3, bos_id=1, names=["a:1"])
    assert packed_batch([[2]], None, [[0]], pad_id=0, length=1).mask.all()
    with pytest.raises(ValueError, match="at least one token"):
        choose_buckets([], 2)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_equals_unpacked(window):
    config = TransformerConfig(
        vocab_size=23, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24, max_length=32,
        windows=(window,),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    lengths = [5, 3, 7, 1, 4]
    texts = [rng.integers(1, 23, size).tolist() for size in lengths]
    rows = pack(lengths, 10)
    batch = packed_batch(texts, None, rows, pad_id=0, length=10)
    tokens, mask = pad_right(texts, pad_id=0, length=7)
    model = Transformer(config)
    params = model.init(jax.random.key(0), tokens, mask)["params"]
    packed = model.apply({"params": params}, batch.tokens, batch.mask, segments=batch.segments)
    alone = np.asarray(model.apply({"params": params}, tokens, mask).hidden)
    for item, found in enumerate(unpack(packed.hidden, batch.segments, rows)):
        np.testing.assert_allclose(found, alone[item, : lengths[item]], rtol=1e-6, atol=1e-6)
    assert not jnp.allclose(
        model.apply({"params": params}, batch.tokens, batch.mask).hidden, packed.hidden, atol=1e-3
    ), "without segments texts see each other"
