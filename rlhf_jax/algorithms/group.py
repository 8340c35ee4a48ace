"""Group policy optimisation: several answers per prompt, each measured against its siblings (the GRPO family).

One turn: the policy answers every prompt G times (`generation.generate` with ``samples=G``), somebody scores the
answers, `experience` compares them within their group, `update` or `update_epochs` takes the gradient steps. No critic
is trained, and nothing that generation computed is computed again: its log-probs are the old log-probs.

Rows of a group are adjacent, rows b · G .. b · G + G - 1. The published algorithms are settings:

===============  ========================================  ====================================  =====================
algorithm        advantages                                surrogate                             reduce
===============  ========================================  ====================================  =====================
GRPO             `group_relative`                          `over_tokens(clipped_surrogate)`      `sequence_mean_totals`
Dr. GRPO         `group_centred`                           `over_tokens(clipped_surrogate)`      `fixed_length_totals`
DAPO             `group_relative`                          the same with clip_high=0.28          `token_totals`
RLOO             `leave_one_out`, kl_in_reward=β           `over_tokens(surrogate)`              `sequence_sum_totals`
GSPO             `group_relative`                          `sequence_policy.gspo`                (losses per sequence)
CISPO, SAPO      `group_relative`                          `over_tokens(gated_policy.cispo)`     `token_totals`
GMPO, VESPO      `group_relative`                          `sequence_policy.gmpo`, `vespo`       as its table says
===============  ========================================  ====================================  =====================

The pull towards the reference is either a term of the loss (`kl_weight`, GRPO) or part of the reward (`kl_in_reward`,
RLOO). Only the second has the optimum π_ref exp(r / β) / Z for answers of several tokens: a term per token does not see
what a token does to the KL of those behind it. With k3 the term's gradient is that of KL(π_ref ‖ π), and its optimum
for answers of one token π_ref β / (λ - r) with the λ that makes it sum to 1; with k2 it is π_ref exp(r / β) / Z.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import group_advantages, kl, masking
from rlhf_jax.losses import policy
from rlhf_jax.losses.policy import ClippedSurrogate
from rlhf_jax.masking import Totals
from rlhf_jax.rewards import check_rewards
from rlhf_jax.training.epochs import run_epochs
from rlhf_jax.training.gradients import loss_and_gradients
from rlhf_jax.training.state import init_train_state, merge_params

__all__ = ["Batch", "Config", "experience", "init", "loss", "over_tokens", "update", "update_epochs"]

Surrogate = Callable[[Array, Array, Array, Array], ClippedSurrogate | Array]


@struct.dataclass
class Batch:
    """Answers, ready to learn from. Index t is the same token everywhere."""

    inputs: Any  # what apply_fn takes; every leaf has the leading axis B
    mask: Array  # [B, T] bool, generated tokens that count
    old_log_probs: Array  # [B, T] when they were generated
    advantages: Array  # [B] per answer, or [B, T] per token
    reference_log_probs: Array | None = None  # [B, T] of the frozen reference; None for no KL term
    importance: Array | None = None  # [B, T] weights of the losses, where the sampler was not the policy


def over_tokens(loss: Callable[..., ClippedSurrogate | Array], **knobs: ArrayLike) -> Surrogate:
    """Makes a loss per token, loss(log_probs, old_log_probs, advantages, **knobs), into a `Config.surrogate`.

    It gives every token its answer's advantage and leaves the mask to the reducer.

    >>> surrogate = over_tokens(policy.clipped_surrogate, clip_high=0.28)
    >>> surrogate(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([3.0]), jnp.array([[True, True]])).loss.tolist()
    [[-3.0, -3.0]]
    """

    def surrogate(log_probs: Array, old_log_probs: Array, advantages: Array, mask: Array) -> ClippedSurrogate | Array:
        if advantages.ndim < mask.ndim:
            advantages = group_advantages.to_tokens(advantages, mask)
        return loss(log_probs, old_log_probs, advantages, **knobs)

    return surrogate


_CLIPPED = over_tokens(policy.clipped_surrogate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How answers are compared and learnt from; defaults as in Shao et al. 2024."""

    group: int  # G, answers per prompt
    advantages: Callable[..., Array] = group_advantages.group_relative  # (rewards [B], mask [B], *, group) -> [B]
    surrogate: Surrogate = _CLIPPED  # (log_probs, old_log_probs, advantages [B], mask) -> per token or per answer
    kl_weight: ArrayLike | None = 0.04  # weight of the KL term of the loss; None for no such term
    kl_estimate: Callable[[Array, Array], Array] = kl.k3  # (log_probs, reference_log_probs) -> [B, T]
    kl_in_reward: ArrayLike | None = None  # weight of the log-ratio that is taken off an answer's reward; None for 0
    reduce: Callable[[Array, Array], Totals] = masking.sequence_mean_totals

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"group must be an int >= 1, got {self.group!r}")


def init(params: Any, apply_fn: Callable[..., Array], optimizer: optax.GradientTransformation) -> TrainState:
    """The state to start from: trained parameters, their optimiser, and the policy `apply_fn(params, inputs)`."""
    return init_train_state(params, apply_fn, optimizer)


