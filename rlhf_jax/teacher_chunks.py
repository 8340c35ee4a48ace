"""A student's next-token distribution against its teacher's, from the hidden states of both, in vocabulary chunks.

One scan visits both output tables together: everything that distillation with human feedback needs per token comes from
it, with four products forward and backward together (both logits, and the student's table averaged under both
distributions). The conventions are those of `vocabulary_chunks`; the teacher is stopped.
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
    make_heads,
    mixture,
    plan_chunks,
    unseen,
    update_softmax,
)

__all__ = ["HeadDistillation", "head_distillation", "head_soft_cross_entropy"]


Residuals = tuple[Parts, Parts, Array, Array, Array, tuple[Array, Array]]


class HeadDistillation(NamedTuple):
    """What one pass over both vocabularies tells about a student and its teacher, per token."""

    cross_entropy: Array  # [...] H(π_T, π_S) = -Σ π_T log π_S
    log_probs: Array  # [...] log π_S of the given tokens
    teacher_log_probs: Array  # [...] log π_T of the given tokens, stopped
    teacher_entropy: Array  # [...] H(π_T), stopped; cross_entropy - teacher_entropy = KL(π_T ‖ π_S)


class _Sums(NamedTuple):
    student: Softmax
    teacher: Softmax
    cross: Array  # [N] Σ w_T (student logit - student maximum), with w = exp(logit - maximum)
    own: Array  # [N] Σ w_T (teacher logit - teacher maximum)
    student_mean: Array  # [N, D] Σ w_S e, with the student's embeddings e, bent by its cap
    teacher_mean: Array  # [N, D] Σ w_T e


def _pass(plan: Plan, student: Head, teacher: Head, tokens: Array) -> tuple[HeadDistillation, _Sums]:
    def step(sums: _Sums, index: Array) -> _Sums:
        ours, theirs = block(plan, student, index), block(plan, teacher, index)
        ours_softmax, ours_done = update_softmax(sums.student, ours)
        theirs_softmax, theirs_done = update_softmax(sums.teacher, theirs)
        weights, decay = theirs_done.weights, theirs_done.decay
        cross = unseen(ours, ours.logits - ours_softmax.maximum[:, None], 0.0)
        own = unseen(theirs, theirs.logits - theirs_softmax.maximum[:, None], 0.0)
        return _Sums(
            ours_softmax,
            theirs_softmax,
            decay * (sums.cross + ours_done.shift * sums.teacher.total) + jnp.sum(weights * cross, axis=-1),
            decay * (sums.own + theirs_done.shift * sums.teacher.total) + jnp.sum(weights * own, axis=-1),
            ours_done.decay[:, None] * sums.student_mean
            + mixture(student, bent(ours, ours_done.weights), ours.embeddings),
            decay[:, None] * sums.teacher_mean
            + mixture(student, bent(ours, weights.astype(student.dtype)), ours.embeddings),
        )

    nothing, nowhere = jnp.zeros(student.hidden.shape[0], teacher.dtype), jnp.zeros(student.hidden.shape, student.dtype)
    start = _Sums(init_softmax(student), init_softmax(teacher), nothing, nothing, nowhere, nowhere)
    sums = fold(plan, step, start)
    total = sums.teacher.total
    log_probs, teacher_log_probs = (
        chosen_tokens(head, tokens).logits - softmax.log_normaliser
        for head, softmax in ((student, sums.student), (teacher, sums.teacher))
    )
    cross_entropy = jnp.log(sums.student.total) - sums.cross / total
    return HeadDistillation(cross_entropy, log_probs, teacher_log_probs, jnp.log(total) - sums.own / total), sums


def _distillation_value(plan: Plan, axes: tuple[int, int], student: Parts, teacher: Parts, tokens: Array):
    return _pass(plan, Head(*student, axes[0]), Head(*teacher, axes[1]), tokens)[0]


def _distillation_forward(plan: Plan, axes: tuple[int, int], student: Parts, teacher: Parts, tokens: Array):
    head = Head(*student, axes[0])
    result, sums = _pass(plan, head, Head(*teacher, axes[1]), tokens)
    mean = sums.student_mean / sums.student.total[:, None]
    slopes = (  # ∂ / ∂ hidden of cross_entropy and log_probs
        head.scale * (mean - sums.teacher_mean / sums.teacher.total[:, None]),
        head.scale * (chosen_tokens(head, tokens).slopes - mean),
    )
    return result, (student, teacher, tokens, sums.student.log_normaliser, sums.teacher.log_normaliser, slopes)


def _distillation_backward(plan: Plan, axes: tuple[int, int], residuals: Residuals, cotangents: HeadDistillation):
    student, teacher, tokens, log_normaliser, teacher_log_normaliser, slopes = residuals
    head, teacher_head = Head(*student, axes[0]), Head(*teacher, axes[1])
    given = (cotangents.cross_entropy, cotangents.log_probs)
    used = any_nonzero(*given)
    for_cross, for_log_probs = (x[:, None] for x in given)
    # A row may use one of the two only, and the other's slope may then be NaN (a token outside the vocabulary).
    hidden = jnp.where(for_cross != 0, for_cross * slopes[0], 0.0)
    hidden = hidden + jnp.where(for_log_probs != 0, for_log_probs * slopes[1], 0.0)

    def logits_gradient(index: Array, part: Block) -> Array:
        probs = jnp.exp(part.logits - log_normaliser[:, None])
        teacher_probs = jnp.exp(block(plan, teacher_head, index).logits - teacher_log_normaliser[:, None])
        chosen = part.ids[None] == tokens[:, None]
        return for_cross * (probs - teacher_probs) + for_log_probs * (chosen - probs)

    table = backpropagate(plan, head, used, logits_gradient).table
    constants = jnp.zeros_like(head.scale), cap_gradient(head.cap)
    return (hidden.astype(head.hidden.dtype), table, *constants), None, None


_distillation = jax.custom_vjp(_distillation_value, nondiff_argnums=(0, 1))
_distillation.defvjp(_distillation_forward, _distillation_backward)


def head_distillation(
    hidden: Array,
    table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    tokens: Array,
    *,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    teacher_soft_cap: ArrayLike | None = None,
    vocabulary_axis: int = 0,
    teacher_vocabulary_axis: int | None = None,
    chunk: int | None = None,
) -> HeadDistillation:
    """Soft-target cross-entropy, both log-probs of the tokens, and the teacher's entropy, without any logits kept.

    With π = softmax(hidden · tableᵀ / τ) for student and teacher. The fields equal `soft_cross_entropy`,
    `token_log_probs` and `entropy` of the logits; the gradients of hidden and table do, too. The teacher's arrays are
    stopped, and so is τ. All fields together cost what the cross-entropy alone costs.

    Args:
      hidden: [..., D] the student's states that predict `tokens` (aligned: no shift here).
      table: [V, D] the student's output table; with ``vocabulary_axis=1`` a kernel [D, V].
      teacher_hidden: [..., D_T] the teacher's states; its width may differ.
      teacher_table: [V, D_T], of the same vocabulary.
      tokens: [...] int ids; one outside [0, V) gives NaN log-probs.
      temperature: τ, divides both logits; see `hinton_cross_entropy` for the factor τ².
      soft_cap: c > 0, the student's logits become c · tanh(hidden · table / c) before τ divides them (Gemma 2); None
        leaves them alone. Stopped.
      teacher_soft_cap: the same of the teacher's logits; None does not mean as in `soft_cap`.
      vocabulary_axis: 0 or 1, where V lies in `table`; static.
      teacher_vocabulary_axis: the same for `teacher_table`; None means as in `table`.
      chunk: C, tokens of the vocabulary held at once, static; None chooses by the number of hidden states.
    Returns:
      HeadDistillation of [...] arrays.
    Raises:
      ValueError: for tables, tokens, axes or a chunk that do not fit. TypeError: for tokens that are not integers.
    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531

    >>> table = jnp.array([[1.0], [0.0]])
    >>> both = head_distillation(jnp.ones(1), table, 0 * jnp.ones(1), table, jnp.array(0))
    >>> round(float(both.cross_entropy), 4), round(float(both.teacher_entropy), 4)
    (0.8133, 0.6931)
    """
    student, teacher, shape = make_heads(
        *(hidden, table, teacher_hidden, teacher_table),
        *(temperature, soft_cap, teacher_soft_cap, vocabulary_axis, teacher_vocabulary_axis),
    )
    plan = plan_chunks(student.table.shape[student.axis], student.hidden.shape[0], chunk)
    ids = flat_tokens(tokens, shape)
    result = _distillation(plan, (student.axis, teacher.axis), student[:4], teacher[:4], ids)
    result = result._replace(
        teacher_log_probs=jax.lax.stop_gradient(result.teacher_log_probs),
        teacher_entropy=jax.lax.stop_gradient(result.teacher_entropy),
    )
    return HeadDistillation(*(x.reshape(shape) for x in result))


def head_soft_cross_entropy(
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
    """Soft-target cross-entropy from hidden states: H(π_T, π_S) = -Σ_v π_T(v) log π_S(v), in vocabulary chunks.

    Its gradient is that of the forward KL(π_T ‖ π_S). Arguments and limits are those of `head_distillation`, which
    gives the log-probs of sampled tokens at no further cost.

    Returns:
      [...] cross-entropy per token, in nats; at least the teacher's entropy, reached where the two agree.

    >>> table = jnp.array([[1.0], [0.0]])
    >>> round(float(head_soft_cross_entropy(jnp.ones(1), table, jnp.zeros(1), table)), 4)
    0.8133
    """
    hidden = jnp.asarray(hidden)
    return head_distillation(
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
    ).cross_entropy
