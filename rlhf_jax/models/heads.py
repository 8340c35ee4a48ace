"""Heads on hidden states: a value per token for the critic, as a number or a distribution, and a score per sequence."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rlhf_jax import masking

__all__ = ["CategoricalHead", "ScalarHead", "SequenceScore"]


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
        return _outputs(features, 1, self.hidden, self.scale)[..., 0]


class CategoricalHead(nn.Module):
    """Logits of a distribution over fixed atoms per feature vector, for `losses.categorical_value`.

    Otherwise a `ScalarHead`, also in how it starts; scale=0 starts every distribution even.
    """

    atoms: int  # how many
    hidden: int = 0
    scale: float = 1.0

    if TYPE_CHECKING:

        def apply(self, *args: Any, **kwargs: Any) -> Any: ...

        def init(self, *args: Any, **kwargs: Any) -> Any: ...

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """features [..., D] -> [..., atoms] float32 (float64 for float64 features)."""
        return _outputs(features, self.atoms, self.hidden, self.scale)


def _outputs(features: Array, count: int, hidden: int, scale: float) -> Array:
    """features [..., D] -> [..., count]; called inside of a module, whose layers these become."""
    x = nn.LayerNorm(name="norm")(features.astype(jnp.promote_types(features.dtype, jnp.float32)))
    if hidden:
        x = nn.tanh(nn.Dense(hidden, name="hidden")(x))
    deviation = scale * (x.shape[-1] + 1) ** -0.5
    return nn.Dense(count, kernel_init=nn.initializers.normal(deviation), name="out")(x)


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
