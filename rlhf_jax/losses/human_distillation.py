"""Policy distillation with human feedback: a teacher π_T, a student π_S, and people who rate what is said with r(y).

A reward is a number that does not depend on the student's parameters: added to a loss it has no gradient. It acts where
it reweights the target, the samples or the advantage. The exact forms, all stopped in teacher, rewards and weights:

============================================  ==============================  ==========================================
form                                          needs                           optimum over all students
============================================  ==============================  ==========================================
(a) `human_reweighted_cross_entropy`          r of every candidate            π_T exp(r / β) / Z
(b) `human_reverse_kl_rewards`                samples of the student          π_T exp(r / β) / Z
(c) `reward_weighted_cross_entropy`           samples of the teacher          π_T exp(r / β) / Z
(d) `human_soft_targets`                      samples of the teacher, both    π_T exp(r / β) / Z
                                              full distributions
============================================  ==============================  ==========================================

(a), (c) and (d) minimise KL(π* ‖ π_S), (b) minimises KL(π_S ‖ π*), with π* = π_T exp(r / β) / Z: they differ only where
the student cannot express π*. β -> ∞ is plain distillation in all of them, β -> 0 keeps only what people like best.

(c) and (d) take one weight per sequence (`human_weights`), or one per token (`human_step_weights`), which says at which
token the sequence became what people like: the same optimum, and far less luck in few samples.

**What does not work** is weighting the soft-target cross-entropy, w(y) H(π_T, π_S)(s_t): the weight multiplies every
token of the target alike, so at each prefix the best answer is still π_T, whatever people said. Only a student with
shared parameters feels it, as a change of which prefixes matter.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating, knob
from rlhf_jax.losses.distillation import soft_cross_entropy
from rlhf_jax.masking import check_mask, masked_mean
from rlhf_jax.returns import at_next_valid, clean

__all__ = [
    "human_reverse_kl_rewards",
    "human_reweighted_cross_entropy",
    "human_soft_targets",
    "human_step_weights",
    "human_teacher_logits",
    "human_weights",
    "reward_weighted_cross_entropy",
]


# --- (a) the teacher, reweighted by people ----------------------------------------------------------------------------


def human_teacher_logits(teacher_logits: Array, rewards: Array, *, beta: ArrayLike) -> Array:
    """Log-probs of the human-reweighted teacher: log π*(a) = log π_T(a) + r(a) / β - log Z.

    π* maximises E[r] - β KL(π ‖ π_T). Adding a constant to all rewards of a row changes nothing; equal rewards or
    β -> ∞ give the teacher back. Teacher and rewards are stopped.

    Args:
      teacher_logits: [..., A] over candidates: tokens, actions, or whole answers by their summed log-probs.
      rewards: [..., A] human reward of every candidate; a missing one is NaN and makes its row NaN.
      beta: β > 0, reward per nat.
    Returns:
      [..., A] normalised log-probs, to be used as logits of a target.
    Raises:
      TypeError: rewards are not floating. AssertionError: shapes differ.
    Reference: Korbak et al. 2022, https://arxiv.org/abs/2205.11275; Rafailov et al. 2023, eq. 4,
      https://arxiv.org/abs/2305.18290

    >>> target = human_teacher_logits(jnp.zeros(2), jnp.array([1.0, 0.0]), beta=1.0)
    >>> [round(p, 4) for p in jnp.exp(target).tolist()]
    [0.7311, 0.2689]
    """
    teacher_logits, rewards = jax.lax.stop_gradient(floating(teacher_logits=teacher_logits, rewards=rewards))
    tilted = jax.nn.log_softmax(teacher_logits, axis=-1) + rewards / knob(beta, rewards)
    return jax.nn.log_softmax(tilted, axis=-1)


def human_reweighted_cross_entropy(
    student_logits: Array, teacher_logits: Array, rewards: Array, *, beta: ArrayLike
) -> Array:
    """Cross-entropy with the human-reweighted teacher: H(π*, π_S) with π* ∝ π_T exp(r / β).

    Args:
      student_logits: [..., A].
      teacher_logits: [..., A], stopped.
      rewards: [..., A] human reward of every candidate, stopped.
      beta: β > 0, reward per nat; β -> ∞ is `soft_cross_entropy`.
    Returns:
      [...] loss, at least the entropy of π*, reached at π_S = π*.
    Raises:
      TypeError: rewards are not floating. AssertionError: shapes differ.
    Reference: Korbak et al. 2022, https://arxiv.org/abs/2205.11275, for the target

    >>> arguments = jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 0.0])
    >>> round(float(human_reweighted_cross_entropy(*arguments, beta=1.0)), 4)
    0.6931
    """
    return soft_cross_entropy(student_logits, human_teacher_logits(teacher_logits, rewards, beta=beta))


def human_weights(rewards: Array, mask: Array, *, beta: ArrayLike, axis_name: str | None = None) -> Array:
    """What human reward makes of samples of the teacher: w = exp(r / β), scaled to mean 1 over the batch.

    E_{y ~ π_T}[w f(y)] estimates E_{y ~ π*}[f(y)] with π* ∝ π_T exp(r / β) (self-normalised, so its bias vanishes like
    1 / B). Only differences of rewards count. Equal rewards or β -> ∞ give ones. Stopped.

    Args:
      rewards: [...] human reward of each sequence.
      mask: [...] bool, sequences that have a rating; the others get weight 0.
      beta: β > 0, reward per nat; w has few large values once the rewards' spread exceeds a few β.
      axis_name: mapped axis whose devices share one mean.
    Returns:
      [...] weights >= 0, at most the number of rated sequences.
    Raises:
      TypeError: rewards are not floating, or the mask is not bool.
    Reference: Korbak et al. 2022, https://arxiv.org/abs/2205.11275; the exponential weight, Peng et al. 2019,
      https://arxiv.org/abs/1910.00177

    >>> [round(w, 4) for w in human_weights(jnp.array([1.0, 0.0]), jnp.array([True, True]), beta=1.0).tolist()]
    [1.4621, 0.5379]
    """
    (rewards,) = jax.lax.stop_gradient(floating(rewards=rewards))
    check_mask(mask, rewards)
    exponent = jnp.where(mask, rewards / knob(beta, rewards), -jnp.inf)
    largest = jnp.max(exponent)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, exponent - largest, 0.0)), 0.0)
    mean = masked_mean(weights, mask, axis_name=axis_name)
    return jax.lax.stop_gradient(weights / jnp.where(mean > 0, mean, 1.0))


def human_step_weights(
    values: Array, rewards: Array, mask: Array, *, beta: ArrayLike, axis_name: str | None = None
) -> Array:
    """Human weights of single tokens: w_t = exp((V(s_{t+1}) - V(s_t)) / β), scaled to mean 1 over the batch's tokens.

    V(s_t) is what people will say of the finished sequence, as far as its beginning tells; after the last token it is
    r(y). With the soft value V(s) = β log E_{y ~ π_T}[exp(r(y) / β) | s], the target π_T(a | s) w(s, a) is the
    next-token distribution of π_T exp(r / β) / Z at every prefix, however often the prefix occurs; a sequence's weights
    multiply to exp((r - V(s_0)) / β) before they are scaled. With another V, for instance a reward model's score of the
    text so far, the target is a step of policy improvement over the teacher. Only differences of V count; equal ones or
    β -> ∞ give ones. Stopped.

    Args:
      values: [B, T] V of the state before each token.
      rewards: [B] human reward of each sequence.
      mask: [B, T] bool, tokens that the teacher generated; the others get weight 0.
      beta: β > 0, reward per nat.
      axis_name: mapped axis whose devices share one mean.
    Returns:
      [B, T] weights >= 0.
    Raises:
      TypeError: values or rewards are not floating, or the mask is not bool. AssertionError: shapes differ.
    Reference: the soft value and its policy, Levine 2018, https://arxiv.org/abs/1805.00909; of finished and unfinished
      texts, Yang and Klein 2021, https://arxiv.org/abs/2104.05218

    >>> real = jnp.array([[True, True], [True, False]])
    >>> weights = human_step_weights(jnp.zeros((2, 2)), jnp.array([1.0, 0.0]), real, beta=1.0)
    >>> [[round(w, 4) for w in row] for row in weights.tolist()]
    [[0.6358, 1.7284], [0.6358, 0.0]]
    """
    (values,), (rewards,) = clean(mask, values, names=("values",)), floating(rewards=rewards)
    gains = jax.lax.stop_gradient(at_next_valid(values, mask, rewards) - values)
    return human_weights(gains, mask, beta=beta, axis_name=axis_name)


# --- (b) on-policy, with the reward in the advantage ------------------------------------------------------------------


def human_reverse_kl_rewards(
    log_probs: Array, teacher_log_probs: Array, human_rewards: Array, *, beta: ArrayLike
) -> Array:
    """Per-token reward of on-policy distillation: r_t - β (log π_S(y_t) - log π_T(y_t)).

    Its sum over a sequence has the expectation E[r(y)] - β KL(π_S ‖ π_T), maximal at π_T exp(r / β) / Z. Feed it to any
    advantage estimator (undiscounted, for this optimum). With r = 0 it is β times `sampled_reverse_kl_advantages`.
    Stopped.

    Args:
      log_probs: [..., T] log π_S of the student's own tokens.
      teacher_log_probs: [..., T] log π_T of the same.
      human_rewards: [..., T] human reward, landed on tokens (0 elsewhere), see `rewards`.
      beta: β >= 0, reward per nat; 0 is pure reinforcement learning.
    Returns:
      [..., T] rewards.
    Raises:
      TypeError: human_rewards are not floating. AssertionError: shapes differ.
    Reference: Korbak et al. 2022, https://arxiv.org/abs/2205.11275

    >>> round(float(human_reverse_kl_rewards(jnp.array(-1.0), jnp.array(-3.0), jnp.array(1.0), beta=0.1)), 4)
    0.8
    """
    log_probs, teacher_log_probs, human_rewards = jax.lax.stop_gradient(
        floating(log_probs=log_probs, teacher_log_probs=teacher_log_probs, human_rewards=human_rewards)
    )
    return human_rewards - knob(beta, human_rewards) * (log_probs - teacher_log_probs)


# --- (c), (d) samples of the teacher, weighted by people --------------------------------------------------------------


def _check_weights(weights: Array, log_probs: Array) -> Array:
    (weights,) = jax.lax.stop_gradient(floating(weights=weights))
    fits = [size in (1, wanted) for size, wanted in zip(weights.shape, log_probs.shape, strict=False)]
    if weights.ndim != log_probs.ndim or not all(fits):
        raise ValueError(
            f"weights must be [..., T] or [..., 1] for log_probs {log_probs.shape}, got {weights.shape}; "
            "write `weights[..., None]` for one per sequence"
        )
    return weights


def reward_weighted_cross_entropy(log_probs: Array, weights: Array) -> Array:
    """Likelihood of the teacher's samples, weighted by what people think of them: -w(y) log π_S(y_t | s_t).

    For y ~ π_T and w = exp(r / β) its expectation is minimal at π_T exp(r / β) / Z. w = 1 is sequence-level
    distillation. The scale of w is that of the learning rate.

    Args:
      log_probs: [..., T] log π_S of the tokens that the teacher sampled.
      weights: [..., 1] w(y) of each sequence (`human_weights`), or [..., T] per token (`human_step_weights`); stopped.
    Returns:
      [..., T] loss per token; sum it over the sequence.
    Raises:
      TypeError: weights are not floating. ValueError: their shape does not fit.
    Reference: Korbak et al. 2022, https://arxiv.org/abs/2205.11275; with advantages as rewards, Peng et al. 2019,
      https://arxiv.org/abs/1910.00177

    >>> reward_weighted_cross_entropy(jnp.array([[-1.0, -2.0]]), jnp.array([[1.5]])).tolist()
    [[1.5, 3.0]]
    """
    (log_probs,) = floating(log_probs=log_probs)
    return -_check_weights(weights, log_probs) * log_probs


def human_soft_targets(
    soft_cross_entropy: Array, log_probs: Array, weights: Array, *, baseline: ArrayLike = 1.0
) -> Array:
    """Dense soft targets with an unbiased human term: b H(π_T, π_S)(s_t) + (w(y) - b) (-log π_S(y_t | s_t)).

    For y ~ π_T the expectation, of value and gradient alike, is that of `reward_weighted_cross_entropy` for any b that
    does not depend on y_t (it may depend on the prefix s_t): given s_t, E[-log π_S(y_t)] = H(π_T, π_S)(s_t). So b
    changes the variance only. With w = b it is plain distillation times b, without noise from the choice of y_t; b = 0
    is `reward_weighted_cross_entropy`. Weights and baseline are stopped.

    Args:
      soft_cross_entropy: [..., T] H(π_T, π_S) at each prefix of y, see `soft_cross_entropy` and `head_distillation`.
      log_probs: [..., T] log π_S of the tokens that the teacher sampled.
      weights: [..., 1] w(y) of each sequence (`human_weights`), or [..., T] per token (`human_step_weights`).
      baseline: b, a number or [..., T]; 1 suits weights of mean 1.
    Returns:
      [..., T] loss per token; sum it over the sequence. May be negative where w < b.
    Raises:
      TypeError: weights are not floating. ValueError: their shape does not fit. AssertionError: shapes differ.
    Reference: none; a control variate for the weighted loss, which is derived above.

    >>> human_soft_targets(jnp.array([[3.0]]), jnp.array([[-2.0]]), jnp.array([[1.5]])).tolist()
    [[4.0]]
    """
    soft_cross_entropy, log_probs = floating(soft_cross_entropy=soft_cross_entropy, log_probs=log_probs)
    weights = _check_weights(weights, log_probs)
    baseline = jax.lax.stop_gradient(knob(baseline, log_probs))
    return baseline * soft_cross_entropy - (weights - baseline) * log_probs
