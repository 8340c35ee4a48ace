"""From per-token log-probs to what pair losses take: LD-DPO's discounted sum and WPO's weights.

Plain inputs need no function: a log-ratio is ``masking.masked_sum(log_probs - reference_log_probs, mask, axis=-1)``.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import floating, knob

__all__ = ["length_desensitised_sum", "wpo_weights"]


def length_desensitised_sum(log_probs: Array, mask: Array, other_lengths: Array, *, alpha: ArrayLike = 0.5) -> Array:
    """LD-DPO's log-prob of a completion: Σ_{t ≤ l} log π_t + α Σ_{t > l} log π_t, l the shorter length of the pair.

    Apply it to policy and reference log-probs (or to their difference) of both completions, then use any pair loss.

    Args:
      log_probs: [..., T] log-probs, or log-ratios, of the completion's tokens.
      mask: [..., T] bool, the completion's tokens.
      other_lengths: [...] number of tokens of the pair's other completion.
      alpha: α, weight of the tokens beyond the other completion's length. Default 0.5 (the paper's suggestion; it tunes
        per model).
    Returns:
      [...] weighted sum. α = 1 gives the plain sum, α = 0 cuts at the shared length; the shorter completion of a pair
      is summed whole.
    Reference: Liu et al. 2024, https://arxiv.org/abs/2409.06411

    >>> log_probs, mask = jnp.array([-1.0, -1.0, -1.0, 9.0]), jnp.array([True, True, True, False])
    >>> float(length_desensitised_sum(log_probs, mask, jnp.array(2)))
    -2.5
    """
    (log_probs,) = floating(log_probs=log_probs)
    position = jnp.cumsum(mask, axis=-1)
    discount = jnp.where(position <= jnp.asarray(other_lengths)[..., None], 1.0, knob(alpha, log_probs))
    (clean,) = masking.zero_outside(mask, log_probs)
    return masking.masked_sum(clean * discount, mask, axis=-1)


def wpo_weights(log_probs: Array, squared_probability_sums: Array, mask: Array) -> Array:
    """WPO's weight of a completion: exp(mean_t log(π(y_t) / Σ_v π(v)²)), how likely the policy itself is to write it.

    A pair's weight is the product of its two completions' weights, and multiplies its loss. Gradients are stopped.

    Args:
      log_probs: [..., T] of the completion's tokens under the current policy.
      squared_probability_sums: [..., T] Σ_v π(v)² of the distributions they were drawn from: what π(y_t) is on average.
        Ones give the weight without this alignment, the geometric mean of the tokens' probabilities.
      mask: [..., T] bool, the completion's tokens.
    Returns:
      [...] weights above 0, about 1 for what the policy would write. A uniform policy gives 1; no tokens give 1.
    Reference: Zhou et al. 2024, https://arxiv.org/abs/2406.11827

    >>> log_probs, mask = jnp.log(jnp.array([[0.25, 0.5]])), jnp.array([[True, True]])
    >>> [round(x, 4) for x in wpo_weights(log_probs, jnp.array([[0.5, 0.5]]), mask).tolist()]
    [0.7071]
    """
    log_probs, sums = floating(log_probs=log_probs, squared_probability_sums=squared_probability_sums)
    aligned = jax.lax.stop_gradient(log_probs) - jnp.log(jnp.where(mask, jax.lax.stop_gradient(sums), 1.0))
    return jnp.exp(masking.masked_mean(aligned, mask, axis=-1))
