"""Masked statistics and reducers: the only place where the library sums over tokens, rows or devices.

Conventions that every other module relies on:

* A mask is bool, ``True`` counts, and it selects by ``where`` before any arithmetic. NaN, inf or garbage in an
  unmasked slot changes neither a value nor a gradient.
* A mean is a pair ``Totals(sum, count)`` until the very end. Sums and counts cross devices and micro-batches
  separately; only then are they divided. So 1 device = N devices = k micro-batches.
* ``axis_name`` names the mapped axis (``pmap``, ``shard_map``, ``vmap``) to reduce over. Under ``jit`` with sharded
  inputs arrays are global already: leave it ``None``.
* Statistics are computed in float32 (float64 inputs stay float64), whatever narrower type comes in.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Axis = int | tuple[int, ...] | None

__all__ = [
    "Moments",
    "Totals",
    "fixed_length_mean",
    "fixed_length_totals",
    "init_moments",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "mean_of_totals",
    "merge_moments",
    "sequence_mean",
    "sequence_mean_counting_empty",
    "sequence_mean_counting_empty_totals",
    "sequence_mean_totals",
    "sequence_sum",
    "sequence_sum_totals",
    "sum_totals",
    "token_mean",
    "token_totals",
    "update_moments",
    "whiten",
    "zero_outside",
]


class Totals(NamedTuple):
    """A mean before its division: ``sum / count``, mergeable by addition."""

    sum: Array  # [] weighted sum
    count: Array  # [] what the sum is divided by


def check_mask(mask: Array, *arrays: Array) -> None:
    """Raises ``TypeError`` for a mask that is not bool, ``AssertionError`` if shapes differ (at trace time)."""
    if jnp.asarray(mask).dtype != jnp.bool_:
        raise TypeError(f"mask must be bool (True = counts), got dtype {jnp.asarray(mask).dtype}; write `mask > 0`")
    chex.assert_equal_shape([mask, *arrays])


def _statistic_dtype(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _psum(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def zero_outside(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    """Zeroes every array outside the mask, so that no later ``exp`` or product can meet garbage.

    Use it on the inputs of a formula: a ``where`` on its output does not stop NaN gradients.

    >>> zero_outside(jnp.array([True, False]), jnp.array([2.0, jnp.nan]))[0].tolist()
    [2.0, 0.0]
    """
    check_mask(mask, *arrays)
    return tuple(jnp.where(mask, x, jnp.zeros((), x.dtype)) for x in arrays)


# --- statistics -------------------------------------------------------------------------------------------------------


def masked_sum(
    x: Array, mask: Array, *, axis: Axis = None, axis_name: str | None = None, keepdims: bool = False
) -> Array:
    """Sum of x over the true slots: Σ_{mask} x. An empty mask gives 0.

    >>> float(masked_sum(jnp.array([1.0, 5.0]), jnp.array([True, False])))
    1.0
    """
    check_mask(mask, x)
    total = jnp.sum(x, axis=axis, where=mask, dtype=_statistic_dtype(x), keepdims=keepdims)
    return _psum(total, axis_name)


def _count(x: Array, mask: Array, axis: Axis, axis_name: str | None, keepdims: bool) -> Array:
    return _psum(jnp.sum(mask, axis=axis, dtype=_statistic_dtype(x), keepdims=keepdims), axis_name)


def masked_mean(
    x: Array, mask: Array, *, axis: Axis = None, axis_name: str | None = None, keepdims: bool = False
) -> Array:
    """Mean of x over the true slots: Σ_{mask} x / Σ mask. An empty mask gives 0, never NaN.

    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    count = _count(x, mask, axis, axis_name, keepdims)
    return masked_sum(x, mask, axis=axis, axis_name=axis_name, keepdims=keepdims) / jnp.maximum(count, 1.0)


def masked_variance(
    x: Array,
    mask: Array,
    *,
    ddof: ArrayLike = 0,
    axis: Axis = None,
    axis_name: str | None = None,
    keepdims: bool = False,
) -> Array:
    """Variance of x over the true slots: Σ_{mask} (x - mean)² / (n - ddof). n <= ddof gives 0, never NaN.

    ``ddof=0`` divides by n (Ziegler et al. 2019's code), ``ddof=1`` by n - 1 (TRL, verl). The values are centred first,
    so a large mean costs no digits.

    >>> float(masked_variance(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([True, True, False]), ddof=1))
    2.0
    """
    mean = masked_mean(x, mask, axis=axis, axis_name=axis_name, keepdims=True)
    centred = jnp.where(mask, x.astype(mean.dtype), mean) - mean
    squares = masked_sum(jnp.square(centred), mask, axis=axis, axis_name=axis_name, keepdims=keepdims)
    freedom = _count(x, mask, axis, axis_name, keepdims) - ddof
    return jnp.where(freedom > 0, squares / jnp.where(freedom > 0, freedom, 1.0), 0.0)


