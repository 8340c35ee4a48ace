"""Supervised fine-tuning: maximum likelihood of the tokens that count.

`apply_fn(params, inputs) -> log_probs [B, T]` is any policy; `rlhf_jax.models.policies` makes one of a language model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array

from rlhf_jax import masking
from rlhf_jax.masking import Totals
from rlhf_jax.training.gradients import loss_and_gradients
from rlhf_jax.training.state import init_train_state, merge_params

__all__ = ["Batch", "Config", "init", "loss", "update"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How token losses become one number."""

    reduce: Callable[[Array, Array], Totals] = masking.token_totals


@struct.dataclass
class Batch:
    """Demonstrations."""

    inputs: Any  # what apply_fn takes; every leaf has the leading axis B
    mask: Array  # [B, T] bool, tokens to learn


def init(params: Any, apply_fn: Callable[..., Array], optimizer: optax.GradientTransformation) -> TrainState:
    """The state to start from: trained parameters, their optimiser, and the policy `apply_fn(params, inputs)`."""
    return init_train_state(params, apply_fn, optimizer)


def loss(params: Any, apply_fn: Callable[..., Array], batch: Batch, *, config: Config) -> dict[str, Totals]:
    """Negative log-likelihood, -log π(y_t | y_<t), in nats per token."""
    log_probs = apply_fn(params, batch.inputs)
    return {"sft/loss": config.reduce(-log_probs, batch.mask)}


def update(
    state: TrainState,
    batch: Batch,
    *,
    config: Config,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step. `frozen` holds what `state` does not train; see `training.state.split_params`."""

    def terms(params: Any, rows: Batch) -> dict[str, Totals]:
        return loss(params if frozen is None else merge_params(params, frozen), state.apply_fn, rows, config=config)

    grads, metrics = loss_and_gradients(
        terms, state.params, batch, weights={"sft/loss": 1.0}, axis_name=axis_name, microbatches=microbatches
    )
    return state.apply_gradients(grads=grads), metrics | {"optim/grad_norm": optax.tree.norm(grads)}
