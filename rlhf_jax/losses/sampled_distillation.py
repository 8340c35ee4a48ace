"""Policy distillation from sampled tokens: estimates of the full-vocabulary losses in `losses.distillation`.

P is the teacher, Q the student. Needed where only the teacher's log-probs of given tokens are known (a teacher behind
an interface), or where distillation is one term of a policy gradient. Per token, unreduced; teacher and weights are
stopped.
"""

import jax
import jax.numpy as jnp  # noqa: F401 (doctests)
from jax import Array

from rlhf_jax.losses._pairs import floating

__all__ = ["sampled_cross_entropy", "sampled_reverse_kl", "sampled_reverse_kl_advantages"]


def sampled_cross_entropy(log_probs: Array, weights: Array) -> Array:
    """Soft-target cross-entropy estimated from sampled tokens: -w log Q(y).

    With y ~ P and w = 1 its expectation is `soft_cross_entropy` (sequence-level distillation learns on the teacher's
    own samples this way). With y from another policy μ, w = P(y) / μ(y) makes it so.

    Args:
      log_probs: [...] log Q of the sampled tokens or actions.
      weights: [...] probability or importance weight of each, stopped.
    Returns:
      [...] loss per sample.
    Reference: Kim and Rush 2016, https://arxiv.org/abs/1606.07947

    >>> float(sampled_cross_entropy(jnp.array(-2.0), jnp.array(0.5)))
    1.0
    """
    log_probs, weights = floating(log_probs=log_probs, weights=weights)
    return -jax.lax.stop_gradient(weights) * log_probs


def sampled_reverse_kl_advantages(log_probs: Array, teacher_log_probs: Array) -> Array:
    """On-policy distillation as an advantage: A_t = log P(y_t) - log Q(y_t), for tokens y the student sampled.

    Feed it to any policy-gradient loss: E[A ∇log Q] = -∇KL(Q ‖ P) at each prefix. Stopped.

    Args:
      log_probs: [..., T] log Q of the student's own tokens.
      teacher_log_probs: [..., T] log P of the same.
    Returns:
      [..., T] advantages; their mean is minus the reverse KL.
    Reference: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649; Gu et al. 2024, https://arxiv.org/abs/2306.08543

    >>> float(sampled_reverse_kl_advantages(jnp.array(-1.0), jnp.array(-3.0)))
    -2.0
    """
    log_probs, teacher_log_probs = floating(log_probs=log_probs, teacher_log_probs=teacher_log_probs)
    return jax.lax.stop_gradient(teacher_log_probs - log_probs)


def sampled_reverse_kl(log_probs: Array, teacher_log_probs: Array) -> Array:
    """Reverse KL estimated from the student's own tokens: value log Q - log P, gradient (log Q - log P) ∇log Q.

    For y ~ Q both are unbiased: the value for KL(Q ‖ P) at the prefix, the gradient for its gradient. (Differentiating
    log Q - log P directly would give a gradient of expectation 0.) It is the loss of `sampled_reverse_kl_advantages`.

    Args:
      log_probs: [..., T] log Q of the student's own tokens.
      teacher_log_probs: [..., T] log P of the same, stopped.
    Returns:
      [..., T] estimate per token, in nats; single values may be negative.
    Reference: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649; the gradient, Schulman 2020,
      http://joschu.net/blog/kl-approx.html

    >>> float(sampled_reverse_kl(jnp.array(-1.0), jnp.array(-3.0)))
    2.0
    """
    advantages = sampled_reverse_kl_advantages(log_probs, teacher_log_probs)
    (log_probs,) = floating(log_probs=log_probs)
    return -advantages * (1.0 + log_probs - jax.lax.stop_gradient(log_probs))
