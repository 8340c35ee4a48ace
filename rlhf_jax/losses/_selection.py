"""Choosing the largest of a batch, over all devices at once."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def _everywhere(x: Array, axis_name: str | None) -> Array:
    return x[None] if axis_name is None else jax.lax.all_gather(x, axis_name)


def _here(axis_name: str | None) -> ArrayLike:
    return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def largest(scores: Array, mask: Array, count: ArrayLike, *, axis_name: str | None = None) -> Array:
    """True at the `count` largest scores under the mask, of the batch of all devices; ties go to the earliest.

    Fewer scores than `count` are all chosen. Choosing has no gradient.

    >>> largest(jnp.array([3.0, 9.0, 5.0]), jnp.array([True, False, True]), 1).tolist()
    [False, False, True]
    """
    scores = jax.lax.stop_gradient(jnp.where(mask, scores, -jnp.inf))
    everywhere = _everywhere(scores, axis_name)
    order = jnp.argsort(everywhere.ravel(), stable=True, descending=True)
    ranks = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    return mask & (ranks.reshape(everywhere.shape)[_here(axis_name)] < count)


def uniform(key: Array, shape: tuple[int, ...], *, axis_name: str | None = None) -> Array:
    """Uniform numbers in [0, 1) of a batch of this shape per device, the same for one device and for many.

    Every device draws for all from the same key and keeps its own.
    """
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    return jax.random.uniform(key, (devices, *shape))[_here(axis_name)]
