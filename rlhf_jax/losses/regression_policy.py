"""Policy losses that fit the policy to a reweighted target: AWR, AWAC, MPO, V-MPO, DRO.

All but DRO are one loss, `weighted_log_likelihood`, and differ by their weights:

=========  ======================================  ===========================  ==========================
algorithm  weights                                 temperature                  reducer
=========  ======================================  ===========================  ==========================
AWR        `awr_weights` of returns - V            a constant                   `masking.token_mean`
AWAC       `awac_weights` of Q - V                 a constant                   `masking.token_mean`
MPO        `mpo_weights` of Q, per state           `mpo_temperature_loss`       sum over K, mean of states
V-MPO      `vmpo_weights` of the better half       `vmpo_temperature_loss`      `masking.masked_sum`
=========  ======================================  ===========================  ==========================

MPO and V-MPO also hold the policy near the old one by `kl_constraint`. Weights, advantages and Q-values are stopped;
temperatures and multipliers that are learned are arguments, and their losses have a gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses import _selection
from rlhf_jax.losses._pairs import floating

__all__ = [
    "awac_weights",
    "awr_weights",
    "better_half",
    "dro",
    "kl_constraint",
    "mpo_temperature_loss",
    "mpo_weights",
    "vmpo_temperature_loss",
    "vmpo_weights",
    "weighted_log_likelihood",
]


class _Exponentials(NamedTuple):
    """exp x under a mask, with the largest x taken out so that nothing overflows."""

    peak: Array  # reduced axes kept as 1
    scaled: Array  # exp(x - peak), 1 outside the mask
    mean: Array  # of scaled over the mask, reduced axes kept as 1; 1 where nothing counts

    def log_mean(self) -> Array:
        """log((1/n)·Σ exp x); 0 where nothing counts."""
        return self.peak + jnp.log(self.mean)


def _exponentials(x: Array, mask: Array, *, axis: int | None = None, axis_name: str | None = None) -> _Exponentials:
    peak = jnp.max(jax.lax.stop_gradient(jnp.where(mask, x, -jnp.inf)), axis=axis, keepdims=True)
    peak = peak if axis_name is None else jax.lax.pmax(peak, axis_name)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    scaled = jnp.exp(jnp.where(mask, x - peak, 0.0))
    mean = masking.masked_mean(scaled, mask, axis=axis, axis_name=axis_name, keepdims=True)
    return _Exponentials(peak, scaled, jnp.where(mean > 0, mean, 1.0))


def _clean(values: Array, mask: Array, name: str) -> Array:
    """The named array in float32, stopped, 0 outside the mask."""
    (values,) = floating(**{name: values})
    return jax.lax.stop_gradient(masking.zero_outside(mask, values)[0])


def weighted_log_likelihood(log_probs: Array, weights: Array) -> Array:
    """Weighted regression onto the taken actions: -w·log π.

    Args:
      log_probs: [..., T] of the taken tokens under the trained policy.
      weights: [..., T] from this module; stopped.
    Returns:
      [..., T] loss. Weights of 1 give behaviour cloning, advantages as weights `policy.reinforce`.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Peng et al. 2019, https://arxiv.org/abs/1910.00177

    >>> weighted_log_likelihood(jnp.array([-2.0]), jnp.array([3.0])).tolist()
    [6.0]
    """
    log_probs, weights = floating(log_probs=log_probs, weights=weights)
    return -log_probs * jax.lax.stop_gradient(weights)


def awr_weights(advantages: Array, *, temperature: ArrayLike = 1.0, max_weight: ArrayLike = 20.0) -> Array:
    """Advantage-weighted regression: w = min(exp(A / temperature), max_weight).

    Args:
      advantages: [..., T] returns minus values; stopped.
      temperature: β; small follows the best actions, infinite clones the behaviour (weights 1).
      max_weight: cap against exploding weights, 20 as in the authors' code.
    Returns:
      [..., T] weights in (0, max_weight].
    Raises: TypeError for integer advantages.
    Reference: Peng et al. 2019, https://arxiv.org/abs/1910.00177

    >>> [round(w, 3) for w in awr_weights(jnp.array([0.0, 1.0, 99.0])).tolist()]
    [1.0, 2.718, 20.0]
    """
    (advantages,) = floating(advantages=advantages)
    exponent = jnp.minimum(jax.lax.stop_gradient(advantages) / temperature, jnp.log(max_weight))
    return jnp.exp(exponent)


def awac_weights(
    advantages: Array, mask: Array, *, temperature: ArrayLike = 1.0, axis_name: str | None = None
) -> Array:
    """Advantage-weighted actor-critic: N·softmax(A / temperature) over the batch, so that the mean weight is 1.

    Args:
      advantages: [..., T] Q minus V; stopped.
      mask: [..., T] bool.
      temperature: λ; infinite gives weights of 1.
      axis_name: mapped axis whose devices share the normalisation.
    Returns:
      [..., T] weights, 0 outside the mask. Adding a constant to all advantages changes nothing.
    Raises: TypeError for integer advantages or a mask that is not bool, AssertionError if shapes differ.
    Reference: Nair et al. 2020, https://arxiv.org/abs/2006.09359 (the batch normalisation is the authors' code)

    >>> weights = awac_weights(jnp.array([0.0, jnp.log(3.0)]), jnp.array([True, True]))
    >>> [round(w, 3) for w in weights.tolist()]
    [0.5, 1.5]
    """
    scaled = _clean(advantages, mask, "advantages") / temperature
    _, exponentials, mean = _exponentials(scaled, mask, axis_name=axis_name)
    return jnp.where(mask, exponentials / mean, 0.0)


def mpo_weights(q_values: Array, mask: Array, *, temperature: ArrayLike) -> Array:
    """MPO's E-step: q(a_k | s) = softmax_k(Q(s, a_k) / temperature) over the K actions sampled per state.

    Args:
      q_values: [..., K] of actions sampled from the old policy; stopped.
      mask: [..., K] bool, the sampled actions.
      temperature: η > 0, from `mpo_temperature_loss`; stopped.
    Returns:
      [..., K] weights, 0 outside the mask, summing to 1 per state that has an action.
    Raises: TypeError for integer q_values or a mask that is not bool, AssertionError if shapes differ.
    Reference: Abdolmaleki et al. 2018, https://arxiv.org/abs/1806.06920

    >>> weights = mpo_weights(jnp.array([0.0, jnp.log(3.0)]), jnp.array([True, True]), temperature=1.0)
    >>> [round(w, 3) for w in weights.tolist()]
    [0.25, 0.75]
    """
    scaled = _clean(q_values, mask, "q_values") / jax.lax.stop_gradient(jnp.asarray(temperature))
    count = masking.masked_sum(jnp.ones_like(scaled), mask, axis=-1, keepdims=True)
    _, exponentials, mean = _exponentials(scaled, mask, axis=-1)
    return jnp.where(mask, exponentials / (mean * jnp.maximum(count, 1.0)), 0.0)


def mpo_temperature_loss(temperature: ArrayLike, q_values: Array, mask: Array, *, epsilon: ArrayLike = 0.1) -> Array:
    """MPO's dual of the temperature, per state: η·ε + η·log((1/K)·Σ_k exp(Q(s, a_k) / η)).

    Its minimum over η makes the mean KL(q || π_old) of `mpo_weights` equal to epsilon. The loss is convex in η.

    Args:
      temperature: η > 0, the learned scalar; keep it positive, for instance by softplus.
      q_values: [..., K] of actions sampled from the old policy; stopped.
      mask: [..., K] bool, the sampled actions.
      epsilon: allowed KL, in nats.
    Returns:
      [...] loss per state, 0 for states without an action; average it over states.
    Raises: TypeError for integer q_values or a mask that is not bool, AssertionError if shapes differ.
    Reference: Abdolmaleki et al. 2018, https://arxiv.org/abs/1806.06920

    >>> round(float(mpo_temperature_loss(2.0, jnp.array([1.0, 1.0]), jnp.array([True, True]))), 3)
    1.2
    """
    cleaned = _clean(q_values, mask, "q_values")
    temperature = jnp.asarray(temperature)
    value = temperature * (epsilon + _exponentials(cleaned / temperature, mask, axis=-1).log_mean()[..., 0])
    return jnp.where(jnp.any(mask, axis=-1), value, 0.0)


def better_half(advantages: Array, mask: Array, *, axis_name: str | None = None) -> Array:
    """V-MPO's choice of samples: True at the larger half of the batch's advantages, rounded up.

    Args:
      advantages: [..., T]; stopped.
      mask: [..., T] bool.
      axis_name: mapped axis whose devices are ranked together.
    Returns:
      [..., T] bool, a part of the mask with ceil(N / 2) of its N slots; ties go to the earliest.
    Raises: TypeError for integer advantages or a mask that is not bool, AssertionError if shapes differ.
    Reference: Song et al. 2019, https://arxiv.org/abs/1909.12238

    >>> better_half(jnp.array([1.0, 3.0, 2.0]), jnp.array([True, True, True])).tolist()
    [False, True, True]
    """
    cleaned = _clean(advantages, mask, "advantages")
    count = masking.masked_sum(jnp.ones_like(cleaned), mask, axis_name=axis_name)
    return _selection.largest(cleaned, mask, jnp.ceil(count / 2.0), axis_name=axis_name)


def vmpo_weights(advantages: Array, selected: Array, *, temperature: ArrayLike, axis_name: str | None = None) -> Array:
    """V-MPO's target: ψ = exp(A / η) / Σ exp(A / η) over the selected samples of the batch.

    Args:
      advantages: [..., T]; stopped.
      selected: [..., T] bool, from `better_half`.
      temperature: η > 0, from `vmpo_temperature_loss`; stopped.
      axis_name: mapped axis whose devices share the normalisation.
    Returns:
      [..., T] weights summing to 1 over the batch, 0 where not selected. The policy loss is
      `masking.masked_sum(weighted_log_likelihood(log_probs, weights), mask)`.
    Raises: TypeError for integer advantages or a mask that is not bool, AssertionError if shapes differ.
    Reference: Song et al. 2019, https://arxiv.org/abs/1909.12238

    >>> weights = vmpo_weights(jnp.array([0.0, jnp.log(3.0)]), jnp.array([True, True]), temperature=1.0)
    >>> [round(w, 3) for w in weights.tolist()]
    [0.25, 0.75]
    """
    scaled = _clean(advantages, selected, "advantages") / jax.lax.stop_gradient(jnp.asarray(temperature))
    count = masking.masked_sum(jnp.ones_like(scaled), selected, axis_name=axis_name)
    _, exponentials, mean = _exponentials(scaled, selected, axis_name=axis_name)
    return jnp.where(selected, exponentials / (mean * jnp.maximum(count, 1.0)), 0.0)


def vmpo_temperature_loss(
    temperature: ArrayLike,
    advantages: Array,
    selected: Array,
    *,
    epsilon: ArrayLike = 0.1,
    axis_name: str | None = None,
) -> Array:
    """V-MPO's dual of the temperature, for the batch: η·ε + η·log((1/n)·Σ_selected exp(A / η)).

    Args:
      temperature: η > 0, the learned scalar.
      advantages: [..., T]; stopped.
      selected: [..., T] bool, from `better_half`.
      epsilon: allowed KL of the target from the selected samples, in nats.
      axis_name: mapped axis whose devices share the mean.
    Returns:
      [] loss. With one state it equals `mpo_temperature_loss`.
    Raises: TypeError for integer advantages or a mask that is not bool, AssertionError if shapes differ.
    Reference: Song et al. 2019, https://arxiv.org/abs/1909.12238

    >>> round(float(vmpo_temperature_loss(2.0, jnp.array([1.0, 1.0]), jnp.array([True, True]))), 3)
    1.2
    """
    cleaned = _clean(advantages, selected, "advantages")
    temperature = jnp.asarray(temperature)
    log_mean = _exponentials(cleaned / temperature, selected, axis_name=axis_name).log_mean()
    return temperature * (epsilon + jnp.reshape(log_mean, ()))


def kl_constraint(multiplier: ArrayLike, kl: Array, *, epsilon: ArrayLike) -> Array:
    """Lagrangian of KL <= epsilon: α·(ε - sg(KL)) + sg(α)·KL, with a gradient for both sides.

    The policy descends the divergence with weight α; the multiplier grows while the divergence exceeds epsilon.

    Args:
      multiplier: α >= 0, the learned scalar; keep it positive, for instance by softplus.
      kl: [...] divergence of the trained policy from the old one, in nats (`kl`).
      epsilon: allowed divergence.
    Returns:
      [...] loss; its value is α·ε.
    Raises: TypeError for an integer divergence.
    Reference: Abdolmaleki et al. 2018, https://arxiv.org/abs/1806.06920; Song et al. 2019,
      https://arxiv.org/abs/1909.12238

    >>> round(float(kl_constraint(2.0, jnp.array(0.3), epsilon=0.1)), 3)
    0.2
    """
    (kl,) = floating(kl=kl)
    alpha = jnp.asarray(multiplier, kl.dtype)
    return alpha * (epsilon - jax.lax.stop_gradient(kl)) + jax.lax.stop_gradient(alpha) * kl


def dro(log_ratios: Array, values: Array, rewards: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Direct reward optimisation, per sequence: ½·(r - V - τ·log(π(y) / π_ref(y)))².

    The optimum of KL-regularised reward maximisation fulfils r = V + τ·log-ratio for every y; the loss is the squared
    violation, for single rated sequences without pairs. Policy and value are both trained by it. Its gradient for the
    policy, divided by τ, is that of -A·log π + (τ/2)·log-ratio² with A = r - V.

    Args:
      log_ratios: [...] log π(y) - log π_ref(y) of whole sequences; the gradient flows.
      values: [...] the predicted value of the prompt; the gradient flows.
      rewards: [...] human ratings or scores; stopped.
      temperature: τ > 0, the weight of the KL term.
    Returns:
      [...] loss, 0 at the optimum.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Richemond et al. 2024, https://arxiv.org/abs/2405.19107

    >>> float(dro(jnp.array(1.0), jnp.array(2.0), jnp.array(5.0)))
    2.0
    """
    log_ratios, values, rewards = floating(log_ratios=log_ratios, values=values, rewards=rewards)
    return 0.5 * jnp.square(jax.lax.stop_gradient(rewards) - values - temperature * log_ratios)
