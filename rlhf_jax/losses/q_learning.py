"""Temporal-difference losses for action values: Q-learning, double Q, SARSA, expected SARSA.

Every function is elementwise over `[..., T]`: entry t of `q_values` [..., T, A] belongs to the state in which
`actions[t]` was taken, entry t of `next_q_values` to the state after it. `discounts` is γ times 0 at a terminal step: a
discount of 0 cuts the next state off, whatever it holds. Targets are stopped. The losses are squared errors without a
factor of one half; `value.huber(action_values(q_values, actions), target)` is the robust form of each.
Language models are the case A = V: an action is a token (`offline_q_learning`).
"""

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.losses import value
from rlhf_jax.losses._pairs import floating

__all__ = [
    "action_values",
    "bootstrapped_target",
    "double_q_learning",
    "double_q_target",
    "expected_sarsa",
    "expected_sarsa_target",
    "q_learning",
    "q_learning_target",
    "sarsa",
    "sarsa_target",
]


def action_values(q_values: Array, actions: Array) -> Array:
    """Q(s_t, a_t) of the taken actions.

    Args:
      q_values: [..., T, A].
      actions: [..., T] integer, in [0, A).
    Returns:
      [..., T] values.
    Raises: TypeError for actions that are not integer or integer q_values, ValueError if axes differ (at trace time).

    >>> action_values(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0])).tolist()
    [2.0, 3.0]
    """
    (q_values,) = floating(q_values=q_values)
    if not jnp.issubdtype(jnp.asarray(actions).dtype, jnp.integer):
        raise TypeError(f"actions must be integer, got dtype {jnp.asarray(actions).dtype}")
    if q_values.shape[:-1] != actions.shape:
        raise ValueError(f"q_values must be actions.shape + (A,), got {q_values.shape} for actions {actions.shape}")
    return jnp.take_along_axis(q_values, actions[..., None], axis=-1)[..., 0]


def bootstrapped_target(rewards: Array, discounts: Array, next_values: Array) -> Array:
    """The one-step target from the next state's value: r + γ·V(s').

    Args:
      rewards: [..., T].
      discounts: [..., T], 0 where the episode ends; there the next value is not looked at and may be anything.
      next_values: [..., T] of the next states.
    Returns:
      [..., T] target, stopped.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Sutton 1988; Sutton and Barto 2018, eq. 6.2

    >>> bootstrapped_target(jnp.ones(2), jnp.array([0.5, 0.0]), jnp.array([4.0, jnp.nan])).tolist()
    [3.0, 1.0]
    """
    rewards, discounts, next_values = jax.lax.stop_gradient(
        floating(rewards=rewards, discounts=discounts, next_values=next_values)
    )
    return rewards + jnp.where(discounts == 0, 0.0, discounts * next_values)


def q_learning_target(rewards: Array, discounts: Array, next_q_values: Array) -> Array:
    """The optimal one-step target: r + γ·max_a Q(s', a).

    Args:
      rewards: [..., T].
      discounts: [..., T], 0 where the episode ends.
      next_q_values: [..., T, A] of the next states, usually from a target network.
    Returns:
      [..., T] target, stopped.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Watkins and Dayan 1992, https://doi.org/10.1007/BF00992698

    >>> q_learning_target(jnp.ones(1), jnp.array([0.5]), jnp.array([[2.0, 4.0]])).tolist()
    [3.0]
    """
    (next_q_values,) = floating(next_q_values=next_q_values)
    return bootstrapped_target(rewards, discounts, jnp.max(next_q_values, axis=-1))


def double_q_target(rewards: Array, discounts: Array, next_q_values: Array, selector_q_values: Array) -> Array:
    """Double Q-learning's target: r + γ·Q(s', argmax_a Q_selector(s', a)).

    Choosing with one network and judging with the other takes away the maximum's upward bias.

    Args:
      rewards: [..., T].
      discounts: [..., T], 0 where the episode ends.
      next_q_values: [..., T, A] that judge, from the target network.
      selector_q_values: [..., T, A] that choose, from the trained network.
    Returns:
      [..., T] target, stopped. With the same Q-values for both it is `q_learning_target`, and never above it.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: van Hasselt et al. 2015, eq. 4, https://arxiv.org/abs/1509.06461

    >>> double_q_target(jnp.ones(1), jnp.array([0.5]), jnp.array([[2.0, 4.0]]), jnp.array([[9.0, 1.0]])).tolist()
    [2.0]
    """
    next_q_values, selector_q_values = floating(next_q_values=next_q_values, selector_q_values=selector_q_values)
    return bootstrapped_target(rewards, discounts, action_values(next_q_values, jnp.argmax(selector_q_values, axis=-1)))


def sarsa_target(rewards: Array, discounts: Array, next_q_values: Array, next_actions: Array) -> Array:
    """The on-policy one-step target: r + γ·Q(s', a').

    Args:
      rewards: [..., T].
      discounts: [..., T], 0 where the episode ends.
      next_q_values: [..., T, A] of the next states.
      next_actions: [..., T] integer, taken there; any valid index where the discount is 0.
    Returns:
      [..., T] target, stopped. With greedy next actions it is `q_learning_target`.
    Raises: TypeError for integer inputs or actions that are not, AssertionError if shapes differ (at trace time).
    Reference: Rummery and Niranjan 1994; Sutton and Barto 2018, eq. 6.7

    >>> sarsa_target(jnp.ones(1), jnp.array([0.5]), jnp.array([[2.0, 4.0]]), jnp.array([0])).tolist()
    [2.0]
    """
    return bootstrapped_target(rewards, discounts, action_values(next_q_values, next_actions))