def whiten(
    x: Array,
    mask: Array,
    *,
    shift_mean: bool = True,
    ddof: ArrayLike = 0,
    epsilon: ArrayLike = 1e-8,
    axis_name: str | None = None,
) -> Array:
    """Scales x to unit variance over the true slots of the whole batch: (x - mean) / √(variance + ε).

    Args:
      x: [...] values, for instance advantages.
      mask: [...] bool.
      shift_mean: False keeps the mean, (x - mean) / √(variance + ε) + mean, the form used for rewards.
      ddof: 0 divides the variance by n, 1 by n - 1.
      epsilon: added under the root; all-equal values give 0 (or their mean), never NaN.
      axis_name: mapped axis whose devices share the statistics.
    Returns:
      [...] whitened values, 0 outside the mask.
    Reference: Ziegler et al. 2019 (code); Huang et al. 2024, detail 12, https://arxiv.org/abs/2403.17031

    >>> [round(v, 3) for v in whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])).tolist()]
    [-1.0, 1.0, 0.0]
    """
    mean = masked_mean(x, mask, axis_name=axis_name)
    variance = masked_variance(x, mask, ddof=ddof, axis_name=axis_name)
    (clean,) = zero_outside(mask, x)
    white = (clean.astype(mean.dtype) - mean) * jax.lax.rsqrt(variance + epsilon)
    return jnp.where(mask, white if shift_mean else white + mean, 0.0)


# --- reducers: [..., T] per-token values -> one number ----------------------------------------------------------------


def sum_totals(totals: Totals, *, axis_name: str | None) -> Totals:
    """Adds the totals of all devices on a mapped axis; the identity for ``axis_name=None``.

    >>> one = Totals(jnp.array(6.0), jnp.array(3.0))
    >>> float(jax.vmap(lambda _: sum_totals(one, axis_name="i"), axis_name="i")(jnp.arange(4)).count[0])
    12.0
    """
    return Totals(_psum(totals.sum, axis_name), _psum(totals.count, axis_name))


def mean_of_totals(totals: Totals, *, axis_name: str | None = None) -> Array:
    """sum / count over all devices; 0 if nothing was counted.

    >>> float(mean_of_totals(Totals(jnp.array(6.0), jnp.array(3.0))))
    2.0
    """
    total, count = sum_totals(totals, axis_name=axis_name)
    return total / jnp.where(count > 0, count, 1.0)


def token_totals(x: Array, mask: Array) -> Totals:
    """Every token weighs the same: (Σ x, number of tokens). The aggregation of DAPO (Yu et al. 2025, eq. 8).

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> [float(part) for part in token_totals(x, mask)]
    [9.0, 3.0]
    """
    return Totals(masked_sum(x, mask), _count(x, mask, None, None, False))


def sequence_mean_totals(x: Array, mask: Array) -> Totals:
    """Every non-empty row weighs the same: (Σ_rows mean over the row's tokens, number of non-empty rows).

    The aggregation of GRPO (Shao et al. 2024, eq. 3); rows without a token are left out of the count.

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> [float(part) for part in sequence_mean_totals(x, mask)]
    [7.5, 2.0]
    """
    occupied = jnp.any(mask, axis=-1)
    return Totals(jnp.sum(masked_mean(x, mask, axis=-1)), jnp.sum(occupied, dtype=_statistic_dtype(x)))


def sequence_mean_counting_empty_totals(x: Array, mask: Array) -> Totals:
    """As `sequence_mean_totals`, but a row without a token counts as a row of mean 0.

    >>> totals = sequence_mean_counting_empty_totals(jnp.array([[2.0], [7.0]]), jnp.array([[True], [False]]))
    >>> [float(part) for part in totals]
    [2.0, 2.0]
    """
    row_means = masked_mean(x, mask, axis=-1)
    return Totals(jnp.sum(row_means), jnp.asarray(row_means.size, row_means.dtype))


def sequence_sum_totals(x: Array, mask: Array) -> Totals:
    """Rows are summed over tokens and averaged over non-empty rows: (Σ x, number of non-empty rows).

    The log-likelihood of a sequence, hence the aggregation of REINFORCE and of sequence-level objectives.

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> [float(part) for part in sequence_sum_totals(x, mask)]
    [9.0, 2.0]
    """
    occupied = jnp.any(mask, axis=-1)
    return Totals(masked_sum(x, mask), jnp.sum(occupied, dtype=_statistic_dtype(x)))


