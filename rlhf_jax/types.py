"""The pytrees that flow between the floors. One shape comment per field; masks are bool, True = counts.

Sequences are left-padded prompts followed by right-padded responses, so that every row's response starts at the same
slot P. Index t of the response fields is the same generated token everywhere.
"""

from typing import Any, NamedTuple

from flax import struct
from jax import Array

__all__ = ["ActorCritic", "Distilled", "PreferenceBatch", "Rollout", "TokenBatch", "TokenInputs"]


@struct.dataclass
class TokenBatch:
    """Sequences to learn from or to score."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, real tokens (prompt and response) as opposed to padding
    loss_mask: Array  # [B, T] bool, tokens that count as targets; slot 0 of a row never can


@struct.dataclass
class TokenInputs:
    """What a language-model policy is evaluated on: sequences, and what is already known of them."""

    tokens: Array  # [B, P + R] int32
    mask: Array  # [B, P + R] bool, real tokens
    trunk: Array | None = None  # [B, P + R, D] activations of the frozen lower layers, if they were kept


@struct.dataclass
class PreferenceBatch:
    """Pairs in which a person preferred `chosen` to `rejected`."""

    chosen: Any  # what the scorer takes, for instance TokenInputs; every leaf has the leading axis B
    rejected: Any  # the same structure, of the other behaviour
    weight: Array  # [B] float32, how much each pair counts; 1 for one comparison


@struct.dataclass
class Rollout:
    """What a policy generated, with everything that generation computed on the way."""

    tokens: Array  # [B, P + R] int32
    mask: Array  # [B, P + R] bool, real tokens
    response_mask: Array  # [B, R] bool, generated tokens up to and including the end token
    log_probs: Array  # [B, R] float32, of the generated tokens under the distribution sampled from (warped)
    raw_log_probs: Array  # [B, R] float32, of the same tokens under the unwarped model
    trunk: Array | None = None  # [B, P + R, D] activations entering the tapped layer, if one was
    hidden: Array | None = None  # [B, R, D] final hidden states that predicted the response, if they were kept

    @property
    def prompt_length(self) -> int:
        """P, the number of (padded) prompt slots."""
        return self.tokens.shape[-1] - self.response_mask.shape[-1]

    @property
    def responses(self) -> Array:
        """[B, R] the generated tokens."""
        return self.tokens[..., self.prompt_length :]

    @property
    def inputs(self) -> TokenInputs:
        """The sequences as a policy takes them."""
        return TokenInputs(self.tokens, self.mask, self.trunk)


class ActorCritic(NamedTuple):
    """What actor and critic say about the tokens (or actions) that were taken."""

    log_probs: Array  # [B, T] of the taken tokens
    values: Array  # [B, T] of the state before each token
    entropy: Array | None = None  # [B, T] of the actor's distribution there, if it is needed


class Distilled(NamedTuple):
    """A student beside its teacher, on the tokens that the teacher took."""

    soft_cross_entropy: Array  # [B, T] H(teacher, student) at the state before each token
    log_probs: Array  # [B, T] the student's
    teacher_entropy: Array  # [B, T] H(teacher); the difference to the cross-entropy is KL(teacher || student)
