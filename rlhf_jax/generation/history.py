"""What a row has written so far, and the rules that depend on it: penalties, bans, and when to stop.

`History` holds the most recent tokens of every row, the last one in the last slot, whatever slots they occupy in the
model's cache; so "the row ends with 5, 6" is a comparison of the last two columns. `init_history` and `update_history`
are a pair of pure functions; `rlhf_jax.generation.sampler.generate` runs them when it is given a rule:

    rules = lambda logits, history: repetition_penalty(logits, history.counts, 1.2)
    generate(..., rules=rules, stop=lambda history: ends_with(history.tokens, history.response_mask, ((13, 13),)))

The rules are functions of arrays and know nothing of `History`: they take logits [..., V] and give logits [..., V].
Counts of tokens are kept up to date, because on a CPU counting them anew costs more than the model's step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = [
    "History",
    "ends_with",
    "forbid_sequences",
    "init_history",
    "minimum_length",
    "no_repeated_ngram",
    "occurrence_penalty",
    "repetition_penalty",
    "token_counts",
    "update_history",
]


class History(NamedTuple):
    """The tokens of every row, right-aligned: the last slot holds the last token."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, real tokens
    response_mask: Array  # [B, T] bool, generated tokens
    counts: Array  # [B, V] int32, how often each token occurs in prompt and response
    response_counts: Array  # [B, V] int32, how often in the response


