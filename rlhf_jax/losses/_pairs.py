"""What preference and reward-model losses do to their inputs: check them, widen them, keep exponentials finite."""

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def floating(**arrays: Array) -> tuple[Array, ...]:
    """The named arrays in float32 (float64 stays float64).

    Raises ``TypeError`` naming the first array that is not floating, ``AssertionError`` if shapes differ.

    >>> floating(scores=jnp.array([1.0], jnp.bfloat16))[0].dtype.name
    'float32'
    """
    given = {name: jnp.asarray(x) for name, x in arrays.items()}
    for name, x in given.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got dtype {x.dtype}; convert it with astype first")
    chex.assert_equal_shape(list(given.values()))
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in given.values())


def check_flags(name: str, flags: Array, like: Array) -> None:
    """Raises ``TypeError`` unless flags are bool, ``AssertionError`` unless they have the shape of `like`."""
    if jnp.asarray(flags).dtype != jnp.bool_:
        raise TypeError(f"{name} must be bool, got dtype {jnp.asarray(flags).dtype}; write `{name} > 0`")
    chex.assert_equal_shape([flags, like])


def check_integers(name: str, integers: Array) -> None:
    """Raises ``TypeError`` unless the array holds integers."""
    if not jnp.issubdtype(jnp.asarray(integers).dtype, jnp.integer):
        raise TypeError(f"{name} must be integer, got dtype {jnp.asarray(integers).dtype}")


def knob(value: ArrayLike, like: Array) -> Array:
    """A numeric knob in the float type of the array it meets, so that neither promotes the other.

    >>> knob(1, jnp.zeros(2)).dtype.name
    'float32'
    """
    return jnp.asarray(value, like.dtype)


def per_token(total: Array, lengths: Array) -> Array:
    """total / length, where an empty completion counts as one token: its total is 0 and so is the quotient.

    >>> per_token(jnp.array([-6.0, 0.0]), jnp.array([3, 0])).tolist()
    [-2.0, 0.0]
    """
    chex.assert_equal_shape([total, lengths])
    return total / jnp.maximum(jnp.asarray(lengths, total.dtype), 1.0)


def _exponent_limit(x: Array) -> float:
    return float(np.log(np.finfo(x.dtype).max)) - 8.7  # 80 in float32, 701 in float64


def bounded_exp(x: Array) -> Array:
    """exp(x), continued along its tangent beyond 80 (float32; 701 in float64): value and gradient stay finite.

    >>> bool(jnp.isfinite(bounded_exp(jnp.array(300.0))))
    True
    """
    limit = _exponent_limit(x)
    return jnp.exp(jnp.minimum(x, limit)) * (1.0 + jnp.maximum(x - limit, 0.0))


def power_scores(x: Array, alpha: ArrayLike) -> Array:
    """(1 - exp(-α x)) / α for any α, also 0, where it is x; exponentials as in `bounded_exp`.

    >>> power_scores(jnp.array([3.0]), 0.0).tolist()
    [3.0]
    """
    alpha = knob(alpha, x)
    z = -alpha * x
    small = jnp.abs(z) < 1e-3
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    limit, safe = _exponent_limit(x), jnp.where(small, 1.0, z)
    grown = jnp.expm1(jnp.minimum(safe, limit)) + float(np.exp(limit)) * jnp.maximum(safe - limit, 0.0)
    return jnp.where(small, x * series, -grown / jnp.where(small, 1.0, alpha))