def fixed_length_totals(x: Array, mask: Array, *, length: ArrayLike) -> Totals:
    """Token sums over a constant: (Σ x, rows · length). The aggregation of Dr. GRPO (Liu et al. 2025, section 3.2).

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> [float(part) for part in fixed_length_totals(x, mask, length=3)]
    [9.0, 6.0]
    """
    rows = mask.size // mask.shape[-1]
    return Totals(masked_sum(x, mask), jnp.asarray(length, _statistic_dtype(x)) * rows)


def token_mean(x: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """Mean of x [..., T] over the valid tokens of the whole batch; 0 if there are none.

    Equals `sequence_mean` when all rows have the same number of tokens.

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(token_mean(x, mask))
    3.0
    """
    return mean_of_totals(token_totals(x, mask), axis_name=axis_name)


def sequence_mean(x: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """Mean over non-empty rows of each row's token mean (GRPO); see `sequence_mean_totals`.

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(sequence_mean(x, mask))
    3.75
    """
    return mean_of_totals(sequence_mean_totals(x, mask), axis_name=axis_name)


def sequence_mean_counting_empty(x: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """Mean over all rows of each row's token mean, empty rows counting as 0.

    >>> float(sequence_mean_counting_empty(jnp.array([[2.0], [7.0]]), jnp.array([[True], [False]])))
    1.0
    """
    return mean_of_totals(sequence_mean_counting_empty_totals(x, mask), axis_name=axis_name)


def sequence_sum(x: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """Mean over non-empty rows of each row's token sum; see `sequence_sum_totals`.

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(sequence_sum(x, mask))
    4.5
    """
    return mean_of_totals(sequence_sum_totals(x, mask), axis_name=axis_name)


def fixed_length_mean(x: Array, mask: Array, *, length: ArrayLike, axis_name: str | None = None) -> Array:
    """Token sum of the batch over rows · length (Dr. GRPO); see `fixed_length_totals`.

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(fixed_length_mean(x, mask, length=3))
    1.5
    """
    return mean_of_totals(fixed_length_totals(x, mask, length=length), axis_name=axis_name)


# --- running moments --------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Running count, mean and sum of squared deviations."""

    count: Array  # [] values seen
    mean: Array  # []
    squares: Array  # [] Σ (x - mean)²

    def variance(self, *, ddof: ArrayLike = 0) -> Array:
        """squares / (count - ddof); 0 while count <= ddof."""
        freedom = self.count - ddof
        return jnp.where(freedom > 0, self.squares / jnp.where(freedom > 0, freedom, 1.0), 0.0)


def init_moments() -> Moments:
    """Moments of nothing: count 0, mean 0, squares 0.

    >>> float(init_moments().variance())
    0.0
    """
    return Moments(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def merge_moments(left: Moments, right: Moments) -> Moments:
    """Moments of two disjoint samples together (Chan, Golub and LeVeque 1979, eq. 2.1).

    mean = (n₁ μ₁ + n₂ μ₂) / n,  squares = S₁ + S₂ + (μ₂ - μ₁)² n₁ n₂ / n. Merging with nothing is the identity.

    >>> one, three = (Moments(jnp.array(1.0), jnp.array(mean), jnp.array(0.0)) for mean in (1.0, 3.0))
    >>> [float(part) for part in merge_moments(one, three)]
    [2.0, 2.0, 2.0]
    """
    count = left.count + right.count
    share = right.count / jnp.where(count > 0, count, 1.0)
    delta = right.mean - left.mean
    return Moments(
        count, left.mean + delta * share, left.squares + right.squares + jnp.square(delta) * left.count * share
    )


def update_moments(moments: Moments, x: Array, mask: Array, *, axis_name: str | None = None) -> Moments:
    """Adds the masked values of one batch, of all devices, to running moments.

    >>> seen = update_moments(init_moments(), jnp.array([1.0, 3.0]), jnp.array([True, True]))
    >>> float(seen.mean), float(seen.variance())
    (2.0, 1.0)
    """
    batch = Moments(
        _count(x, mask, None, axis_name, False),
        masked_mean(x, mask, axis_name=axis_name),
        masked_variance(x, mask, axis_name=axis_name) * _count(x, mask, None, axis_name, False),
    )
    return merge_moments(moments, batch)
