"""Preference optimisation from single completions that people found good or bad, without pairs (KTO, BCO, APO-zero).

`apply_fn(params, inputs) -> log_probs [B, T]` is any policy. Per completion, with its log-ratio ρ against the frozen
reference, the loss is ``config.loss(ρ, desirable, anchor, beta=config.beta)``. What completions are compared with is
the anchor, one number for the whole batch, without gradient:

=========  ===============================================  ================  =========================================
algorithm  loss                                             anchor            what it is
=========  ===============================================  ================  =========================================
KTO        `unpaired_preference.kto`                        `mismatched_kl`   KL to the reference, by mismatched answers
BCO        `unpaired_preference.bco`, beta=0.01             `mean_reward`     mean of β ρ over all steps before this one
APO-zero   `unpaired_preference.kto`                        `nothing`         0
=========  ===============================================  ================  =========================================

KTO's λ_D and λ_U are knobs of its loss (`functools.partial`), BCO's prompt weights go into `Batch.weight`. At the first
step a policy equals its reference and BCO's mean is 0 as it would be with that step in it; so no second forward pass is
spent, and micro-batches are exact.
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

from rlhf_jax import masking
from rlhf_jax.losses import unpaired_preference
from rlhf_jax.masking import Totals
from rlhf_jax.training.gradients import loss_and_gradients, split_rows
from rlhf_jax.training.state import init_train_state, merge_params

__all__ = [
    "Batch",
    "Config",
    "State",
    "init",
    "loss",
    "mean_reward",
    "mismatched_kl",
    "nothing",
    "reference_point",
    "update",
    "with_reference",
]


@struct.dataclass
class State:
    """Everything that training changes."""

    train: TrainState  # the policy's trained parameters and their optimiser
    rewards: Totals  # β ρ of all completions of the steps so far, by weight


@struct.dataclass
class Batch:
    """Completions and what people thought of them."""

    inputs: Any  # what apply_fn takes; every leaf has the leading axis B
    mask: Array  # [B, T] bool, completion tokens
    desirable: Array  # [B] bool
    weight: Array  # [B] float32, how much each completion counts; 0 for not at all
    reference_log_probs: Array | None = None  # [B, T] of the frozen reference; `with_reference` puts them there
    mismatched: "Batch | None" = None  # rows that hold a prompt and the completion of another; `desirable` is not read


def mismatched_kl(point: Array | None, rewards: Totals) -> Array:
    """KTO's anchor: what `reference_point` estimated from `Batch.mismatched`.

    >>> float(mismatched_kl(jnp.array(0.5), Totals(jnp.array(3.0), jnp.array(2.0))))
    0.5
    """
    del rewards
    if point is None:
        raise ValueError("KTO's anchor needs batch.mismatched: prompts with completions of other rows")
    return point


def mean_reward(point: Array | None, rewards: Totals) -> Array:
    """BCO's anchor: the mean of β ρ over the steps so far, 0 before the first.

    >>> float(mean_reward(None, Totals(jnp.array(3.0), jnp.array(2.0))))
    1.5
    """
    del point
    return masking.mean_of_totals(rewards)


def nothing(point: Array | None, rewards: Totals) -> Array:
    """APO-zero's anchor, 0.

    >>> float(nothing(None, Totals(jnp.array(3.0), jnp.array(2.0))))
    0.0
    """
    del point
    return jnp.zeros_like(rewards.sum)


_summed = functools.partial(masking.masked_sum, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which loss, of which log-ratios, compared with what; defaults as in Ethayarajh et al. 2024."""

    loss: Callable[..., Array] = unpaired_preference.kto  # (ρ [B], desirable [B], anchor [], *, beta) -> [B]
    beta: ArrayLike = 0.1  # strength of the pull towards the reference
    anchor: Callable[[Array | None, Totals], Array] = mismatched_kl  # (KTO's point, rewards so far) -> []
    summarise: Callable[[Array, Array], Array] = _summed  # (log-ratios, mask) -> ρ


def init(params: Any, apply_fn: Callable[..., Array], optimizer: optax.GradientTransformation) -> State:
    """The state to start from: trained parameters, their optimiser, and the policy `apply_fn(params, inputs)`."""
    zero = jnp.zeros((), jnp.float32)
    return State(init_train_state(params, apply_fn, optimizer), Totals(zero, zero))


