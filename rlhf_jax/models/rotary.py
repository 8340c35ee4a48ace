"""Rotary position embedding and the ways in which published models stretch it to longer texts.

A `Rotation` holds the cosines and sines of a batch's positions. It is computed once per call and shared by all layers
of one kind. Frequencies are static: they are computed in float64 and rounded once.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "LongScaling",
    "RotaryScaling",
    "Rotation",
    "YarnScaling",
    "frequencies",
    "rotate",
    "rotation",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al. 2023, "position interpolation")."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths stretched by a factor, short ones kept, a linear blend between (Llama 3.1)."""

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Interpolation by parts and a larger amplitude (Peng et al. 2023, YaRN).

    `amplitude` multiplies cosines and sines; None gives the paper's 0.1 · ln(factor) + 1.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    amplitude: float | None = None
    whole_bounds: bool = True  # round the bounds of the blend outwards to whole dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongScaling:
    """A factor per dimension, one list for short rows and one for long ones (Ding et al. 2024, LongRoPE).

    A text is long once its positions pass `original_length`; each one is judged by itself, so that its neighbours in
    the batch or in a packed row do not change it.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    amplitude: float


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


class Rotation(NamedTuple):
    """Cosines and sines of R / 2 angles per position, twice over; R is the number of rotated dimensions of a head."""

    cos: Array  # [B, T, 1, R] float32
    sin: Array  # [B, T, 1, R] float32, the first half negated


def frequencies(dim: int, theta: float, scaling: RotaryScaling | None = None, *, long: bool = False) -> np.ndarray:
    """Angle per position of each pair of dimensions: θ^(-2i/R) for i = 0 .. R/2 - 1, as `scaling` changes it.

    Args:
      dim: R, the number of rotated dimensions, even.
      theta: θ, the base of the wavelengths.
      scaling: how the model was stretched; None for not at all.
      long: which list of a `LongScaling` to take.
    Returns:
      [R/2] float64. A factor of 1 changes nothing.
    Raises:
      ValueError: the lists of a `LongScaling` do not have R/2 entries.
    Reference: Su et al. 2021, https://arxiv.org/abs/2104.09864

    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.1]
    >>> frequencies(4, 100.0, LinearScaling(factor=2.0)).tolist()
    [0.5, 0.05]
    """
    plain = theta ** (-np.arange(dim // 2) * 2.0 / dim)
    match scaling:
        case None:
            return plain
        case LinearScaling():
            return plain / scaling.factor
        case Llama3Scaling():
            turns = scaling.original_length * plain / (2 * math.pi)  # within the original length
            kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
            kept = np.clip(kept, 0.0, 1.0)
            return plain * (kept + (1 - kept) / scaling.factor)
        case YarnScaling():
            kept = 1 - _ramp(dim, theta, scaling)
            return plain * (kept + (1 - kept) / scaling.factor)
        case LongScaling():
            factors = np.asarray(scaling.long if long else scaling.short, np.float64)
            if factors.shape != plain.shape:
                raise ValueError(
                    f"a LongScaling needs {dim // 2} factors for {dim} rotated dimensions, got {factors.size}"
                )
            return plain / factors


def _ramp(dim: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """0 for pairs that turn often within the original length, 1 for those that turn seldom, linear between."""
    bound = lambda turns: dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = bound(scaling.fast), bound(scaling.slow)
    if scaling.whole_bounds:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)


def _amplitude(scaling: RotaryScaling | None) -> float:
    match scaling:
        case YarnScaling(amplitude=None):
            return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        case YarnScaling() | LongScaling():
            return float(scaling.amplitude)  # type: ignore[arg-type]
        case _:
            return 1.0


def rotation(
    position: Array, dim: int, theta: float, scaling: RotaryScaling | None = None, segments: Array | None = None
) -> Rotation:
    """The rotation of every position.

    Args:
      position: [B, T] int positions.
      dim: R, rotated dimensions of a head.
      theta: base of the wavelengths.
      scaling: how the model was stretched.
      segments: [B, T] int, the text that each position belongs to; None if each row is one text.
    Returns:
      `Rotation` with [B, T, 1, R] float32 cosines and sines.

    >>> rotation(jnp.array([[0, 1]]), 2, 10.0).cos.round(4)[..., 0].ravel().tolist()
    [1.0, 0.5403]
    """
    frequency = jnp.asarray(frequencies(dim, theta, scaling), jnp.float32).reshape(1, 1, 1, -1)
    if isinstance(scaling, LongScaling):
        far = jnp.asarray(frequencies(dim, theta, scaling, long=True), jnp.float32).reshape(1, 1, 1, -1)
        if segments is None:
            last = jnp.max(position, axis=-1, keepdims=True)
        else:
            same = segments[:, :, None] == segments[:, None]
            last = jnp.max(jnp.where(same, position[:, None], 0), axis=-1)
        frequency = jnp.where((last >= scaling.original_length)[..., None, None], far, frequency)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    amplitude = _amplitude(scaling)
    cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude
    return Rotation(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


def rotate(x: Array, turn: Rotation) -> Array:
    """Rotates the pairs (i, i + R/2) of the first R dimensions (Su et al. 2021, eq. 34; half-split layout).

    Args:
      x: [B, T, N, head_dim] queries or keys; dimensions from R on pass unchanged.
      turn: `Rotation` of their positions.
    Returns:
      [B, T, N, head_dim], computed in float32, in x's dtype. Position 0 changes nothing; the scalar product of two
      rotated vectors depends on their positions only through the difference.

    >>> quarter = Rotation(jnp.zeros((1, 1, 1, 2)), jnp.array([[[[-1.0, 1.0]]]]))
    >>> rotate(jnp.array([[[[3.0, 4.0]]]]), quarter).ravel().tolist()
    [-4.0, 3.0]
    """
    count = turn.cos.shape[-1]
    turned, rest = jnp.split(x.astype(jnp.float32), [count], axis=-1)
    # A roll and not two halves put together: XLA's loops over it are faster on a CPU.
    turned = turned * turn.cos + jnp.roll(turned, count // 2, axis=-1) * turn.sin
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)
