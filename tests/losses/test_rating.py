"""Ratings as numbers and as ordered categories, and process supervision: formulas, limits, masks, recovery."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax.losses import rating, reward_model

CUTS = np.array([-1.3, -0.2, 0.1, 2.0])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def category(score, k, cuts=CUTS):
    """P(rating = k) as the difference of two cumulative probabilities."""
    upper = sigmoid(cuts[k] - score) if k < len(cuts) else 1.0
    return upper - (sigmoid(cuts[k - 1] - score) if k else 0.0)


# --- regression -------------------------------------------------------------------------------------------------------


def test_rating_regression():
    scores, ratings = jnp.float32([3.5, -1.0]), jnp.array([4, 2])
    np.testing.assert_allclose(rating.rating_regression(scores, ratings), [0.25, 9.0])
    np.testing.assert_allclose(rating.rating_regression(scores, ratings + 0.5), [1.0, 12.25])
    gradient = jax.grad(lambda s, r: rating.rating_regression(s, r).sum(), argnums=(0, 1))(scores, ratings + 0.5)
    np.testing.assert_allclose(gradient[0], [-2.0, -7.0])
    assert not gradient[1].any()
    assert rating.rating_regression(scores.astype(jnp.bfloat16), ratings).dtype == jnp.float32
    with jax.enable_x64(True):
        check_grads(
            lambda s: rating.rating_regression(s, jnp.array([4, 2])), (jnp.float64([1.0, 2.0]),), order=1, modes=["rev"]
        )
    with pytest.raises(TypeError, match="scores must be floating"):
        rating.rating_regression(ratings, ratings)
    with pytest.raises(AssertionError):
        rating.rating_regression(scores, jnp.array([1]))


def test_the_best_score_is_the_mean_rating():
    ratings = jnp.array([1, 2, 5, 5])
    slope = jax.grad(lambda s: rating.rating_regression(jnp.full(4, s), ratings).sum())(jnp.float32(13 / 4))
    assert abs(slope) < 1e-5


# --- ordinal ----------------------------------------------------------------------------------------------------------


@given(scores=hnp.arrays(np.float32, (2, 3), elements=st.floats(-5, 5, width=32)))
def test_ordinal_equals_differences_of_cumulative_probabilities(scores):
    probabilities = np.exp(np.float64(rating.ordinal_log_probs(scores, jnp.float32(CUTS))))
    expected = [[[category(float(s), k) for k in range(5)] for s in row] for row in scores]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-5)
    for k in range(5):
        loss = rating.ordinal(scores, np.full(scores.shape, k), jnp.float32(CUTS))
        np.testing.assert_allclose(loss, -np.log(np.array(expected)[..., k]), rtol=1e-4, atol=1e-5)


def test_two_levels_are_logistic_regression_and_shifts_cancel():
    scores, cut = jnp.float32([-1.0, 0.4, 3.0]), jnp.float32([0.4])
    one = rating.ordinal(scores, jnp.ones(3, int), cut)
    np.testing.assert_allclose(one, reward_model.bradley_terry(scores, jnp.full(3, 0.4)), rtol=1e-6)
    zero = rating.ordinal(scores, jnp.zeros(3, int), cut)
    np.testing.assert_allclose(zero, reward_model.bradley_terry(jnp.full(3, 0.4), scores), rtol=1e-6)
    np.testing.assert_allclose(one[1], math.log(2), rtol=1e-6)
    ratings = jnp.array([0, 3, 4])
    shifted = rating.ordinal(scores + 2, ratings, jnp.float32(CUTS) + 2)
    np.testing.assert_allclose(shifted, rating.ordinal(scores, ratings, jnp.float32(CUTS)), rtol=1e-5)


def test_ordinal_gradients_extremes_and_dtype():
    scores, ratings = np.array([0.3, -2.0, 1.0, 0.0, 4.0]), np.arange(5)
    with jax.enable_x64(True):
        check_grads(
            lambda s, c: rating.ordinal(s, jnp.asarray(ratings), c),
            (jnp.float64(scores), jnp.float64(CUTS)),
            order=1,
            modes=["rev"],
        )
        check_grads(rating.ordered_cut_points, (jnp.float64([0.3, -2.0, 1.0]),), order=1, modes=["rev"])
    for end in (-80.0, 80.0):
        value, gradient = jax.value_and_grad(
            lambda s, c: rating.ordinal(s, jnp.asarray(ratings), c).sum(), argnums=(0, 1)
        )(jnp.full(5, end), jnp.float32(CUTS))
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradient)
    narrow = rating.ordinal(jnp.zeros(5, jnp.bfloat16), jnp.asarray(ratings), jnp.asarray(CUTS, jnp.bfloat16))
    assert narrow.dtype == jnp.float32


def test_cut_points_increase_and_start_evenly():
    parameters = jnp.float32([2.0, -30.0, 0.0, 5.0])
    cuts = rating.ordered_cut_points(parameters)
    expected = 2.0 + np.cumsum([0.0, *np.log1p(np.exp([-30.0, 0.0, 5.0]))])
    np.testing.assert_allclose(cuts, expected, rtol=1e-6)
    for levels in (2, 3, 5, 10):
        start = rating.ordered_cut_points(rating.init_cut_parameters(levels))
        np.testing.assert_allclose(start, np.arange(levels - 1) - (levels - 2) / 2, atol=1e-5)


def test_cut_points_are_recovered_from_ratings():
    """Maximum likelihood on expected counts at known scores finds the cut points that made them."""
    with jax.enable_x64(True):
        scores = jnp.linspace(-3.0, 3.0, 25)
        truth = jnp.exp(rating.ordinal_log_probs(scores, jnp.asarray(CUTS)))
        levels = [jnp.full(25, k) for k in range(5)]

        def loss(parameters):
            cuts = rating.ordered_cut_points(parameters)
            return sum(jnp.sum(truth[:, k] * rating.ordinal(scores, levels[k], cuts)) for k in range(5)) / 25

        step = jax.jit(
            lambda parameters: jax.lax.fori_loop(0, 4000, lambda _, p: p - 3.0 * jax.grad(loss)(p), parameters)
        )
        fitted = rating.ordered_cut_points(step(rating.init_cut_parameters(5)))
        np.testing.assert_allclose(fitted, CUTS, atol=1e-3)


def test_ordinal_refusals():
    scores, cuts = jnp.zeros(3), jnp.float32(CUTS)
    losses = rating.ordinal(scores, jnp.array([-1, 5, 4]), cuts)
    assert np.isnan(losses).tolist() == [True, True, False]
    gradient = jax.grad(lambda s: jnp.nansum(rating.ordinal(s, jnp.array([-1, 5, 4]), cuts)))(scores)
    assert np.isfinite(gradient).all()
    with pytest.raises(TypeError, match="ratings must be integer"):
        rating.ordinal(scores, scores, cuts)
    with pytest.raises(TypeError, match="scores must be floating"):
        rating.ordinal(jnp.zeros(3, int), jnp.zeros(3, int), cuts)
    with pytest.raises(AssertionError):
        rating.ordinal(scores, jnp.zeros(2, int), cuts)
    with pytest.raises(AssertionError):
        rating.ordinal(scores, jnp.zeros(3, int), cuts[None])
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        rating.init_cut_parameters(1)


# --- process rewards --------------------------------------------------------------------------------------------------


@given(
    logits=hnp.arrays(np.float32, (2, 4), elements=st.floats(-20, 20, width=32)),
    labels=hnp.arrays(np.float32, (2, 4), elements=st.sampled_from([0.0, 0.25, 1.0])),
    mask=hnp.arrays(np.bool_, (2, 4)),
)
def test_process_rewards_equal_cross_entropy(logits, labels, mask):
    expected = np.zeros((2, 4))
    for i, j in zip(*np.nonzero(mask), strict=True):
        z, y = float(logits[i, j]), float(labels[i, j])
        expected[i, j] = -y * math.log(sigmoid(z)) - (1 - y) * math.log(sigmoid(-z))
    clean = jax.value_and_grad(lambda z: rating.process_rewards(z, labels, mask).sum())
    wanted = clean(jnp.where(mask, logits, 0.0))
    for garbage in (np.nan, np.inf):
        dirty = np.where(mask, logits, garbage).astype(np.float32), np.where(mask, labels, garbage)
        np.testing.assert_allclose(rating.process_rewards(*dirty, mask), expected, rtol=1e-5, atol=1e-6)
        gradient = jax.grad(lambda z, y=dirty[1]: rating.process_rewards(z, y, mask).sum())(jnp.asarray(dirty[0]))
        np.testing.assert_array_equal(gradient, wanted[1])


def test_process_rewards_labels_gradients_and_refusals():
    logits, mask = jnp.float32([[0.0, 80.0, -80.0]]), jnp.ones((1, 3), bool)
    for labels in (jnp.array([[True, True, False]]), jnp.array([[1, 1, 0]])):
        np.testing.assert_allclose(rating.process_rewards(logits, labels, mask), [[math.log(2), 0.0, 0.0]], atol=1e-6)
    soft = jnp.float32([[0.3, 0.9, 0.2]])
    gradient = jax.grad(lambda z, y: rating.process_rewards(z, y, mask).sum(), argnums=(0, 1))(logits, soft)
    np.testing.assert_allclose(gradient[0], [[0.2, 0.1, -0.2]], atol=1e-6)
    assert not gradient[1].any()
    with jax.enable_x64(True):
        check_grads(
            lambda z: rating.process_rewards(z, soft, mask), (jnp.float64([[0.3, 1.0, -2.0]]),), order=1, modes=["rev"]
        )
    assert rating.process_rewards(logits.astype(jnp.bfloat16), soft, mask).dtype == jnp.float32
    with pytest.raises(TypeError, match="mask must be bool"):
        rating.process_rewards(logits, soft, mask.astype(int))
    with pytest.raises(TypeError, match="step_logits must be floating"):
        rating.process_rewards(mask, soft, mask)
    with pytest.raises(AssertionError):
        rating.process_rewards(logits, soft[0], mask)
