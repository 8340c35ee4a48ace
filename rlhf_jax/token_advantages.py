"""Advantages per token without a value function: REINFORCE++, with and without groups, and the optimal token baseline.

Slots outside the mask are not steps, as in `returns`; groups are laid out as in `group_advantages`. Nothing is stopped
here except the log-probs of the optimal token baseline: losses stop the advantages that they consume.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.advantages import Advantages
from rlhf_jax.group_advantages import check_group, group_centred, to_tokens
from rlhf_jax.returns import clean, discounted_returns

__all__ = [
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]


def reinforce_plus_plus(
    rewards: Array,
    mask: Array,
    *,
    discount: ArrayLike = 1.0,
    ddof: ArrayLike = 0,
    epsilon: ArrayLike = 1e-8,
    axis_name: str | None = None,
) -> Advantages:
    """REINFORCE++: the discounted return of KL-shaped rewards, whitened over all tokens of the batch.

    The mean of the batch is the baseline, so one answer per prompt suffices. Adding a constant to every return changes
    nothing.

    Args:
      rewards: [B, T] per token, from `rewards.kl_shaped_rewards`.
      mask: [B, T] bool, tokens that are steps.
      discount: γ, one number or [B, T].
      ddof: 0 divides the variance by n, 1 by n - 1.
      epsilon: added to the variance under the root.
      axis_name: mapped axis whose devices share the statistics.
    Returns:
      Advantages: whitened advantages without a unit and the returns they come from, [B, T], 0 outside the mask.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ.
    Reference: Hu et al. 2025, https://arxiv.org/abs/2501.03262

    >>> rewards, mask = jnp.array([[0.0, 1.0], [0.0, 3.0]]), jnp.array([[True, True], [True, True]])
    >>> reinforce_plus_plus(rewards, mask).advantages.tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    returns = discounted_returns(rewards, mask, discount=discount)
    return Advantages(masking.whiten(returns, mask, ddof=ddof, epsilon=epsilon, axis_name=axis_name), returns)


def reinforce_plus_plus_baseline(
    rewards: Array,
    mask: Array,
    *,
    group: int,
    ddof: ArrayLike = 0,
    epsilon: ArrayLike = 1e-8,
    axis_name: str | None = None,
) -> Array:
    """REINFORCE++ with baseline: r_i - mean_group(r), spread over the tokens and whitened over those of the batch.

    The spread is that of the *centred* rewards, unlike in `group_relative_batch_std`, and every token weighs the same
    in it. `reinforce_plus_plus`, the form without groups, is in `token_advantages`.

    Args:
      rewards: [B] one per sequence; a row without a valid token does not count and may be NaN.
      mask: [B, T] bool, tokens of the sequences.
      group: G, static, rows per prompt.
      ddof: 0 divides the variance by n, 1 by n - 1.
      epsilon: added to the variance under the root.
      axis_name: mapped axis whose devices share the statistics.
    Returns:
      [B, T] advantages without a unit, 0 outside the mask.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Hu et al. 2025, https://arxiv.org/abs/2501.03262

    >>> mask = jnp.array([[True, True], [True, True]])
    >>> reinforce_plus_plus_baseline(jnp.array([0.0, 4.0]), mask, group=2).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    masking.check_mask(mask)
    centred = group_centred(rewards, jnp.any(mask, axis=-1), group=group)
    return masking.whiten(to_tokens(centred, mask), mask, ddof=ddof, epsilon=epsilon, axis_name=axis_name)


def optimal_token_baseline(
    rewards: Array,
    log_probs: Array,
    squared_probabilities: Array,
    mask: Array,
    *,
    group: int,
    discount: ArrayLike = 1.0,
) -> Advantages:
    """A baseline for every token position: A_t = G_t - B_t, with B_t = Σ_i W_t^i G_t^i / Σ_i W_t^i over the group.

    W_t = Σ_{j<=t} (1 - 2 π_j + Σ_v π_j(v)²) adds up the squared gradient of the logits along the row; a return on a
    noisy path says more about the best baseline. Rows are compared at the same count of valid tokens. Where a single
    row of a group goes on, its baseline is its own return and the advantage 0, as for a group of one. Rewards only at
    the end and equal W give `group_centred`.

    Args:
      rewards: [B, T] per token.
      log_probs: [B, T] of the generated tokens under the policy that generated them; stopped.
      squared_probabilities: [B, T] Σ_v π(v)² of the distributions they were drawn from, in (0, 1]; stopped.
      mask: [B, T] bool, tokens that are steps.
      group: G, static, rows per prompt, adjacent.
      discount: γ of the returns, one number or [B, T].
    Returns:
      Advantages: advantages and returns G, [B, T], 0 outside the mask.
    Raises: TypeError for integer rewards or a mask that is not bool; ValueError if group does not divide B;
      AssertionError or ValueError if shapes differ.
    Reference: Li et al. 2026, https://arxiv.org/abs/2602.07078

    >>> rewards, mask = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.array([[True, True], [True, True]])
    >>> log_probs, squares = jnp.log(jnp.full((2, 2), 0.5)), jnp.array([[0.5, 0.5], [0.25, 0.25]])
    >>> advantages = optimal_token_baseline(rewards, log_probs, squares, mask, group=2).advantages
    >>> [[round(a, 3) for a in row] for row in advantages.tolist()]
    [[0.333, 0.333], [-0.667, -0.667]]
    """
    check_group(group, mask.shape[0])
    chex.assert_rank(mask, 2)
    returns = discounted_returns(rewards, mask, discount=discount)
    log_probs, squares = clean(mask, log_probs, squared_probabilities, names=("log_probs", "squared_probabilities"))
    energy = jax.lax.stop_gradient(1.0 - 2.0 * jnp.exp(log_probs) + squares)
    paths = jnp.cumsum(jnp.where(mask, energy, 0.0), axis=-1).astype(returns.dtype)

    order = jnp.argsort(~mask, axis=-1, stable=True)  # valid tokens first
    rank = jnp.cumsum(mask, axis=-1) - 1  # and back
    packed_returns, packed_paths, packed_mask = (jnp.take_along_axis(x, order, axis=-1) for x in (returns, paths, mask))
    by_group = (-1, group, mask.shape[-1])
    weights = jnp.where(packed_mask, packed_paths, 0.0).reshape(by_group)
    total = jnp.sum(weights, axis=1, keepdims=True)
    baseline = jnp.sum(weights * packed_returns.reshape(by_group), axis=1, keepdims=True) / jnp.where(
        total > 0, total, 1.0
    )
    baseline = jnp.broadcast_to(baseline, weights.shape).reshape(mask.shape)
    advantages = returns - jnp.take_along_axis(baseline, jnp.maximum(rank, 0), axis=-1)
    return Advantages(jnp.where(mask, advantages, 0.0), returns)
