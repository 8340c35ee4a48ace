"""AC-HF, actor-critic with human feedback: the actor acts, people (or a model of them) score, both learn.

One turn has three parts, all pure:

1. the actor generates (`rlhf_jax.generation`, or an environment), and somebody scores what it did;
2. `experience` turns scores, the critic's values and the reference's log-probs into advantages and returns;
3. `update` takes one clipped policy-gradient step of the actor and one regression step of the critic; `update_epochs`
   takes all steps of a turn in one program.

`apply_fn(params, inputs) -> ActorCritic` evaluates both networks, which may share a trunk or not, for tokens or for
actions in a game alike.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import advantages as advantage_functions
from rlhf_jax import kl, masking, rewards
from rlhf_jax.losses import policy, value
from rlhf_jax.masking import Totals
from rlhf_jax.training.epochs import run_epochs
from rlhf_jax.training.gradients import loss_and_gradients
from rlhf_jax.training.state import init_train_state, merge_params
from rlhf_jax.types import ActorCritic

__all__ = ["Batch", "Config", "State", "experience", "init", "loss", "steer", "update", "update_epochs"]


@struct.dataclass
class State:
    """Everything that training changes."""

    train: TrainState  # actor's and critic's trained parameters and their optimiser
    kl: kl.AdaptiveKL  # strength of the pull towards the reference


@struct.dataclass
class Batch:
    """What the actor did, ready to learn from. Index t is the same token everywhere."""

    inputs: Any  # what apply_fn takes; every leaf has the leading axis B
    mask: Array  # [B, T] bool, generated tokens
    old_log_probs: Array  # [B, T] when they were generated
    old_values: Array  # [B, T] the critic's, before learning
    advantages: Array  # [B, T]
    returns: Array  # [B, T] the critic's targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of PPO with a learned human reward; defaults as in Ziegler et al. 2019."""

    clip: ArrayLike = 0.2  # the policy ratio stays in [1 - clip, 1 + clip]
    value_clip: ArrayLike = 0.2  # values move at most this far from the old ones per turn
    value_weight: ArrayLike = 0.1
    entropy_weight: ArrayLike | None = None  # a number needs an apply_fn that returns the entropy
    discount: ArrayLike = 1.0
    gae_lambda: ArrayLike = 0.95
    kl_target: ArrayLike = 6.0  # nats per sequence that the controller steers to
    kl_horizon: ArrayLike = 10_000.0  # sequences over which it does
    reduce: Callable[[Array, Array], Totals] = masking.token_totals


def init(
    params: Any,
    apply_fn: Callable[..., ActorCritic],
    optimizer: optax.GradientTransformation,
    *,
    kl_coefficient: ArrayLike = 0.15,
) -> State:
    """The state to start from; `params` is the dict of trained parameters, of actor and critic together."""
    return State(init_train_state(params, apply_fn, optimizer), kl.init_adaptive_kl(kl_coefficient))


def experience(
    inputs: Any,
    mask: Array,
    old_log_probs: Array,
    reference_log_probs: Array,
    old_values: Array,
    scores: Array,
    *,
    kl_coefficient: ArrayLike,
    config: Config,
    axis_name: str | None = None,
) -> tuple[Batch, dict[str, Array]]:
    """Advantages and returns of a batch of behaviour: human score where it lands, KL penalty at every token, GAE.

    Args:
      inputs: what `apply_fn` takes, leading axis B.
      mask: [B, T] bool, generated tokens.
      old_log_probs: [B, T] of the policy that generated them.
      reference_log_probs: [B, T] of the frozen reference.
      old_values: [B, T] of the critic.
      scores: [B] human reward of each sequence, which lands on its last token; or [B, T], of each token.
      kl_coefficient: β; the reward per token is -β (log π - log π_ref).
      config: `discount`, `gae_lambda`.
      axis_name: mapped axis whose devices share the whitening statistics.
    Returns:
      The batch, advantages whitened once over all devices; metrics, KL in nats per sequence.
    """
    if scores.ndim == mask.ndim:
        landed, scores = scores, masking.masked_sum(scores, mask, axis=-1)
    else:
        landed = rewards.score_at_last_token(scores, mask)
    token_rewards = rewards.kl_shaped_rewards(landed, old_log_probs, reference_log_probs, mask, beta=kl_coefficient)
    advantages, returns = advantage_functions.gae(
        token_rewards, old_values, mask, discount=config.discount, gae_lambda=config.gae_lambda
    )
    white = masking.whiten(advantages, mask, axis_name=axis_name)
    clean = masking.zero_outside(mask, old_log_probs, reference_log_probs, old_values, returns)
    old_log_probs, reference_log_probs, old_values, returns = clean
    mean = functools.partial(masking.masked_mean, axis_name=axis_name)
    rows = jnp.ones(scores.shape, bool)
    spread = masking.masked_variance(returns, mask, axis_name=axis_name)
    metrics = {
        "human/score": mean(scores, rows),
        "policy/kl": masking.sequence_sum(kl.k1(old_log_probs, reference_log_probs), mask, axis_name=axis_name),
        "policy/length": mean(jnp.sum(mask, axis=-1, dtype=jnp.float32), rows),
        "value/explained_variance": 1.0
        - masking.masked_variance(returns - old_values, mask, axis_name=axis_name) / jnp.maximum(spread, 1e-8),
    }
    return Batch(inputs, mask, old_log_probs, old_values, white, returns), metrics


