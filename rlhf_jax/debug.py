"""Checks of values while a compiled program runs: what shapes and types cannot show, said in words.

Each function is pure, returns nothing, and raises through `jax.experimental.checkify`::

    def step(params, batch):
        debug.check_mask_rows(batch.mask)
        debug.check_rewards(batch.rewards)
        return loss(params, batch)

    error, value = checkify.checkify(step)(params, batch)
    error.throw()  # a ValueError with the sentence of the first check that failed

Without `checkify.checkify` around them they raise at once outside `jit`, and refuse to compile inside it. Take them out
of a finished program: each costs a flag that the host has to look at.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

from rlhf_jax.masking import check_mask, masked_sum

__all__ = [
    "check_finite",
    "check_first_ratio",
    "check_group_rewards_differ",
    "check_log_probs",
    "check_mask_not_empty",
    "check_mask_rows",
    "check_one_bos",
    "check_pad_is_not_eos",
    "check_prompts_left_padded",
    "check_responses_right_padded",
    "check_rewards",
]


def check_mask_not_empty(mask: Array) -> None:
    """Fails if nothing in the batch counts: every mean of it is 0, and a step on it moves nothing.

    >>> error, _ = checkify.checkify(check_mask_not_empty)(jnp.zeros((2, 3), bool))
    >>> print(error.get().splitlines()[0])
    the mask is all False: no token of the batch counts (`check` failed)
    """
    check_mask(mask)
    checkify.check(jnp.any(mask), "the mask is all False: no token of the batch counts")


def check_mask_rows(mask: Array) -> None:
    """Fails if a row [..., T] has no true slot: such a row is left out of sequence means.

    >>> error, _ = checkify.checkify(check_mask_rows)(jnp.array([[True], [False]]))
    >>> print(error.get().splitlines()[0])
    the mask has 1 empty rows, the first is row 1 (`check` failed)
    """
    check_mask(mask)
    occupied = jnp.any(mask, axis=-1).reshape(-1)
    checkify.check(
        jnp.all(occupied),
        "the mask has {count} empty rows, the first is row {row}",
        count=jnp.sum(~occupied, dtype=jnp.int32),
        row=jnp.argmin(occupied),
    )


def check_responses_right_padded(mask: Array) -> None:
    """Fails if a response mask [..., R] has a hole or starts late: tokens come first, padding after.

    >>> error, _ = checkify.checkify(check_responses_right_padded)(jnp.array([[False, True]]))
    >>> print(error.get().splitlines()[0])
    row 0 of the response mask has a token after padding (`check` failed)
    """
    check_mask(mask)
    rows = jnp.any(~mask[..., :-1] & mask[..., 1:], axis=-1).reshape(-1)
    checkify.check(~jnp.any(rows), "row {row} of the response mask has a token after padding", row=jnp.argmax(rows))


def check_prompts_left_padded(mask: Array) -> None:
    """Fails if a prompt mask [..., P] has a hole or padding at its end: padding comes first, tokens after.

    >>> error, _ = checkify.checkify(check_prompts_left_padded)(jnp.array([[True, False]]))
    >>> print(error.get().splitlines()[0])
    row 0 of the prompt mask has padding after a token (`check` failed)
    """
    check_mask(mask)
    rows = jnp.any(mask[..., :-1] & ~mask[..., 1:], axis=-1).reshape(-1)
    checkify.check(~jnp.any(rows), "row {row} of the prompt mask has padding after a token", row=jnp.argmax(rows))


def check_finite(x: Array, mask: Array, *, name: str = "x") -> None:
    """Fails if a counted slot is NaN or infinite.

    >>> error, _ = checkify.checkify(check_finite)(jnp.array([0.0, jnp.inf]), jnp.array([True, True]))
    >>> print(error.get().splitlines()[0])
    x is not finite in 1 counted slots, the first is flat index 1 (`check` failed)
    """
    check_mask(mask, x)
    wrong = mask & ~jnp.isfinite(x)
    checkify.check(
        ~jnp.any(wrong),
        name + " is not finite in {count} counted slots, the first is flat index {index}",
        count=jnp.sum(wrong, dtype=jnp.int32),
        index=jnp.argmax(wrong.reshape(-1)),
    )


def check_rewards(rewards: Array, mask: Array | None = None) -> None:
    """Fails if a reward is NaN (missing) or infinite: mask it out or score it, it must not become 0 in silence.

    Args:
      rewards: [...] float.
      mask: [...] bool, rewards that count; all by default.

    >>> error, _ = checkify.checkify(check_rewards)(jnp.array([jnp.nan, 1.0]))
    >>> print(error.get().splitlines()[0])
    rewards is not finite in 1 counted slots, the first is flat index 0 (`check` failed)
    """
    check_finite(rewards, jnp.ones(rewards.shape, bool) if mask is None else mask, name="rewards")


def check_log_probs(log_probs: Array, mask: Array, *, tolerance: ArrayLike = 1e-3) -> None:
    """Fails if a counted log-prob is NaN, infinite or above 0 (a loss or a probability passed by mistake).

    >>> error, _ = checkify.checkify(check_log_probs)(jnp.array([0.5]), jnp.array([True]))
    >>> print(error.get().splitlines()[0])
    a log-prob is 0.5, above 0 (`check` failed)
    """
    check_finite(log_probs, mask, name="log_probs")
    highest = jnp.max(jnp.where(mask, log_probs, -jnp.inf), initial=-jnp.inf)
    checkify.check(highest <= tolerance, "a log-prob is {highest}, above 0", highest=highest)


def check_first_ratio(log_probs: Array, old_log_probs: Array, mask: Array, *, tolerance: ArrayLike = 1e-3) -> None:
    """Fails unless π / π_old is 1 at every counted token, as it must be before the first update on a batch.

    What breaks it: log-probs from the sampler's own arithmetic, a temperature in one of the two, dropout, a shift by
    one token, different padding.

    Args:
      log_probs: [..., T] of the policy about to be trained.
      old_log_probs: [..., T] stored when the batch was sampled.
      mask: [..., T] bool.
      tolerance: how far a ratio may be from 1.

    >>> error, _ = checkify.checkify(check_first_ratio)(jnp.zeros(2), jnp.array([0.0, -1.0]), jnp.ones(2) > 0)
    >>> print(error.get().splitlines()[0])  # doctest: +ELLIPSIS
    before any update the ratio is 2.718..., not 1, at flat index 1 (`check` failed)
    """
    check_mask(mask, log_probs, old_log_probs)
    gap = jnp.where(mask, log_probs, 0.0) - jnp.where(mask, old_log_probs, 0.0)
    distance = jnp.abs(jnp.expm1(gap))
    worst = jnp.argmax(distance.reshape(-1))
    checkify.check(
        distance.reshape(-1)[worst] <= tolerance,
        "before any update the ratio is {ratio}, not 1, at flat index {index}",
        ratio=jnp.exp(gap.reshape(-1)[worst]),
        index=worst,
    )


def check_pad_is_not_eos(tokens: Array, mask: Array, *, eos: ArrayLike) -> None:
    """Fails if padding holds the end token: whoever counts ends, or masks by `tokens != pad`, goes wrong then.

    Args:
      tokens: [..., T] int.
      mask: [..., T] bool, real tokens.
      eos: id of the end token.

    >>> error, _ = checkify.checkify(check_pad_is_not_eos)(jnp.array([5, 2, 2]), jnp.array([True, True, False]), eos=2)
    >>> print(error.get().splitlines()[0])
    padding holds the end token 2 in 1 slots: give padding an id of its own (`check` failed)
    """
    check_mask(mask, tokens)
    wrong = ~mask & (tokens == eos)
    checkify.check(
        ~jnp.any(wrong),
        "padding holds the end token {eos} in {count} slots: give padding an id of its own",
        eos=tokens.reshape(-1)[jnp.argmax(wrong.reshape(-1))],
        count=jnp.sum(wrong, dtype=jnp.int32),
    )


def check_one_bos(tokens: Array, mask: Array, *, bos: ArrayLike) -> None:
    """Fails if a row has the start token twice: the chat template wrote one and the tokenizer added another.

    Args:
      tokens: [..., T] int.
      mask: [..., T] bool, real tokens.
      bos: id of the start token.

    >>> error, _ = checkify.checkify(check_one_bos)(jnp.array([[1, 1, 7]]), jnp.ones((1, 3), bool), bos=1)
    >>> print(error.get().splitlines()[0])
    row 0 has the start token 1 2 times (`check` failed)
    """
    check_mask(mask, tokens)
    starts = masked_sum((tokens == bos).astype(jnp.float32), mask, axis=-1).reshape(-1)
    row = jnp.argmax(starts)
    checkify.check(
        starts[row] <= 1,
        "row {row} has the start token {bos} {count} times",
        row=row,
        bos=jnp.max(jnp.where(tokens == bos, tokens, 0)),
        count=starts[row].astype(jnp.int32),
    )


def check_group_rewards_differ(rewards: Array, *, group: int, share: ArrayLike = 0.0) -> None:
    """Fails if too many groups have all-equal rewards: their group-relative advantages are 0 and teach nothing.

    Args:
      rewards: [B] rewards, rows of a group side by side.
      group: rows of a group.
      share: of groups that may be all equal; 0 allows none.
    Raises: ValueError if `group` does not divide B (at trace time).

    >>> check = checkify.checkify(lambda rewards: check_group_rewards_differ(rewards, group=2))
    >>> error, _ = check(jnp.array([0.0, 1.0, 1.0, 1.0]))
    >>> print(error.get().splitlines()[0])
    1 of 2 groups have all-equal rewards, the first is group 1 (`check` failed)
    """
    if rewards.shape[-1] % group:
        raise ValueError(f"group must divide the batch, got group {group} and {rewards.shape[-1]} rewards")
    groups = rewards.reshape(-1, group)
    equal = jnp.all(groups == groups[:, :1], axis=-1)
    checkify.check(
        jnp.sum(equal, dtype=jnp.float32) <= share * groups.shape[0],
        "{count} of " + str(groups.shape[0]) + " groups have all-equal rewards, the first is group {index}",
        count=jnp.sum(equal, dtype=jnp.int32),
        index=jnp.argmax(equal),
    )
