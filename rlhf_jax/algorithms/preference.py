"""Preference optimisation: a policy learns from pairs without a reward model (the DPO family).

`apply_fn(params, inputs) -> log_probs [B, T]` is any policy, for instance `models.policies.token_policy`. Both
completions of a pair go through it in one forward pass of 2 B rows. Per pair, with a completion's log-ratio
ρ = Σ_t log π(y_t) - log π_ref(y_t), the loss is ``config.loss(ρ_w, ρ_l, beta=config.beta)``:

===================  ====================================================  =================  ==========================
algorithm            loss                                                  summarise          reference
===================  ====================================================  =================  ==========================
DPO, cDPO, rDPO      `preference.dpo`, `conservative_dpo`, `robust_dpo`    `summed`           yes
IPO, RSO, EXO        `preference.ipo_sum`, `hinge`, `exo`                  `summed`           yes
f-DPO                `divergence_preference.forward_kl_dpo` ...            `summed`           yes
NCA, SPPO, APO       `anchored_preference.nca`, `sppo`, `apo_zero` ...     `summed`           yes
length-normalised    `preference.dpo` with beta=5, `ipo_sum` (TRL's IPO)   `averaged`         yes
LD-DPO               `preference.dpo`                                      `length_desensit…` yes
RPO                  `preference.dpo`, chosen_nll_weight=1                 `summed`           yes
CPO                  `reference_free_preference.cpo`, chosen_nll_weight=1  `summed`           no
SimPO                `preference.dpo` of ρ_w - γ / β and ρ_l               `averaged`         no
===================  ====================================================  =================  ==========================

The reference's log-probs are part of the batch (`with_reference` puts them there, once for all epochs), or come from
parameters given to `update`, or are absent: then ρ is the policy's own log-prob.
"""

import dataclasses
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
from rlhf_jax.losses import preference
from rlhf_jax.masking import Totals
from rlhf_jax.training.gradients import loss_and_gradients
from rlhf_jax.training.state import init_train_state, merge_params
from rlhf_jax.types import PreferenceBatch

__all__ = ["Completions", "Config", "averaged", "init", "loss", "summed", "update", "with_reference"]


@struct.dataclass
class Completions:
    """One side of the pairs: `PreferenceBatch(chosen, rejected, weight)` holds two of these."""

    inputs: Any  # what apply_fn takes; every leaf has the leading axis B
    mask: Array  # [B, T] bool, completion tokens
    reference_log_probs: Array | None = None  # [B, T] of the frozen reference, where they are known


def summed(log_ratios: Array, mask: Array, other_lengths: Array) -> Array:
    """A completion's log-ratio, Σ_t log π(y_t) - log π_ref(y_t): [..., T] -> [...].

    >>> summed(jnp.array([[1.0, 2.0]]), jnp.array([[True, True]]), jnp.array([1])).tolist()
    [3.0]
    """
    del other_lengths
    return masking.masked_sum(log_ratios, mask, axis=-1)


