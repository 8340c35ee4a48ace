"""What rows of data sets mean: one plain value per kind of example.

A side (prompt or response) is a text, or the messages of a conversation.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_jax.data.chat import Message

__all__ = [
    "Conversation",
    "Example",
    "Preference",
    "Prompt",
    "PromptCompletion",
    "Ranked",
    "Rated",
    "Side",
    "Stepwise",
    "Text",
    "Tools",
    "Unpaired",
]

Side = str | tuple[Message, ...]  # a text, or messages
Tools = tuple[Mapping[str, Any], ...] | None


class Text(NamedTuple):
    """A text to model as it stands."""

    text: str


class Conversation(NamedTuple):
    """A conversation whose assistant is to be learnt from, in every turn."""

    messages: tuple[Message, ...]
    tools: Tools = None


class Prompt(NamedTuple):
    """What a policy is to respond to."""

    prompt: Side
    tools: Tools = None


class PromptCompletion(NamedTuple):
    """A prompt and the response to learn."""

    prompt: Side
    completion: Side
    tools: Tools = None


class Preference(NamedTuple):
    """Two responses of which people preferred the first."""

    prompt: Side
    chosen: Side
    rejected: Side
    tools: Tools = None


class Unpaired(NamedTuple):
    """A response that somebody found good or bad."""

    prompt: Side
    completion: Side
    label: bool  # True is good
    tools: Tools = None


class Stepwise(NamedTuple):
    """A solution in steps, each right or wrong."""

    prompt: str
    completions: tuple[str, ...]
    labels: tuple[bool, ...]  # one per step, True is right


class Rated(NamedTuple):
    """Responses with a number each; larger is better."""

    prompt: Side
    responses: tuple[Side, ...]
    ratings: tuple[float, ...]  # one per response
    tools: Tools = None


class Ranked(NamedTuple):
    """Responses in order, the best first."""

    prompt: Side
    responses: tuple[Side, ...]
    tools: Tools = None


Example = Text | Conversation | Prompt | PromptCompletion | Preference | Unpaired | Stepwise | Rated | Ranked
