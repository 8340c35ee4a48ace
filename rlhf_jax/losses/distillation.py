"""Policy distillation: a teacher's distribution as the target of a student's. Per token, unreduced.

P is the teacher's next-token distribution, softmax(teacher_logits / τ), Q the student's. The teacher is stopped in
every function. A token that the teacher forbids (logit -inf) contributes nothing; one that only the student forbids
makes the cross-entropy and the forward KL infinite, as the mathematics has it.

Logits [..., V] may also be action preferences of a game agent. For language models
`vocabulary_chunks.head_distillation` and `losses.head_divergences` give the same numbers from hidden states, without
[B, T, V]; `losses.sampled_distillation` needs the log-probs of sampled tokens only.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.logprobs import token_log_probs
from rlhf_jax.losses._pairs import check_integers, floating, knob

__all__ = [
    "forward_kl",
    "generalised_jsd",
    "hard_cross_entropy",
    "hinton_cross_entropy",
    "kickstarting",
    "reverse_kl",
    "soft_cross_entropy",
    "top_k_kl",
    "total_variation",
]


class _Pair(NamedTuple):
    teacher: Array  # [..., V] log P, stopped
    student: Array  # [..., V] log Q


def _log_probs(student_logits: Array, teacher_logits: Array, temperature: ArrayLike) -> _Pair:
    student_logits, teacher_logits = floating(student_logits=student_logits, teacher_logits=teacher_logits)
    temperature = knob(temperature, student_logits)
    return _Pair(
        jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature, axis=-1),
        jax.nn.log_softmax(student_logits / temperature, axis=-1),
    )


def _expected_difference(log_p: Array, log_x: Array, log_y: Array) -> Array:
    """Σ p (log x - log y), where p = 0 contributes 0 to the value and to every gradient."""
    possible = jnp.exp(log_p) > 0
    log_p, log_x, log_y = (jnp.where(possible, log, 0.0) for log in (log_p, log_x, log_y))
    return jnp.sum(jnp.where(possible, jnp.exp(log_p) * (log_x - log_y), 0.0), axis=-1)


# --- the whole vocabulary ---------------------------------------------------------------------------------------------


def hard_cross_entropy(student_logits: Array, teacher_logits: Array) -> Array:
    """Cross-entropy with the teacher's most likely token: -log Q(argmax P).

    The limit of `soft_cross_entropy` as the teacher alone is cooled to τ -> 0. The first of equal maxima counts.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], stopped.
    Returns:
      [...] loss per token, in nats.
    Reference: Kim and Rush 2016, who replace the teacher by its mode per sequence, https://arxiv.org/abs/1606.07947

    >>> round(float(hard_cross_entropy(jnp.zeros(4), jnp.array([0.0, 3.0, 1.0, 2.0]))), 4)
    1.3863
    """
    student_logits, teacher_logits = floating(student_logits=student_logits, teacher_logits=teacher_logits)
    return -token_log_probs(student_logits, jnp.argmax(teacher_logits, axis=-1))


def soft_cross_entropy(student_logits: Array, teacher_logits: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Cross-entropy with soft targets: H(P, Q) = -Σ_v P(v) log Q(v).

    Equals `forward_kl` plus the teacher's entropy, and has its gradient. No factor τ²: see `hinton_cross_entropy`.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], stopped.
      temperature: τ, divides both logits.
    Returns:
      [...] loss per token, in nats; at least the teacher's entropy.
    Reference: Hinton et al. 2015, section 2, https://arxiv.org/abs/1503.02531

    >>> round(float(soft_cross_entropy(jnp.array([1.0, 0.0]), jnp.zeros(2))), 4)
    0.8133
    """
    log_p, log_q = _log_probs(student_logits, teacher_logits, temperature)
    return _expected_difference(log_p, jnp.zeros_like(log_q), log_q)


