"""Small networks for games: actor with critic, a judge of single steps, and what ties them to the algorithms.

Observations are vectors [..., D], or boards [..., H, W, C] that are flattened. `actor_critic` and `distilled` make the
`apply_fn` of `algorithms.actor_critic` and `algorithms.policy_distillation`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses.distillation import soft_cross_entropy
from rlhf_jax.types import ActorCritic, Distilled

__all__ = ["ActionInputs", "PolicyValue", "PolicyValueNet", "StepScore", "actor_critic", "distilled"]


class PolicyValue(NamedTuple):
    """What actor and critic say about an observation."""

    logits: Array  # [..., A] of the actions
    values: Array  # [...] of the state


class ActionInputs(NamedTuple):
    """Steps to evaluate a policy on."""

    observations: Array  # [B, T, ...] before each action
    actions: Array  # [B, T] int32, taken
    teacher_logits: Array | None = None  # [B, T, A] of the teacher, for distillation


def _torso(x: Array, hidden: Sequence[int], name: str) -> Array:
    for index, width in enumerate(hidden):
        x = nn.tanh(nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5), name=f"{name}_{index}")(x))
    return x


def _flat(observations: Array, rank: int) -> Array:
    """[..., D] float32 of observations whose last `rank` axes belong together."""
    return observations.reshape(*observations.shape[: observations.ndim - rank], -1).astype(jnp.float32)


class PolicyValueNet(nn.Module):
    """Actor and critic, two separate multilayer perceptrons; the actor starts almost uniform, the critic near 0."""

    actions: int
    hidden: Sequence[int] = (64, 64)
    rank: int = 1  # axes of one observation

    if TYPE_CHECKING:  # Linen cannot say that without mutable collections `apply` returns what the method does

        def apply(self, *args: Any, **kwargs: Any) -> Any: ...

    @nn.compact
    def __call__(self, observations: Array) -> PolicyValue:
        """observations [..., *shape] -> PolicyValue."""
        x, orthogonal = _flat(observations, self.rank), nn.initializers.orthogonal
        logits = nn.Dense(self.actions, kernel_init=orthogonal(0.01), name="logits")(_torso(x, self.hidden, "actor"))
        values = nn.Dense(1, kernel_init=orthogonal(1.0), name="value")(_torso(x, self.hidden, "critic"))
        return PolicyValue(logits, values[..., 0])


class StepScore(nn.Module):
    """A score in (-1, 1) for a step; tanh keeps a learned reward bounded (as in PEBBLE).

    With `filters` a board [..., H, W, C] is read square by square, what was there and how it changed, and summed over
    the board, so that what is learned about one square holds for all; without, everything is flattened.
    """

    actions: int
    hidden: Sequence[int] = (64, 64)
    rank: int = 1
    filters: int = 0

    @nn.compact
    def __call__(self, observations: Array, outcomes: Array, actions: Array) -> Array:
        """observations before and outcomes after the action [..., *shape], actions [...] int32 -> [...] float32."""
        seen = jnp.concatenate([observations, outcomes - observations], axis=-1).astype(jnp.float32)
        if self.filters:
            seen = jnp.sum(nn.relu(nn.Dense(self.filters, name="square")(seen)), axis=(-3, -2))
        else:
            seen = _flat(seen, self.rank)
        x = jnp.concatenate([seen, jax.nn.one_hot(actions, self.actions)], axis=-1)
        return nn.tanh(nn.Dense(1, name="score")(_torso(x, self.hidden, "torso"))[..., 0])


def actor_critic(network: PolicyValueNet) -> Callable[[Any, ActionInputs], ActorCritic]:
    """`apply_fn` of `algorithms.actor_critic` for a network that returns `PolicyValue`."""

    def apply(params: Any, inputs: ActionInputs) -> ActorCritic:
        logits, values = network.apply({"params": params}, inputs.observations)
        log_probs = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_probs, inputs.actions[..., None], axis=-1)[..., 0]
        return ActorCritic(taken, values, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))

    return apply


def distilled(network: PolicyValueNet, *, temperature: ArrayLike = 1.0) -> Callable[[Any, ActionInputs], Distilled]:
    """`apply_fn` of `algorithms.policy_distillation`; `inputs.teacher_logits` are the soft targets, stopped."""

    def apply(params: Any, inputs: ActionInputs) -> Distilled:
        teacher_logits = inputs.teacher_logits
        if teacher_logits is None:
            raise ValueError("inputs.teacher_logits must hold the teacher's logits [B, T, A], got None")
        logits, _ = network.apply({"params": params}, inputs.observations)
        taken = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs.actions[..., None], axis=-1)[..., 0]
        soft = soft_cross_entropy(logits, teacher_logits, temperature=temperature)
        return Distilled(soft, taken, soft_cross_entropy(teacher_logits, teacher_logits, temperature=temperature))

    return apply
