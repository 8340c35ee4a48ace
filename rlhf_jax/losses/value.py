"""Value losses per token: what a critic minimises, from its predictions and the returns.

All are elementwise and unreduced; zero the inputs outside the mask first (`masking.zero_outside`) and reduce after.
Returns, targets and old values are stopped. No squared error here hides a factor of one half: code that computes
0.5·max(...) (PPO of Schulman et al., TRL, verl) is `0.5 * clipped_squared_error(...)`. Huber losses carry the one half
of their definition.

`categorical_value` has critics that predict a distribution over fixed atoms.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating

__all__ = ["clipped_squared_error", "expectile_error", "huber", "quantile_huber", "squared_error"]


def squared_error(values: Array, returns: Array) -> Array:
    """Squared error per token: (V - R)², without a factor of one half.

    Args:
      values: [..., T] predicted.
      returns: [..., T] targets; stopped.
    Returns:
      [..., T] loss with gradient 2·(V - R).
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).

    >>> squared_error(jnp.array([1.0]), jnp.array([3.0])).tolist()
    [4.0]
    """
    values, returns = floating(values=values, returns=returns)
    return jnp.square(values - jax.lax.stop_gradient(returns))


def clipped_squared_error(values: Array, old_values: Array, returns: Array, *, clip: ArrayLike = 0.2) -> Array:
    """PPO's clipped value loss per token: max((V - R)², (clip(V, V_old - c, V_old + c) - R)²), no factor one half.

    A value that has moved more than c from its old one, towards the return, gets no further gradient.

    Args:
      values: [..., T] predicted now.
      old_values: [..., T] predicted when the tokens were sampled; stopped.
      returns: [..., T] targets; stopped.
      clip: c, in units of the value; infinite gives `squared_error`.
    Returns:
      [..., T] loss, never below `squared_error`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Schulman et al. 2017 (code, baselines/ppo2); Huang et al. 2024, https://arxiv.org/abs/2403.17031

    >>> clipped_squared_error(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), clip=0.5).tolist()
    [0.25]
    """
    values, old_values, returns = floating(values=values, old_values=old_values, returns=returns)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    bounded = jnp.clip(values, old_values - clip, old_values + clip)  # equal to values, to the bit, inside the bounds
    free, held = jnp.square(values - returns), jnp.square(bounded - returns)
    return jnp.where(free >= held, free, held)  # at a tie the value's own gradient, not half of each


def huber(values: Array, returns: Array, *, delta: ArrayLike = 1.0) -> Array:
    """Huber loss per token: ½·e² where |e| <= δ, δ·(|e| - ½·δ) beyond, with e = V - R.

    Args:
      values: [..., T] predicted.
      returns: [..., T] targets; stopped.
      delta: δ > 0, from where the gradient stays at ±δ. Infinite gives half of `squared_error`.
    Returns:
      [..., T] loss.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Huber 1964, https://doi.org/10.1214/aoms/1177703732

    >>> huber(jnp.array([0.5, 3.0]), jnp.zeros(2)).tolist()
    [0.125, 2.5]
    """
    values, returns = floating(values=values, returns=returns)
    error = values - jax.lax.stop_gradient(returns)
    inner = jnp.clip(error, -jnp.asarray(delta), jnp.asarray(delta))
    return inner * (error - 0.5 * inner)


def expectile_error(values: Array, returns: Array, *, expectile: ArrayLike = 0.7) -> Array:
    """Asymmetric squared error per token: |τ - 1(R < V)|·(R - V)².

    Args:
      values: [..., T] predicted.
      returns: [..., T] targets; stopped.
      expectile: τ in (0, 1). Above ½ the value leans to the larger targets; towards 1 it learns their maximum. ½ gives
        half of `squared_error`.
    Returns:
      [..., T] loss.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Kostrikov et al. 2021, https://arxiv.org/abs/2110.06169

    >>> [round(x, 3) for x in expectile_error(jnp.zeros(2), jnp.array([1.0, -1.0]), expectile=0.9).tolist()]
    [0.9, 0.1]
    """
    values, returns = floating(values=values, returns=returns)
    error = jax.lax.stop_gradient(returns) - values
    return jnp.where(error < 0, 1.0 - jnp.asarray(expectile), expectile) * jnp.square(error)


def quantile_huber(quantiles: Array, targets: Array, *, kappa: ArrayLike = 1.0) -> Array:
    """Quantile regression of a return distribution: Σ_i (1/M)·Σ_j |τ_i - 1(u_ij < 0)|·L_κ(u_ij)/κ, u_ij = t_j - θ_i.

    L_κ is the Huber loss and τ_i = (2i - 1) / 2N the midpoints that the N predicted quantiles stand for.

    Args:
      quantiles: [..., N] predicted θ, in any order of the same meaning for every row.
      targets: [..., M] samples or quantiles of the return; stopped.
      kappa: κ >= 0, width of the quadratic part; 0 gives the plain quantile (pinball) loss.
    Returns:
      [...] loss per row. With one quantile it is half of the Huber loss over κ, of the median.
    Raises: ValueError if leading axes differ, TypeError for integer inputs (at trace time).
    Reference: Dabney et al. 2018, eq. 9 and 10, https://arxiv.org/abs/1710.10044

    >>> round(float(quantile_huber(jnp.array([0.0, 0.0]), jnp.array([2.0]))), 3)
    1.5
    """
    (quantiles,), (targets,) = floating(quantiles=quantiles), floating(targets=targets)
    if quantiles.shape[:-1] != targets.shape[:-1]:
        raise ValueError(f"quantiles and targets must share leading axes, got {quantiles.shape} and {targets.shape}")
    number = quantiles.shape[-1]
    levels = ((jnp.arange(number, dtype=quantiles.dtype) + 0.5) / number)[:, None]
    levels = levels.reshape((1,) * (quantiles.ndim - 1) + levels.shape)
    errors = jax.lax.stop_gradient(targets)[..., None, :] - quantiles[..., :, None]
    kappa = jnp.asarray(kappa, errors.dtype)
    quadratic = jnp.abs(errors) <= kappa
    scaled = 0.5 * jnp.square(jnp.where(quadratic, errors, 0.0)) / jnp.where(kappa > 0, kappa, 1.0)
    loss = jnp.abs(levels - (errors < 0)) * jnp.where(quadratic, scaled, jnp.abs(errors) - 0.5 * kappa)
    return jnp.sum(loss, axis=(-2, -1)) / targets.shape[-1]