def hinton_cross_entropy(student_logits: Array, teacher_logits: Array, *, temperature: ArrayLike = 2.0) -> Array:
    """Soft-target cross-entropy whose gradient keeps its size as τ grows: τ² H(P, Q).

    Gradients of soft targets shrink like 1 / τ²; the factor keeps their share beside a hard-target loss. As τ -> ∞ the
    gradient with respect to logits of mean zero is (student - teacher) / V. τ = 1 is `soft_cross_entropy`.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], stopped.
      temperature: τ, divides both logits.
    Returns:
      [...] loss per token.
    Reference: Hinton et al. 2015, sections 2 and 2.1, https://arxiv.org/abs/1503.02531

    >>> round(float(hinton_cross_entropy(jnp.zeros(2), jnp.zeros(2))), 4)
    2.7726
    """
    loss = soft_cross_entropy(student_logits, teacher_logits, temperature=temperature)
    return jnp.square(knob(temperature, loss)) * loss


def forward_kl(student_logits: Array, teacher_logits: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """KL of the student from the teacher: KL(P ‖ Q) = Σ_v P(v) (log P(v) - log Q(v)), mass-covering.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], stopped.
      temperature: τ, divides both logits.
    Returns:
      [...] divergence per token, in nats; 0 where P = Q.
    Reference: Agarwal et al. 2024, section 2, https://arxiv.org/abs/2306.13649

    >>> round(float(forward_kl(jnp.array([1.0, 0.0]), jnp.zeros(2))), 4)
    0.1201
    """
    log_p, log_q = _log_probs(student_logits, teacher_logits, temperature)
    return _expected_difference(log_p, log_p, log_q)


def reverse_kl(student_logits: Array, teacher_logits: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """KL of the teacher from the student: KL(Q ‖ P) = Σ_v Q(v) (log Q(v) - log P(v)), mode-seeking.

    Infinite where the student allows what the teacher forbids.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], stopped.
      temperature: τ, divides both logits.
    Returns:
      [...] divergence per token, in nats; 0 where P = Q.
    Reference: Gu et al. 2024 (MiniLLM), https://arxiv.org/abs/2306.08543

    >>> round(float(reverse_kl(jnp.array([1.0, 0.0]), jnp.zeros(2))), 4)
    0.1109
    """
    log_p, log_q = _log_probs(student_logits, teacher_logits, temperature)
    return _expected_difference(log_q, log_q, log_p)


def generalised_jsd(
    student_logits: Array, teacher_logits: Array, *, beta: ArrayLike = 0.5, temperature: ArrayLike = 1.0
) -> Array:
    """Generalised Jensen-Shannon divergence: β KL(P ‖ M) + (1 - β) KL(Q ‖ M) with M = β P + (1 - β) Q.

    Always finite, at most the entropy of (β, 1 - β). β = 1/2 is the Jensen-Shannon divergence, at most log 2. Divided
    by β it tends to `forward_kl` as β -> 0, divided by 1 - β to `reverse_kl` as β -> 1; at 0 and 1 it is 0.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], stopped.
      beta: β in (0, 1), weight of the teacher.
      temperature: τ, divides both logits.
    Returns:
      [...] divergence per token, in nats; 0 where P = Q.
    Reference: Agarwal et al. 2024 (GKD), section 2, https://arxiv.org/abs/2306.13649

    >>> round(float(generalised_jsd(jnp.array([1.0, 0.0]), jnp.zeros(2))), 4)
    0.0285
    """
    log_p, log_q = _log_probs(student_logits, teacher_logits, temperature)
    possible = jnp.isfinite(log_p) | jnp.isfinite(log_q)
    beta = knob(beta, log_q)
    log_m = _log_mixture(jnp.where(possible, log_p, 0.0), jnp.where(possible, log_q, 0.0), beta)
    return beta * _expected_difference(log_p, log_p, log_m) + (1.0 - beta) * _expected_difference(log_q, log_q, log_m)


def _log_mixture(log_p: Array, log_q: Array, beta: Array) -> Array:
    return jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)


def total_variation(student_logits: Array, teacher_logits: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Total variation distance: ½ Σ_v |P(v) - Q(v)|, the largest difference in the probability of any event.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], stopped.
      temperature: τ, divides both logits.
    Returns:
      [...] distance per token between 0 and 1; its square is at most KL / 2 (Pinsker), either way round.
    Reference: Wen et al. 2023 (f-distillation), https://arxiv.org/abs/2307.15190

    >>> round(float(total_variation(jnp.array([1.0, 0.0]), jnp.zeros(2))), 4)
    0.2311
    """
    log_p, log_q = _log_probs(student_logits, teacher_logits, temperature)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


# --- a teacher of which only the top is known -------------------------------------------------------------------------


def top_k_kl(student_logits: Array, teacher_indices: Array, teacher_log_probs: Array) -> Array:
    """Forward KL where only the teacher's k likeliest tokens are known; the others are lumped into one tail bucket.

    Σ_{v in top k} P(v) (log P(v) - log Q(v)) + P(tail) (log P(tail) - log Q(tail)), with P(tail) = 1 - Σ_{top k} P.
    Without the tail bucket a student could put any mass outside the top k. Lumping loses information, so this is at
    most `forward_kl`; k = V is `forward_kl` itself.

    Args:
      student_logits: [..., V].
      teacher_indices: [..., k] int ids, different within a row.
      teacher_log_probs: [..., k] their log-probs under the teacher's full softmax (they sum to at most 1); stopped.
    Returns:
      [...] divergence per token, in nats.
    Raises:
      TypeError: indices are not integers. ValueError: shapes do not match, or k > V.
    Reference: the bound is the log sum inequality, Cover and Thomas 2006, theorem 2.7.1.

    >>> round(float(top_k_kl(jnp.zeros(4), jnp.array([1]), jnp.log(jnp.array([0.7])))), 4)
    0.4457
    """
    check_integers("teacher_indices", teacher_indices)
    (student_logits,), (log_p,) = floating(student_logits=student_logits), floating(teacher_log_probs=teacher_log_probs)
    chex.assert_equal_shape([teacher_indices, log_p])
    log_p = jax.lax.stop_gradient(log_p)
    size, k = student_logits.shape[-1], log_p.shape[-1]
    if log_p.shape[:-1] != student_logits.shape[:-1] or k > size:
        raise ValueError(f"teacher arrays must be [..., k <= V] for logits {student_logits.shape}, got {log_p.shape}")
    log_q = jax.nn.log_softmax(student_logits, axis=-1)
    known = _expected_difference(log_p, log_p, jnp.take_along_axis(log_q, teacher_indices, axis=-1))
    if k == size:
        return known
    outside = jnp.put_along_axis(log_q, teacher_indices, -jnp.inf, axis=-1, inplace=False)
    log_q_tail = jax.nn.logsumexp(outside, axis=-1)
    tail = jnp.maximum(1.0 - jnp.sum(jnp.exp(log_p), axis=-1), 0.0)
    log_p_tail = jnp.log(jnp.where(tail > 0, tail, 1.0))
    return known + jnp.where(tail > 0, tail * (log_p_tail - log_q_tail), 0.0)


# --- together with another objective ----------------------------------------------------------------------------------


def kickstarting(
    policy_loss: Array,
    distillation_loss: Array,
    step: ArrayLike,
    *,
    weight: Callable[[ArrayLike], ArrayLike],
) -> Array:
    """A teacher that helps at the start and then lets go: policy_loss + λ(step) · distillation_loss.

    Args:
      policy_loss: [...] the student's own objective, for instance an actor-critic loss.
      distillation_loss: [...] divergence from the teacher on the student's trajectories, in the paper H(P, Q).
      step: [] training step.
      weight: λ, a function of the step such as an `optax` schedule; a schedule that ends at 0 ends the help.
    Returns:
      [...] policy_loss where λ = 0, so that the student may surpass its teacher.
    Reference: Schmitt et al. 2018, https://arxiv.org/abs/1803.03835

    >>> float(kickstarting(jnp.array(1.0), jnp.array(2.0), 3, weight=lambda step: 1.0 - step / 4))
    1.5
    """
    policy_loss, distillation_loss = floating(policy_loss=policy_loss, distillation_loss=distillation_loss)
    return policy_loss + knob(weight(step), policy_loss) * distillation_loss
