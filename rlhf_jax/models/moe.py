"""Mixture of experts with a sorted, ragged dispatch: no capacity and no dropped token."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rlhf_jax import masking
from rlhf_jax.models.layers import ACTIVATIONS
from rlhf_jax.models.linear import Dense, kernel_of, plain_kernel

if TYPE_CHECKING:
    from rlhf_jax.models.config import TransformerConfig

__all__ = ["MixtureOfExperts", "load_balance", "route"]


def route(router_logits: Array, experts_per_token: int, *, normalise: bool = True) -> tuple[Array, Array]:
    """The experts of each token and their weights: the k largest of softmax(router_logits).

    Args:
      router_logits: [..., E].
      experts_per_token: k.
      normalise: divides the k weights by their sum.
    Returns:
      (weights [..., k] float32, experts [..., k] int32), largest first.

    >>> weights, experts = route(jnp.log(jnp.array([0.1, 0.6, 0.3])), 2)
    >>> weights.round(3).tolist(), experts.tolist()
    ([0.667, 0.333], [1, 2])
    """
    probs = jax.nn.softmax(router_logits.astype(jnp.promote_types(router_logits.dtype, jnp.float32)), axis=-1)
    weights, experts = jax.lax.top_k(probs, experts_per_token)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


def load_balance(router_logits: Array, mask: Array, *, experts_per_token: int, axis_name: str | None = None) -> Array:
    """Load-balancing loss E · Σ_e f_e · p_e: f_e choices of expert e per token, p_e its mean router probability.

    Args:
      router_logits: [..., T, E], as a `MixtureOfExperts` leaves them in the "intermediates" collection.
      mask: [..., T] bool, tokens that count.
      experts_per_token: k.
      axis_name: device axis over which the means are taken as well.
    Returns:
      [] float32; k if every expert is chosen equally often. Choices are constants, probabilities carry the gradient.
    Reference: Fedus et al. 2021, eq. 4, https://arxiv.org/abs/2101.03961

    >>> float(load_balance(jnp.zeros((2, 4)), jnp.ones(2, bool), experts_per_token=4))
    4.0
    """
    experts = router_logits.shape[-1]
    probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(router_logits, experts_per_token)
    choices = jnp.sum(jax.nn.one_hot(chosen, experts, dtype=jnp.float32), axis=-2)
    mean = lambda x: masking.token_mean(x, mask, axis_name=axis_name)
    by_expert = jax.vmap(mean, in_axes=-1)
    return experts * jnp.sum(jax.lax.stop_gradient(by_expert(choices)) * by_expert(probs))


class MixtureOfExperts(nn.Module):
    """Σ over the k chosen experts of weight · down(activation(gate(x)) · up(x)).

    Tokens are sorted by expert, multiplied in groups of different sizes (`jax.lax.ragged_dot`), and put back. The
    router's logits are sown as "router_logits" in the "intermediates" collection.
    """

    config: "TransformerConfig"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D]."""
        config = self.config
        logits = Dense(config.num_experts, use_bias=False, name="router")(x)
        self.sow("intermediates", "router_logits", logits)
        weights, chosen = route(logits, config.experts_per_token, normalise=config.normalise_expert_weights)

        tokens = x.reshape(-1, x.shape[-1])
        chosen = chosen.reshape(-1)  # [N · k], token-major
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=config.num_experts).astype(jnp.int32)
        grouped = tokens[order // config.experts_per_token]  # [N · k, D] sorted by expert
        multiply = lambda name, rows, wide: jax.lax.ragged_dot(
            rows, Experts(config.num_experts, rows.shape[-1], wide, name=name)().astype(rows.dtype), sizes
        )
        act = ACTIVATIONS[config.activation]
        inner = act(multiply("gate", grouped, config.expert_width)) * multiply("up", grouped, config.expert_width)
        outer = multiply("down", inner, config.width)
        outer = outer[jnp.argsort(order)].reshape(*weights.shape, config.width)  # [..., k, D] in the tokens' order
        return jnp.sum(outer * weights[..., None].astype(x.dtype), axis=-2)


class Experts(nn.Module):
    """One kernel [in, out] per expert, stacked."""

    num_experts: int
    rows: int
    columns: int

    @nn.compact
    def __call__(self) -> Array:
        """[E, in, out]."""
        start = nn.initializers.lecun_normal(batch_axis=(0,))
        return plain_kernel(kernel_of(self, (self.num_experts, self.rows, self.columns), start))
