"""Divergences between a student and its teacher from the hidden states of both, in vocabulary chunks.

The forward KL comes from `vocabulary_chunks.head_distillation`, one pass over both output tables. The others are sums
Σ_v f(log P(v), log Q(v)) of normalised log-probs: a first pass finds the normalisers, a second one sums f, and the
gradient is a third. Conventions of arguments and limits are those of `vocabulary_chunks`: `table` is [V, D], a kernel
[D, V] goes with ``vocabulary_axis=1``, the teacher is stopped.
"""

from collections.abc import Callable

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
    block,
    cap_gradient,
    fold,
    init_softmax,
    make_heads,
    plan_chunks,
    unseen,
    update_softmax,
)
from rlhf_jax.teacher_chunks import head_distillation

__all__ = ["head_forward_kl", "head_generalised_jsd", "head_reverse_kl", "head_total_variation"]

Term = Callable[[Array, Array, Array], Array]
"""(log P, log Q, knob) -> contributions to the divergence, elementwise."""


def _normalisers(plan: Plan, student: Head, teacher: Head) -> tuple[Array, Array]:
    def step(both: tuple[Softmax, Softmax], index: Array) -> tuple[Softmax, Softmax]:
        ours = update_softmax(both[0], block(plan, student, index))[0]
        return ours, update_softmax(both[1], block(plan, teacher, index))[0]

    ours, theirs = fold(plan, step, (init_softmax(student), init_softmax(teacher)))
    return ours.log_normaliser, theirs.log_normaliser


def _forward(term: Term, plan: Plan, axes: tuple[int, int], student: Parts, teacher: Parts, knob: Array):
    """The divergence [N] and what the gradient needs: Σ_v ∂f/∂log Q among it."""
    head, teacher_head = Head(*student, axes[0]), Head(*teacher, axes[1])
    ours, theirs = _normalisers(plan, head, teacher_head)

    def step(sums: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        part = block(plan, head, index)
        log_q = part.logits - ours[:, None]
        log_p = block(plan, teacher_head, index).logits - theirs[:, None]
        terms, slopes = jax.jvp(lambda x: term(log_p, x, knob), (log_q,), (jnp.ones_like(log_q),))
        terms, slopes = unseen(part, terms, 0.0), unseen(part, slopes, 0.0)
        return sums[0] + jnp.sum(terms, axis=-1), sums[1] + jnp.sum(slopes, axis=-1)

    nothing = jnp.zeros(head.hidden.shape[0], head.dtype)
    divergence, slope = fold(plan, step, (nothing, nothing))
    return divergence, (student, teacher, knob, ours, theirs, slope)


def _value(term: Term, plan: Plan, axes: tuple[int, int], student: Parts, teacher: Parts, knob: Array) -> Array:
    return _forward(term, plan, axes, student, teacher, knob)[0]


Residuals = tuple[Parts, Parts, Array, Array, Array, Array]


def _backward(term: Term, plan: Plan, axes: tuple[int, int], residuals: Residuals, cotangent: Array):
    student, teacher, knob, ours, theirs, slope = residuals
    teacher_head = Head(*teacher, axes[1])

    def logits_gradient(index: Array, part: Block) -> Array:
        log_q = part.logits - ours[:, None]
        log_p = block(plan, teacher_head, index).logits - theirs[:, None]
        slopes = jax.jvp(lambda x: term(log_p, x, knob), (log_q,), (jnp.ones_like(log_q),))[1]
        return cotangent[:, None] * (slopes - slope[:, None] * jnp.exp(log_q))

    head = Head(*student, axes[0])
    gradient = backpropagate(plan, head, any_nonzero(cotangent), logits_gradient)
    return (*gradient, cap_gradient(head.cap)), None, None


_divergence = jax.custom_vjp(_value, nondiff_argnums=(0, 1, 2))
_divergence.defvjp(_forward, _backward)


def _head_divergence(
    term: Term,
    knob: ArrayLike,
    hidden: Array,
    table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    *,
    temperature: ArrayLike,
    soft_cap: ArrayLike | None,
    teacher_soft_cap: ArrayLike | None,
    vocabulary_axis: int,
    teacher_vocabulary_axis: int | None,
    chunk: int | None,
) -> Array:
    student, teacher, shape = make_heads(
        *(hidden, table, teacher_hidden, teacher_table),
        *(temperature, soft_cap, teacher_soft_cap, vocabulary_axis, teacher_vocabulary_axis),
    )
    plan = plan_chunks(student.table.shape[student.axis], student.hidden.shape[0], chunk)
    knob = jax.lax.stop_gradient(jnp.asarray(knob, student.dtype))
    flat = _divergence(term, plan, (student.axis, teacher.axis), student[:4], teacher[:4], knob)
    return flat.reshape(shape)


def _reverse_kl_term(log_p: Array, log_q: Array, _: Array) -> Array:
    return jnp.exp(log_q) * (log_q - log_p)


def _jsd_term(log_p: Array, log_q: Array, beta: Array) -> Array:
    log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
    return beta * jnp.exp(log_p) * (log_p - log_m) + (1.0 - beta) * jnp.exp(log_q) * (log_q - log_m)


def _total_variation_term(log_p: Array, log_q: Array, _: Array) -> Array:
    return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))


