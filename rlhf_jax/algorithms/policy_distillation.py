"""PD, policy distillation with human feedback: a teacher's soft targets, moved by what people like.

The student learns on sequences y that the *teacher* generated. Per token its loss is

    H(π_T, π_S)(s_t) + (w(y) - b) · (-log π_S(y_t | s_t)),     w(y) = exp(r(y) / β) / E[exp(r / β)]

with human reward r and baseline b = 1: dense soft targets, and an unbiased human term with the soft targets as its
control variate. In expectation it is the reward-weighted likelihood, whose optimum is π_T exp(r / β) / Z. With all
rewards equal w = 1, and it is plain distillation, whose optimum is π_T.

Few samples carry most of w(y). Two remedies with the same optimum: weights w(s_t, y_t) per token, if something knows
what a beginning is worth (`losses.human_distillation.human_step_weights`); or rows drawn with probability
∝ (1 + w) / 2, from the teacher and its human-reweighted target in equal parts, with importance 2 / (1 + w)
(`proposal`).

`apply_fn(params, inputs) -> Distilled` compares the student with the teacher; `rlhf_jax.models.policies` makes one for
language models in which teacher and student are hidden states and output tables.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array

from rlhf_jax import masking
from rlhf_jax.losses.human_distillation import human_soft_targets
from rlhf_jax.masking import Totals
from rlhf_jax.training.gradients import loss_and_gradients
from rlhf_jax.training.state import init_train_state, merge_params
from rlhf_jax.types import Distilled

__all__ = ["Batch", "Config", "init", "loss", "proposal", "update"]


@struct.dataclass
class Batch:
    """Sequences that the teacher generated."""

    inputs: Any  # what apply_fn takes; every leaf has the leading axis B
    mask: Array  # [B, T] bool, generated tokens
    human_weights: Array  # [B] w(y) or [B, T] w(s_t, y_t), see `losses.human_distillation`; ones: plain distillation
    importance: Array | None = None  # [B] π_T(y) / q(y) of rows drawn from q; None for the teacher's own samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How token losses become one number."""

    reduce: Callable[[Array, Array], Totals] = masking.token_totals


def proposal(human_weights: Array) -> tuple[Array, Array]:
    """Which of the teacher's samples to learn from: q ∝ (1 + w) / 2, half teacher and half reweighted teacher.

    Args:
      human_weights: [N] w(y) of all samples, of mean 1.
    Returns:
      ([N] probabilities to draw rows with, [N] importance 2 / (1 + w) of a row). The human term's coefficient becomes
      2 (w - 1) / (1 + w), which lies in [-2, 2). Weights of 1 give uniform rows and importance 1.

    >>> probabilities, importance = proposal(jnp.array([0.0, 2.0]))
    >>> probabilities.tolist(), importance.round(3).tolist()
    ([0.25, 0.75], [2.0, 0.667])
    """
    mixed = 1.0 + human_weights
    return mixed / jnp.sum(mixed), 2.0 / mixed


def init(params: Any, apply_fn: Callable[..., Distilled], optimizer: optax.GradientTransformation) -> TrainState:
    """The state to start from: the student's trained parameters and their optimiser."""
    return init_train_state(params, apply_fn, optimizer)


def loss(params: Any, apply_fn: Callable[..., Distilled], batch: Batch, *, config: Config) -> dict[str, Totals]:
    """Soft-target cross-entropy with the human term, per token, for rows drawn from q = π_T or another proposal."""
    student = apply_fn(params, batch.inputs)
    soft, log_probs, teacher_entropy = masking.zero_outside(batch.mask, *student)
    weights = batch.human_weights.reshape(len(batch.mask), -1)  # [B, 1] or [B, T]
    objective = human_soft_targets(soft, log_probs, weights)
    if batch.importance is not None:
        objective = batch.importance[:, None] * objective
    return {
        "distillation/loss": config.reduce(objective, batch.mask),
        "distillation/forward_kl": config.reduce(soft - teacher_entropy, batch.mask),
    }


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

    grads, metrics = loss_and_gradients(
        terms, state.params, batch, weights={"distillation/loss": 1.0}, axis_name=axis_name, microbatches=microbatches
    )
    return state.apply_gradients(grads=grads), metrics | {"optim/grad_norm": optax.tree.norm(grads)}
