"""Value losses per token: what the critic minimises, from predicted values and returns."""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["clipped_squared_error", "squared_error"]


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(x).astype(jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)) for x in arrays)


def squared_error(values: Array, returns: Array) -> Array:
    """Squared error per token: (V - R)², without a factor of one half.

    Args:
      values: [..., T] predicted.
      returns: [..., T] targets; stopped.
    Returns:
      [..., T] loss.

    >>> squared_error(jnp.array([1.0]), jnp.array([3.0])).tolist()
    [4.0]
    """
    chex.assert_equal_shape([values, returns])
    values, returns = _float32(values, returns)
    return jnp.square(values - jax.lax.stop_gradient(returns))


def clipped_squared_error(values: Array, old_values: Array, returns: Array, *, clip: ArrayLike = 0.2) -> Array:
    """PPO's clipped value loss per token: max((V - R)², (V_old + clip(V - V_old, -c, c) - R)²), no factor one half.

    Args:
      values: [..., T] predicted now.
      old_values: [..., T] predicted when the tokens were sampled; stopped.
      returns: [..., T] targets; stopped.
      clip: c, how far a value may move from its old one; infinite gives `squared_error`.
    Returns:
      [..., T] loss.

    >>> clipped_squared_error(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), clip=0.5).tolist()
    [0.25]
    """
    chex.assert_equal_shape([values, old_values, returns])
    values, old_values, returns = _float32(values, old_values, returns)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    bounded = old_values + jnp.clip(values - old_values, -clip, clip)
    return jnp.maximum(jnp.square(values - returns), jnp.square(bounded - returns))
