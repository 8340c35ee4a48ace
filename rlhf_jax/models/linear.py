"""Linear maps over kernels that may be plain, quantised, or adapted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from rlhf_jax.models.adapters import Adapted
from rlhf_jax.models.quantisation import Quantised

__all__ = ["Dense", "kernel_of", "plain_kernel", "product"]


def product(x: Array, kernel: Any) -> Array:
    """x · W for a plain, `Quantised` or `Adapted` kernel W.

    A quantised kernel is dequantised when it is needed, in the forward pass and once more in the backward pass, and is
    not kept between the two.

    Args:
      x: [..., in].
      kernel: [in, out].
    Returns:
      [..., out] in the wider of the two dtypes.

    >>> product(jnp.ones(2), jnp.eye(2)).tolist()
    [1.0, 1.0]
    """
    # All rows stand in one axis: a kernel's gradient then sums over that axis, which XLA on a CPU does without a
    # transposed copy of x.
    rows = x.reshape(-1, x.shape[-1])
    return _product_of_rows(rows, kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _product_of_rows(rows: Array, kernel: Any) -> Array:
    if isinstance(kernel, Adapted):
        return kernel.times(rows, _product_of_rows)
    if isinstance(kernel, Quantised):
        return _quantised_product(rows, kernel)
    return jnp.dot(rows, kernel)


def _count(kernel: Quantised) -> int:
    """How many parts of its columns a kernel is dequantised in, up to 4.

    A loop over parts is the one way of holding back a dequantisation that every backend's scheduler respects: left to
    itself, a compiler dequantises all kernels of a model at the start of the program.
    """
    return max(n for n in range(1, 5) if kernel.shape[-1] % n == 0)


def _part(kernel: Quantised, index: Array) -> Array:
    """Columns of the kernel, [in, out/n]."""
    width = kernel.shape[-1] // _count(kernel)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, index * width, width, axis=1)
    return dataclasses.replace(kernel, codes=cut(kernel.codes), scales=cut(kernel.scales)).dequantised()


@jax.custom_vjp
def _quantised_product(x: Array, kernel: Quantised) -> Array:
    columns = jax.lax.map(lambda index: jnp.dot(x, _part(kernel, index)), jnp.arange(_count(kernel)))
    return jnp.moveaxis(columns, 0, 1).reshape(len(x), kernel.shape[-1])


def _forward(x: Array, kernel: Quantised) -> tuple[Array, tuple[Quantised, Array]]:
    return _quantised_product(x, kernel), (kernel, jnp.zeros((0,), x.dtype))


def _backward(kept: tuple[Quantised, Array], gradient: Array) -> tuple[Array, Quantised]:
    kernel, like = kept
    columns = jnp.moveaxis(gradient.reshape(len(gradient), _count(kernel), kernel.shape[-1] // _count(kernel)), 1, 0)

    def step(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return total + jnp.dot(part[0], _part(kernel, part[1]).T, preferred_element_type=total.dtype), None

    start = jnp.zeros((len(gradient), kernel.shape[0]), jnp.promote_types(gradient.dtype, jnp.float32))
    x = jax.lax.scan(step, start, (columns, jnp.arange(_count(kernel))))[0].astype(like.dtype)
    frozen = np.zeros(kernel.codes.shape, jax.dtypes.float0)
    return x, dataclasses.replace(kernel, codes=frozen, scales=jnp.zeros_like(kernel.scales))


_quantised_product.defvjp(_forward, _backward)


def plain_kernel(kernel: Any) -> Array:
    """The kernel as one array."""
    if isinstance(kernel, Adapted):
        return kernel.summed()
    return kernel.dequantised() if isinstance(kernel, Quantised) else kernel


def kernel_of(module: nn.Module, shape: tuple[int, ...], start: Any) -> Any:
    """The module's parameter "kernel", whose leaf may also be `Quantised` or `Adapted`."""
    if not module.has_variable("params", "kernel"):
        return module.param("kernel", start, shape)
    kernel = module.get_variable("params", "kernel")
    if tuple(kernel.shape) != shape:
        path = "/".join((*module.path, "kernel"))
        raise ValueError(f"the parameter {path} must have the shape {shape}, got {tuple(kernel.shape)}")
    return kernel


class Dense(nn.Module):
    """x · W + b over the last axis, as `flax.linen.Dense`, for every kind of kernel."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., in] -> [..., features]."""
        kernel = kernel_of(self, (x.shape[-1], self.features), nn.initializers.lecun_normal())
        y = product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        return y