def averaged(log_ratios: Array, mask: Array, other_lengths: Array) -> Array:
    """A completion's log-ratio per token: [..., T] -> [...]; no tokens give 0.

    >>> averaged(jnp.array([[1.0, 2.0]]), jnp.array([[True, True]]), jnp.array([1])).tolist()
    [1.5]
    """
    del other_lengths
    return masking.masked_mean(log_ratios, mask, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which loss, of which log-ratios; defaults as in Rafailov et al. 2023."""

    loss: Callable[..., Array] = preference.dpo  # (ρ_w [B], ρ_l [B], *, beta) -> [B]
    beta: ArrayLike = 0.1  # strength of the pull towards the reference
    summarise: Callable[[Array, Array, Array], Array] = summed  # (log-ratios, mask, the other's lengths) -> ρ
    chosen_nll_weight: ArrayLike | None = None  # a number adds the chosen completion's -log π per token


def init(params: Any, apply_fn: Callable[..., Array], optimizer: optax.GradientTransformation) -> TrainState:
    """The state to start from: trained parameters, their optimiser, and the policy `apply_fn(params, inputs)`."""
    return init_train_state(params, apply_fn, optimizer)


def _both(batch: PreferenceBatch) -> Any:
    """[2 B] rows, the chosen first."""
    return jax.tree.map(lambda chosen, rejected: jnp.concatenate([chosen, rejected]), batch.chosen, batch.rejected)


def with_reference(batch: PreferenceBatch, apply_fn: Callable[..., Array], reference: Any) -> PreferenceBatch:
    """The batch with the frozen reference's log-probs on both sides, from one forward pass of 2 B rows.

    Args:
      batch: pairs of `Completions`.
      apply_fn: the reference policy (params, inputs) -> [B, T]; it may be another than the trained one.
      reference: its parameters.
    Returns:
      The same pairs with `reference_log_probs`, stopped and 0 outside the masks.
    """
    both = _both(batch)
    log_probs = jax.lax.stop_gradient(apply_fn(reference, both.inputs))
    (clean,) = masking.zero_outside(both.mask, log_probs)
    chosen, rejected = jnp.split(clean, 2)
    return PreferenceBatch(
        batch.chosen.replace(reference_log_probs=chosen),
        batch.rejected.replace(reference_log_probs=rejected),
        batch.weight,
    )


def loss(
    params: Any, apply_fn: Callable[..., Array], batch: PreferenceBatch, *, config: Config, reference: Any = None
) -> dict[str, Totals]:
    """Loss per pair and what the policy implies: rewards β ρ, their margin, how often the chosen one is ahead.

    Args:
      params: the policy's parameters.
      apply_fn: the policy.
      batch: pairs of `Completions`. A pair of weight 0 counts nothing, whatever it holds.
      config: the loss and its knobs.
      reference: parameters of the frozen reference, evaluated by the same `apply_fn`; None takes the log-probs in the
        batch, and where there are none ρ is the policy's own log-prob.
    Raises:
      ValueError: the reference is given twice, as parameters and in the batch.
    """
    if reference is not None:
        if batch.chosen.reference_log_probs is not None:
            raise ValueError("the batch holds reference_log_probs already: give them or reference, not both")
        batch = with_reference(batch, apply_fn, reference)
    both, counts = _both(batch), batch.weight > 0
    mask = both.mask & jnp.tile(counts, 2)[:, None]
    (log_probs,) = masking.zero_outside(mask, apply_fn(params, both.inputs))
    log_ratios = log_probs
    if both.reference_log_probs is not None:
        (known,) = masking.zero_outside(mask, both.reference_log_probs)
        log_ratios = log_probs - jax.lax.stop_gradient(known)
    lengths = jnp.sum(mask, axis=-1)
    others = jnp.roll(lengths, len(counts))
    chosen, rejected = jnp.split(config.summarise(log_ratios, mask, others), 2)

    weight = jnp.where(counts, batch.weight, 0.0)
    weighted = lambda x: Totals(jnp.sum(weight * x), jnp.sum(weight))
    terms = {
        "preference/loss": weighted(config.loss(chosen, rejected, beta=config.beta)),
        "preference/accuracy": weighted(preference.accuracy(chosen, rejected)),
        "preference/margin": weighted(config.beta * (chosen - rejected)),
        "preference/chosen_reward": weighted(config.beta * chosen),
        "preference/rejected_reward": weighted(config.beta * rejected),
    }
    if config.chosen_nll_weight is not None:
        own = masking.masked_mean(log_probs, mask, axis=-1)[: len(counts)]
        terms["preference/chosen_nll"] = weighted(-own)
    return terms


def update(
    state: TrainState,
    batch: PreferenceBatch,
    *,
    config: Config,
    reference: Any = None,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step.

    `reference` are all parameters of the frozen reference, if the batch does not hold its log-probs; `frozen` are the
    policy's parameters that `state` does not train.
    """

    def terms(params: Any, rows: PreferenceBatch) -> dict[str, Totals]:
        whole = params if frozen is None else merge_params(params, frozen)
        return loss(whole, state.apply_fn, rows, config=config, reference=reference)

    weights: dict[str, ArrayLike] = {"preference/loss": 1.0}
    if config.chosen_nll_weight is not None:
        weights["preference/chosen_nll"] = config.chosen_nll_weight
    grads, metrics = loss_and_gradients(
        terms, state.params, batch, weights=weights, axis_name=axis_name, microbatches=microbatches
    )
    return state.apply_gradients(grads=grads), metrics | {"optim/grad_norm": optax.tree.norm(grads)}