def steer(state: State, kl_per_sequence: ArrayLike, *, sequences: ArrayLike, config: Config) -> State:
    """Moves the KL coefficient towards `config.kl_target`, once per turn, by the KL that `experience` reports.

    `sequences` counts those of all devices. An infinite `config.kl_horizon` keeps the coefficient fixed.
    """
    controller = kl.update_adaptive_kl(
        state.kl, kl_per_sequence, batch_size=sequences, target=config.kl_target, horizon=config.kl_horizon
    )
    return State(state.train, controller)


def loss(params: Any, apply_fn: Callable[..., ActorCritic], batch: Batch, *, config: Config) -> dict[str, Totals]:
    """Clipped surrogate of the actor, clipped squared error of the critic, entropy; per-token terms."""
    now = apply_fn(params, batch.inputs)
    log_probs, values = masking.zero_outside(batch.mask, now.log_probs, now.values)
    surrogate = policy.clipped_surrogate(
        log_probs, batch.old_log_probs, batch.advantages, clip_low=config.clip, clip_high=config.clip
    )
    reduce = lambda x: config.reduce(x, batch.mask)
    terms = {
        "policy/loss": reduce(surrogate.loss),
        "value/loss": reduce(
            value.clipped_squared_error(values, batch.old_values, batch.returns, clip=config.value_clip)
        ),
        "policy/clip_fraction": reduce(surrogate.clipped.astype(jnp.float32)),
        "policy/step_kl": reduce(kl.k3(batch.old_log_probs, log_probs)),
    }
    if now.entropy is not None:
        terms["policy/entropy"] = reduce(now.entropy)
    return terms


def update(
    state: State,
    batch: Batch,
    *,
    config: Config,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[State, dict[str, Array]]:
    """One gradient step of actor and critic. `frozen` holds the parameters that `state` does not train."""

    def terms(params: Any, rows: Batch) -> dict[str, Totals]:
        return loss(
            params if frozen is None else merge_params(params, frozen), state.train.apply_fn, rows, config=config
        )

    weights: dict[str, ArrayLike] = {"policy/loss": 1.0, "value/loss": config.value_weight}
    if config.entropy_weight is not None:
        weights["policy/entropy"] = -jnp.asarray(config.entropy_weight)
    grads, metrics = loss_and_gradients(
        terms, state.train.params, batch, weights=weights, axis_name=axis_name, microbatches=microbatches
    )
    metrics |= {"optim/grad_norm": optax.tree.norm(grads)}
    return State(state.train.apply_gradients(grads=grads), state.kl), metrics


def update_epochs(
    state: State,
    batch: Batch,
    key: Array,
    *,
    epochs: int,
    minibatches: int = 1,
    config: Config,
    frozen: Any = None,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[State, dict[str, Array]]:
    """All steps of one turn: `epochs` passes in a fresh random order, each in `minibatches` steps; metrics averaged.

    `microbatches` splits the rows of every step, as in `update`.
    `key` is consumed; under a mapped axis give each device its own. See `training.epochs.run_epochs`.
    """
    step = functools.partial(update, config=config, frozen=frozen, axis_name=axis_name, microbatches=microbatches)
    return run_epochs(step, state, batch, key, epochs=epochs, minibatches=minibatches)
