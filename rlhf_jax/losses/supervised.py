"""Learning from given tokens: likelihood, label smoothing, dynamic fine-tuning, z-loss. Per token, unreduced.

The inputs are log-probs of the target tokens (`logprobs.token_log_probs`, `logprobs.head_log_probs`), aligned with
them. Reduce with `masking.token_mean` under the mask of the tokens that count.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.logprobs import token_log_probs
from rlhf_jax.losses._pairs import floating, knob

__all__ = ["dynamic_fine_tuning", "negative_log_likelihood", "smoothed_cross_entropy", "z_loss"]


def negative_log_likelihood(log_probs: Array) -> Array:
    """Cross-entropy with a one-hot target: -log π(y_t), in nats.

    Args:
      log_probs: [..., T] of the target tokens.
    Returns:
      [..., T]; ``exp(token_mean(loss, mask))`` is the perplexity.

    >>> round(float(negative_log_likelihood(jnp.log(0.25))), 4)
    1.3863
    """
    (log_probs,) = floating(log_probs=log_probs)
    return -log_probs


def smoothed_cross_entropy(
    logits: Array, tokens: Array, *, smoothing: ArrayLike = 0.1, temperature: ArrayLike = 1.0
) -> Array:
    """Cross-entropy with a smoothed target: -(1 - ε) log π(y) - ε · 1/V Σ_v log π(v).

    The target gives ε to the uniform distribution over all V tokens, y included. ε = 0 is the negative log-likelihood,
    ε = 1 the cross-entropy with the uniform distribution.

    Args:
      logits: [..., V], all finite where ε > 0 (a forbidden token makes the uniform part infinite).
      tokens: [...] int ids.
      smoothing: ε in [0, 1].
      temperature: τ, divides the logits.
    Returns:
      [...] loss per token. Its minimum is the smoothed target's entropy, not 0.
    Raises:
      TypeError: tokens are not integers. ValueError: shapes do not match.
    Reference: Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567

    >>> round(float(smoothed_cross_entropy(jnp.zeros(4), jnp.array(2))), 4)
    1.3863
    """
    (logits,) = floating(logits=logits)
    scaled, smoothing = logits / knob(temperature, logits), knob(smoothing, logits)
    uniform = jnp.mean(scaled, axis=-1) - jax.nn.logsumexp(scaled, axis=-1)
    return -(1.0 - smoothing) * token_log_probs(scaled, tokens) - smoothing * uniform


def dynamic_fine_tuning(log_probs: Array) -> Array:
    """Likelihood weighted by the stopped probability: -sg[π(y_t)] log π(y_t).

    The gradient of the negative log-likelihood grows like 1 / π(y_t) in π; the weight cancels this: the gradient is
    exactly that of -π(y_t). The weight is stopped.

    Args:
      log_probs: [..., T] of the target tokens.
    Returns:
      [..., T] loss per token, between 0 and 1 / e.
    Reference: Wu et al. 2025, https://arxiv.org/abs/2508.05629

    >>> round(float(dynamic_fine_tuning(jnp.log(0.25))), 4)
    0.3466
    """
    (log_probs,) = floating(log_probs=log_probs)
    return -jnp.exp(jax.lax.stop_gradient(log_probs)) * log_probs


def z_loss(log_normaliser: Array, *, coefficient: ArrayLike = 1e-4) -> Array:
    """Keeps the softmax's normaliser near 1: c · (log Z)², added to the likelihood.

    Args:
      log_normaliser: [..., T] log Σ exp(logit), from `logprobs.log_normaliser` or `logprobs.head_statistics`.
      coefficient: c.
    Returns:
      [..., T] loss per token; 0 where the logits are log-probs already.
    Reference: Chowdhery et al. 2022 (PaLM), section 5, https://arxiv.org/abs/2204.02311

    >>> round(float(z_loss(jnp.array(3.0), coefficient=0.1)), 4)
    0.9
    """
    (log_normaliser,) = floating(log_normaliser=log_normaliser)
    return knob(coefficient, log_normaliser) * jnp.square(log_normaliser)
