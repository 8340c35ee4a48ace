"""One reward from an ensemble of reward models, so that the policy does not exploit what a single one got wrong.

Members lie on the first axis, [E, ...], where `vmap` over their parameters puts them. Pessimism is a choice of
function: `mean` trusts the ensemble, `mean_minus_std` and `mean_minus_variance` distrust disagreement, `minimum`
believes the worst.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.rewards import check_rewards

__all__ = ["mean", "mean_minus_std", "mean_minus_variance", "minimum"]


def mean(rewards: Array) -> Array:
    """The mean over reward models, in which their independent errors average out.

    Args:
      rewards: [E, ...] one reward per member.
    Returns:
      [...] rewards; NaN where a member's is.
    Raises: TypeError for integer rewards.
    Reference: Coste et al. 2023, https://arxiv.org/abs/2310.02743

    >>> mean(jnp.array([[1.0], [3.0]])).tolist()
    [2.0]
    """
    rewards = check_rewards(rewards)
    return jnp.sum(rewards, axis=0) / rewards.shape[0]


def minimum(rewards: Array) -> Array:
    """The worst opinion, which an answer can only raise by convincing every member.

    Args:
      rewards: [E, ...] one reward per member.
    Returns:
      [...] rewards; NaN where a member's is.
    Raises: TypeError for integer rewards.
    Reference: Coste et al. 2023 (worst-case optimisation), https://arxiv.org/abs/2310.02743

    >>> minimum(jnp.array([[1.0], [3.0]])).tolist()
    [1.0]
    """
    return jnp.min(check_rewards(rewards), axis=0)


def _variance(rewards: Array, ddof: ArrayLike) -> Array:
    """Over the members, of their distances from the first one, so that equal opinions give exactly 0."""
    distances = rewards - rewards[:1]
    squares = jnp.sum(jnp.square(distances - mean(distances)[None]), axis=0)
    freedom = rewards.shape[0] - jnp.asarray(ddof, rewards.dtype)
    return jnp.where(freedom > 0, squares / jnp.where(freedom > 0, freedom, 1.0), 0.0)


def mean_minus_variance(rewards: Array, *, penalty: ArrayLike = 0.1, ddof: ArrayLike = 0) -> Array:
    """The mean less the members' disagreement: mean - λ variance.

    λ = 0, or a single member, gives the mean.

    Args:
      rewards: [E, ...] one reward per member.
      penalty: λ, in 1 / reward units.
      ddof: 0 divides the variance by E, 1 by E - 1.
    Returns:
      [...] rewards; NaN where a member's is.
    Raises: TypeError for integer rewards.
    Reference: Coste et al. 2023 (uncertainty-weighted optimisation), https://arxiv.org/abs/2310.02743

    >>> mean_minus_variance(jnp.array([[1.0], [3.0]]), penalty=0.5).tolist()
    [1.5]
    """
    rewards = check_rewards(rewards)
    return mean(rewards) - penalty * _variance(rewards, ddof)


def mean_minus_std(rewards: Array, *, k: ArrayLike = 1.0, ddof: ArrayLike = 0) -> Array:
    """A lower confidence bound: mean - k · std over the members.

    k = 0, or a single member, gives the mean; negative k seeks disagreement. Two members, k = 1 and ddof = 0 give
    `minimum`. Where all agree the derivative of the spread is taken as 0.

    Args:
      rewards: [E, ...] one reward per member.
      k: standard deviations below the mean.
      ddof: 0 divides the variance by E, 1 by E - 1.
    Returns:
      [...] rewards in reward units; NaN where a member's is.
    Raises: TypeError for integer rewards.
    Reference: Eisenstein et al. 2023, "mean minus std", https://arxiv.org/abs/2312.09244

    >>> mean_minus_std(jnp.array([[1.0], [3.0]]), k=2.0).tolist()
    [0.0]
    """
    rewards = check_rewards(rewards)
    variance = _variance(rewards, ddof)
    spread = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), variance)
    return mean(rewards) - k * spread
