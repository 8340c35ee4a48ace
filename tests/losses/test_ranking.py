"""Plackett-Luce and list choice against products of choice probabilities, on ragged lists with holes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax.losses import ranking, reward_model


@st.composite
def lists(draw, span=30):
    """Scores [3, 5] with NaN where a mask [3, 5] is False."""
    mask = draw(hnp.arrays(np.bool_, (3, 5)))
    scores = draw(hnp.arrays(np.float32, (3, 5), elements=st.floats(-span, span, width=32)))
    return np.where(mask, scores, np.nan).astype(np.float32), mask


def kept(row, mask):
    return [float(s) for s, keep in zip(row, mask, strict=True) if keep]


def pick(scores, index):
    """-log of the softmax probability of one score."""
    top = max(scores)
    return math.log(sum(math.exp(s - top) for s in scores)) + top - scores[index]


@given(case=lists(), depth=st.sampled_from([None, 1, 2, 9]))
def test_plackett_luce_is_a_product_of_choices(case, depth):
    expected = []
    for row, mask in zip(*case, strict=True):
        scores = kept(row, mask)
        expected.append(sum(pick(scores[k:], 0) for k in range(min(len(scores), depth or 9))))
    np.testing.assert_allclose(ranking.plackett_luce(*case, depth=depth), expected, rtol=1e-5, atol=1e-4)


@given(case=lists(), data=st.data())
def test_list_choice_is_a_softmax(case, data):
    scores, mask = case
    choice, expected = [], []
    for row, flags in zip(scores, mask, strict=True):
        slots = [i for i, flag in enumerate(flags) if flag]
        chosen = data.draw(st.sampled_from(slots)) if slots else 2
        choice.append(chosen)
        expected.append(pick(kept(row, flags), slots.index(chosen)) if slots else 0.0)
    np.testing.assert_allclose(ranking.list_choice(scores, np.array(choice), mask), expected, rtol=1e-5, atol=1e-4)


def test_probabilities_of_all_rankings_and_choices_sum_to_one():
    scores = np.float32([0.3, -1.0, 2.0, 0.5])
    every = np.ones((24, 4), bool)
    orders = np.array([scores[list(o)] for o in itertools.permutations(range(4))])
    np.testing.assert_allclose(np.exp(-ranking.plackett_luce(orders, every)).sum(), 1.0, rtol=1e-5)
    choices = ranking.list_choice(np.tile(scores, (4, 1)), np.arange(4), every[:4])
    np.testing.assert_allclose(np.exp(-choices).sum(), 1.0, rtol=1e-5)


def test_limits():
    scores, every = np.float32([[0.3, -1.0], [5.0, 7.0]]), np.ones((2, 2), bool)
    bradley_terry = reward_model.bradley_terry(scores[:, 0], scores[:, 1])
    np.testing.assert_allclose(ranking.plackett_luce(scores, every), bradley_terry, rtol=1e-6)
    np.testing.assert_allclose(ranking.list_choice(scores, np.array([0, 0]), every), bradley_terry, rtol=1e-6)
    one = np.array([[True, False], [False, True]])
    assert ranking.plackett_luce(scores, one).tolist() == [0.0, 0.0]
    assert ranking.list_choice(scores, np.array([0, 1]), one).tolist() == [0.0, 0.0]
    equal = np.full((1, 5), 3.0, np.float32)
    np.testing.assert_allclose(ranking.plackett_luce(equal, np.ones((1, 5), bool)), [math.log(120)], rtol=1e-6)
    np.testing.assert_allclose(
        ranking.list_choice(equal, np.array([2]), np.ones((1, 5), bool)), [math.log(5)], rtol=1e-6
    )
    hole = np.array([[False, True, True, True, True]])
    rng = np.random.default_rng(0).normal(size=(1, 5)).astype(np.float32)
    first_pick = ranking.plackett_luce(rng, hole, depth=1)
    np.testing.assert_allclose(first_pick, ranking.list_choice(rng, np.array([1]), hole), rtol=1e-6)
    np.testing.assert_allclose(ranking.plackett_luce(rng + 9, hole), ranking.plackett_luce(rng, hole), rtol=1e-4)


GRADIENTS = [
    jax.jit(jax.grad(lambda s, mask: ranking.plackett_luce(s, mask).sum())),
    jax.jit(jax.grad(lambda s, mask: ranking.list_choice(s, jnp.argmax(mask, -1), mask).sum())),
]


@given(case=lists())
def test_garbage_changes_no_gradient(case):
    scores, mask = case
    for gradient in GRADIENTS:
        wanted = gradient(np.where(mask, scores, np.float32(0)), mask)
        for garbage in (np.nan, np.inf, -np.inf, 1e9):
            np.testing.assert_array_equal(gradient(np.where(mask, scores, np.float32(garbage)), mask), wanted)
        assert np.isfinite(wanted).all()
        assert not np.asarray(wanted)[~mask].any()


def test_gradients_equal_finite_differences():
    scores, mask = np.array([[0.3, -1.0, 2.0], [0.1, 0.2, 9.0]]), np.array([[True, True, True], [True, False, True]])
    with jax.enable_x64(True):
        scores = jnp.float64(scores)
        check_grads(lambda s: ranking.plackett_luce(s, mask), (scores,), order=1, modes=["rev"])
        check_grads(lambda s: ranking.plackett_luce(s, mask, depth=1), (scores,), order=1, modes=["rev"])
        check_grads(lambda s: ranking.list_choice(s, jnp.array([1, 2]), mask), (scores,), order=1, modes=["rev"])


def test_extremes_dtypes_and_jit():
    scores, every = jnp.float32([[80.0, -80.0, 0.0, 80.0]]), jnp.ones((1, 4), bool)
    choice = jnp.array([1])
    for loss in (lambda s: ranking.plackett_luce(s, every), lambda s: ranking.list_choice(s, choice, every)):
        assert np.isfinite(loss(scores)).all()
        assert np.isfinite(jax.grad(lambda s, f=loss: f(s).sum())(scores)).all()
        np.testing.assert_allclose(jax.jit(loss)(scores), loss(scores), rtol=1e-6)
        assert loss(scores.astype(jnp.bfloat16)).dtype == jnp.float32


def test_a_choice_that_is_not_there_is_loud():
    scores, mask = jnp.zeros((4, 3)), jnp.array([[True, True, False]] * 3 + [[False] * 3])
    losses = ranking.list_choice(scores, jnp.array([2, 3, -1, 0]), mask)
    assert np.isnan(losses).tolist() == [True, True, True, False]
    assert losses[3] == 0.0


def test_refusals():
    scores, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        ranking.plackett_luce(scores, mask, depth=0)
    with pytest.raises(TypeError, match="mask must be bool"):
        ranking.plackett_luce(scores, mask.astype(int))
    with pytest.raises(TypeError, match="mask must be bool"):
        ranking.list_choice(scores, jnp.array([0, 1]), mask.astype(int))
    with pytest.raises(TypeError, match="choice must be integer"):
        ranking.list_choice(scores, jnp.array([0.0, 1.0]), mask)
    with pytest.raises(TypeError, match="scores must be floating"):
        ranking.plackett_luce(scores.astype(int), mask)
    with pytest.raises(AssertionError):
        ranking.list_choice(scores, jnp.array([0]), mask)
