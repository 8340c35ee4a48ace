"""Actor-critic with human feedback: COACH, its eligibility traces, Deep COACH, Advise, and human returns for a critic.

A person watches an agent and says +1 or -1, now and then, a little late. COACH reads this as the advantage of what was
just done, since people judge relative to what the agent does at present: the actor's loss is that of `policy.reinforce`
with the feedback in the advantage's place. A trace lets one judgement reach back over earlier steps; summed over an
episode this is the same gradient as `coach` with the `human_returns` of discount equal to the decay.

Feedback is float; a step without feedback holds 0. Steps of an episode are marked by a bool mask [..., T]. `tamer` has
the methods that read feedback as a reward to be modelled.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import floating
from rlhf_jax.losses.policy import entropy_bonus, reinforce
from rlhf_jax.returns import discounted_returns

__all__ = [
    "Eligibility",
    "advise_log_probs",
    "coach",
    "deep_coach",
    "eligibility_gradient",
    "human_returns",
    "init_eligibility",
    "shape_policy",
    "shift_feedback",
    "update_eligibility",
]

Params = TypeVar("Params")


def coach(log_probs: Array, feedback: Array) -> Array:
    """Convergent actor-critic by humans, per step: -f·log π, the feedback f standing for the advantage.

    Args:
      log_probs: [..., T] of the taken actions under the trained policy.
      feedback: [..., T] of the person on each step, 0 where none was given; stopped.
    Returns:
      [..., T] loss, equal to `policy.reinforce` with advantages = feedback.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: MacGlashan et al. 2017, https://arxiv.org/abs/1701.06049

    >>> coach(jnp.array([-2.0, -1.0]), jnp.array([1.0, 0.0])).tolist()
    [2.0, 0.0]
    """
    log_probs, feedback = floating(log_probs=log_probs, feedback=feedback)
    return reinforce(log_probs, feedback)


class Eligibility(NamedTuple):
    """Decayed sum of the gradients of log π of the steps so far."""

    trace: object  # pytree like the parameters, float32 or wider


def _wide(x: Array) -> Array:
    return jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32))


def init_eligibility(params: object) -> Eligibility:
    """The empty trace: zeros like the parameters.

    >>> init_eligibility({"w": jnp.ones(2)}).trace["w"].tolist()
    [0.0, 0.0]
    """
    return Eligibility(jax.tree.map(lambda x: jnp.zeros_like(_wide(x)), params))


def update_eligibility(
    state: Eligibility, gradient: object, *, decay: ArrayLike = 0.95, restart: ArrayLike = False
) -> Eligibility:
    """One step of COACH's trace: e ← λ·e + ∇log π(a | s).

    Args:
      state: the trace before this step.
      gradient: pytree like the parameters, the gradient of log π of the step that feedback now arriving would judge
        (with a reaction time, the step that lies this long ago); stopped.
      decay: λ in [0, 1], how far back a judgement reaches; 0 judges this step alone.
      restart: [] bool, True at the first step of an episode forgets the trace before.
    Returns:
      the trace after this step.
    Reference: MacGlashan et al. 2017, algorithm 1, https://arxiv.org/abs/1701.06049

    >>> state = update_eligibility(Eligibility(jnp.array([4.0])), jnp.array([1.0]), decay=0.5)
    >>> state.trace.tolist()
    [3.0]
    """

    def step(trace: Array, new: Array) -> Array:
        return jnp.where(restart, 0.0, decay * trace) + jax.lax.stop_gradient(_wide(new))

    return Eligibility(jax.tree.map(step, state.trace, gradient))


def eligibility_gradient(state: Eligibility, feedback: ArrayLike) -> object:
    """The gradient that an optimiser descends when feedback arrives: -f·e.

    Args:
      state: the trace including the judged step.
      feedback: [] of the person; 0 gives no step.
    Returns:
      pytree like the parameters. With decay 0 it is the gradient of `coach` for the last step.
    Reference: MacGlashan et al. 2017, algorithm 1, https://arxiv.org/abs/1701.06049

    >>> eligibility_gradient(Eligibility(jnp.array([3.0])), 2.0).tolist()
    [-6.0]
    """
    return jax.tree.map(lambda trace: -jnp.asarray(feedback) * trace, state.trace)


def shift_feedback(feedback: Array, mask: Array, *, delay: int) -> Array:
    """Moves feedback back to the step it is about: out[t] = feedback[t + delay].

    Args:
      feedback: [..., T] at the step of its arrival.
      mask: [..., T] bool, the steps of the episode.
      delay: the person's reaction time in steps, a static int >= 0.
    Returns:
      [..., T] feedback, 0 at the last `delay` steps and outside the mask.
    Raises: ValueError for a negative delay, TypeError for integer feedback or a mask that is not bool.
    Reference: MacGlashan et al. 2017, https://arxiv.org/abs/1701.06049

    >>> shift_feedback(jnp.array([0.0, 0.0, 1.0]), jnp.ones(3, bool), delay=1).tolist()
    [0.0, 1.0, 0.0]
    """
    if delay < 0:
        raise ValueError(f"delay must be 0 or a positive number of steps, got {delay}")
    (feedback,) = floating(feedback=feedback)
    (feedback,) = masking.zero_outside(mask, feedback)
    delay = min(delay, feedback.shape[-1])
    shifted = jnp.concatenate([feedback[..., delay:], jnp.zeros_like(feedback[..., :delay])], axis=-1)
    return masking.zero_outside(mask, shifted)[0]


def deep_coach(
    log_probs: Array,
    old_log_probs: Array,
    mask: Array,
    feedback: Array,
    entropies: Array,
    *,
    decay: ArrayLike = 0.35,
    entropy_coefficient: ArrayLike = 1.5,
) -> Array:
    """Deep COACH, per window: -f·Σ_t λ^(steps after t)·r_t - entropy_coefficient·H, r = π / π_old.

    A window is the stretch of steps that ends at the judged one, as replayed from a buffer. Its gradient is that of the
    paper, -f·Σ_t λ^(steps after t)·r_t·∇log π_t - coefficient·∇H.

    Args:
      log_probs: [..., T] of the taken actions under the trained policy.
      old_log_probs: [..., T] under the policy that acted; stopped.
      mask: [..., T] bool, the steps of the window.
      feedback: [...] of the person on the last step of the window; stopped.
      entropies: [...] of the trained policy at that step, in nats; the gradient flows.
      decay: λ in [0, 1]; 0 judges the last step alone.
      entropy_coefficient: weight of the entropy bonus, large since feedback is sparse.
    Returns:
      [...] loss per window; average it over windows. On-policy with decay 0 and no entropy it has the gradient of
      `coach` on the last step.
    Raises: TypeError for integer inputs or a mask that is not bool, ValueError if feedback is not one per window,
      AssertionError if shapes differ (at trace time).
    Reference: Arumugam et al. 2019, algorithm 1, https://arxiv.org/abs/1902.04257

    >>> zeros, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    >>> deep_coach(zeros, zeros, mask, jnp.array([2.0]), jnp.array([1.0]), decay=0.5).tolist()
    [-4.5]
    """
    log_probs, old_log_probs = floating(log_probs=log_probs, old_log_probs=old_log_probs)
    feedback, entropies = floating(feedback=feedback, entropies=entropies)
    if feedback.shape != mask.shape[:-1]:
        raise ValueError(f"feedback must be one per window, {mask.shape[:-1]}, got {feedback.shape}")
    log_probs, old_log_probs = masking.zero_outside(mask, log_probs, old_log_probs)
    steps_after = jnp.cumsum(mask[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1] - 1
    weights = jnp.asarray(decay, log_probs.dtype) ** jnp.maximum(steps_after, 0)
    ratios = jnp.exp(log_probs - jax.lax.stop_gradient(old_log_probs))
    credited = masking.masked_sum(weights * ratios, mask, axis=-1)
    return -jax.lax.stop_gradient(feedback) * credited + entropy_bonus(entropies, coefficient=entropy_coefficient)


def human_returns(feedback: Array, mask: Array, *, discount: ArrayLike = 0.99) -> Array:
    """A critic's targets from human signals: G_t = f_t + γ·G_{t+1}, to the end of the episode.

    Args:
      feedback: [..., T] signals per step, 0 where none was given.
      mask: [..., T] bool, the steps of the episode; others are skipped, at any place.
      discount: γ in [0, 1]. People judge what is coming too, so small discounts are usual; 0 gives the feedback itself.
    Returns:
      [..., T] returns, stopped, 0 outside the mask. Feed them to a loss of `value`; minus the critic's values they are
      the actor's advantages.
    Raises: TypeError for integer feedback or a mask that is not bool, AssertionError if shapes differ (at trace time).
    Reference: Knox and Stone 2012, "Reinforcement learning from human reward: discounting in episodic tasks", RO-MAN

    >>> human_returns(jnp.array([1.0, 0.0, 4.0]), jnp.ones(3, bool), discount=0.5).tolist()
    [2.0, 2.0, 4.0]
    """
    (feedback,) = floating(feedback=feedback)
    return discounted_returns(jax.lax.stop_gradient(feedback), mask, discount=discount)


def advise_log_probs(labels: Array, *, consistency: ArrayLike) -> Array:
    """Advise: log of the chance that an action is right, C^Δ / (C^Δ + (1 - C)^Δ).

    Args:
      labels: [..., A] Δ, how many "right" minus how many "wrong" labels the action has got in this state; stopped.
      consistency: C in (0, 1), the chance that the person labels an action correctly; ½ says nothing.
    Returns:
      [..., A] log-probabilities, one statement per action (they need not sum to 1). Δ = 0 gives log ½; swapping the
      signs of all labels gives the chance of being wrong.
    Raises: TypeError for integer labels.
    Reference: Griffith et al. 2013, https://papers.nips.cc/paper/5187

    >>> [round(p, 3) for p in jnp.exp(advise_log_probs(jnp.array([0.0, 1.0, 2.0]), consistency=0.8)).tolist()]
    [0.5, 0.8, 0.941]
    """
    (labels,) = floating(labels=labels)
    log_odds = jnp.log(consistency) - jnp.log1p(-jnp.asarray(consistency))
    return jax.nn.log_sigmoid(jax.lax.stop_gradient(labels) * log_odds)


def shape_policy(logits: Array, labels: Array, *, consistency: ArrayLike) -> Array:
    """Policy shaping: the product of the agent's policy and the person's advice, normalised.

    Args:
      logits: [..., A] of the agent's policy; the gradient flows.
      labels: [..., A] as in `advise_log_probs`; stopped.
      consistency: C in (0, 1) as in `advise_log_probs`.
    Returns:
      [..., A] log-probabilities of π(a)·Advise(a) / Σ π·Advise. Without labels, or with C = ½, they are those of π.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Griffith et al. 2013, https://papers.nips.cc/paper/5187

    >>> shaped = shape_policy(jnp.zeros(2), jnp.array([1.0, -1.0]), consistency=0.8)
    >>> [round(p, 3) for p in jnp.exp(shaped).tolist()]
    [0.8, 0.2]
    """
    logits, labels = floating(logits=logits, labels=labels)
    return jax.nn.log_softmax(jax.nn.log_softmax(logits) + advise_log_probs(labels, consistency=consistency))
