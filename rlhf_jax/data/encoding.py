"""Examples to token lists: what would go wrong in silence is an error that names the row.

Every row has a token that ends the response, no begin token twice, no padding token and something to learn. A row that
is too long is refused and not cut, so that no response is lost. Batches are made of the lists by `data.batches`, or by
`data.packing`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import check_tokens, pad_right
from rlhf_jax.data.chat import assistant_spans, render_chat
from rlhf_jax.data.examples import Conversation, Side, Tools
from rlhf_jax.data.tokenizer import ChatTokenizer, Tokenizer, template_of
from rlhf_jax.errors import UserError
from rlhf_jax.types import TokenBatch

__all__ = [
    "EncodedRow",
    "begin_token",
    "check_rows",
    "encode_conversation",
    "encode_pair",
    "encode_prompt",
    "encode_text",
    "row_batch",
]


class EncodedRow(NamedTuple):
    """One row's tokens, and which of them are to be learnt."""

    tokens: list[int]
    targets: list[bool]


def encode_text(text: str, tokenizer: Tokenizer) -> EncodedRow:
    """A text with its end token, all to be learnt; with a begin token if the model was trained so.

    Raises: UserError if the text spells out the begin token itself.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> encode_text("Hi", ByteTokenizer())
    EncodedRow(tokens=[72, 105, 258], targets=[True, True, True])
    """
    begin = _begin(text, tokenizer)
    tokens = [*begin, *tokenizer.encode(text), tokenizer.eos_id]
    return EncodedRow(tokens, [index >= len(begin) for index in range(len(tokens))])


def encode_conversation(conversation: Conversation, tokenizer: ChatTokenizer) -> EncodedRow:
    """A conversation by the model's template; what the assistant wrote is to be learnt, its end tokens included.

    Where turns are found by comparing texts, white space behind the end token is not counted to them: nothing comes
    after it when the model generates. A token that lies half in a turn counts to it.

    Raises: UserError if the tokenizer has no template, or that names the message whose part the template cannot give or
      that has no end token to learn.
    """
    text, spans = assistant_spans(
        template_of(tokenizer), conversation.messages, tools=conversation.tools, variables=tokenizer.special_tokens
    )
    tokens, places = tokenizer.encode_with_places(text)
    targets = [False] * len(tokens)
    for message, start, end in spans:
        own = [i for i, (first, last) in enumerate(places) if first < end and last > start and first < last]
        own, ends = _up_to_stop(own, tokens, tokenizer) if message >= 0 else (own, _stops(tokens, own, tokenizer))
        if not ends and (message >= 0 or _stops(tokens, [own[-1] + 1] if own else [], tokenizer)):
            name = f"message {message}" if message >= 0 else f"the assistant's {text[start:end][:40]!r}"
            raise UserError(f"{name} has no end token to learn, so that the model would not stop; correct the template")
        for index in own:
            targets[index] = True
    return EncodedRow(tokens, targets)


def encode_prompt(prompt: Side, tokenizer: Tokenizer, *, tools: Tools = None) -> list[int]:
    """What a policy sees before it responds: a text, or messages with the assistant's turn opened."""
    if isinstance(prompt, str):
        return [*_begin(prompt, tokenizer), *tokenizer.encode(prompt)]
    chat = _chatting(tokenizer)
    text = render_chat(
        template_of(chat), prompt, add_generation_prompt=True, tools=tools, variables=chat.special_tokens
    )
    return chat.encode_with_places(text)[0]


def encode_pair(
    prompt: Side, response: Side, tokenizer: Tokenizer, *, tools: Tools = None
) -> tuple[list[int], list[int]]:
    """A prompt as a policy sees it, and the response with its end token, for `token_batch` and `preference_batch`.

    Args:
      prompt, response: both texts, or both messages; the response is then one message of the assistant.
      tokenizer: a `ChatTokenizer` for messages.
      tools: passed to the chat template.
    Raises: UserError if the response is several messages (learn from the whole as a `Conversation`), the template
      renders the prompt differently once the response follows, or it ends no response.
    """
    tokens = encode_prompt(prompt, tokenizer, tools=tools)
    if isinstance(prompt, str) and isinstance(response, str):
        return tokens, [*tokenizer.encode(response), tokenizer.eos_id]
    if isinstance(prompt, str) or isinstance(response, str) or len(response) != 1:
        raise UserError("prompt and response must both be text, or messages and one message of the assistant")
    chat = _chatting(tokenizer)
    messages = (*prompt, *response)
    names = {"tools": tools, "variables": chat.special_tokens}
    before = render_chat(template_of(chat), prompt, add_generation_prompt=True, **names)
    whole = render_chat(template_of(chat), messages, **names)
    if not whole.startswith(before):
        raise UserError("the chat template renders the prompt differently once the response follows")
    together = chat.encode_with_places(whole)[0]
    joined = together[: len(tokens)] == tokens
    answer = together[len(tokens) :] if joined else chat.encode_with_places(whole[len(before) :])[0]
    own, ends = _up_to_stop(list(range(len(answer))), answer, chat)
    if not ends:
        raise UserError("the response has no end token to learn, so that no model would stop; correct the template")
    return tokens, [answer[index] for index in own]


