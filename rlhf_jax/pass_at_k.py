"""The best of k answers: the unbiased pass@k estimate, and advantages that train for it.

Groups are laid out as in `group_advantages`: B = prompts · G rows, those of a prompt adjacent; a row outside the mask
does not count and gets 0. Nothing is stopped here: losses stop the advantages that they consume.
"""

import chex
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.group_advantages import check_group
from rlhf_jax.rewards import check_rewards

__all__ = [
    "best_of_group_advantage",
    "pass_at_k",
    "pass_at_k_advantage",
]


def _check_k(k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be an int >= 1, got {k!r}")


def _all_wrong(wrong: Array, samples: Array, k: int) -> Array:
    """C(wrong, k) / C(samples, k), the chance that k answers out of `samples` are all wrong; k may be 0."""
    drawn = jnp.arange(k, dtype=wrong.dtype).reshape((k,) + (1,) * wrong.ndim)
    left = jnp.maximum(wrong[None] - drawn, 0.0)
    return jnp.prod(left / jnp.maximum(samples[None] - drawn, 1.0), axis=0)


def pass_at_k(correct: Array, samples: ArrayLike, *, k: int) -> Array:
    """The chance that one of k answers is right, estimated without bias: 1 - C(n - c, k) / C(n, k).

    k = 1 gives c / n. The binomials are divided factor by factor, so that nothing overflows.

    Args:
      correct: [...] c, right answers among those sampled; any integer or floating type.
      samples: [] or [...] n, answers sampled.
      k: static int >= 1, answers drawn from them without replacement.
    Returns:
      [...] float32 in [0, 1]. NaN where n < k: fewer answers than k hold no unbiased estimate.
    Raises: ValueError if k < 1.
    Reference: Chen et al. 2021, eq. 1, https://arxiv.org/abs/2107.03374

    >>> round(float(pass_at_k(jnp.array(1), 4, k=2)), 4)
    0.5
    """
    _check_k(k)
    correct = jnp.asarray(correct).astype(jnp.result_type(correct, jnp.float32))
    samples = jnp.broadcast_to(jnp.asarray(samples, correct.dtype), correct.shape)
    return jnp.where(samples >= k, 1.0 - _all_wrong(samples - correct, samples, k), jnp.nan)


def pass_at_k_advantage(correct: Array, mask: Array | None = None, *, group: int, k: int) -> Array:
    """The mean standardised reward of all sets of k answers that an answer belongs to, a set's reward being its best.

    With n answers, w of them wrong, and R = 1 - C(w, k) / C(n, k): a right answer gets (1 - R) / σ, a wrong one
    (1 - R - C(w - 1, k - 1) / C(n - 1, k - 1)) / σ, with σ = √(R (1 - R)). Wrong answers cost nothing while too few
    are wrong to fill a set. k = 1 gives `group_relative` with ddof = 0 and ε = 0.

    Args:
      correct: [B] bool, answers that are right.
      mask: [B] bool, answers that count; None for all.
      group: G, static, rows per prompt.
      k: static int, 1 <= k <= G.
    Returns:
      [B] float32 advantages without a unit; 0 where every set has the same reward, where fewer than k answers count,
      and outside the mask.
    Raises: TypeError if correct is not bool; ValueError if group does not divide B or k is out of range.
    Reference: Chen et al. 2025, https://arxiv.org/abs/2508.10751

    >>> correct = jnp.array([True, False, False, False])
    >>> [round(a, 3) for a in pass_at_k_advantage(correct, group=4, k=2).tolist()]
    [1.0, -0.333, -0.333, -0.333]
    """
    if jnp.asarray(correct).dtype != jnp.bool_:
        raise TypeError(f"correct must be bool, got dtype {correct.dtype}; write `rewards > 0.5`")
    chex.assert_rank(correct, 1)
    mask = jnp.ones(correct.shape, jnp.bool_) if mask is None else mask
    masking.check_mask(mask, correct)
    check_group(group, correct.shape[0])
    _check_k(k)
    if k > group:
        raise ValueError(f"k must be at most group = {group}, got {k}")
    correct, mask = correct.reshape(-1, group), mask.reshape(-1, group)
    samples = jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.float32)
    wrong = jnp.sum(mask & ~correct, axis=-1, keepdims=True, dtype=jnp.float32)
    failure = _all_wrong(wrong, samples, k)
    variance = failure * (1.0 - failure)
    useful = mask & (variance > 0) & (samples >= k)
    failure_with_this = jnp.where(correct, 0.0, _all_wrong(wrong - 1.0, samples - 1.0, k - 1))
    advantages = (failure - failure_with_this) / jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    return jnp.where(useful, advantages, 0.0).reshape(-1)


def best_of_group_advantage(rewards: Array, mask: Array | None = None, *, group: int) -> Array:
    """What the group's best reward owes to each answer: A_i = max_j r_j - max_{j≠i} r_j.

    Trains for the best of G answers, which for rewards of 0 and 1 is pass@G. Only a best answer without an equal gets
    more than 0, namely its lead over the second.

    Args:
      rewards: [B] one per sequence.
      mask: [B] bool, rewards that count; None for all.
      group: G, static, rows per prompt.
    Returns:
      [B] advantages in reward units, never negative; 0 in a group of one.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Tang et al. 2025, https://arxiv.org/abs/2503.19595

    >>> best_of_group_advantage(jnp.array([1.0, 5.0, 2.0]), group=3).tolist()
    [0.0, 3.0, 0.0]
    """
    rewards = check_rewards(rewards)
    chex.assert_rank(rewards, 1)
    mask = jnp.ones(rewards.shape, jnp.bool_) if mask is None else mask
    masking.check_mask(mask, rewards)
    check_group(group, rewards.shape[0])
    if group == 1:
        return jnp.where(mask, rewards - rewards, 0.0)
    rewards, mask = rewards.reshape(-1, group), mask.reshape(-1, group)
    ranked = jnp.sort(jnp.where(mask, rewards, -jnp.inf), axis=-1)
    best, second = ranked[:, -1:], ranked[:, -2:-1]
    leads = mask & ~(rewards < best) & ~jnp.isneginf(second)
    return jnp.where(leads, best - jnp.where(jnp.isneginf(second), best, second), 0.0).reshape(-1)
