"""Language models as policies: functions of (params, inputs), the `apply_fn` of the algorithms.

Here alone a `Transformer` meets the response-aligned view of the algorithms: hidden states at slots P-1 .. P+R-2
predict the R response tokens, so index t of everything returned is response token t. With ``prompt_length=1``
everything after the first token is a response, which is how plain texts are learnt.

With ``first > 0`` only layers from `first` on are run, on the trunk activations that generation or an earlier pass has
kept in `TokenInputs.trunk`. The lower layers' parameters are then not needed.

[B, R, V] logits are never formed. What padding holds, in tokens, trunk or teacher's states, changes nothing that is
returned for real tokens, nor its gradient.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.logprobs import head_log_probs, response_states
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.stacked import StackedTransformer
from rlhf_jax.models.transformer import Transformer, output_table
from rlhf_jax.teacher_chunks import head_distillation
from rlhf_jax.types import ActorCritic, Distilled, TokenInputs

__all__ = ["TeacherInputs", "actor_critic", "response_hidden", "student", "token_policy"]

Decoder = Transformer | StackedTransformer


@struct.dataclass
class TeacherInputs:
    """Sequences with the teacher's states, for a student to learn from."""

    inputs: TokenInputs
    teacher_hidden: Array  # [B, R, D_T] the teacher's final hidden states that predict the response


def response_hidden(model: Decoder, params: dict, inputs: TokenInputs, *, prompt_length: int, first: int = 0) -> Array:
    """[B, R, D] final hidden states that predict each response token."""
    start = _kept_trunk(inputs) if first else inputs.tokens
    hidden = model.apply({"params": params}, start, inputs.mask, first=first).hidden
    return response_states(hidden, prompt_length=prompt_length)


def _kept_trunk(inputs: TokenInputs) -> Array:
    """[B, P + R, D] activations that were kept, 0 in padding."""
    if inputs.trunk is None:
        raise ValueError("inputs.trunk is missing: generate with tap=first, or first=0 runs all layers on the tokens")
    return jnp.where(inputs.mask[..., None], inputs.trunk, 0)


def token_policy(
    model: Decoder, *, prompt_length: int, first: int = 0, temperature: ArrayLike = 1.0
) -> Callable[[dict, TokenInputs], Array]:
    """`apply_fn(params, inputs) -> log_probs [B, R]` of the response tokens, at the sampling temperature."""

    def apply(params: dict, inputs: TokenInputs) -> Array:
        hidden = response_hidden(model, params, inputs, prompt_length=prompt_length, first=first)
        tokens, cap = inputs.tokens[:, prompt_length:], model.config.logit_soft_cap
        return head_log_probs(hidden, output_table(params), tokens, temperature=temperature, soft_cap=cap)

    return apply


def actor_critic(
    model: Decoder, critic: ScalarHead, *, prompt_length: int, first: int, temperature: ArrayLike = 1.0
) -> Callable[[dict, TokenInputs], ActorCritic]:
    """`apply_fn({"actor": ..., "critic": ...}, inputs)`: the actor's upper layers, and a critic on the same trunk."""
    if not first:
        raise ValueError(
            "first must be at least 1: the critic reads the activations of a trunk below the actor's layers"
        )
    log_probs = token_policy(model, prompt_length=prompt_length, first=first, temperature=temperature)

    def apply(params: dict, inputs: TokenInputs) -> ActorCritic:
        before = response_states(_kept_trunk(inputs), prompt_length=prompt_length)
        values = critic.apply({"params": params["critic"]}, before)
        return ActorCritic(log_probs(params["actor"], inputs), values)

    return apply


def student(
    model: Decoder, *, prompt_length: int, first: int = 0, temperature: ArrayLike = 1.0
) -> Callable[[dict[str, Any], TeacherInputs], Distilled]:
    """`apply_fn({"student": ..., "teacher_table": [V, D_T]}, inputs)`: a student beside the teacher that generated.

    Teacher and student have the same soft cap of logits, if any.
    """

    def apply(params: dict[str, Any], batch: TeacherInputs) -> Distilled:
        own, inputs = params["student"], batch.inputs
        hidden = response_hidden(model, own, inputs, prompt_length=prompt_length, first=first)
        real, tokens = inputs.mask[:, prompt_length:], inputs.tokens[:, prompt_length:]
        taught, table = jnp.where(real[..., None], batch.teacher_hidden, 0), params["teacher_table"]
        cap = model.config.logit_soft_cap
        both = head_distillation(
            *(hidden, output_table(own), taught, table, tokens),
            temperature=temperature,
            soft_cap=cap,
            teacher_soft_cap=cap,
        )
        return Distilled(both.cross_entropy, both.log_probs, both.teacher_entropy)

    return apply
