"""Scripted teachers: programs that compare two segments of play, or judge single steps late, the way people do.

They stand in for people where a true return is known, so that a method can be measured under every kind of imperfect
feedback. What they say is *scripted feedback* and has to be called so wherever it is reported.

A segment is T steps with a bool mask (an episode may end within it). `compare` follows the simulated teachers of BPref:
a Boltzmann-rational choice by the myopic return, then mistakes, then "equal" and "skip".
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import floating
from rlhf_jax.types import PreferenceBatch

__all__ = [
    "Answers",
    "Signals",
    "compare",
    "delayed_signals",
    "preference_batch",
    "return_threshold",
    "segment_returns",
]


class Answers(NamedTuple):
    """What a teacher said about pairs of segments."""

    first_wins: Array  # [...] float32, 1 the first is better, 0 the second, 1/2 they are equal
    given: Array  # [...] bool, False where the teacher skipped the question


def segment_returns(rewards: Array, mask: Array, *, myopia: ArrayLike = 1.0) -> Array:
    """What a teacher thinks a segment is worth: Σ_t γ^(steps after t) r_t, so that the end counts most.

    Args:
      rewards: [..., T] true rewards.
      mask: [..., T] bool, the steps of the segment.
      myopia: γ in [0, 1]; 1 is the plain sum, 0 sees the last step alone.
    Returns:
      [...] returns; an empty segment is worth 0.
    Raises: TypeError for integer rewards or a mask that is not bool, AssertionError if shapes differ.
    Reference: Lee et al. 2021 (BPref), eq. 3, https://arxiv.org/abs/2111.03026

    >>> float(segment_returns(jnp.array([1.0, 1.0, 9.0]), jnp.array([True, True, False]), myopia=0.5))
    1.5
    """
    (rewards,) = floating(rewards=rewards)
    (rewards,) = masking.zero_outside(mask, rewards)
    steps_after = jnp.cumsum(mask[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1] - 1
    weights = jnp.asarray(myopia, rewards.dtype) ** jnp.maximum(steps_after, 0)
    return masking.masked_sum(weights * rewards, mask, axis=-1)


def return_threshold(
    fraction: ArrayLike, mean_episode_return: Array, *, segment: ArrayLike, episode: ArrayLike
) -> Array:
    """A threshold that grows with the agent: fraction · mean return · segment / episode.

    What is "almost equal" or "not worth a look" depends on how well the agent plays. Set it anew from the latest
    episodes; do not multiply a threshold again.

    Args:
      fraction: of the return that a mean segment has.
      mean_episode_return: [] of the latest episodes.
      segment: steps of a segment.
      episode: steps of an episode.
    Reference: Lee et al. 2021 (BPref), https://arxiv.org/abs/2111.03026

    >>> round(float(return_threshold(0.1, jnp.array(200.0), segment=50, episode=500)), 3)
    2.0
    """
    return jnp.asarray(fraction * mean_episode_return * (jnp.asarray(segment, jnp.float32) / episode))


def compare(
    first_returns: Array,
    second_returns: Array,
    key: Array,
    *,
    rationality: ArrayLike = jnp.inf,
    mistakes: ArrayLike = 0.0,
    equal_within: ArrayLike = 0.0,
    skip_below: ArrayLike = -jnp.inf,
) -> Answers:
    """Which of two segments is better, as an imperfect teacher says: P(first) = σ(β (R₁ - R₂)).

    Then the choice is turned round with probability `mistakes`; pairs closer than `equal_within` are called equal,
    whatever was chosen; pairs of which neither is worth `skip_below` are skipped.

    Args:
      first_returns, second_returns: [...] what the teacher thinks of the segments, see `segment_returns`.
      key: consumed.
      rationality: β >= 0 per unit of return; infinity always prefers the larger, 0 tosses a coin. Equal returns are a
        coin toss at any β unless `equal_within` is above 0.
      mistakes: probability in [0, 1] of saying the opposite.
      equal_within: returns less than this apart are equal; see `return_threshold`.
      skip_below: a question is skipped if the larger return is below this.
    Returns:
      Answers(first_wins, given).
    Raises: TypeError for integer returns, AssertionError if shapes differ.
    Reference: Lee et al. 2021 (BPref), section 4, https://arxiv.org/abs/2111.03026

    >>> answers = compare(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.2]), jax.random.key(0), equal_within=0.5)
    >>> answers.first_wins.tolist()
    [1.0, 0.5]
    """
    first, second = floating(first_returns=first_returns, second_returns=second_returns)
    chex.assert_equal_shape([first, second])
    choice_key, mistake_key = jax.random.split(key)
    difference = first - second
    # 0 · inf is NaN: equal returns are a coin toss at any rationality.
    logit = jnp.where(difference == 0, 0.0, difference) * jnp.where(difference == 0, 0.0, rationality)
    chosen = jax.random.bernoulli(choice_key, jax.nn.sigmoid(logit))
    chosen ^= jax.random.bernoulli(mistake_key, mistakes, difference.shape)
    first_wins = jnp.where(jnp.abs(difference) < equal_within, 0.5, chosen.astype(jnp.float32))
    return Answers(first_wins, jnp.maximum(first, second) >= skip_below)


def preference_batch(first: object, second: object, answers: Answers) -> PreferenceBatch:
    """Answers as pairs for `algorithms.reward_model`: every pair in both orders, weighted by how far it was chosen.

    A tie is half a vote for either side; a skipped question weighs nothing.

    Args:
      first, second: pytrees with leading axis N, what the scorer takes.
      answers: of [N].
    Returns:
      PreferenceBatch of 2N pairs, whose weights sum to the number of answers given.

    >>> answers = Answers(jnp.array([1.0, 0.5]), jnp.array([True, True]))
    >>> preference_batch(jnp.arange(2), jnp.arange(2), answers).weight.tolist()
    [1.0, 0.5, 0.0, 0.5]
    """
    join = lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
    given = answers.given.astype(jnp.float32)
    weight = jnp.concatenate([given * answers.first_wins, given * (1.0 - answers.first_wins)])
    return PreferenceBatch(join(first, second), join(second, first), weight)


class Signals(NamedTuple):
    """Judgements of single steps, late and now and then."""

    values: Array  # [..., T] the judgement that step t caused; 0 where none was given
    times: Array  # [..., T] seconds at which it was given: the end of step t plus the reaction time
    given: Array  # [..., T] bool


def delayed_signals(
    judgements: Array,
    key: Array,
    *,
    frequency: ArrayLike = 0.5,
    step_seconds: ArrayLike = 0.2,
    fastest: ArrayLike = 0.2,
    slowest: ArrayLike = 0.6,
) -> Signals:
    """A person at the button: judges a share of the steps, each after a reaction time uniform in [fastest, slowest].

    Args:
      judgements: [..., T] what the person would say about every step at once.
      key: consumed.
      frequency: probability in [0, 1] that a step is judged at all.
      step_seconds: how long a step lasts; step t takes place from t · step_seconds on.
      fastest, slowest: reaction times in seconds.
    Returns:
      Signals(values, times, given). The learner sees values and times, not which step caused them.
    Raises: TypeError for integer judgements.
    Reference: Knox and Stone 2009, https://doi.org/10.1145/1597735.1597738

    >>> signals = delayed_signals(jnp.ones(2), jax.random.key(0), frequency=1.0, fastest=0.3, slowest=0.3)
    >>> [round(t, 3) for t in signals.times.tolist()]
    [0.5, 0.7]
    """
    (judgements,) = floating(judgements=judgements)
    given_key, delay_key = jax.random.split(key)
    given = jax.random.bernoulli(given_key, frequency, judgements.shape)
    spread = jax.random.uniform(delay_key, judgements.shape, judgements.dtype)
    ends = (jnp.arange(judgements.shape[-1], dtype=judgements.dtype) + 1.0) * step_seconds
    times = jnp.broadcast_to(ends, judgements.shape) + fastest + spread * (jnp.asarray(slowest) - fastest)
    return Signals(jnp.where(given, judgements, 0.0), times, given)
