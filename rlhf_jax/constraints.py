"""Cost constraints: maximise the reward while the mean cost stays within a limit, by a Lagrange multiplier.

max_π E[r] subject to E[c] <= d. The policy maximises `penalised_rewards` under the current multiplier λ >= 0, and the
multiplier follows the measured cost: up while it is above the limit, down while it is below. Costs are measured like
rewards, one per sequence or episode; take their mean over all devices with `masking.masked_mean` first.

A NaN cost makes the multiplier NaN, so that a broken measurement shows.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.rewards import check_rewards

__all__ = [
    "Lagrange",
    "PIDLagrange",
    "constrained_advantages",
    "init_lagrange",
    "init_pid_lagrange",
    "penalised_rewards",
    "update_lagrange",
    "update_pid_lagrange",
]


class Lagrange(NamedTuple):
    """Plain dual ascent."""

    multiplier: Array  # [] λ >= 0, reward units per cost unit


class PIDLagrange(NamedTuple):
    """A multiplier with proportional, integral and derivative control."""

    multiplier: Array  # [] λ >= 0, reward units per cost unit
    integral: Array  # [] I >= 0, summed violations
    previous_cost: Array  # [] mean cost at the last update
    updates: Array  # [] int32, updates so far


def init_lagrange(initial: ArrayLike = 0.0) -> Lagrange:
    """A multiplier before the first measurement.

    >>> float(init_lagrange(0.5).multiplier)
    0.5
    """
    return Lagrange(jnp.asarray(initial, jnp.float32))


def update_lagrange(state: Lagrange, cost: ArrayLike, *, limit: ArrayLike, learning_rate: ArrayLike = 0.05) -> Lagrange:
    """Dual ascent: λ ← max(0, λ + η (cost - limit)).

    A fixed point where the cost meets the limit, or where λ = 0 and the cost is within it.

    Args:
      state: the multiplier.
      cost: [] mean cost of the current policy, over all devices.
      limit: d, in cost units.
      learning_rate: η.
    Returns:
      The multiplier after one step.
    Reference: Stooke et al. 2020, https://arxiv.org/abs/2007.03964

    >>> round(float(update_lagrange(init_lagrange(), 3.0, limit=1.0, learning_rate=0.1).multiplier), 3)
    0.2
    """
    violation = jnp.asarray(cost, jnp.float32) - limit
    return Lagrange(jnp.maximum(state.multiplier + learning_rate * violation, 0.0))


def init_pid_lagrange(initial: ArrayLike = 0.0, *, integral_gain: ArrayLike = 0.01) -> PIDLagrange:
    """A controlled multiplier before the first measurement, the integral set so that it stands for `initial`.

    Args:
      initial: λ to start from.
      integral_gain: K_I > 0 of the updates that follow.
    Returns:
      The state; its first update sees no derivative.

    >>> float(init_pid_lagrange(0.5, integral_gain=0.1).integral)
    5.0
    """
    initial, gain = jnp.asarray(initial, jnp.float32), jnp.asarray(integral_gain, jnp.float32)
    return PIDLagrange(initial, initial / jnp.where(gain > 0, gain, 1.0), jnp.zeros(()), jnp.zeros((), jnp.int32))


def update_pid_lagrange(
    state: PIDLagrange,
    cost: ArrayLike,
    *,
    limit: ArrayLike,
    proportional_gain: ArrayLike = 0.05,
    integral_gain: ArrayLike = 0.01,
    derivative_gain: ArrayLike = 0.0,
) -> PIDLagrange:
    """PID control: λ = max(0, K_P Δ + K_I I + K_D ∂), which damps the oscillation of plain dual ascent.

    Δ = cost - limit, I ← max(0, I + Δ), ∂ = max(0, cost - previous cost), 0 at the first update. K_P = K_D = 0 gives
    `update_lagrange` with η = K_I.

    Args:
      state: the multiplier, from `init_pid_lagrange`.
      cost: [] mean cost of the current policy, over all devices.
      limit: d, in cost units.
      proportional_gain: K_P, answers the present violation.
      integral_gain: K_I, answers the summed violations, and is all that acts at the limit.
      derivative_gain: K_D, answers a growing cost, never a falling one.
    Returns:
      The multiplier and what the controller remembers.
    Reference: Stooke et al. 2020, algorithm 2, https://arxiv.org/abs/2007.03964

    >>> state = update_pid_lagrange(init_pid_lagrange(), 3.0, limit=1.0, proportional_gain=1.0, integral_gain=0.5)
    >>> float(state.multiplier)
    3.0
    """
    cost = jnp.asarray(cost, jnp.float32)
    violation = cost - limit
    integral = jnp.maximum(state.integral + violation, 0.0)
    growth = jnp.where(state.updates > 0, jnp.maximum(cost - state.previous_cost, 0.0), 0.0)
    control = proportional_gain * violation + integral_gain * integral + derivative_gain * growth
    return PIDLagrange(jnp.maximum(control, 0.0), integral, cost, state.updates + 1)


def penalised_rewards(rewards: Array, costs: Array, multiplier: ArrayLike) -> Array:
    """What the policy maximises under a multiplier: (r - λ c) / (1 + λ).

    The division keeps the size of the objective, hence of the policy's steps, whatever λ is. λ = 0 gives the reward,
    λ → infinity minus the cost.

    Args:
      rewards: [...] per token, sequence or step.
      costs: [...] of the same.
      multiplier: [] λ >= 0, from `update_lagrange` or `update_pid_lagrange`; stopped.
    Returns:
      [...] rewards.
    Raises: TypeError for integer rewards or costs; AssertionError if shapes differ.
    Reference: Stooke et al. 2020, https://arxiv.org/abs/2007.03964; Dai et al. 2023,
      https://arxiv.org/abs/2310.12773, for language models

    >>> penalised_rewards(jnp.array([4.0]), jnp.array([1.0]), 1.0).tolist()
    [1.5]
    """
    chex.assert_equal_shape([rewards, costs])
    return _mixed(check_rewards(rewards), check_rewards(costs, "costs"), multiplier)


def constrained_advantages(advantages: Array, cost_advantages: Array, multiplier: ArrayLike) -> Array:
    """The same mixture of advantages, for a reward critic beside a cost critic: (A_r - λ A_c) / (1 + λ).

    Advantages without a value function are linear in the reward, and so is GAE: for them this equals the advantage of
    `penalised_rewards`. Whitened ones are not.

    Args:
      advantages: [...] of the reward.
      cost_advantages: [...] of the cost.
      multiplier: [] λ >= 0; stopped.
    Returns:
      [...] advantages.
    Raises: TypeError for integers; AssertionError if shapes differ.
    Reference: Stooke et al. 2020, https://arxiv.org/abs/2007.03964

    >>> constrained_advantages(jnp.array([4.0]), jnp.array([1.0]), 1.0).tolist()
    [1.5]
    """
    chex.assert_equal_shape([advantages, cost_advantages])
    return _mixed(
        check_rewards(advantages, "advantages"), check_rewards(cost_advantages, "cost_advantages"), multiplier
    )


def _mixed(gain: Array, cost: Array, multiplier: ArrayLike) -> Array:
    multiplier = jax.lax.stop_gradient(jnp.asarray(multiplier, jnp.float32))
    return (gain - multiplier * cost) / (1.0 + multiplier)
