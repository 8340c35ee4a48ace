"""KL between a policy and its reference: per-token estimates, the exact value, and controllers of its coefficient.

Everything here measures KL(π || π_ref) for tokens drawn from π, in nats. With x = log π - log π_ref of the drawn token,

    estimate   value                mean    variance   right gradient when used as a loss
    k1         x                    exact   high       no: its expected gradient is zero
    k2         x² / 2               biased  low        yes
    k3         exp(-x) - 1 + x      exact   low        no: it is that of the forward KL

so a KL *loss* wants k2, or `k1_with_k2_gradient` / `k3_with_k2_gradient` where the number is also logged. A KL *reward*
(see `rewards.kl_shaped_rewards`) wants k1. "Right" means on-policy: the tokens come from the policy being
differentiated.

The reference log-probs are constants: no gradient flows into them. The estimates are elementwise, so zero both inputs
outside the mask first (`masking.zero_outside`) and reduce with the same mask afterwards.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "full_kl",
    "init_adaptive_kl",
    "init_fixed_kl",
    "k1",
    "k1_with_k2_gradient",
    "k2",
    "k3",
    "k3_with_k2_gradient",
    "update_adaptive_kl",
    "update_fixed_kl",
]


def _wide(x: Array) -> Array:
    """Float32 at least: bfloat16 log-probs carry two digits, too few to subtract."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _log_ratio(log_probs: Array, reference_log_probs: Array, clamp: ArrayLike | None) -> Array:
    chex.assert_equal_shape([log_probs, reference_log_probs])
    x = _wide(log_probs) - _wide(jax.lax.stop_gradient(reference_log_probs))
    return x if clamp is None else jnp.clip(x, -jnp.asarray(clamp, x.dtype), jnp.asarray(clamp, x.dtype))


def k1(log_probs: Array, reference_log_probs: Array, *, clamp: ArrayLike | None = None) -> Array:
    """The log-ratio, the unbiased estimate of high variance: k1 = x = log π - log π_ref.

    Args:
      log_probs: [...] of the drawn tokens under the policy.
      reference_log_probs: [...] of the same tokens under the reference; stopped.
      clamp: bound on |x|; beyond it value and gradient are cut. None, the default, leaves x alone.
    Returns:
      [...] nats per token, negative where the reference likes the token better.
    Raises: AssertionError if shapes differ.
    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html

    >>> round(float(k1(jnp.log(0.5), jnp.log(0.25))), 4)
    0.6931
    """
    return _log_ratio(log_probs, reference_log_probs, clamp)


def k2(log_probs: Array, reference_log_probs: Array, *, clamp: ArrayLike | None = None) -> Array:
    """Half the squared log-ratio, biased but with the gradient of the KL on-policy: k2 = x² / 2.

    Its gradient is x ∇log π, whose mean over tokens of the policy is ∇KL(π || π_ref).

    Args:
      log_probs: [...] of the drawn tokens under the policy.
      reference_log_probs: [...] of the same tokens under the reference; stopped.
      clamp: bound on |x|, so the value is at most clamp² / 2. None leaves x alone.
    Returns:
      [...] per token, never negative.
    Raises: AssertionError if shapes differ.
    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html

    >>> round(float(k2(jnp.log(0.5), jnp.log(0.25))), 4)
    0.2402
    """
    return 0.5 * jnp.square(_log_ratio(log_probs, reference_log_probs, clamp))


def k3(
    log_probs: Array,
    reference_log_probs: Array,
    *,
    clamp: ArrayLike | None = None,
    value_clamp: ArrayLike | None = None,
) -> Array:
    """The unbiased estimate of low variance: k3 = exp(-x) - 1 + x, the penalty of GRPO.

    Small x gives k2. Float32 holds it down to x = -88; clamp if the policy may leave more reference tokens behind.

    Args:
      log_probs: [...] of the drawn tokens under the policy.
      reference_log_probs: [...] of the same tokens under the reference; stopped.
      clamp: bound on |x| before exp. None leaves x alone.
      value_clamp: upper bound on the result, with no gradient beyond. None leaves it alone.
    Returns:
      [...] per token, never negative up to rounding.
    Raises: AssertionError if shapes differ.
    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html; Shao et al. 2024, eq. 4,
      https://arxiv.org/abs/2402.03300

    >>> round(float(k3(jnp.log(0.5), jnp.log(0.25))), 4)
    0.1931
    """
    x = _log_ratio(log_probs, reference_log_probs, clamp)
    value = jnp.expm1(-x) + x
    return value if value_clamp is None else jnp.minimum(value, jnp.asarray(value_clamp, value.dtype))


def _with_gradient_of(value: Array, carrier: Array) -> Array:
    """The number `value` with the derivative of `carrier`: their difference is never rounded into the value."""
    return jax.lax.stop_gradient(value) + (carrier - jax.lax.stop_gradient(carrier))


def k1_with_k2_gradient(log_probs: Array, reference_log_probs: Array, *, clamp: ArrayLike | None = None) -> Array:
    """The number of `k1` with the gradient of `k2`: unbiased in value and, on-policy, in gradient.

    Args:
      log_probs: [...] of the drawn tokens under the policy.
      reference_log_probs: [...] of the same tokens under the reference; stopped.
      clamp: bound on |x| in both. None leaves x alone.
    Returns:
      [...] nats per token.
    Raises: AssertionError if shapes differ.
    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html, for the values

    >>> round(float(k1_with_k2_gradient(jnp.log(0.5), jnp.log(0.25))), 4)
    0.6931
    >>> round(float(jax.grad(k1_with_k2_gradient)(jnp.log(0.5), jnp.log(0.25))), 4)
    0.6931
    """
    estimates = k1(log_probs, reference_log_probs, clamp=clamp), k2(log_probs, reference_log_probs, clamp=clamp)
    return _with_gradient_of(*estimates)


