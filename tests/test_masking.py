"""masking.py against float64 loops, and its promises about masks and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax import masking

FINITE = st.floats(-100, 100, width=32)


SHAPES = ((1, 1), (1, 7), (5, 1), (3, 4))  # few, since every operation compiles anew for each


@st.composite
def ragged(draw, shapes=SHAPES):
    """x [B, T] with NaN outside a bool mask [B, T]; empty rows and holes included."""
    shape = draw(st.sampled_from(shapes))
    x = draw(hnp.arrays(np.float32, shape, elements=FINITE))
    mask = draw(hnp.arrays(np.bool_, shape))
    return np.where(mask, x, np.nan).astype(np.float32), mask


def row_values(x, mask):
    return [[float(v) for v, keep in zip(row, kept, strict=True) if keep] for row, kept in zip(x, mask, strict=True)]


def ratio(total, count):
    return total / count if count else 0.0


ORACLES = {
    masking.token_mean: lambda rows: ratio(sum(map(sum, rows)), sum(map(len, rows))),
    masking.sequence_mean: lambda rows: ratio(sum(sum(r) / len(r) for r in rows if r), sum(map(bool, rows))),
    masking.sequence_mean_counting_empty: lambda rows: sum(sum(r) / len(r) for r in rows if r) / len(rows),
    masking.sequence_sum: lambda rows: ratio(sum(map(sum, rows)), sum(map(bool, rows))),
    lambda x, mask, **kw: masking.fixed_length_mean(x, mask, length=11, **kw): lambda rows: (
        sum(map(sum, rows)) / (11 * len(rows))
    ),
    masking.masked_mean: lambda rows: ratio(sum(map(sum, rows)), sum(map(len, rows))),
    masking.masked_sum: lambda rows: sum(map(sum, rows)),
}


@pytest.mark.parametrize("index", range(len(ORACLES)))
@given(case=ragged())
def test_reducers_equal_float64_loops(index, case):
    reduce, oracle = list(ORACLES.items())[index]
    np.testing.assert_allclose(reduce(*case), oracle(row_values(*case)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ddof", [0, 1])
@given(case=ragged())
def test_variance_equals_numpy(ddof, case):
    x, mask = case
    kept = x[mask].astype(np.float64)
    expected = np.var(kept, ddof=ddof) if kept.size > ddof else 0.0
    np.testing.assert_allclose(masking.masked_variance(x, mask, ddof=ddof), expected, rtol=1e-4, atol=1e-3)


def test_variance_keeps_its_digits_beside_a_large_mean():
    x = jnp.float32([[1e4, 1e4 + 1, 1e4 + 2]])
    np.testing.assert_allclose(masking.masked_variance(x, jnp.ones_like(x, bool)), 2 / 3, rtol=1e-5)


@given(case=ragged(), axis=st.sampled_from([0, 1]))
def test_statistics_along_an_axis_are_those_of_each_line(case, axis):
    x, mask = np.moveaxis(case[0], axis, 1), np.moveaxis(case[1], axis, 1)
    for statistic in (masking.masked_sum, masking.masked_mean, masking.masked_variance):
        lines = [statistic(row, kept) for row, kept in zip(x, mask, strict=True)]
        np.testing.assert_allclose(statistic(*case, axis=axis), jnp.stack(lines), rtol=1e-5, atol=1e-4)


@given(case=ragged(), ddof=st.sampled_from([0, 1]), shift=st.booleans())
def test_whiten_equals_float64(case, ddof, shift):
    x, mask = case
    white = np.asarray(masking.whiten(x, mask, ddof=ddof, shift_mean=shift, epsilon=1e-2))
    assert not white[~mask].any()
    kept = x[mask].astype(np.float64)
    variance = np.var(kept, ddof=ddof) if kept.size > ddof else 0.0
    mean = kept.mean() if kept.size else 0.0
    expected = (kept - mean) / np.sqrt(variance + 1e-2) + (0.0 if shift else mean)
    np.testing.assert_allclose(white[mask], expected, rtol=1e-3, atol=1e-3)


GRADIENTS = [
    jax.jit(jax.value_and_grad(function))
    for function in (*ORACLES, masking.masked_variance, lambda x, mask: jnp.sum(jnp.sin(masking.whiten(x, mask))))
]


@settings(max_examples=10)
@given(case=ragged(shapes=[(3, 4)]))
def test_garbage_outside_the_mask_changes_no_value_and_no_gradient(case):
    x, mask = case
    for value_and_gradient in GRADIENTS:
        expected, expected_gradient = value_and_gradient(np.where(mask, x, np.float32(0)), mask)
        for garbage in (np.nan, np.inf, -1e9):
            value, gradient = value_and_gradient(np.where(mask, x, np.float32(garbage)), mask)
            np.testing.assert_array_equal(value, expected)
            np.testing.assert_array_equal(gradient, expected_gradient)
            assert np.isfinite(gradient).all()
            assert not np.asarray(gradient)[~mask].any()


def test_gradients_equal_central_differences():
    rng = np.random.default_rng(2)
    x, mask = rng.normal(size=(4, 5)), rng.random((4, 5)) < 0.6
    mask[1] = False

    def total(x):
        """Every statistic with a weight of its own."""
        moments = masking.update_moments(masking.init_moments(), x, mask)
        parts = [function(x, mask) for function in (*ORACLES, masking.masked_variance)]
        parts += [moments.mean, moments.squares, *masking.masked_variance(x, mask, axis=-1, ddof=1)]
        parts += [jnp.sum(jnp.sin(masking.whiten(x, mask, shift_mean=shift))) for shift in (True, False)]
        return sum((index + 1) * part for index, part in enumerate(parts))

    with jax.enable_x64(True):
        check_grads(jax.jit(total), (jnp.asarray(x),), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("map_devices", [jax.vmap, jax.pmap])
def test_four_shards_equal_one(map_devices):
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(8, 5)).astype(np.float32), rng.random((8, 5)) < 0.5
    mask[0] = False
    functions = [*ORACLES, masking.masked_variance, lambda x, m, **kw: masking.masked_variance(x, m, ddof=1, **kw)]
    for function in functions:
        sharded = map_devices(lambda x, m, f=function: f(x, m, axis_name="data"), axis_name="data")
        np.testing.assert_allclose(sharded(x.reshape(4, 2, 5), mask.reshape(4, 2, 5)), [function(x, mask)] * 4, 1e-5)
    sharded = map_devices(lambda x, m: masking.whiten(x, m, axis_name="data"), axis_name="data")
    whole = masking.whiten(x, mask)
    np.testing.assert_allclose(sharded(x.reshape(4, 2, 5), mask.reshape(4, 2, 5)).reshape(8, 5), whole, 1e-4, 1e-5)


def test_totals_add_up_over_micro_batches():
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(6, 5)).astype(np.float32), rng.random((6, 5)) < 0.5
    for totals, mean in [
        (masking.token_totals, masking.token_mean),
        (masking.sequence_mean_totals, masking.sequence_mean),
        (masking.sequence_mean_counting_empty_totals, masking.sequence_mean_counting_empty),
        (masking.sequence_sum_totals, masking.sequence_sum),
        (
            lambda x, m: masking.fixed_length_totals(x, m, length=7),
            lambda x, m: masking.fixed_length_mean(x, m, length=7),
        ),
    ]:
        parts = [totals(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
        merged = masking.Totals(sum(p.sum for p in parts), sum(p.count for p in parts))
        np.testing.assert_allclose(masking.mean_of_totals(merged), mean(x, mask), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_reduced_in_float32(dtype):
    x = jnp.full((1, 4096), 1.0, dtype)
    mask = jnp.ones_like(x, bool)
    assert masking.token_mean(x, mask).dtype == jnp.float32
    assert float(masking.masked_sum(x, mask)) == 4096.0  # bfloat16 accumulation would stop at 256
    assert masking.whiten(x, mask).dtype == jnp.float32


def test_bad_masks_are_refused_in_words():
    with pytest.raises(TypeError, match="mask must be bool"):
        masking.token_mean(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(AssertionError):
        masking.token_mean(jnp.ones((2, 3)), jnp.ones((2,), bool))


@given(parts=st.lists(ragged(), min_size=1, max_size=4))
def test_running_moments_equal_those_of_everything_seen(parts):
    moments = masking.init_moments()
    for x, mask in parts:
        moments = masking.update_moments(moments, x, mask)
    kept = np.concatenate([x[mask] for x, mask in parts]).astype(np.float64)
    assert int(moments.count) == kept.size
    if kept.size:
        np.testing.assert_allclose(moments.mean, kept.mean(), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(moments.variance(), kept.var(), rtol=1e-3, atol=1e-2)
    if kept.size > 1:
        np.testing.assert_allclose(moments.variance(ddof=1), kept.var(ddof=1), rtol=1e-3, atol=1e-2)


def test_merging_with_nothing_is_the_identity():
    some = masking.update_moments(masking.init_moments(), jnp.array([1.0, 4.0]), jnp.array([True, True]))
    for merged in (
        masking.merge_moments(some, masking.init_moments()),
        masking.merge_moments(masking.init_moments(), some),
    ):
        np.testing.assert_allclose(merged, some)
    assert float(masking.init_moments().variance(ddof=1)) == 0.0
