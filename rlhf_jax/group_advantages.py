"""Advantages of whole sequences against others of the same prompt: no value function, one number per sequence.

Layout: B = prompts · G rows, the G rows of a prompt adjacent, `group` = G a static int that divides B.

* **Missing rewards.** `mask` [B] says which rewards count; a row outside it gets 0 and enters no statistic. Without a
  mask every reward counts, and a NaN makes its whole group NaN (the whole batch where the batch is normalised), so that
  it shows. `~jnp.isnan(rewards)` is the mask that leaves missing rewards out.
* **A group of one** (one row, or one that counts) has nothing to be compared with: its advantage is 0, never NaN and
  never the raw reward.
* **All-equal rewards** give exactly 0: statistics are taken of the distances from the group's largest reward, so
  rounding of the mean is not blown up by the division.

`to_tokens` spreads the result over the tokens. Advantages per token are in `token_advantages`, those for the best of
several answers in `pass_at_k`. Nothing is stopped here: losses stop the advantages that they consume.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.rewards import check_rewards

__all__ = [
    "gdpo",
    "gpg",
    "group_centred",
    "group_relative",
    "group_relative_batch_std",
    "leave_one_out",
    "optimal_reward_baseline",
    "remax",
    "to_tokens",
]


# --- groups -----------------------------------------------------------------------------------------------------------


def check_group(group: int, rows: int) -> None:
    """Raises ``ValueError`` unless group is a positive int that divides the number of rows (at trace time)."""
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ValueError(f"group must be an int >= 1, got {group!r}")
    if rows % group:
        raise ValueError(f"group must divide the batch: {rows} rows are not a multiple of group = {group}")


def _centred(rewards: Array, mask: Array | None, group: int) -> tuple[Array, Array]:
    """[prompts, G] rewards minus their group's mean, 0 outside the mask; and the mask, [prompts, G]."""
    rewards = check_rewards(rewards)
    chex.assert_rank(rewards, 1)
    mask = jnp.ones(rewards.shape, jnp.bool_) if mask is None else mask
    masking.check_mask(mask, rewards)
    check_group(group, rewards.shape[0])
    rewards, mask = rewards.reshape(-1, group), mask.reshape(-1, group)
    from_best = _from_best(rewards, mask)
    mean = masking.masked_mean(from_best, mask, axis=-1, keepdims=True)
    return jnp.where(mask, from_best - mean, 0.0), mask


