"""Reward model: a score per behaviour, learned from which of two a person preferred.

`apply_fn(params, inputs) -> scores [B]` scores texts, segments of play or anything else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses.reward_model import bradley_terry, centring
from rlhf_jax.masking import Totals
from rlhf_jax.training.gradients import loss_and_gradients
from rlhf_jax.training.state import init_train_state, merge_params
from rlhf_jax.types import PreferenceBatch

__all__ = ["Config", "init", "loss", "update"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Weights of the terms."""

    label_smoothing: ArrayLike = 0.0  # believed share of comparisons that are mistakes
    centring: ArrayLike = 0.01  # weight of (r_chosen + r_rejected)²: fixes the origin, and shrinks differences a little

    def __post_init__(self) -> None:
        if isinstance(self.label_smoothing, (int, float)) and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")


def init(params: Any, apply_fn: Callable[..., Array], optimizer: optax.GradientTransformation) -> TrainState:
    """The state to start from: trained parameters, their optimiser, and the scorer `apply_fn(params, inputs)`."""
    return init_train_state(params, apply_fn, optimizer)


def loss(params: Any, apply_fn: Callable[..., Array], batch: PreferenceBatch, *, config: Config) -> dict[str, Totals]:
    """Bradley-Terry loss per pair, -log σ(r_chosen - r_rejected), and the centring term (r_chosen + r_rejected)².

    A pair of weight 0 counts for nothing, whatever its scores are.
    """
    both = jax.tree.map(lambda chosen, rejected: jnp.concatenate([chosen, rejected]), batch.chosen, batch.rejected)
    chosen, rejected = jnp.split(apply_fn(params, both), 2)
    counts = batch.weight > 0
    chosen, rejected, weight = masking.zero_outside(counts, chosen, rejected, batch.weight)
    weighted = lambda x: Totals(jnp.sum(weight * x), jnp.sum(weight))
    return {
        "reward/loss": weighted(bradley_terry(chosen, rejected, label_smoothing=config.label_smoothing)),
        "reward/centring": weighted(centring(chosen, rejected)),
        "reward/accuracy": weighted((chosen > rejected).astype(jnp.float32)),
    }


def update(
    state: TrainState,
    batch: PreferenceBatch,
    *,
    config: Config,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step. `frozen` holds the parameters that `state` does not train."""

    def terms(params: Any, rows: PreferenceBatch) -> dict[str, Totals]:
        return loss(params if frozen is None else merge_params(params, frozen), state.apply_fn, rows, config=config)

    weights = {"reward/loss": 1.0, "reward/centring": config.centring}
    grads, metrics = loss_and_gradients(
        terms, state.params, batch, weights=weights, axis_name=axis_name, microbatches=microbatches
    )
    return state.apply_gradients(grads=grads), metrics | {"optim/grad_norm": optax.tree.norm(grads)}