def k3_with_k2_gradient(
    log_probs: Array,
    reference_log_probs: Array,
    *,
    clamp: ArrayLike | None = None,
    value_clamp: ArrayLike | None = None,
) -> Array:
    """The number of `k3` with the gradient of `k2`: unbiased in value and, on-policy, in gradient.

    Args:
      log_probs: [...] of the drawn tokens under the policy.
      reference_log_probs: [...] of the same tokens under the reference; stopped.
      clamp: bound on |x| in both. None leaves x alone.
      value_clamp: upper bound on the number alone; the gradient goes on. None leaves it alone.
    Returns:
      [...] nats per token.
    Raises: AssertionError if shapes differ.
    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html, for the values

    >>> round(float(k3_with_k2_gradient(jnp.log(0.5), jnp.log(0.25))), 4)
    0.1931
    >>> round(float(jax.grad(k3_with_k2_gradient)(jnp.log(0.5), jnp.log(0.25))), 4)
    0.6931
    """
    number = k3(log_probs, reference_log_probs, clamp=clamp, value_clamp=value_clamp)
    return _with_gradient_of(number, k2(log_probs, reference_log_probs, clamp=clamp))


def full_kl(logits: Array, reference_logits: Array) -> Array:
    """The exact divergence over the vocabulary: KL(π || π_ref) = Σ_v π(v) (log π(v) - log π_ref(v)).

    The mean of `k1` and of `k3` over tokens drawn from π is this number, and the mean gradient of `k2` its gradient.
    A logit of -inf is a token that cannot be drawn and counts 0 log 0 = 0. If only the reference forbids a token the
    divergence is +inf, as in the mathematics.

    Args:
      logits: [..., V] of the policy; any constant may be added to a row.
      reference_logits: [..., V] of the reference; stopped.
    Returns:
      [...] nats, never negative up to rounding.
    Raises: AssertionError if shapes differ.
    Reference: Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694

    >>> logits = jnp.log(jnp.array([0.5, 0.5, 0.0]))  # the third token is forbidden
    >>> round(float(full_kl(logits, jnp.log(jnp.array([0.25, 0.5, 0.25])))), 4)
    0.3466
    """
    chex.assert_equal_shape([logits, reference_logits])
    log_probs = jax.nn.log_softmax(_wide(logits), axis=-1)
    reference_log_probs = jax.nn.log_softmax(_wide(jax.lax.stop_gradient(reference_logits)), axis=-1)
    possible = jnp.exp(log_probs) > 0.0
    policy, reference = (jnp.where(possible, x, 0.0) for x in (log_probs, reference_log_probs))
    return jnp.sum(jnp.where(possible, jnp.exp(policy) * (policy - reference), 0.0), axis=-1)


# --- controllers of the coefficient -----------------------------------------------------------------------------------


class FixedKL(NamedTuple):
    """A coefficient that never moves."""

    coefficient: Array  # [] weight of the KL in the reward or the loss


class AdaptiveKL(NamedTuple):
    """A coefficient that follows the measured KL."""

    coefficient: Array  # [] weight of the KL in the reward or the loss


def init_fixed_kl(coefficient: ArrayLike = 0.05) -> FixedKL:
    """A controller that keeps its coefficient.

    >>> round(float(init_fixed_kl(0.1).coefficient), 3)
    0.1
    """
    return FixedKL(jnp.asarray(coefficient, jnp.float32))


def update_fixed_kl(state: FixedKL, kl: ArrayLike) -> FixedKL:
    """Returns the state as it is, whatever was measured.

    >>> round(float(update_fixed_kl(init_fixed_kl(0.1), kl=50.0).coefficient), 3)
    0.1
    """
    del kl
    return state


def init_adaptive_kl(initial: ArrayLike = 0.15) -> AdaptiveKL:
    """A controller that starts at `initial`, Ziegler et al.'s value by default.

    >>> round(float(init_adaptive_kl(0.2).coefficient), 3)
    0.2
    """
    return AdaptiveKL(jnp.asarray(initial, jnp.float32))


def update_adaptive_kl(
    state: AdaptiveKL,
    kl: ArrayLike,
    *,
    batch_size: ArrayLike,
    target: ArrayLike = 6.0,
    horizon: ArrayLike = 10_000.0,
) -> AdaptiveKL:
    """Moves the coefficient towards the target KL: β ← β (1 + clip(KL / target - 1, ±0.2) n / horizon).

    A positive β stays positive for n < 5 horizon. KL = target is a fixed point, and an infinite horizon is `FixedKL`.

    Args:
      state: the controller.
      kl: [] nats per *sequence*: summed over tokens, averaged over the sequences of all devices
        (`masking.sequence_sum`). A per-token mean needs another target.
      batch_size: n, sequences measured since the last update, over all devices.
      target: wanted nats per sequence.
      horizon: sequences over which a saturated error moves β by 20 %.
    Returns:
      The controller with its new coefficient. A NaN KL makes it NaN, so that a broken measurement shows.
    Reference: Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593; n / horizon as in its code

    >>> round(float(update_adaptive_kl(init_adaptive_kl(0.1), 12.0, batch_size=5_000).coefficient), 4)
    0.11
    """
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return AdaptiveKL(state.coefficient * (1.0 + error * batch_size / horizon))
