"""From a model's logits to one token per row and its log-probabilities: rules, then a warp, then the draw.

Everything that generates goes through `draw`, so that rules and warps mean the same everywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.history import History

__all__ = ["Choose", "Draw", "Rules", "Stop", "Warp", "draw", "greedy", "log_prob_of"]

Warp = Callable[[Array], Array]  # logits [B, V] -> logits [B, V]
Rules = Callable[[Array, History], Array]  # logits [B, V], what was written -> logits [B, V]
Choose = Callable[[Array, Array], Array]  # keys [B], logits [B, V] -> tokens [B]
Stop = Callable[[History], Array]  # what was written -> [B] bool


def greedy(keys: Array, logits: Array) -> Array:
    """The most likely token of each row; the keys are not used. keys [B], logits [B, V] -> [B] int32."""
    del keys
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


class Draw(NamedTuple):
    """One token per row, and how likely it was."""

    token: Array  # [B] int32
    log_prob: Array  # [B] under the distribution sampled from
    raw_log_prob: Array  # [B] under the model


def log_prob_of(logits: Array, token: Array) -> Array:
    """Log-probability of one token per row: logits [B, V], token [B] -> [B].

    >>> round(float(log_prob_of(jnp.zeros((1, 4)), jnp.array([2]))[0]), 4)
    -1.3863
    """
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def draw(
    keys: Array,
    logits: Array,
    *,
    history: History | None = None,
    rules: Rules | None = None,
    warp: Warp | None = None,
    choose: Choose = categorical,
) -> Draw:
    """Draws one token per row from warp(rules(logits)).

    Args:
      keys: [B] typed keys, one per row, consumed.
      logits: [B, V] of the model.
      history: what was written so far; the rules need it.
      rules: (logits [B, V], history) -> logits [B, V], applied first; None for none.
      warp: logits [B, V] -> logits [B, V]; None for none.
      choose: draws tokens [B] from (keys [B], logits [B, V]).
    Returns:
      `Draw`. Without rules and warp its two log-probs are the same.

    >>> drawn = draw(jax.random.split(jax.random.key(0), 1), jnp.array([[0.0, 9.0]]), choose=greedy)
    >>> drawn.token.tolist(), drawn.log_prob.round(4).tolist()
    ([1], [-0.0001])
    """
    ruled = logits if rules is None else rules(logits, history)  # type: ignore[arg-type]
    warped = ruled if warp is None else warp(ruled)
    token = choose(keys, warped)
    raw = log_prob_of(logits, token)
    return Draw(token, raw if warped is logits else log_prob_of(warped, token), raw)
