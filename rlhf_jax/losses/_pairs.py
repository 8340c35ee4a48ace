"""What every pairwise loss does to its inputs first: equal shapes, floating, at least float32."""

import chex
import jax.numpy as jnp
from jax import Array


def floating(**arrays: Array) -> tuple[Array, ...]:
    """The named arrays in float32 (float64 stays float64).

    Raises ``TypeError`` naming the first array that is not floating, ``AssertionError`` if shapes differ.

    >>> floating(scores=jnp.array([1.0], jnp.bfloat16))[0].dtype.name
    'float32'
    """
    for name, x in arrays.items():
        if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got dtype {jnp.asarray(x).dtype}; convert it with astype first")
    chex.assert_equal_shape(list(arrays.values()))
    return tuple(jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)) for x in arrays.values())
