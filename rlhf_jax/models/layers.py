"""Norms, activations and the MLP."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rlhf_jax.models.linear import Dense

if TYPE_CHECKING:
    from rlhf_jax.models.config import TransformerConfig

__all__ = ["ACTIVATIONS", "MLP", "NORMS", "Norm", "soft_cap"]

NORMS = ("rms", "layer")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap · tanh(x / cap), which keeps x within ±cap; None leaves x alone. x -> 0 gives x.

    >>> round(float(soft_cap(jnp.array(100.0), 5.0)), 4)
    5.0
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


class Norm(nn.Module):
    """Normalises the last axis in float32: RMS (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016).

    Multiplies by offset + scale; a layer norm adds a bias.
    """

    kind: str = "rms"
    epsilon: float = 1e-5
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D] in x's dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        start = nn.initializers.constant(1.0 - self.offset)
        scale = self.offset + self.param("scale", start, (x.shape[-1],)).astype(wide.dtype)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = _along(scale, x) * (wide * jax.lax.rsqrt(power + self.epsilon))
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            wide = wide + _along(bias.astype(wide.dtype), x)
        return wide.astype(x.dtype)


def _along(vector: Array, x: Array) -> Array:
    """A vector over the last axis, with the rank of x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020), or down(activation(up(x))) if it is not gated."""

    config: "TransformerConfig"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D]."""
        config = self.config
        dense = lambda name, width: Dense(width, use_bias=config.mlp_bias, name=name)
        act = ACTIVATIONS[config.activation]
        inner = dense("up", config.mlp_width)(x)
        inner = act(dense("gate", config.mlp_width)(x)) * inner if config.gated else act(inner)
        return dense("down", config.width)(inner)