def head_forward_kl(
    hidden: Array,
    table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    *,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    teacher_soft_cap: ArrayLike | None = None,
    vocabulary_axis: int = 0,
    teacher_vocabulary_axis: int | None = None,
    chunk: int | None = None,
) -> Array:
    """KL(P ‖ Q) per token from hidden states, equal to `distillation.forward_kl` of the logits; P the teacher.

    It is `head_distillation`'s cross-entropy minus the teacher's entropy, so one call of that gives both and the
    log-probs of sampled tokens. Teacher and τ are stopped.

    Args:
      hidden: [..., D] the student's states (aligned: no shift here).
      table: [V, D] the student's output table; with ``vocabulary_axis=1`` a kernel [D, V].
      teacher_hidden: [..., D_T] the teacher's states; its width may differ.
      teacher_table: [V, D_T], of the same vocabulary.
      temperature: τ, divides both logits.
      soft_cap: c > 0, the student's logits become c · tanh(hidden · table / c) before τ divides them (Gemma 2); None
        leaves them alone. Stopped.
      teacher_soft_cap: the same of the teacher's logits; None does not mean as in `soft_cap`.
      vocabulary_axis: 0 or 1, where V lies in `table`; static.
      teacher_vocabulary_axis: the same for `teacher_table`; None means as in `table`.
      chunk: C, tokens of the vocabulary held at once, static; None chooses by the number of hidden states.
    Returns:
      [...] divergence per token, in nats.
    Raises:
      ValueError: for tables, axes or a chunk that do not fit.

    >>> table = jnp.array([[1.0], [0.0]])
    >>> round(float(head_forward_kl(jnp.ones(1), table, jnp.zeros(1), table)), 4)
    0.1201
    """
    hidden = jnp.asarray(hidden)
    both = head_distillation(
        hidden,
        table,
        teacher_hidden,
        teacher_table,
        jnp.zeros(hidden.shape[:-1], jnp.int32),
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocabulary_axis=vocabulary_axis,
        teacher_vocabulary_axis=teacher_vocabulary_axis,
        chunk=chunk,
    )
    return both.cross_entropy - both.teacher_entropy


def head_reverse_kl(
    hidden: Array,
    table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    *,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    teacher_soft_cap: ArrayLike | None = None,
    vocabulary_axis: int = 0,
    teacher_vocabulary_axis: int | None = None,
    chunk: int | None = None,
) -> Array:
    """KL(Q ‖ P) per token from hidden states, equal to `distillation.reverse_kl` of the logits; P the teacher.

    With a frozen reference policy as the teacher it is the exact KL penalty. Arguments and errors are those of
    `head_forward_kl`.

    Returns:
      [...] divergence per token, in nats.

    >>> table = jnp.array([[1.0], [0.0]])
    >>> round(float(head_reverse_kl(jnp.ones(1), table, jnp.zeros(1), table)), 4)
    0.1109
    """
    return _head_divergence(
        _reverse_kl_term,
        0.0,
        hidden,
        table,
        teacher_hidden,
        teacher_table,
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocabulary_axis=vocabulary_axis,
        teacher_vocabulary_axis=teacher_vocabulary_axis,
        chunk=chunk,
    )


def head_generalised_jsd(
    hidden: Array,
    table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    teacher_soft_cap: ArrayLike | None = None,
    vocabulary_axis: int = 0,
    teacher_vocabulary_axis: int | None = None,
    chunk: int | None = None,
) -> Array:
    """Generalised Jensen-Shannon divergence per token from hidden states, equal to `distillation.generalised_jsd`.

    Args:
      beta: β in (0, 1), weight of the teacher, stopped; the other arguments and the errors are those of
        `head_forward_kl`.
    Returns:
      [...] divergence per token, in nats.
    Reference: Agarwal et al. 2024 (GKD), section 2, https://arxiv.org/abs/2306.13649

    >>> table = jnp.array([[1.0], [0.0]])
    >>> round(float(head_generalised_jsd(jnp.ones(1), table, jnp.zeros(1), table)), 4)
    0.0285
    """
    return _head_divergence(
        _jsd_term,
        beta,
        hidden,
        table,
        teacher_hidden,
        teacher_table,
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocabulary_axis=vocabulary_axis,
        teacher_vocabulary_axis=teacher_vocabulary_axis,
        chunk=chunk,
    )


def head_total_variation(
    hidden: Array,
    table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    *,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    teacher_soft_cap: ArrayLike | None = None,
    vocabulary_axis: int = 0,
    teacher_vocabulary_axis: int | None = None,
    chunk: int | None = None,
) -> Array:
    """Total variation distance per token from hidden states, equal to `distillation.total_variation` of the logits.

    Arguments and errors are those of `head_forward_kl`.

    Returns:
      [...] distance per token, between 0 and 1.

    >>> table = jnp.array([[1.0], [0.0]])
    >>> round(float(head_total_variation(jnp.ones(1), table, jnp.zeros(1), table)), 4)
    0.2311
    """
    return _head_divergence(
        _total_variation_term,
        0.0,
        hidden,
        table,
        teacher_hidden,
        teacher_table,
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocabulary_axis=vocabulary_axis,
        teacher_vocabulary_axis=teacher_vocabulary_axis,
        chunk=chunk,
    )