def experience(
    inputs: Any,
    mask: Array,
    old_log_probs: Array,
    rewards: Array,
    reference_log_probs: Array | None = None,
    *,
    config: Config,
    axis_name: str | None = None,
) -> tuple[Batch, dict[str, Array]]:
    """Advantages of a batch of answers within their groups.

    An answer whose reward is missing (NaN) is left out: of its group's statistics, and of the loss.

    Args:
      inputs: what `apply_fn` takes, leading axis B.
      mask: [B, T] bool, generated tokens.
      old_log_probs: [B, T] of the policy that generated them, as generation returns them.
      rewards: [B] float32 per answer; NaN where it is missing.
      reference_log_probs: [B, T] of the frozen reference; None if neither loss nor reward looks at it.
      config: `group`, `advantages`, `kl_in_reward`.
      axis_name: mapped axis of devices, for the metrics; groups do not cross devices.
    Returns:
      The batch, everything stopped and 0 outside the mask; metrics, KL in nats per answer. "group/undecided" is the
      share of groups whose answers all have the same advantage, and so teach nothing.
    Raises:
      TypeError: integer rewards. ValueError: group does not divide B, or a KL without a reference.
    """
    if reference_log_probs is None and (config.kl_in_reward is not None or config.kl_weight is not None):
        raise ValueError("reference_log_probs is missing: give it, or set kl_weight=None and kl_in_reward=None")
    rewards = jax.lax.stop_gradient(check_rewards(rewards))
    present = ~jnp.isnan(rewards)
    mask = mask & present[:, None]
    (old_log_probs,) = masking.zero_outside(mask, jax.lax.stop_gradient(old_log_probs))
    compared, metrics = jnp.where(present, rewards, 0.0), {}
    mean = functools.partial(masking.masked_mean, axis_name=axis_name)
    if reference_log_probs is not None:
        (reference_log_probs,) = masking.zero_outside(mask, jax.lax.stop_gradient(reference_log_probs))
        log_ratios = masking.masked_sum(old_log_probs - reference_log_probs, mask, axis=-1)
        metrics["policy/kl"] = mean(log_ratios, jnp.any(mask, axis=-1))
        if config.kl_in_reward is not None:
            compared = compared - config.kl_in_reward * log_ratios
    advantages = config.advantages(compared, present, group=config.group)
    grouped = advantages.reshape(-1, config.group * (advantages.size // present.size))
    every = jnp.ones(present.shape, bool)
    metrics |= {
        "human/score": mean(rewards, present),
        "human/missing": mean((~present).astype(jnp.float32), every),
        "policy/length": mean(jnp.sum(mask, axis=-1, dtype=jnp.float32), present),
        "group/undecided": mean(jnp.all(grouped == 0, axis=-1).astype(jnp.float32), every[:: config.group]),
    }
    kept = None if config.kl_weight is None else reference_log_probs
    return Batch(inputs, mask, old_log_probs, jax.lax.stop_gradient(advantages), kept), metrics


def loss(params: Any, apply_fn: Callable[..., Array], batch: Batch, *, config: Config) -> dict[str, Totals]:
    """Surrogate of the policy and its KL term, reduced by `config.reduce`; losses per answer are averaged over answers.

    Args:
      params: the policy's parameters.
      apply_fn: the policy.
      batch: answers with their advantages.
      config: `surrogate`, `kl_estimate`, `reduce`.
    Raises:
      ValueError: the config has a KL term and the batch no reference.
    """
    mask = batch.mask
    log_probs, old_log_probs = masking.zero_outside(mask, apply_fn(params, batch.inputs), batch.old_log_probs)
    advantages = batch.advantages
    if advantages.ndim == mask.ndim:
        (advantages,) = masking.zero_outside(mask, advantages)
    result = config.surrogate(log_probs, old_log_probs, advantages, mask)
    objective, clipped = result if isinstance(result, ClippedSurrogate) else (result, None)

    def reduce(x: Array) -> Totals:
        if x.ndim == mask.ndim:
            return config.reduce(x, mask)
        return masking.token_totals(x, jnp.any(mask, axis=-1))

    if batch.importance is not None:
        if objective.ndim < mask.ndim:
            raise ValueError("importance weighs losses per token, but config.surrogate returns one per answer")
        (weights,) = masking.zero_outside(mask, jax.lax.stop_gradient(batch.importance))
        objective = weights * objective
    terms = {"policy/loss": reduce(objective), "policy/step_kl": reduce(kl.k3(old_log_probs, log_probs))}
    if clipped is not None:
        terms["policy/clip_fraction"] = reduce(clipped.astype(jnp.float32))
    if config.kl_weight is not None:
        if batch.reference_log_probs is None:
            raise ValueError("config.kl_weight needs the batch's reference_log_probs; None turns the KL term off")
        (reference,) = masking.zero_outside(mask, batch.reference_log_probs)
        terms["policy/reference_kl"] = reduce(config.kl_estimate(log_probs, reference))
    return terms


def update(
    state: TrainState,
    batch: Batch,
    *,
    config: Config,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step. `frozen` holds the parameters that `state` does not train."""

    def terms(params: Any, rows: Batch) -> dict[str, Totals]:
        return loss(params if frozen is None else merge_params(params, frozen), state.apply_fn, rows, config=config)

    weights: dict[str, ArrayLike] = {"policy/loss": 1.0}
    if config.kl_weight is not None:
        weights["policy/reference_kl"] = config.kl_weight
    grads, metrics = loss_and_gradients(
        terms, state.params, batch, weights=weights, axis_name=axis_name, microbatches=microbatches
    )
    return state.apply_gradients(grads=grads), metrics | {"optim/grad_norm": optax.tree.norm(grads)}


def update_epochs(
    state: TrainState,
    batch: Batch,
    key: Array,
    *,
    epochs: int,
    minibatches: int = 1,
    config: Config,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """All steps of one turn: `epochs` passes in a fresh random order, each in `minibatches` steps; metrics averaged.

    `microbatches` splits the rows of every step, as in `update`.
    `key` is consumed; under a mapped axis give each device its own. B must be divisible by `minibatches`. Answers of a
    group may meet in different minibatches: they have been compared already.
    """
    step = functools.partial(update, config=config, frozen=frozen, axis_name=axis_name, microbatches=microbatches)
    return run_epochs(step, state, batch, key, epochs=epochs, minibatches=minibatches)
