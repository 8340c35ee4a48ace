"""Scalar heads on hidden states: a value per token for the critic, a score per sequence for the reward model."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rlhf_jax import masking

__all__ = ["ScalarHead", "SequenceScore"]


class ScalarHead(nn.Module):
    """A number per feature vector: normalise, optionally one hidden layer, project.

    The last kernel starts normal with standard deviation 1/√(d + 1) and zero bias (Ziegler et al. 2019), times
    `scale`; scale=0 starts every output at zero.
    """

    hidden: int = 0  # width of the hidden layer; 0 for a linear head
    scale: float = 1.0

    if TYPE_CHECKING:  # Linen cannot say that without mutable collections `apply` returns what the method does

        def apply(self, *args: Any, **kwargs: Any) -> Any: ...

        def init(self, *args: Any, **kwargs: Any) -> Any: ...

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """features [..., D] -> [...] float32 (float64 for float64 features)."""
        x = nn.LayerNorm(name="norm")(features.astype(jnp.promote_types(features.dtype, jnp.float32)))
        if self.hidden:
            x = nn.tanh(nn.Dense(self.hidden, name="hidden")(x))
        deviation = self.scale * (x.shape[-1] + 1) ** -0.5
        return nn.Dense(1, kernel_init=nn.initializers.normal(deviation), name="out")(x)[..., 0]


class SequenceScore(nn.Module):
    """One score per sequence: the mean of its real tokens' features, then a `ScalarHead`.

    Which layer the features come from is the caller's choice; middle layers often tell more than the last one.
    """

    hidden: int = 0

    @nn.compact
    def __call__(self, features: Array, mask: Array) -> Array:
        """features [B, T, D], mask [B, T] bool -> [B] float32 (float64 for float64 features)."""
        wide = jnp.broadcast_to(mask[..., None], features.shape)
        return ScalarHead(self.hidden, name="head")(masking.masked_mean(features, wide, axis=-2))
