"""Offline Q-learning for language models: conservative penalty, ILQL and its policy.

ILQL never queries a token that the data does not hold: the value is an upper expectile of Q over the tokens taken, the
target of Q is that value, and a cross-entropy keeps the Q-values of other tokens low. At generation time the base
model's logits are shifted by the learned advantages. Shapes and discounts are those of `q_learning`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses import value
from rlhf_jax.losses._pairs import floating
from rlhf_jax.losses.q_learning import action_values, bootstrapped_target

__all__ = ["IlqlLoss", "conservative_penalty", "ilql", "ilql_logits"]


def conservative_penalty(q_values: Array, actions: Array) -> Array:
    """CQL's penalty per step: log Σ_a exp Q(s, a) - Q(s, a_taken), the cross-entropy of softmax(Q) to the action.

    Args:
      q_values: [..., T, A] of the trained network.
      actions: [..., T] integer, taken.
    Returns:
      [..., T] penalty >= 0. Adding a constant to all Q-values of a state changes nothing.
    Raises: as `q_learning.action_values`.
    Reference: Kumar et al. 2020, eq. 4, https://arxiv.org/abs/2006.04779

    >>> round(float(conservative_penalty(jnp.zeros((1, 4)), jnp.array([0]))[0]), 3)
    1.386
    """
    (q_values,) = floating(q_values=q_values)
    return -action_values(jax.nn.log_softmax(q_values), actions)


class IlqlLoss(NamedTuple):
    """The three terms of ILQL, to be reduced, weighted and added."""

    q: Array  # [..., T] squared error of Q to r + γ·V(s')
    value: Array  # [..., T] expectile error of V to the target network's Q
    conservative: Array  # [..., T] cross-entropy of softmax(Q) to the taken token


def ilql(
    q_values: Array,
    values: Array,
    next_values: Array,
    target_q_values: Array,
    actions: Array,
    rewards: Array,
    discounts: Array,
    *,
    expectile: ArrayLike = 0.7,
) -> IlqlLoss:
    """Implicit language Q-learning, per token: (Q - r - γ·V')², |τ - 1(Q̂ < V)|·(Q̂ - V)² and the CQL term.

    Args:
      q_values: [..., T, A] of the trained network.
      values: [..., T] V of the same states, trained network.
      next_values: [..., T] V of the next states; stopped.
      target_q_values: [..., T, A] Q̂ of the same states from the slowly moving network (the minimum of two); stopped.
      actions: [..., T] integer, the tokens taken.
      rewards: [..., T]; stopped.
      discounts: [..., T], 0 where the episode ends; stopped.
      expectile: τ in (0, 1), see `value.expectile_error`.
    Returns:
      IlqlLoss(q, value, conservative), each [..., T]. The paper's objective is q + value + α·conservative, reduced.
    Raises: as `q_learning.action_values`, AssertionError if shapes differ (at trace time).
    Reference: Snell et al. 2022, https://arxiv.org/abs/2206.11871

    >>> q = jnp.array([[1.0, 0.0]])
    >>> losses = ilql(q, jnp.zeros(1), jnp.zeros(1), q, jnp.array([0]), jnp.zeros(1), jnp.zeros(1))
    >>> [round(float(x[0]), 3) for x in losses]
    [1.0, 0.7, 0.313]
    """
    taken = action_values(q_values, actions)
    return IlqlLoss(
        q=value.squared_error(taken, bootstrapped_target(rewards, discounts, next_values)),
        value=value.expectile_error(values, action_values(target_q_values, actions), expectile=expectile),
        conservative=conservative_penalty(q_values, actions),
    )


def ilql_logits(logits: Array, q_values: Array, values: Array, *, beta: ArrayLike = 1.0) -> Array:
    """ILQL's policy: logits of π_base(a | s)·exp(β·(Q(s, a) - V(s))).

    Args:
      logits: [..., A] of the base model.
      q_values: [..., A] learned.
      values: [...] learned; it cancels in the softmax and keeps the numbers small.
      beta: strength; 0 gives the base model, infinite the best token of Q.
    Returns:
      [..., A] logits, unnormalised.
    Raises: ValueError if values are not one per state, TypeError for integer inputs, AssertionError if shapes differ.
    Reference: Snell et al. 2022, https://arxiv.org/abs/2206.11871

    >>> ilql_logits(jnp.zeros(2), jnp.array([1.0, 3.0]), jnp.array(1.0), beta=2.0).tolist()
    [0.0, 4.0]
    """
    logits, q_values = floating(logits=logits, q_values=q_values)
    (values,) = floating(values=values)
    if values.shape != q_values.shape[:-1]:
        raise ValueError(f"values must be one per state, {q_values.shape[:-1]}, got {values.shape}")
    return logits + jnp.asarray(beta, logits.dtype) * (q_values - values[..., None])
