"""Language models as policies: functions of (params, inputs), the `apply_fn` of the algorithms.

Here alone a `Transformer` meets the response-aligned view of the algorithms: hidden states at slots P-1 .. P+R-2 predict
the R response tokens, so index t of everything returned is response token t. With ``prompt_length=1`` everything after
the first token is a response, which is how plain texts are learnt.

With ``first > 0`` only layers from `first` on are run, on the trunk activations that generation or an earlier pass has
kept in `TokenInputs.trunk`. The lower layers' parameters are then not needed.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.logprobs import head_log_probs, head_statistics
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, output_table
from rlhf_jax.types import ActorCritic, Distilled, TokenInputs
from rlhf_jax.vocabulary_chunks import head_soft_cross_entropy

__all__ = ["TeacherInputs", "actor_critic", "response_hidden", "student", "token_policy"]


@struct.dataclass
class TeacherInputs:
    """Sequences with the teacher's states, for a student to learn from."""

    inputs: TokenInputs
    teacher_hidden: Array  # [B, R, D_T] the teacher's final hidden states that predict the response


def response_hidden(model: Transformer, params: dict, inputs: TokenInputs, *, prompt_length: int, first: int = 0) -> Array:
    """[B, R, D] final hidden states that predict each response token."""
    start = inputs.trunk if first else inputs.tokens
    return model.apply({"params": params}, start, inputs.mask, first=first).hidden[:, prompt_length - 1 : -1]


def token_policy(
    model: Transformer, *, prompt_length: int, first: int = 0, temperature: ArrayLike = 1.0
) -> Callable[[dict, TokenInputs], Array]:
    """`apply_fn(params, inputs) -> log_probs [B, R]` of the response tokens, at the sampling temperature."""

    def apply(params: dict, inputs: TokenInputs) -> Array:
        hidden = response_hidden(model, params, inputs, prompt_length=prompt_length, first=first)
        return head_log_probs(hidden, output_table(params), inputs.tokens[:, prompt_length:], temperature=temperature)

    return apply


def actor_critic(
    model: Transformer, critic: ScalarHead, *, prompt_length: int, first: int, temperature: ArrayLike = 1.0
) -> Callable[[dict, TokenInputs], ActorCritic]:
    """`apply_fn({"actor": ..., "critic": ...}, inputs)`: the actor's top layers and a critic on the shared frozen trunk."""

    def apply(params: dict, inputs: TokenInputs) -> ActorCritic:
        hidden = response_hidden(model, params["actor"], inputs, prompt_length=prompt_length, first=first)
        actor = head_statistics(
            hidden, output_table(params["actor"]), inputs.tokens[:, prompt_length:], temperature=temperature
        )
        values = critic.apply({"params": params["critic"]}, inputs.trunk[:, prompt_length - 1 : -1])
        return ActorCritic(actor.log_probs, values, actor.entropy)

    return apply


def student(
    model: Transformer, *, prompt_length: int, first: int = 0, temperature: ArrayLike = 1.0
) -> Callable[[dict[str, Any], TeacherInputs], Distilled]:
    """`apply_fn({"student": ..., "teacher_table": [V, D_T]}, inputs)`: a student beside the teacher that generated."""

    def apply(params: dict[str, Any], batch: TeacherInputs) -> Distilled:
        table, tokens = output_table(params["student"]), batch.inputs.tokens[:, prompt_length:]
        hidden = response_hidden(model, params["student"], batch.inputs, prompt_length=prompt_length, first=first)
        soft = head_soft_cross_entropy(
            hidden, table, batch.teacher_hidden, params["teacher_table"], temperature=temperature
        )
        return Distilled(soft, head_log_probs(hidden, table, tokens, temperature=temperature))

    return apply