def _from_best(rewards: Array, mask: Array) -> Array:
    """[prompts, G] rewards minus their group's largest, 0 outside the mask."""
    best = jnp.max(rewards, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    return jnp.where(mask, rewards - jax.lax.stop_gradient(best), 0.0)


def _root(variance: Array) -> Array:
    """The square root, with derivative 0 instead of infinity at 0."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), variance)


def to_tokens(advantages: Array, mask: Array) -> Array:
    """Gives every valid token its sequence's advantage.

    Args:
      advantages: [...] one per sequence.
      mask: [..., T] bool, tokens of the sequence.
    Returns:
      [..., T] advantages, 0 outside the mask.
    Raises: TypeError for a mask that is not bool; AssertionError if shapes disagree.

    >>> to_tokens(jnp.array([0.5, -1.0]), jnp.array([[True, True], [True, False]])).tolist()
    [[0.5, 0.5], [-1.0, 0.0]]
    """
    masking.check_mask(mask)
    chex.assert_shape(advantages, mask.shape[:-1])
    return jnp.where(mask, advantages[..., None], jnp.zeros((), advantages.dtype))


# --- GRPO and its relatives -------------------------------------------------------------------------------------------


def group_centred(rewards: Array, mask: Array | None = None, *, group: int) -> Array:
    """The reward minus its group's mean, the advantage of Dr. GRPO: A_i = r_i - mean(r).

    Sums to 0 over a group and does not change if a constant is added to a group's rewards. Equal to
    (n - 1) / n times `leave_one_out` for n rewards that count.

    Args:
      rewards: [B] one per sequence.
      mask: [B] bool, rewards that count; None for all.
      group: G, static, rows per prompt.
    Returns:
      [B] advantages in reward units.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Liu et al. 2025, https://arxiv.org/abs/2503.20783

    >>> group_centred(jnp.array([1.0, 3.0, 0.0, 0.0]), group=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    return _centred(rewards, mask, group)[0].reshape(-1)


def group_relative(
    rewards: Array,
    mask: Array | None = None,
    *,
    group: int,
    ddof: ArrayLike = 1,
    epsilon: ArrayLike = 1e-4,
) -> Array:
    """The advantage of GRPO: A_i = (r_i - mean(r)) / (std(r) + ε) over the group.

    Adding a constant to a group's rewards changes nothing, and neither does a positive factor at ε = 0. Without the
    division it is `group_centred`.

    Args:
      rewards: [B] one per sequence.
      mask: [B] bool, rewards that count; None for all.
      group: G, static, rows per prompt.
      ddof: 1 divides the variance by n - 1 (TRL, verl, tunix, OpenRLHF), 0 by n.
      epsilon: added to the standard deviation; 1e-4 in TRL, 1e-6 in verl and tunix.
    Returns:
      [B] advantages without a unit.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Shao et al. 2024, section 4.1.2, https://arxiv.org/abs/2402.03300

    >>> [round(a, 3) for a in group_relative(jnp.array([1.0, 3.0, 7.0, 7.0]), group=2, ddof=0).tolist()]
    [-1.0, 1.0, 0.0, 0.0]
    """
    centred, valid = _centred(rewards, mask, group)
    variance = masking.masked_variance(centred, valid, ddof=ddof, axis=-1, keepdims=True)
    return (centred / (_root(variance) + epsilon)).reshape(-1)


def group_relative_batch_std(
    rewards: Array,
    mask: Array | None = None,
    *,
    group: int,
    ddof: ArrayLike = 1,
    epsilon: ArrayLike = 1e-4,
    axis_name: str | None = None,
) -> Array:
    """The mean of the group, the spread of the batch: A_i = (r_i - mean_group(r)) / (std_batch(r) + ε).

    So a prompt whose answers nearly agree is not blown up. With a single group equal to `group_relative`.

    Args:
      rewards: [B] one per sequence.
      mask: [B] bool, rewards that count; None for all.
      group: G, static, rows per prompt.
      ddof: 1 divides the variance by n - 1, 0 by n.
      epsilon: added to the standard deviation.
      axis_name: mapped axis whose devices share the standard deviation.
    Returns:
      [B] advantages without a unit.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Liu et al. 2025 (Lite PPO), https://arxiv.org/abs/2508.08221

    >>> advantages = group_relative_batch_std(jnp.array([0.0, 2.0, 4.0, 6.0]), group=2, ddof=0, epsilon=0.0)
    >>> [round(a, 3) for a in advantages.tolist()]
    [-0.447, 0.447, -0.447, 0.447]
    """
    centred, valid = _centred(rewards, mask, group)
    variance = masking.masked_variance(
        check_rewards(rewards).reshape(valid.shape), valid, ddof=ddof, axis_name=axis_name
    )
    return (centred / (_root(variance) + epsilon)).reshape(-1)


def leave_one_out(rewards: Array, mask: Array | None = None, *, group: int) -> Array:
    """The reward minus the mean of the others, the advantage of RLOO: A_i = r_i - Σ_{j≠i} r_j / (n - 1).

    The baseline does not contain the reward it is taken from, so the gradient stays unbiased. A group of two gives the
    difference of the two rewards.

    Args:
      rewards: [B] one per sequence.
      mask: [B] bool, rewards that count; None for all.
      group: G, static, rows per prompt.
    Returns:
      [B] advantages in reward units.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740

    >>> leave_one_out(jnp.array([1.0, 3.0, 5.0]), group=3).tolist()
    [-3.0, 0.0, 3.0]
    """
    centred, valid = _centred(rewards, mask, group)
    n = jnp.sum(valid, axis=-1, keepdims=True, dtype=centred.dtype)
    return (centred * n / jnp.maximum(n - 1.0, 1.0)).reshape(-1)


def remax(rewards: Array, greedy_rewards: Array) -> Array:
    """The reward minus that of the greedy answer to the same prompt: A = r(y) - r(y_greedy).

    Args:
      rewards: [...] of the sampled sequences.
      greedy_rewards: [...] of the sequences decoded greedily from the same prompts.
    Returns:
      [...] advantages in reward units, 0 where sampled and greedy rewards agree.
    Raises: TypeError for integer rewards; AssertionError if shapes differ.
    Reference: Li et al. 2023, https://arxiv.org/abs/2310.10505

    >>> remax(jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])).tolist()
    [0.5, -0.5]
    """
    chex.assert_equal_shape([rewards, greedy_rewards])
    return check_rewards(rewards) - check_rewards(greedy_rewards, "greedy_rewards")


def optimal_reward_baseline(rewards: Array, lengths: Array, mask: Array | None = None, *, group: int) -> Array:
    """The advantage of OPO: A_i = r_i - b with the length-weighted baseline b = Σ l_i r_i / Σ l_i over the group.

    This baseline has the least variance if the squared gradient of a sequence grows with its length. Equal lengths give
    `group_centred`.

    Args:
      rewards: [B] one per sequence.
      lengths: [B] valid tokens per sequence; any integer or floating type.
      mask: [B] bool, rewards that count; None for all.
      group: G, static, rows per prompt.
    Returns:
      [B] advantages in reward units; 0 for a group without a token.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Hao et al. 2025, https://arxiv.org/abs/2505.23585

    >>> optimal_reward_baseline(jnp.array([1.0, 0.0]), jnp.array([3, 1]), group=2).tolist()
    [0.25, -0.75]
    """
    chex.assert_equal_shape([rewards, lengths])
    centred, valid = _centred(rewards, mask, group)
    weights = jnp.where(valid, lengths.reshape(valid.shape).astype(centred.dtype), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    from_best = _from_best(check_rewards(rewards).reshape(valid.shape), valid)
    baseline = jnp.sum(weights * from_best, axis=-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return jnp.where(valid & (total > 0), from_best - baseline, 0.0).reshape(-1)


def gpg(
    rewards: Array,
    mask: Array | None = None,
    *,
    group: int,
    normaliser: ArrayLike = 1.0,
    axis_name: str | None = None,
) -> Array:
    """The advantage of group policy gradient: A_i = α (r_i - mean(r)) / F, with α = B / (B - M).

    M counts the rows of groups whose rewards are all equal: they have no gradient, and α makes up for them in a later
    mean over all rows. Without such groups α = 1 and F = 1 give `group_centred`.

    Args:
      rewards: [B] one per sequence.
      mask: [B] bool, rewards that count; None for all.
      group: G, static, rows per prompt.
      normaliser: F.
      axis_name: mapped axis whose devices share α.
    Returns:
      [B] advantages in reward units / F; 0 everywhere if no group has a gradient.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Chu et al. 2025, https://arxiv.org/abs/2504.02546

    >>> gpg(jnp.array([1.0, 0.0, 1.0, 1.0]), group=2).tolist()
    [1.0, -1.0, 0.0, 0.0]
    """
    centred, valid = _centred(rewards, mask, group)
    informative = jnp.broadcast_to(jnp.any(centred != 0, axis=-1, keepdims=True), valid.shape)
    share = masking.masked_mean(informative.astype(centred.dtype), valid, axis_name=axis_name)
    return (centred / jnp.where(share > 0, share, 1.0) / normaliser).reshape(-1)


def gdpo(
    rewards: Array,
    mask: Array | None = None,
    *,
    group: int,
    weights: ArrayLike = 1.0,
    ddof: ArrayLike = 1,
    epsilon: ArrayLike = 1e-4,
    axis_name: str | None = None,
) -> Array:
    """Several rewards, each normalised in its group before they are added: A_i = whiten(Σ_n w_n A_i^n).

    A^n is `group_relative` of reward n. A reward of large scale cannot drown the others, and combinations of the same
    sum stay apart where one of their rewards is rarer than the other. The result is whitened over the batch, so a
    common factor of the weights does not matter.

    Args:
      rewards: [B, N] N rewards per sequence.
      mask: [B, N] bool, rewards that count; a missing one adds 0. None for all.
      group: G, static, rows per prompt.
      weights: [] or [N] weight of each reward.
      ddof: 1 divides the group variances by n - 1, 0 by n; the batch variance is divided by its number of rows.
      epsilon: added to the groups' standard deviations; under the root of the batch variance it is 1e-8.
      axis_name: mapped axis whose devices share the batch statistics.
    Returns:
      [B] advantages without a unit; 0 for a row none of whose rewards counts.
    Raises: TypeError for integer rewards; ValueError if group does not divide B; AssertionError if shapes differ.
    Reference: Liu et al. 2026, https://arxiv.org/abs/2601.05242

    >>> both = jnp.array([[0.0, 0.0], [1.0, 100.0]])
    >>> [round(a, 3) for a in gdpo(both, group=2).tolist()]
    [-1.0, 1.0]
    """
    rewards = check_rewards(rewards)
    chex.assert_rank(rewards, 2)
    mask = jnp.ones(rewards.shape, jnp.bool_) if mask is None else mask
    masking.check_mask(mask, rewards)
    each = jax.vmap(lambda r, m: group_relative(r, m, group=group, ddof=ddof, epsilon=epsilon), 1, 1)(rewards, mask)
    weighted = each * jnp.broadcast_to(jnp.asarray(weights, each.dtype), each.shape)
    return masking.whiten(jnp.sum(weighted, axis=-1), jnp.any(mask, axis=-1), axis_name=axis_name)
