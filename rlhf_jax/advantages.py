"""Advantages along time: GAE, with mask holes skipped or not, with time limits, and off-policy as V-trace.

Masks, holes, discounts and bootstrap values are those of `returns`: a slot outside the mask is not a step, and what it
holds changes nothing. `gae_through_holes` is the one exception. Advantages of whole sequences, without a value
function, are in `group_advantages`.

Nothing is stopped here except the log-probs of V-trace: the losses stop the advantages and targets that they consume.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import kl, masking
from rlhf_jax.returns import at_next_valid, backward_recursion, clean, final_values, per_step

__all__ = [
    "Advantages",
    "VTrace",
    "gae",
    "gae_through_holes",
    "gae_with_truncation",
    "vtrace",
]


class Advantages(NamedTuple):
    """What the actor and what the critic learn from."""

    advantages: Array  # [..., T] 0 outside the mask
    returns: Array  # [..., T] targets of the value function, 0 outside the mask


class VTrace(NamedTuple):
    """What the actor and the critic learn from, off-policy."""

    advantages: Array  # [..., T] ρ_t (r_t + γ v_next(t) - V_t), 0 outside the mask
    returns: Array  # [..., T] v_t, targets of the value function, 0 outside the mask
    weights: Array  # [..., T] ρ_t, the clipped importance weights, 0 outside the mask


# --- generalised advantage estimation ---------------------------------------------------------------------------------


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    bootstrap_value: ArrayLike = 0.0,
    discount: ArrayLike = 1.0,
    gae_lambda: ArrayLike = 0.95,
) -> Advantages:
    """Generalised advantage estimation: A_t = δ_t + γ λ A_next(t), with δ_t = r_t + γ V_next(t) - V_t.

    Slots outside the mask are not steps (verl, tunix): a row with holes gives exactly what the row of its valid tokens
    gives. λ = 1 gives the discounted return minus the value, λ = 0 the one-step error δ. The returns A + V are the
    λ-returns.

    Args:
      rewards: [..., T] per token.
      values: [..., T] of the state before each token.
      mask: [..., T] bool, tokens that are steps.
      bootstrap_value: [] or [...] value after the last valid token; 0 if the episode ended there.
      discount: γ, one number or [..., T].
      gae_lambda: λ, one number or [..., T].
    Returns:
      Advantages of [..., T], both 0 outside the mask. Not whitened; see `masking.whiten`.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ.
    Reference: Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438; λ = 0.95 and γ = 1 from Ziegler et al.
      2019, https://arxiv.org/abs/1909.08593

    >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.2, jnp.nan, 0.6]])
    >>> gae(rewards, values, jnp.array([[True, False, True]])).advantages.tolist()
    [[0.78, 0.0, 0.4]]
    """
    rewards, values = clean(mask, rewards, values)
    discounts, final = per_step(discount, mask, rewards, "discount"), final_values(bootstrap_value, rewards)
    errors = rewards + discounts * at_next_valid(values, mask, final) - values
    decay = discounts * per_step(gae_lambda, mask, rewards, "gae_lambda")
    advantages = backward_recursion(errors, decay, mask, jnp.zeros_like(final))
    return Advantages(advantages, advantages + values)


def gae_through_holes(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    bootstrap_value: ArrayLike = 0.0,
    discount: ArrayLike = 1.0,
    gae_lambda: ArrayLike = 0.95,
) -> Advantages:
    """GAE in which a hole is a step of reward 0 and value 0, so that it decays what comes after it (OpenRLHF).

    Holes are slots outside the mask that a valid slot follows; slots after the last valid one are padding and ignored.
    Without holes equal to `gae`. With holes the token before one sees the next value as 0 at λ = 0; prefer `gae`
    unless another system's numbers are wanted.

    Args:
      rewards: [..., T] per token.
      values: [..., T] of the state before each token.
      mask: [..., T] bool, tokens that count.
      bootstrap_value: [] or [...] value after the last valid token; 0 if the episode ended there.
      discount: γ, one number or [..., T]; in a hole the hole's own.
      gae_lambda: λ, one number or [..., T]; in a hole the hole's own.
    Returns:
      Advantages of [..., T], both 0 outside the mask.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ.
    Reference: Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438

    >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.2, jnp.nan, 0.6]])
    >>> gae_through_holes(rewards, values, jnp.array([[True, False, True]]), gae_lambda=0.5).advantages.tolist()
    [[0.2, 0.0, 0.4]]
    """
    clean_rewards, clean_values = clean(mask, rewards, values)
    steps = jax.lax.cummax(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True) > 0
    everywhere = gae(
        clean_rewards,
        clean_values,
        steps,
        bootstrap_value=bootstrap_value,
        discount=discount,
        gae_lambda=gae_lambda,
    )
    return Advantages(*masking.zero_outside(mask, *everywhere))


def gae_with_truncation(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminations: Array,
    truncations: Array,
    mask: Array,
    *,
    discount: ArrayLike = 0.99,
    gae_lambda: ArrayLike = 0.95,
) -> Advantages:
    """GAE over a stretch of several episodes, some of them cut by a time limit, as control environments give it.

    δ_t = r_t + γ V'_t - V_t, where V'_t is the value of the state that really followed, 0 if it was terminal, and
    A_t = δ_t + γ λ A_next(t), cut after every termination and truncation. So a truncated episode is bootstrapped and a
    terminated one is not. Without either, and with next_values the values one step on, equal to `gae`.

    Args:
      rewards: [..., T] per step.
      values: [..., T] of the state before each step.
      next_values: [..., T] of the state after each step; at a truncation of the last observation of the old episode,
        not of the first one after the reset. What it holds at a termination is ignored.
      terminations: [..., T] bool, the step ended its episode by the rules.
      truncations: [..., T] bool, the step was the last allowed; a step may be both, which terminates.
      mask: [..., T] bool, steps that were taken.
      discount: γ, one number or [..., T].
      gae_lambda: λ, one number or [..., T].
    Returns:
      Advantages of [..., T], both 0 outside the mask.
    Raises: TypeError for integer rewards or flags that are not bool; AssertionError or ValueError if shapes differ.
    Reference: Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438; Pardo et al. 2018,
      https://arxiv.org/abs/1712.00378, for the time limits

    >>> rewards, values, next_values = jnp.array([1.0, 1.0]), jnp.array([0.0, 0.0]), jnp.array([5.0, 5.0])
    >>> cut, yes = jnp.array([True, False]), jnp.array([True, True])
    >>> gae_with_truncation(rewards, values, next_values, ~cut, cut, yes, discount=1.0).advantages.tolist()
    [6.0, 1.0]
    """
    for name, flags in (("terminations", terminations), ("truncations", truncations)):
        if flags.dtype != jnp.bool_:
            raise TypeError(f"{name} must be bool, got dtype {flags.dtype}; write `{name} > 0`")
    chex.assert_equal_shape([terminations, truncations, next_values, mask])
    names = ("rewards", "values", "next_values")
    rewards, values, next_values = clean(mask, rewards, values, next_values, names=names)
    next_values = jnp.where(terminations, 0.0, next_values)
    discounts = per_step(discount, mask, rewards, "discount")
    decay = jnp.where(terminations | truncations, 0.0, discounts * per_step(gae_lambda, mask, rewards, "gae_lambda"))
    errors = rewards + discounts * next_values - values
    advantages = backward_recursion(errors, decay, mask, jnp.zeros_like(rewards[..., 0]))
    return Advantages(advantages, advantages + values)


# --- off-policy -------------------------------------------------------------------------------------------------------


def vtrace(
    log_probs: Array,
    behaviour_log_probs: Array,
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    bootstrap_value: ArrayLike = 0.0,
    discount: ArrayLike = 0.99,
    trace_lambda: ArrayLike = 1.0,
    rho_bar: ArrayLike = 1.0,
    c_bar: ArrayLike = 1.0,
) -> VTrace:
    """Off-policy targets with clipped importance weights: v_t = V_t + ρ_t δ_t + γ c_t (v_next(t) - V_next(t)).

    ρ_t = min(ρ̄, π/μ), c_t = λ min(c̄, π/μ), δ_t = r_t + γ V_next(t) - V_t, and the advantage is
    ρ_t (r_t + γ v_next(t) - V_t). On-policy and with clips >= 1 the targets are the λ-returns. ρ̄ decides what the
    values converge to (infinity: those of π), c̄ only how fast.

    Args:
      log_probs: [..., T] of the taken actions under the policy that learns, π; stopped.
      behaviour_log_probs: [..., T] of the same under the policy that acted, μ; stopped.
      rewards: [..., T] per step.
      values: [..., T] of the state before each step.
      mask: [..., T] bool, steps that were taken.
      bootstrap_value: [] or [...] value after the last valid step.
      discount: γ, one number or [..., T].
      trace_lambda: λ, one number or [..., T].
      rho_bar: ρ̄ > 0, largest weight of an error.
      c_bar: c̄ > 0, largest weight passed on to earlier steps.
    Returns:
      VTrace of [..., T], all 0 outside the mask.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ.
    Reference: Espeholt et al. 2018, eq. 1 and section 4.2, https://arxiv.org/abs/1802.01561; λ as in its remark 2

    >>> rewards, values, mask = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.array([True, True])
    >>> twice_as_likely = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.25]))
    >>> vtrace(*twice_as_likely, rewards, values, mask, discount=1.0, rho_bar=2.0).returns.tolist()
    [1.5, 1.5]
    """
    log_ratio = jax.lax.stop_gradient(kl.k1(*masking.zero_outside(mask, log_probs, behaviour_log_probs)))
    rewards, values = clean(mask, rewards, values)
    discounts, final = per_step(discount, mask, rewards, "discount"), final_values(bootstrap_value, rewards)
    rho = jnp.exp(jnp.minimum(log_ratio, jnp.log(jnp.asarray(rho_bar, log_ratio.dtype)))).astype(rewards.dtype)
    c = jnp.exp(jnp.minimum(log_ratio, jnp.log(jnp.asarray(c_bar, log_ratio.dtype)))).astype(rewards.dtype)
    errors = rho * (rewards + discounts * at_next_valid(values, mask, final) - values)
    decay = discounts * per_step(trace_lambda, mask, rewards, "trace_lambda") * c
    targets = jnp.where(mask, values + backward_recursion(errors, decay, mask, jnp.zeros_like(final)), 0.0)
    advantages = rho * (rewards + discounts * at_next_valid(targets, mask, final) - values)
    return VTrace(*masking.zero_outside(mask, advantages, targets, rho))
