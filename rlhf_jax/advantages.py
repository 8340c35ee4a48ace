"""Returns and advantages along time: discounted, n-step and λ-returns, GAE, V-trace.

Everything is one backward recursion, y_t = x_t + d_t y_next(t), in which next(t) is the next *valid* slot: a slot
outside the mask is not a step, it neither decays nor earns, and its output is 0. So trailing padding changes nothing,
and neither do holes, for instance the words of a tool or of the user between two turns of a dialogue. A reward that
lies in a hole is lost; put it on a valid token.

Index t: value V_t is of the state before token t is chosen, reward r_t is what choosing it earned, and discount γ_t is
what the state after it is worth of itself. γ_t = 0 ends an episode inside a row. `bootstrap_value` is the value of the
state after a row's last valid token, 0 if that token ended the episode.

A discount or λ is one number (traced; sweep it with `vmap`) or one per step, [..., T]. Nothing is stopped here: the
losses stop the advantages and targets they consume.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.rewards import check_rewards

__all__ = [
    "Advantages",
    "gae",
]


class Advantages(NamedTuple):
    """What the actor and what the critic learn from."""

    advantages: Array  # [..., T] 0 outside the mask
    returns: Array  # [..., T] targets of the value function, 0 outside the mask


# --- the recursion ----------------------------------------------------------------------------------------------------


def _per_step(knob: ArrayLike, like: Array, name: str) -> Array:
    """[..., T] a knob that is one number or one per step."""
    knob = jnp.asarray(knob, like.dtype)
    if knob.shape not in ((), like.shape):
        raise ValueError(f"{name} must be one number or have shape {like.shape}, one per step; got shape {knob.shape}")
    return jnp.broadcast_to(knob, like.shape)


def _final(bootstrap_value: ArrayLike, like: Array) -> Array:
    """[...] the value after each row's last valid token."""
    value = jnp.asarray(bootstrap_value, like.dtype)
    if value.shape not in ((), like.shape[:-1]):
        raise ValueError(
            f"bootstrap_value must be one number or have shape {like.shape[:-1]}, one per row; got shape {value.shape}"
        )
    return jnp.broadcast_to(value, like.shape[:-1])


def _backward(x: Array, decay: Array, mask: Array, final: Array) -> Array:
    """[..., T] y_t = x_t + decay_t y_next(t), with y = final after the last valid slot and 0 outside the mask."""

    def step(y_next, slot):
        x_t, decay_t, valid = slot
        y = jnp.where(valid, x_t + decay_t * y_next, y_next)
        return y, jnp.where(valid, y, 0.0)

    time_first = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), (x, decay, mask))
    return jnp.moveaxis(jax.lax.scan(step, final, time_first, reverse=True)[1], 0, -1)


def _next_valid(x: Array, mask: Array, final: Array) -> Array:
    """[..., T] x at the next valid slot after t, or final if there is none."""

    def step(upcoming, slot):
        x_t, valid = slot
        return jnp.where(valid, x_t, upcoming), upcoming

    time_first = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), (x, mask))
    return jnp.moveaxis(jax.lax.scan(step, final, time_first, reverse=True)[1], 0, -1)


# --- generalised advantage estimation ---------------------------------------------------------------------------------


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    bootstrap_value: ArrayLike = 0.0,
    discount: ArrayLike = 1.0,
    gae_lambda: ArrayLike = 0.95,
) -> Advantages:
    """Generalised advantage estimation: A_t = δ_t + γ λ A_next(t), with δ_t = r_t + γ V_next(t) - V_t.

    Slots outside the mask are not steps (verl, tunix): a row with holes gives exactly what the row of its valid tokens
    gives. λ = 1 gives the discounted return minus the value, λ = 0 the one-step error δ. The returns A + V are the
    λ-returns.

    Args:
      rewards: [..., T] per token.
      values: [..., T] of the state before each token.
      mask: [..., T] bool, tokens that are steps.
      bootstrap_value: [] or [...] value after the last valid token; 0 if the episode ended there.
      discount: γ, one number or [..., T].
      gae_lambda: λ, one number or [..., T].
    Returns:
      Advantages of [..., T], both 0 outside the mask. Not whitened; see `masking.whiten`.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ.
    Reference: Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438; λ = 0.95 and γ = 1 from Ziegler et al.
      2019, https://arxiv.org/abs/1909.08593

    >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.2, jnp.nan, 0.6]])
    >>> gae(rewards, values, jnp.array([[True, False, True]])).advantages.tolist()
    [[0.78, 0.0, 0.4]]
    """
    rewards, values, mask = _clean(rewards, values, mask)
    discounts, final = _per_step(discount, rewards, "discount"), _final(bootstrap_value, rewards)
    errors = rewards + discounts * _next_valid(values, mask, final) - values
    decay = discounts * _per_step(gae_lambda, rewards, "gae_lambda")
    advantages = _backward(errors, decay, mask, jnp.zeros_like(final))
    return Advantages(advantages, advantages + values)


def _clean(rewards: Array, values: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Rewards and values in one wide dtype and 0 outside the mask."""
    rewards, values = check_rewards(rewards), check_rewards(values, "values")
    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    rewards, values = masking.zero_outside(mask, rewards.astype(dtype), values.astype(dtype))
    return rewards, values, mask
