"""strategies.py: what is drawn keeps its promises, and the awkward cases do turn up."""

import numpy as np
import pytest
from hypothesis import find, given, settings

from rlhf_jax.testing import strategies


@given(mask=strategies.masks((3, 5), layout="right"), lefty=strategies.masks((3, 5), layout="left"))
def test_layouts(mask, lefty):
    assert mask.dtype == lefty.dtype == np.bool_
    assert not (~mask[:, :-1] & mask[:, 1:]).any()
    assert not (lefty[:, :-1] & ~lefty[:, 1:]).any()


@given(mask=strategies.masks((3, 5), empty_rows=False))
def test_no_row_is_empty_unless_allowed(mask):
    assert mask.any(-1).all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda mask: not mask.any(),
        lambda mask: mask.all(),
        lambda mask: mask.any() and not mask.any(-1).all(),
        lambda mask: (mask[:, :-1] & ~mask[:, 1:]).any() and (~mask[:, :-1] & mask[:, 1:]).any(),  # a hole or both pads
    ],
)
def test_awkward_masks_turn_up(wanted):
    assert wanted(find(strategies.masks((2, 4)), wanted, settings=settings(max_examples=2000)))


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be right, left, holes or any, got 'both'"):
        find(strategies.masks(layout="both"), bool)


@given(batch=strategies.ragged_batches(strategies.sizes(), garbage=float("nan")))
def test_ragged_batches_hold_garbage_exactly_outside_the_mask(batch):
    for array in batch[1:]:
        assert array.dtype == np.float32
        assert array.shape == batch.mask.shape
        np.testing.assert_array_equal(np.isfinite(array), batch.mask)
    for array in batch[1:4]:
        assert (array[batch.mask] <= 0).all()


@given(batch=strategies.ragged_batches((2, 3), garbage=None), garbage=strategies.garbage_values())
def test_plausible_padding_can_be_filled_later(batch, garbage):
    assert all(np.isfinite(array).all() for array in batch[1:])
    filled = batch.filled(garbage)
    for before, after in zip(batch[1:], filled[1:], strict=True):
        np.testing.assert_array_equal(after[batch.mask], before[batch.mask])
        np.testing.assert_array_equal(after[~batch.mask], np.float32(garbage))


@given(
    ratios=strategies.log_ratios((3,), extreme=30.0),
    logits=strategies.logits((2, 3)),
    scores=strategies.grouped_rewards(2, 3, equal_groups=False),
    untied=strategies.rewards((4,), ties=False),
    pairs=strategies.preference_pairs(4, extreme=50.0),
)
def test_ranges(ratios, logits, scores, untied, pairs):
    assert ratios.dtype == logits.dtype == scores.dtype == untied.dtype == np.float32
    assert (np.abs(ratios) <= 30).all()
    assert logits.shape == (2, 3)
    assert scores.shape == (6,)
    assert (np.abs(untied) <= 10).all()
    assert (np.abs(pairs.chosen_log_ratios) <= 50).all()
    assert (pairs.rejected_lengths >= 1).all()


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        (strategies.log_ratios((2,)), lambda x: 80.0 in x and -80.0 in x),
        (strategies.rewards((3,)), lambda x: len(set(x.tolist())) == 2),
        (strategies.grouped_rewards(2, 3), lambda x: len(set(x[:3].tolist())) == 1 and len(set(x[3:].tolist())) > 1),
        (strategies.preference_pairs(2), lambda p: p.chosen_log_ratios[0] == p.rejected_log_ratios[0] != 0),
    ],
)
def test_extremes_and_ties_turn_up(strategy, wanted):
    assert wanted(find(strategy, wanted, settings=settings(max_examples=5000)))