def expected_sarsa_target(rewards: Array, discounts: Array, next_q_values: Array, next_policy: Array) -> Array:
    """Expected SARSA's target: r + γ·Σ_a π(a | s')·Q(s', a).

    Args:
      rewards: [..., T].
      discounts: [..., T], 0 where the episode ends.
      next_q_values: [..., T, A] of the next states.
      next_policy: [..., T, A] probabilities of the evaluated policy there.
    Returns:
      [..., T] target, stopped: the mean of `sarsa_target` over next actions. A greedy policy gives `q_learning_target`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: van Seijen et al. 2009, https://doi.org/10.1109/ADPRL.2009.4927542; Sutton and Barto 2018, eq. 6.9

    >>> expected_sarsa_target(jnp.ones(1), jnp.array([0.5]), jnp.array([[2.0, 4.0]]), jnp.array([[0.5, 0.5]])).tolist()
    [2.5]
    """
    next_q_values, next_policy = floating(next_q_values=next_q_values, next_policy=next_policy)
    return bootstrapped_target(rewards, discounts, jnp.sum(next_policy * next_q_values, axis=-1))


def q_learning(q_values: Array, actions: Array, rewards: Array, discounts: Array, next_q_values: Array) -> Array:
    """Q-learning, per step: (Q(s, a) - sg(r + γ·max_a' Q(s', a')))².

    Args:
      q_values: [..., T, A] of the trained network.
      actions: [..., T] integer, taken.
      rewards: [..., T]; stopped.
      discounts: [..., T], 0 where the episode ends; stopped.
      next_q_values: [..., T, A] of the next states, usually from a target network; stopped.
    Returns:
      [..., T] loss.
    Raises: as `action_values` and `q_learning_target`.
    Reference: Watkins and Dayan 1992, https://doi.org/10.1007/BF00992698; Mnih et al. 2013,
      https://arxiv.org/abs/1312.5602

    >>> q, next_q = jnp.array([[5.0, 0.0]]), jnp.array([[2.0, 4.0]])
    >>> q_learning(q, jnp.array([0]), jnp.ones(1), jnp.array([0.5]), next_q).tolist()
    [4.0]
    """
    target = q_learning_target(rewards, discounts, next_q_values)
    return value.squared_error(action_values(q_values, actions), target)


def double_q_learning(
    q_values: Array, actions: Array, rewards: Array, discounts: Array, next_q_values: Array, selector_q_values: Array
) -> Array:
    """Double Q-learning, per step: the squared error to `double_q_target`.

    Args:
      q_values: [..., T, A] of the trained network.
      actions: [..., T] integer, taken.
      rewards: [..., T]; stopped.
      discounts: [..., T], 0 where the episode ends; stopped.
      next_q_values: [..., T, A] that judge the next states, from the target network; stopped.
      selector_q_values: [..., T, A] that choose there, from the trained network; stopped.
    Returns:
      [..., T] loss.
    Raises: as `action_values` and `double_q_target`.
    Reference: van Hasselt et al. 2015, https://arxiv.org/abs/1509.06461

    >>> q, next_q, choice = jnp.array([[5.0, 0.0]]), jnp.array([[2.0, 4.0]]), jnp.array([[9.0, 1.0]])
    >>> double_q_learning(q, jnp.array([0]), jnp.ones(1), jnp.array([0.5]), next_q, choice).tolist()
    [9.0]
    """
    target = double_q_target(rewards, discounts, next_q_values, selector_q_values)
    return value.squared_error(action_values(q_values, actions), target)


def sarsa(
    q_values: Array, actions: Array, rewards: Array, discounts: Array, next_q_values: Array, next_actions: Array
) -> Array:
    """SARSA, per step: the squared error to `sarsa_target`.

    Args:
      q_values: [..., T, A] of the trained network.
      actions: [..., T] integer, taken.
      rewards: [..., T]; stopped.
      discounts: [..., T], 0 where the episode ends; stopped.
      next_q_values: [..., T, A] of the next states; stopped.
      next_actions: [..., T] integer, taken there.
    Returns:
      [..., T] loss.
    Raises: as `action_values` and `sarsa_target`.
    Reference: Rummery and Niranjan 1994; Sutton and Barto 2018, eq. 6.7

    >>> q, next_q, steps = jnp.array([[5.0, 0.0]]), jnp.array([[2.0, 4.0]]), jnp.array([0])
    >>> sarsa(q, steps, jnp.ones(1), jnp.array([0.5]), next_q, steps).tolist()
    [9.0]
    """
    target = sarsa_target(rewards, discounts, next_q_values, next_actions)
    return value.squared_error(action_values(q_values, actions), target)


def expected_sarsa(
    q_values: Array, actions: Array, rewards: Array, discounts: Array, next_q_values: Array, next_policy: Array
) -> Array:
    """Expected SARSA, per step: the squared error to `expected_sarsa_target`.

    Args:
      q_values: [..., T, A] of the trained network.
      actions: [..., T] integer, taken.
      rewards: [..., T]; stopped.
      discounts: [..., T], 0 where the episode ends; stopped.
      next_q_values: [..., T, A] of the next states; stopped.
      next_policy: [..., T, A] probabilities of the evaluated policy there; stopped.
    Returns:
      [..., T] loss.
    Raises: as `action_values` and `expected_sarsa_target`.
    Reference: van Seijen et al. 2009, https://doi.org/10.1109/ADPRL.2009.4927542

    >>> q, next_q, policy = jnp.array([[5.0, 0.0]]), jnp.array([[2.0, 4.0]]), jnp.array([[0.5, 0.5]])
    >>> expected_sarsa(q, jnp.array([0]), jnp.ones(1), jnp.array([0.5]), next_q, policy).tolist()
    [6.25]
    """
    target = expected_sarsa_target(rewards, discounts, next_q_values, next_policy)
    return value.squared_error(action_values(q_values, actions), target)
