"""Rewards that are no JAX functions (Python, processes, servers), computed while the device already acts again.

JAX returns from a jitted call before the device is done with it. So a step first asks for the next rollout, then scores
the last one on the host meanwhile, and learns from it at the end:

    step = functools.partial(step_ahead, act=act, score=score, learn=learn)
    loop.run(step, init_ahead(state, act), range(100))

The policy that acts is then one step older than the one that learns. `Rollout.log_probs` are those of the policy that
acted, so every algorithm with a ratio (PPO's, GRPO's) corrects for it as it does for a second epoch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

__all__ = ["Ahead", "init_ahead", "step_ahead"]

Act = Callable[[Any, int], Any]


class Ahead(NamedTuple):
    """What a step takes and returns. A checkpoint of it resumes to the same numbers: the waiting rollout is in it."""

    state: Any  # what learns
    rollout: Any  # of the next step, not scored yet; a pytree of arrays


def init_ahead(state: Any, act: Act, *, index: int = 0) -> Ahead:
    """The state before step `index`, with a rollout of its own policy."""
    return Ahead(state, act(state, index))


def step_ahead(
    ahead: Ahead,
    index: int,
    *,
    act: Act,
    score: Callable[[Any], Any],
    learn: Callable[[Any, Any, Any], tuple[Any, Any]],
) -> tuple[Ahead, Any]:
    """One step: asks for rollout index + 1, scores rollout index on the host meanwhile, then learns from it.

    Args:
      ahead: from `init_ahead` or the step before.
      index: of the step.
      act: (state, index) -> rollout; jitted, so that it returns at once. The key of a rollout is folded from the index.
      score: rollout of NumPy arrays -> whatever `learn` takes; an ordinary function of the host.
      learn: (state, rollout, scores) -> (state, metrics); jitted. It may donate the state.
    Returns:
      The next `Ahead` and the metrics. Rollout index + 1 comes from the policy before this step's update; where `learn`
      changes nothing, all is as if acting and learning took turns.

    >>> act, score = lambda state, index: 10 * index + state, lambda rollout: -rollout
    >>> learn = lambda state, rollout, scores: (state + 1, (int(rollout), int(scores)))
    >>> step_ahead(init_ahead(0, act), 0, act=act, score=score, learn=learn)
    (Ahead(state=1, rollout=10), (0, 0))
    """
    following = act(ahead.state, index + 1)
    scores = score(jax.device_get(ahead.rollout))
    state, metrics = learn(ahead.state, ahead.rollout, scores)
    return Ahead(state, following), metrics
