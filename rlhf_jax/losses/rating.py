"""Reward-model losses for absolute labels: ratings as numbers, ratings as ordered categories, right and wrong steps."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import masking
from rlhf_jax.losses._pairs import check_integers, floating

__all__ = [
    "init_cut_parameters",
    "ordered_cut_points",
    "ordinal",
    "ordinal_log_probs",
    "process_rewards",
    "rating_regression",
]


def rating_regression(scores: Array, ratings: Array) -> Array:
    """Regression on a scalar rating: (s - rating)².

    Args:
      scores: [...] predicted.
      ratings: [...] given by people, integer or floating; stopped.
    Returns:
      [...] loss per completion. Its minimum over many people's ratings is their mean.
    Reference: Wang et al. 2024 (HelpSteer2), https://arxiv.org/abs/2406.08673

    >>> float(rating_regression(jnp.array(3.5), jnp.array(4)))
    0.25
    """
    (scores,) = floating(scores=scores)
    chex.assert_equal_shape([scores, ratings])
    return jnp.square(scores - jax.lax.stop_gradient(jnp.asarray(ratings, scores.dtype)))


def init_cut_parameters(levels: int) -> Array:
    """Parameters [levels - 1] whose `ordered_cut_points` are one apart and centred on 0.

    >>> ordered_cut_points(init_cut_parameters(4)).tolist()
    [-1.0, 0.0, 1.0]
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    one = jnp.log(jnp.expm1(jnp.ones(())))  # softplus(one) = 1
    return jnp.full(levels - 1, one).at[0].set(1 - levels / 2)


def ordered_cut_points(parameters: Array) -> Array:
    """Increasing cut points from free parameters: c_0 = a_0, c_k = c_{k-1} + softplus(a_k).

    Args:
      parameters: [K - 1] any real numbers, trained with the reward model.
    Returns:
      [K - 1] increasing cut points for `ordinal`.

    >>> bool(jnp.all(jnp.diff(ordered_cut_points(jnp.array([3.0, -2.0, 0.0]))) > 0))
    True
    """
    (parameters,) = floating(parameters=parameters)
    return jnp.cumsum(jnp.concatenate([parameters[:1], jax.nn.softplus(parameters[1:])]))


def ordinal_log_probs(scores: Array, cut_points: Array) -> Array:
    """Cumulative-link model (proportional odds): P(rating ≤ k) = σ(c_k - s), so P(k) = σ(c_k - s) - σ(c_{k-1} - s).

    Computed as log σ(c_k - s) + log σ(s - c_{k-1}) + log(1 - exp(c_{k-1} - c_k)): no difference of sigmoids.

    Args:
      scores: [...] one per completion.
      cut_points: [K - 1] increasing, see `ordered_cut_points`.
    Returns:
      [..., K] log-probabilities of the ratings 0 ... K - 1; their exponentials sum to 1.
    Reference: McCullagh 1980

    >>> [round(p, 4) for p in jnp.exp(ordinal_log_probs(jnp.array(0.0), jnp.log(jnp.array([0.5, 2.0])))).tolist()]
    [0.3333, 0.3333, 0.3333]
    """
    (scores,) = floating(scores=scores)
    (cuts,) = floating(cut_points=cut_points)
    chex.assert_rank(cuts, 1)
    above = scores[..., None] - jnp.expand_dims(cuts, tuple(range(scores.ndim)))  # [..., K - 1]
    end = jnp.zeros_like(scores)[..., None]
    upper = jnp.concatenate([jax.nn.log_sigmoid(-above), end], axis=-1)
    lower = jnp.concatenate([end, jax.nn.log_sigmoid(above)], axis=-1)
    gaps = jnp.pad(jax.nn.log1mexp(jnp.diff(cuts)), 1)
    return upper + lower + jnp.expand_dims(gaps, tuple(range(scores.ndim)))


def ordinal(scores: Array, ratings: Array, cut_points: Array) -> Array:
    """Ordinal regression: -log P(rating), see `ordinal_log_probs`. It learns where people's scale is tight or wide.

    Args:
      scores: [...] one per completion.
      ratings: [...] int, 0 ... K - 1.
      cut_points: [K - 1] increasing; gradients flow into them.
    Returns:
      [...] loss per completion; NaN for a rating outside 0 ... K - 1. K = 2 is logistic regression, log 2 at the cut.
      Adding a number to scores and cut points changes nothing.
    Raises: TypeError if ratings are not integer.
    Reference: McCullagh 1980

    >>> round(float(ordinal(jnp.array(1.0), jnp.array(1), jnp.array([1.0]))), 4)
    0.6931
    """
    check_integers("ratings", ratings)
    chex.assert_equal_shape([scores, ratings])
    log_probs = ordinal_log_probs(scores, cut_points)
    given = jax.nn.one_hot(ratings, log_probs.shape[-1], dtype=jnp.bool_)
    loss = -masking.masked_sum(log_probs, given, axis=-1)
    return jnp.where(jnp.any(given, axis=-1), loss, jnp.nan)


def process_rewards(step_logits: Array, step_labels: Array, mask: Array) -> Array:
    """Process supervision, binary cross-entropy per reasoning step: -y log σ(z) - (1 - y) log σ(-z).

    Args:
      step_logits: [..., S] one per step.
      step_labels: [..., S] y, bool or in [0, 1] (the share of people, or of rollouts, who found the step right);
        stopped.
      mask: [..., S] bool, steps that have a label.
    Returns:
      [..., S] loss per step, 0 outside the mask. A logit of 0 gives log 2.
    Raises: TypeError if mask is not bool.
    Reference: Uesato et al. 2022, https://arxiv.org/abs/2211.14275; Lightman et al. 2023,
      https://arxiv.org/abs/2305.20050

    >>> loss = process_rewards(jnp.array([0.0, jnp.nan]), jnp.array([1.0, 0.0]), jnp.array([True, False]))
    >>> [round(x, 4) for x in loss.tolist()]
    [0.6931, 0.0]
    """
    (logits,) = floating(step_logits=step_logits)
    labels = jax.lax.stop_gradient(jnp.asarray(step_labels, logits.dtype))
    logits, labels = masking.zero_outside(mask, logits, labels)
    loss = -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)
    return jnp.where(mask, loss, 0.0)
