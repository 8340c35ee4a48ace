"""generation/warpers.py against sorting in float64: ties, limits, what survives, knobs traced or per row."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rlhf_jax.generation.warpers import logit_bias, min_p, temperature, top_k, top_p

V = 13
# Halves and few values, so that ties are common; extremes; excluded tokens.
FLOATS = st.floats(-30, 30, width=32, allow_subnormal=False)
VALUES = st.one_of(st.integers(-6, 6).map(lambda n: n / 2), FLOATS, st.sampled_from([-np.inf, -1e30, 80.0, -0.0]))
ROWS = hnp.arrays(np.float32, (3, V), elements=VALUES).filter(lambda x: np.isfinite(x).any(axis=-1).all())
SHARES = st.one_of(st.floats(0, 1, width=32, allow_subnormal=False), st.sampled_from([0.0, 1.0]))

jitted = {f: jax.jit(f) for f in (top_k, top_p, min_p, temperature)}


def probabilities(row):
    row = row.astype(np.float64)
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def kept(warped, logits):
    """Which tokens survived; those keep their logit to the last bit."""
    warped = np.asarray(warped)
    survives = warped != -np.inf
    np.testing.assert_array_equal(warped[survives], logits[survives])
    return survives


@given(logits=ROWS, k=st.integers(1, V))
def test_top_k_keeps_the_k_best_and_their_ties(logits, k):
    survives = kept(jitted[top_k](logits, k), logits)
    for row, keep in zip(logits, survives, strict=True):
        np.testing.assert_array_equal(keep, (row >= np.sort(row)[::-1][k - 1]) & (row > -np.inf))
        assert keep.sum() >= min(k, np.isfinite(row).sum()) >= 1


@given(logits=ROWS, p=SHARES)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    survives = kept(jitted[top_p](logits, p), logits)
    for row, keep in zip(logits, survives, strict=True):
        probs = probabilities(row)
        above = np.array([probs[row > x].sum() for x in row])  # the mass of what is strictly better
        assert keep[row == row.max()].all()
        assert keep[(above < p - 1e-5) & (row > -np.inf)].all()
        assert not keep[(above > p + 1e-5) & (row < row.max())].any()
        for x in set(row.tolist()):  # ties share their fate
            assert len(set(keep[row == x].tolist())) == 1


@given(logits=ROWS, p=SHARES)
def test_min_p_keeps_what_is_at_least_p_times_as_likely_as_the_best(logits, p):
    survives = kept(jitted[min_p](logits, p), logits)
    for row, keep in zip(logits, survives, strict=True):
        share = np.exp(row.astype(np.float64) - row.max())
        assert keep[(share > p * (1 + 1e-5)) & (row > -np.inf)].all()
        assert not keep[share < p * (1 - 1e-5)].any()
        assert keep[row == row.max()].all()


@given(logits=ROWS)
def test_limits(logits):
    np.testing.assert_array_equal(top_k(logits, V), logits)
    np.testing.assert_array_equal(jitted[top_p](logits, 1.0), logits)
    np.testing.assert_array_equal(jitted[min_p](logits, 0.0), logits)
    np.testing.assert_array_equal(jitted[temperature](logits, 1.0), logits)
    best = np.where(logits == logits.max(axis=-1, keepdims=True), logits, -np.inf)
    np.testing.assert_array_equal(jitted[top_k](logits, 1), best)
    np.testing.assert_array_equal(jitted[top_p](logits, 0.0), best)
    np.testing.assert_array_equal(jitted[min_p](logits, 1.0), best)


def test_p_of_one_keeps_tokens_too_rare_to_change_a_sum():
    logits = jnp.concatenate([jnp.zeros(300), jnp.full(300, -60.0)])
    assert jnp.isfinite(top_p(logits, 1.0)).all()


@hypothesis.settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_large_vocabularies_equal_sorting(seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(2, 5000)) * 3).astype(np.float32)
    for row, keep in zip(logits, kept(jitted[top_k](logits, 40), logits), strict=True):
        assert set(np.flatnonzero(keep)) == set(np.argsort(row)[-40:])
    for row, keep in zip(logits, kept(jitted[top_p](logits, 0.9), logits), strict=True):
        mass = np.cumsum(np.sort(probabilities(row))[::-1])
        assert abs(keep.sum() - (np.searchsorted(mass, 0.9) + 1)) <= 1


def test_temperature_is_a_power_of_the_probabilities():
    logits = np.random.default_rng(0).normal(size=(2, V))
    powers = np.stack([probabilities(row) for row in logits]) ** (1 / 0.7)
    expected = powers / powers.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(temperature(jnp.asarray(logits), 0.7)), expected, rtol=1e-5)


@pytest.mark.parametrize("warp", [top_k, top_p, min_p, temperature])
def test_knobs_may_be_swept_or_differ_by_row(warp):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, V)), jnp.float32)
    knobs = jnp.array([2, 5, 9]) if warp is top_k else jnp.array([0.2, 0.5, 0.9])
    alone = jnp.stack([warp(row, knob) for row, knob in zip(logits, knobs, strict=True)])
    np.testing.assert_array_equal(jax.vmap(warp)(logits, knobs), alone)
    np.testing.assert_array_equal(warp(logits, knobs[:, None]), alone)
    np.testing.assert_array_equal(warp(logits[0], knobs[0]), alone[0])


@pytest.mark.parametrize("warp", [lambda z: top_k(z, 3), lambda z: top_p(z, 0.5), lambda z: min_p(z, 0.5)])
def test_bfloat16_stays_bfloat16(warp):
    logits = jnp.arange(8.0, dtype=jnp.bfloat16)
    assert warp(logits).dtype == jnp.bfloat16
    np.testing.assert_array_equal(warp(logits).astype(jnp.float32), warp(logits.astype(jnp.float32)))


@pytest.mark.parametrize("k", [0, V + 1])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k must lie in 1..{V} "):
        top_k(jnp.zeros(V), k)


def test_logit_bias():
    logits = np.random.default_rng(2).normal(size=(2, V)).astype(np.float32)
    expected = logits.copy()
    expected[:, 3] += 2.0
    expected[:, 7] = -np.inf
    np.testing.assert_allclose(logit_bias(jnp.asarray(logits), jnp.array([3, 7]), jnp.array([2.0, -jnp.inf])), expected)
    np.testing.assert_array_equal(logit_bias(jnp.asarray(logits), jnp.zeros(0, jnp.int32), 1.0), logits)
    expected = logits + np.where(np.arange(V) == 4, 2.0, 0.0)
    np.testing.assert_allclose(logit_bias(jnp.asarray(logits), jnp.array([4, 4]), 1.0), expected, rtol=1e-6)