def token_counts(tokens: Array, mask: Array, vocab_size: int) -> Array:
    """How often each token occurs: [B, V] int32 of tokens [B, T] under mask [B, T] bool.

    >>> token_counts(jnp.array([[2, 0, 2]]), jnp.array([[True, False, True]]), 3).tolist()
    [[0, 0, 2]]
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    start = jnp.zeros((tokens.shape[0], vocab_size), jnp.int32)
    return start.at[rows, jnp.where(mask, tokens, vocab_size)].add(1, mode="drop")


def init_history(prompts: Array, mask: Array, *, length: int, vocab_size: int) -> History:
    """The history of left-padded prompts [B, P] that may grow by `length` tokens: T = P + length slots.

    >>> init_history(jnp.array([[7]]), jnp.array([[True]]), length=2, vocab_size=8).tokens.tolist()
    [[0, 0, 7]]
    """
    room = ((0, 0), (length, 0))
    counts = token_counts(prompts, mask, vocab_size)
    padded = jnp.pad(mask, room)
    return History(jnp.pad(prompts, room), padded, jnp.zeros_like(padded), counts, jnp.zeros_like(counts))


def update_history(history: History, token: Array, real: Array) -> History:
    """Appends a token [B] to every row; rows with real [B] = False get a slot of padding.

    >>> start = init_history(jnp.array([[7]]), jnp.array([[True]]), length=1, vocab_size=8)
    >>> update_history(start, jnp.array([4]), jnp.array([True])).tokens.tolist()
    [[7, 4]]
    """
    push = lambda window, column: jnp.concatenate([window[:, 1:], column[:, None].astype(window.dtype)], axis=1)
    rows = jnp.arange(token.shape[0])
    place = jnp.where(real, token, history.counts.shape[-1])
    return History(
        push(history.tokens, token),
        push(history.mask, real),
        push(history.response_mask, real),
        history.counts.at[rows, place].add(1, mode="drop"),
        history.response_counts.at[rows, place].add(1, mode="drop"),
    )


# --- rules ------------------------------------------------------------------------------------------------------------


def repetition_penalty(logits: Array, counts: Array, penalty: ArrayLike) -> Array:
    """Makes tokens that occur less likely: a positive logit is divided by the penalty, a negative one multiplied.

    Args:
      logits: [..., V].
      counts: [..., V] int, occurrences; usually those in prompt and response.
      penalty: 1 changes nothing, larger numbers repel, smaller ones attract.
    Returns:
      [..., V].
    Reference: Keskar et al. 2019, section 4.1 (which divides all logits), https://arxiv.org/abs/1909.05858

    >>> repetition_penalty(jnp.array([2.0, -2.0, 2.0]), jnp.array([1, 3, 0]), 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    return jnp.where(counts > 0, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def occurrence_penalty(logits: Array, counts: Array, *, presence: ArrayLike = 0.0, frequency: ArrayLike = 0.0) -> Array:
    """z - presence · [n > 0] - frequency · n for a token that occurs n times. Two zeros change nothing.

    Args:
      logits: [..., V].
      counts: [..., V] int, occurrences n; usually those in the response.
      presence: subtracted once.
      frequency: subtracted for every occurrence.
    Returns:
      [..., V].

    >>> occurrence_penalty(jnp.zeros(3), jnp.array([0, 1, 3]), presence=1.0, frequency=0.5).tolist()
    [0.0, -1.5, -2.5]
    """
    return logits - presence * (counts > 0) - frequency * counts


def minimum_length(logits: Array, response_mask: Array, end_token: int, length: ArrayLike) -> Array:
    """Excludes the end token until a row's response has `length` tokens.

    Args:
      logits: [..., V].
      response_mask: [..., T] bool, generated tokens.
      end_token: the id to exclude.
      length: tokens before the first possible end; 0 changes nothing.
    Returns:
      [..., V].

    >>> minimum_length(jnp.zeros(2), jnp.array([False, True]), 0, 2).tolist()
    [-inf, 0.0]
    """
    early = jnp.sum(response_mask, axis=-1) < length
    return logits.at[..., end_token].set(jnp.where(early, -jnp.inf, logits[..., end_token]))


def ends_with(tokens: Array, mask: Array, sequences: Sequence[Sequence[int]]) -> Array:
    """Whether each row ends with one of the sequences, all of it real tokens: the condition to stop.

    Args:
      tokens: [..., T] int, the last token in the last slot.
      mask: [..., T] bool. Pass the response's mask to ignore what the prompt ends with.
      sequences: token sequences, not empty and static. One longer than T is never found.
    Returns:
      [...] bool.
    Raises: ValueError for an empty sequence.

    >>> ends_with(jnp.array([[1, 5, 6], [5, 6, 1]]), jnp.ones((2, 3), bool), ((5, 6), (9,))).tolist()
    [True, False]
    """
    found = jnp.zeros(tokens.shape[:-1], bool)
    for sequence in sequences:
        if not len(sequence):
            raise ValueError("every row ends with an empty sequence; give at least one token")
        found = found | _ends(tokens, mask, sequence)
    return found


def _ends(tokens: Array, mask: Array, sequence: Sequence[int]) -> Array:
    """[...] bool; True for an empty sequence."""
    found = jnp.full(tokens.shape[:-1], len(sequence) <= tokens.shape[-1])
    for back, token in enumerate(reversed(sequence[-tokens.shape[-1] :]), start=1):
        found = found & mask[..., -back] & (tokens[..., -back] == token)
    return found


def forbid_sequences(logits: Array, tokens: Array, mask: Array, sequences: Sequence[Sequence[int]]) -> Array:
    """Excludes the token that would complete one of the sequences ("bad words").

    A sequence of a single token is excluded always.

    Args:
      logits: [..., V].
      tokens: [..., T] int, the last token in the last slot.
      mask: [..., T] bool, real tokens.
      sequences: token sequences, not empty and static.
    Returns:
      [..., V]. At least one token must remain.
    Raises: ValueError for an empty sequence.

    >>> logits, tokens = jnp.zeros((1, 4)), jnp.array([[3, 1]])
    >>> forbid_sequences(logits, tokens, jnp.ones((1, 2), bool), ((1, 0), (2, 3), (2,))).tolist()
    [[-inf, 0.0, -inf, 0.0]]
    """
    for sequence in sequences:
        if not len(sequence):
            raise ValueError("an empty sequence forbids nothing; give at least one token")
        last = sequence[-1]
        logits = logits.at[..., last].set(jnp.where(_ends(tokens, mask, sequence[:-1]), -jnp.inf, logits[..., last]))
    return logits


def no_repeated_ngram(logits: Array, tokens: Array, mask: Array, n: int) -> Array:
    """Excludes tokens that would complete a sequence of n tokens which occurs already.

    Args:
      logits: [B, V].
      tokens: [B, T] int, the last token in the last slot.
      mask: [B, T] bool, real tokens; n-grams over padding do not count.
      n: length of the sequences, static; 1 excludes every token that occurs, n > T none.
    Returns:
      [B, V]. At least one token must remain.
    Raises: ValueError if n < 1.
    Reference: Paulus et al. 2018, section 2.5, https://arxiv.org/abs/1705.04304

    >>> no_repeated_ngram(jnp.zeros((1, 3)), jnp.array([[0, 2, 0]]), jnp.ones((1, 3), bool), 2).tolist()
    [[0.0, 0.0, -inf]]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    slots = tokens.shape[-1]
    if n > slots:
        return logits
    last = tokens[:, n - 1 :]  # [B, T - n + 1] the last token of every n-gram
    repeated = mask[:, n - 1 :]
    for i in range(n - 1):
        suffix = slots - n + 1 + i  # the i-th of the n - 1 most recent tokens
        same = tokens[:, i : i + last.shape[-1]] == tokens[:, suffix : suffix + 1]
        repeated = repeated & mask[:, i : i + last.shape[-1]] & mask[:, suffix : suffix + 1] & same
    rows = jnp.arange(tokens.shape[0])[:, None]
    return logits.at[rows, jnp.where(repeated, last, logits.shape[-1])].set(-jnp.inf, mode="drop")