def begin_token(tokenizer: Tokenizer) -> int | None:
    """The begin token, None for models that have none of their own (theirs is the end token).

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> begin_token(ByteTokenizer()), begin_token(ByteTokenizer(bos_id=258))
    (257, None)
    """
    return None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id


def check_rows(rows: Sequence[EncodedRow], tokenizer: Tokenizer, *, length: int, names: Sequence[str] = ()) -> None:
    """Raises a UserError that names the first row which is too long, begins twice, holds padding, or teaches nothing.

    Args:
      rows: of which each keeps all its tokens in a batch.
      tokenizer: the one that encoded them.
      length: slots of a row.
      names: what to call the rows, for instance file and line; by default their numbers.
    """
    for index, (tokens, targets) in enumerate(rows):
        name = names[index] if names else f"row {index}"
        if tokenizer.pad_id == tokenizer.eos_id:
            raise UserError(f"{name}: padding and the end token are both {tokenizer.pad_id}; pad with another token")
        if len(tokens) > length:
            kept = sum(targets[1:length])
            raise UserError(
                f"{name} has {len(tokens)} tokens but only {length} slots; {kept} of {sum(targets)} targets fit; "
                "shorten it, leave it out or use more slots"
            )
        check_tokens(tokens, targets, name, pad_id=tokenizer.pad_id, bos_id=begin_token(tokenizer))


def row_batch(
    rows: Sequence[EncodedRow], tokenizer: Tokenizer, *, length: int, names: Sequence[str] = ()
) -> TokenBatch:
    """Rows padded on the right, after `check_rows`; for many short texts see `data.packing`.

    Returns: a TokenBatch of [B, length]. A row's first token is never a target.
    """
    check_rows(rows, tokenizer, length=length, names=names)
    tokens, mask = pad_right([row.tokens for row in rows], pad_id=tokenizer.pad_id, length=length)
    targets = np.zeros((len(rows), length), np.bool_)
    for index, row in enumerate(rows):
        targets[index, 1 : len(row.tokens)] = row.targets[1:]
    return TokenBatch(tokens=tokens, mask=mask, loss_mask=jnp.asarray(targets))


def _begin(text: str, tokenizer: Tokenizer) -> list[int]:
    if not getattr(tokenizer, "begins_texts", False):
        return []
    spelt = getattr(tokenizer, "special_tokens", {}).get("bos_token")
    if spelt and text.startswith(spelt):
        raise UserError(f"the text begins with {spelt!r}, which the tokenizer adds by itself; take it out of the text")
    return [tokenizer.bos_id]


def _chatting(tokenizer: Tokenizer) -> ChatTokenizer:
    if not hasattr(tokenizer, "encode_with_places"):
        raise UserError("messages need a tokenizer with a chat template; give texts, or load a model's tokenizer")
    return tokenizer  # type: ignore[return-value]


def _stops(tokens: Sequence[int], places: Sequence[int], tokenizer: ChatTokenizer) -> list[int]:
    ending = {*tokenizer.control_ids.values(), *tokenizer.stop_ids}
    return [index for index in places if index < len(tokens) and tokens[index] in ending]


def _up_to_stop(own: list[int], tokens: Sequence[int], tokenizer: ChatTokenizer) -> tuple[list[int], bool]:
    """Without the white space behind the last control token; and whether that then is the end."""
    stops = _stops(tokens, own, tokenizer)
    if not stops or tokenizer.decode([tokens[index] for index in own if index > stops[-1]]).strip():
        return own, False
    return [index for index in own if index <= stops[-1]], True
