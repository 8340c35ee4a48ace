"""Statistics of the next-token distribution straight from hidden states and the output table, in vocabulary chunks.

[B, T, V] never exists, neither forward nor backward: a scan visits the table in chunks of C tokens, holds [B·T, C]
logits, and keeps running sums, as memory-efficient attention does. The gradient of a log-probability with respect to
the hidden state, e_y - Σ_v p_v e_v, is one more running sum of the same pass: with a frozen table, forward and backward
cost what dense autodiff costs, two products. The table's gradient is a separate pass that recomputes the logits;
`jax.jit` removes it where nobody asks for it. A vocabulary that fits into one chunk is not recomputed.

Conventions: `table` is [V, D], the rows that hidden states are multiplied with (a tied embedding, used as it lies,
never transposed). A Dense kernel [D, V] is passed with ``vocabulary_axis=1``. Inputs are aligned (see
`logprobs.predictions` for the shift). Sums are float32 also for bfloat16 inputs. A slot whose cotangent is exactly 0,
because it is masked later, adds nothing to any gradient, even if its hidden state is NaN. Derivatives are reverse-mode
only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax._chunked_head import (
    Block,
    Head,
    Parts,
    Plan,
    Softmax,
    any_nonzero,
    backpropagate,
    bent,
    block,
    cap_gradient,
    chosen_tokens,
    flat_tokens,
    fold,
    init_softmax,
    make_head,
    mixture,
    plan_chunks,
    scale_gradient,
    unseen,
    update_softmax,
)
from rlhf_jax.teacher_chunks import HeadDistillation, head_distillation, head_soft_cross_entropy

__all__ = [
    "HeadDistillation",
    "HeadStatistics",
    "head_distillation",
    "head_log_probs",
    "head_soft_cross_entropy",
    "head_statistics",
]


# --- log-probabilities ------------------------------------------------------------------------------------------------


def _log_probs_value(plan: Plan, axis: int, parts: Parts, tokens: Array) -> Array:
    head = Head(*parts, axis)
    softmax = fold(plan, lambda s, i: update_softmax(s, block(plan, head, i))[0], init_softmax(head))
    return chosen_tokens(head, tokens).logits - softmax.log_normaliser


def _log_probs_forward(plan: Plan, axis: int, parts: Parts, tokens: Array):
    head = Head(*parts, axis)

    def step(carry: tuple[Softmax, Array], index: Array) -> tuple[Softmax, Array]:
        softmax, expected = carry
        part = block(plan, head, index)
        softmax, done = update_softmax(softmax, part)
        return softmax, expected * done.decay[:, None] + mixture(head, bent(part, done.weights), part.embeddings)

    softmax, expected = fold(plan, step, (init_softmax(head), jnp.zeros(head.hidden.shape, head.dtype)))
    chosen = chosen_tokens(head, tokens)
    slope = head.scale * (chosen.slopes - expected / softmax.total[:, None])  # ∂ log_probs / ∂ hidden
    return chosen.logits - softmax.log_normaliser, (parts, tokens, softmax.log_normaliser, slope)


def _log_probs_backward(plan: Plan, axis: int, residuals: tuple[Parts, Array, Array, Array], cotangent: Array):
    parts, tokens, log_normaliser, slope = residuals
    head, used = Head(*parts, axis), any_nonzero(cotangent)
    hidden_gradient = jnp.where(used[:, None], cotangent[:, None] * slope, 0.0)

    def logits_gradient(_: Array, part: Block) -> Array:
        probs = jnp.exp(part.logits - log_normaliser[:, None])
        return cotangent[:, None] * ((part.ids[None] == tokens[:, None]) - probs)

    gradient = backpropagate(plan, head, used, logits_gradient)
    scale = scale_gradient(head, hidden_gradient) if head.cap is None else gradient.scale
    return (hidden_gradient.astype(head.hidden.dtype), gradient.table, scale, cap_gradient(head.cap)), None


_log_probs = jax.custom_vjp(_log_probs_value, nondiff_argnums=(0, 1))
_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def head_log_probs(
    hidden: Array,
    table: Array,
    tokens: Array,
    *,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    vocabulary_axis: int = 0,
    chunk: int | None = None,
) -> Array:
    """Log-probability of each token from hidden states: log softmax(hidden · tableᵀ / τ)[token], without the logits.

    Equals ``token_log_probs(hidden @ table.T, tokens)`` in value and in the gradients of hidden, table and τ.

    Args:
      hidden: [..., D] states that predict `tokens` (aligned: no shift here).
      table: [V, D], for instance a tied embedding; with ``vocabulary_axis=1`` a kernel [D, V].
      tokens: [...] int ids; one outside [0, V) gives NaN.
      temperature: τ, divides the logits.
      soft_cap: c > 0, logits become c · tanh(hidden · table / c) before τ divides them (Gemma 2), stopped; None leaves
        them alone, as c -> infinity does.
      vocabulary_axis: 0 or 1, where V lies in `table`; static.
      chunk: C, tokens of the vocabulary held at once, static; None chooses by the number of hidden states.
    Returns:
      [...] float32 log-probs (float64 for float64 inputs).
    Raises:
      ValueError: for a table, tokens, axis or chunk that does not fit. TypeError: for tokens that are not integers.
    Reference: Wijmans et al. 2024, https://arxiv.org/abs/2411.09009, for a cross-entropy that never holds all logits

    >>> hidden, table = jnp.array([1.0, 0.0]), jnp.array([[2.0, 5.0], [0.0, 5.0], [1.0, 5.0]])
    >>> round(float(head_log_probs(hidden, table, jnp.array(0))), 4)
    -0.4076
    """
    head, shape = make_head(hidden, table, temperature, soft_cap, vocabulary_axis)
    plan = plan_chunks(head.table.shape[head.axis], head.hidden.shape[0], chunk)
    return _log_probs(plan, head.axis, head[:4], flat_tokens(tokens, shape)).reshape(shape)


# --- log-probabilities, entropy, concentration ------------------------------------------------------------------------


class HeadStatistics(NamedTuple):
    """What one pass over the vocabulary tells about each next-token distribution."""

    log_probs: Array  # [...] of the given tokens
    entropy: Array  # [...] nats
    sum_of_squared_probs: Array  # [...] Σ p²
    log_normaliser: Array  # [...] log Σ exp(logit / τ)


class _Sums(NamedTuple):
    softmax: Softmax
    logit: Array  # [N] Σ w (logit - maximum), with w = exp(logit - maximum)
    square: Array  # [N] Σ w²


def _statistics_value(plan: Plan, axis: int, parts: Parts, tokens: Array):
    head = Head(*parts, axis)

    def step(sums: _Sums, index: Array) -> _Sums:
        part = block(plan, head, index)
        softmax, done = update_softmax(sums.softmax, part)
        centred = unseen(part, part.logits - softmax.maximum[:, None], 0.0)
        logit = done.decay * (sums.logit + done.shift * sums.softmax.total) + jnp.sum(done.weights * centred, axis=-1)
        return _Sums(softmax, logit, jnp.square(done.decay) * sums.square + jnp.sum(jnp.square(done.weights), axis=-1))

    nothing = jnp.zeros(head.hidden.shape[0], head.dtype)
    softmax, logit, square = fold(plan, step, _Sums(init_softmax(head), nothing, nothing))
    log_probs = chosen_tokens(head, tokens).logits - softmax.log_normaliser
    entropy = jnp.log(softmax.total) - logit / softmax.total
    return HeadStatistics(log_probs, entropy, square / jnp.square(softmax.total), softmax.log_normaliser)


def _statistics_forward(plan: Plan, axis: int, parts: Parts, tokens: Array):
    statistics = _statistics_value(plan, axis, parts, tokens)
    return statistics, (parts, tokens, statistics)


def _statistics_backward(
    plan: Plan, axis: int, residuals: tuple[Parts, Array, HeadStatistics], cotangents: HeadStatistics
):
    parts, tokens, statistics = residuals
    for_log_probs, for_entropy, for_squares, for_normaliser = (x[:, None] for x in cotangents)
    _, entropy, squares, log_normaliser = (x[:, None] for x in statistics)

    def logits_gradient(_: Array, part: Block) -> Array:
        log_probs = part.logits - log_normaliser
        probs = jnp.exp(log_probs)
        slope = for_normaliser - for_log_probs - for_entropy * (log_probs + entropy)
        slope = slope + 2 * for_squares * (probs - squares)
        return for_log_probs * (part.ids[None] == tokens[:, None]) + probs * slope

    head = Head(*parts, axis)
    gradient = backpropagate(plan, head, any_nonzero(*cotangents), logits_gradient)
    return (*gradient, cap_gradient(head.cap)), None


_statistics = jax.custom_vjp(_statistics_value, nondiff_argnums=(0, 1))
_statistics.defvjp(_statistics_forward, _statistics_backward)


def head_statistics(
    hidden: Array,
    table: Array,
    tokens: Array,
    *,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    vocabulary_axis: int = 0,
    chunk: int | None = None,
) -> HeadStatistics:
    """Log-probs of tokens, entropy, Σ p² and log normaliser from hidden states, in one pass over the vocabulary.

    Equals `token_log_probs`, `entropy`, `sum_of_squared_probs` and `log_normaliser` of the logits, in value and in the
    gradients of hidden, table and τ. The gradient takes one product more than that of `head_log_probs`; without a
    gradient both cost one product.

    Args:
      hidden: [..., D] states that predict `tokens` (aligned: no shift here).
      table: [V, D], for instance a tied embedding; with ``vocabulary_axis=1`` a kernel [D, V].
      tokens: [...] int ids; one outside [0, V) gives a NaN log-prob.
      temperature: τ, divides the logits.
      soft_cap: c > 0, logits become c · tanh(hidden · table / c) before τ divides them (Gemma 2), stopped; None leaves
        them alone, as c -> infinity does.
      vocabulary_axis: 0 or 1, where V lies in `table`; static.
      chunk: C, tokens of the vocabulary held at once, static; None chooses by the number of hidden states.
    Returns:
      HeadStatistics of [...] arrays.
    Raises:
      ValueError: for a table, tokens, axis or chunk that does not fit. TypeError: for tokens that are not integers.
    Reference: as `head_log_probs`; the running sums, Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867

    >>> statistics = head_statistics(jnp.zeros(2), jnp.ones((4, 2)), jnp.array(3))
    >>> [round(float(x), 4) for x in statistics]
    [-1.3863, 1.3863, 0.25, 1.3863]
    """
    head, shape = make_head(hidden, table, temperature, soft_cap, vocabulary_axis)
    plan = plan_chunks(head.table.shape[head.axis], head.hidden.shape[0], chunk)
    flat = _statistics(plan, head.axis, head[:4], flat_tokens(tokens, shape))
    return HeadStatistics(*(x.reshape(shape) for x in flat))
