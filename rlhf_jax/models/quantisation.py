"""Block quantisation of frozen weights: 8 or 4 bits per number and one scale per block.

A block is a run of rows of one column of a kernel [in, out], so that a kernel cut by columns or by blocks of rows is
cut the same way in codes and scales. A `Quantised` leaf stands in the tree where the kernel stood. The decoder
multiplies with it as it is (`rlhf_jax.models.linear`), holding one dequantised kernel at a time; any other model takes
`dequantise(params)`.

Gradients flow through a product to its inputs, never to the codes: quantised weights are frozen, and what learns are
adapters beside them (`rlhf_jax.models.adapters`).
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jax import Array

__all__ = ["NF4_LEVELS", "Quantised", "dequantise", "int8", "nf4", "quantise", "stored_bytes"]


@struct.dataclass
class Quantised:
    """A kernel [..., in, out] in few bits."""

    codes: Array  # [..., in, out] int8, or [..., in/2, out] uint8 with two codes each
    scales: Array  # [..., in/block, out] float32, the largest magnitude of each block
    bits: int = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)  # of the kernel it stands for

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel it stands for."""
        *lead, rows, columns = self.codes.shape
        return (*lead, rows * 8 // self.bits, columns)

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return self.codes.ndim

    def dequantised(self) -> Array:
        """The kernel, to the nearest level of each block."""
        if self.bits == 8:
            levels = self.codes.astype(jnp.float32) / 127
        else:
            pairs = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)  # [..., in/2, 2, out]
            levels = jnp.asarray(NF4_LEVELS)[pairs].reshape(self.shape)
        *lead, blocks, columns = self.scales.shape
        blocked = levels.reshape(*lead, blocks, -1, columns) * self.scales[..., None, :]
        return blocked.reshape(self.shape).astype(self.dtype)


def _nf4_levels() -> np.ndarray:
    """16 levels at quantiles of a normal distribution, asymmetric so that 0 is one of them."""
    quantile = statistics.NormalDist().inv_cdf
    edge = 1 - (1 / 32 + 1 / 30) / 2  # the outermost quantile, halfway between those of 15 and 16 levels
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    return np.array(sorted([*above, 0.0, *below]), np.float32) / np.float32(quantile(edge))


NF4_LEVELS = _nf4_levels()


def _blocks(weight: Array, block: int) -> tuple[Array, Array]:
    """Values in [-1, 1] as [..., in/block, block, out], and the scales."""
    *lead, rows, columns = weight.shape
    if rows % block:
        raise ValueError(f"block={block} must divide the {rows} rows of a kernel {weight.shape}")
    blocked = weight.astype(jnp.float32).reshape(*lead, rows // block, block, columns)
    scales = jnp.max(jnp.abs(blocked), axis=-2)
    return blocked / jnp.where(scales > 0, scales, 1.0)[..., None, :], scales


def int8(weight: Array, *, block: int = 64) -> Quantised:
    """8 bits per number: 255 equal steps between the largest magnitude of a block and its negative.

    Args:
      weight: [..., in, out].
      block: rows that share a scale; divides `in`.
    Returns:
      `Quantised` of 8 + 32/block bits per number; off by at most 1/254 of the block's largest magnitude.
    Raises:
      ValueError: block does not divide the rows.

    >>> int8(jnp.array([[1.0], [-0.5]]), block=2).codes.ravel().tolist()
    [127, -64]
    """
    values, scales = _blocks(weight, block)
    codes = jnp.round(values * 127).astype(jnp.int8).reshape(weight.shape)
    return Quantised(codes, scales, 8, weight.dtype)


def nf4(weight: Array, *, block: int = 64) -> Quantised:
    """4 bits per number: levels at the quantiles of a normal distribution (NormalFloat).

    Args:
      weight: [..., in, out].
      block: rows that share a scale; even, and divides `in`.
    Returns:
      `Quantised` of 4 + 32/block bits per number. Zero and the largest magnitude of a block are exact up to rounding.
    Raises:
      ValueError: block is odd or does not divide the rows.
    Reference: Dettmers et al. 2023, section 3, https://arxiv.org/abs/2305.14314

    >>> nf4(jnp.array([[2.0], [0.0], [0.4], [-0.1]]), block=4).dequantised().ravel().round(3).tolist()
    [2.0, 0.0, 0.322, -0.182]
    """
    if block % 2:
        raise ValueError(f"block={block} must be even: two numbers share a byte")
    values, scales = _blocks(weight, block)
    borders = jnp.asarray((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    codes = jnp.searchsorted(borders, values).astype(jnp.uint8)
    *lead, rows, columns = weight.shape
    pairs = codes.reshape(*lead, rows // 2, 2, columns)
    return Quantised(pairs[..., 0, :] | (pairs[..., 1, :] << 4), scales, 4, weight.dtype)


def quantise(params: dict, predicate: Callable[[str], bool], *, to: Callable[[Array], Quantised] = nf4) -> dict:
    """Replaces the kernels whose path satisfies the predicate by `Quantised` leaves.

    Args:
      params: nested dicts of arrays.
      predicate: path such as "layer_0/mlp/up/kernel" -> bool, see `rlhf_jax.training.state.path_matches`.
      to: `int8` or `nf4`, for instance `functools.partial(nf4, block=128)`.
    Returns:
      The same tree; other leaves are shared.
    Raises:
      ValueError: nothing is chosen, or a chosen leaf has fewer than two axes.

    >>> tree = quantise({"up": {"kernel": jnp.ones((64, 2)), "bias": jnp.ones(2)}}, lambda path: "kernel" in path)
    >>> tree["up"]["kernel"].codes.shape
    (32, 2)
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))  # type: ignore[arg-type]
    chosen = [path for path in flat if predicate(path)]
    if not chosen:
        raise ValueError(f"predicate chooses none of the {len(flat)} parameters; the first paths are {list(flat)[:5]}")
    for path in chosen:
        if flat[path].ndim < 2:
            raise ValueError(f"{path} has the shape {flat[path].shape}; only kernels [..., in, out] are quantised")
    return traverse_util.unflatten_dict(flat | {path: to(flat[path]) for path in chosen}, sep="/")


def dequantise(params: Any) -> Any:
    """The tree with every `Quantised` leaf as a plain array.

    >>> dequantise({"kernel": int8(jnp.ones((2, 1)), block=2)})["kernel"].tolist()
    [[1.0], [1.0]]
    """
    is_quantised = lambda leaf: isinstance(leaf, Quantised)
    plain = lambda leaf: leaf.dequantised() if is_quantised(leaf) else leaf
    return jax.tree.map(plain, params, is_leaf=is_quantised)


def stored_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree.

    >>> stored_bytes({"kernel": int8(jnp.ones((64, 2)))})
    136
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