def with_reference(batch: Batch, apply_fn: Callable[..., Array], reference: Any) -> Batch:
    """The batch, and its mismatched rows, with the frozen reference's log-probs, stopped and 0 outside the masks."""
    log_probs = jax.lax.stop_gradient(apply_fn(reference, batch.inputs))
    (clean,) = masking.zero_outside(batch.mask, log_probs)
    others = None if batch.mismatched is None else with_reference(batch.mismatched, apply_fn, reference)
    return dataclasses.replace(batch, reference_log_probs=clean, mismatched=others)


def _log_ratios(params: Any, apply_fn: Callable[..., Array], batch: Batch, config: Config) -> Array:
    """[B] ρ; 0 for completions that count nothing."""
    if batch.reference_log_probs is None:
        raise ValueError("the batch holds no reference_log_probs: put them there by with_reference")
    mask = batch.mask & (batch.weight > 0)[:, None]
    log_probs, known = masking.zero_outside(mask, apply_fn(params, batch.inputs), batch.reference_log_probs)
    return config.summarise(log_probs - jax.lax.stop_gradient(known), mask)


def reference_point(
    params: Any,
    apply_fn: Callable[..., Array],
    mismatched: Batch,
    *,
    config: Config,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> Array:
    """KTO's z₀ of the policy as it is, max(0, mean ρ of the mismatched completions): [] over all devices, stopped.

    It belongs to the whole batch, so `update` asks for it before the batch is split.
    """
    parts = split_rows(mismatched, microbatches)
    params = jax.lax.stop_gradient(params)
    ratios = jax.lax.map(lambda rows: _log_ratios(params, apply_fn, rows, config), parts)
    return unpaired_preference.kto_reference_point(ratios, parts.weight > 0, axis_name=axis_name)


def loss(
    params: Any, apply_fn: Callable[..., Array], batch: Batch, anchor: Array, *, config: Config
) -> dict[str, Totals]:
    """Loss per completion, and the rewards β ρ that the policy implies: of all, of good and of bad completions.

    Args:
      params: the policy's parameters.
      apply_fn: the policy.
      batch: with `reference_log_probs`. A completion of weight 0 counts nothing, whatever it holds.
      anchor: [] what completions are compared with; stopped.
      config: the loss and its knobs.
    Raises:
      ValueError: the batch holds no reference_log_probs.
    """
    ratios = _log_ratios(params, apply_fn, batch, config)
    weight = jnp.where(batch.weight > 0, batch.weight, 0.0)
    weighted = lambda x, w: Totals(jnp.sum(w * x), jnp.sum(w))
    rewards = config.beta * ratios
    return {
        "preference/loss": weighted(config.loss(ratios, batch.desirable, anchor, beta=config.beta), weight),
        "preference/reward": weighted(rewards, weight),
        "preference/desirable_reward": weighted(rewards, jnp.where(batch.desirable, weight, 0.0)),
        "preference/undesirable_reward": weighted(rewards, jnp.where(batch.desirable, 0.0, weight)),
    }


def update(
    state: State,
    batch: Batch,
    *,
    config: Config,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[State, dict[str, Array]]:
    """One gradient step. `frozen` holds the parameters that `state` does not train."""
    train = state.train
    whole = lambda params: params if frozen is None else merge_params(params, frozen)
    devices = {"axis_name": axis_name, "microbatches": microbatches}
    point = None
    if batch.mismatched is not None:
        point = reference_point(whole(train.params), train.apply_fn, batch.mismatched, config=config, **devices)
    anchor = config.anchor(point, state.rewards)

    def terms(params: Any, rows: Batch) -> dict[str, Totals]:
        return loss(whole(params), train.apply_fn, rows, anchor, config=config)

    grads, metrics = loss_and_gradients(
        terms, train.params, dataclasses.replace(batch, mismatched=None), weights={"preference/loss": 1.0}, **devices
    )
    count = masking.masked_sum(batch.weight, batch.weight > 0, axis_name=axis_name)
    seen = Totals(state.rewards.sum + count * metrics["preference/reward"], state.rewards.count + count)
    metrics |= {"preference/anchor": anchor, "optim/grad_norm": optax.tree.norm(grads)}
    return State(train.apply_gradients(grads=grads), seen), metrics
