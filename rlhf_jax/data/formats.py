"""Rows of data sets and what they mean: which columns make which kind of example.

Every kind comes in two dresses, standard (text) and conversational (lists of messages); within a row they may not be
mixed. Columns that no kind knows are ignored; a choice of known columns that fits no kind is an error which lists both.

| kind | columns (`tools` may stand beside all but `text`) |
|---|---|
| text | text |
| conversation | messages |
| prompt only | prompt |
| prompt and completion | prompt, completion |
| preference | prompt, chosen, rejected |
| preference, implicit prompt | chosen, rejected |
| unpaired | prompt, completion, label |
| stepwise | prompt, completions, labels |
| rated | prompt, completion, rating; or prompt, responses, ratings |
| ranked | prompt, ranked (best first) |
"""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.chat import Message
from rlhf_jax.data.examples import (
    Conversation,
    Example,
    Preference,
    Prompt,
    PromptCompletion,
    Ranked,
    Rated,
    Side,
    Stepwise,
    Text,
    Tools,
    Unpaired,
)
from rlhf_jax.errors import UserError

__all__ = ["FORMATS", "Format", "detect_format", "split_prompt"]


class Format(NamedTuple):
    """One kind of example, and how a row becomes one."""

    name: str
    columns: tuple[str, ...]
    example: Callable[[Mapping[str, Any]], Example]  # raises UserError that says what a row lacks


def detect_format(columns: Iterable[str]) -> Format:
    """The kind of example that a data set with these columns holds; columns that no kind knows do not matter.

    Raises: UserError that lists the columns found and those of every kind.

    >>> detect_format(["id", "chosen", "rejected"]).name
    'preference, implicit prompt'
    """
    found = list(columns)
    known = {name for each in FORMATS for name in each.columns}
    telling = known & set(found)
    for each in FORMATS:
        if telling == set(each.columns):
            return each
    expected = "; ".join(f"{each.name} ({', '.join(each.columns)})" for each in FORMATS)
    raise UserError(
        f"no format has the columns {', '.join(sorted(telling)) or '(none that is known)'}. Found: "
        f"{', '.join(map(str, found)) or 'none'}. Expected one of: {expected}. Rename or drop columns"
    )


def split_prompt(chosen: Side, rejected: Side, *, prompt_end: str | None = None) -> tuple[Side, Side, Side]:
    """The prompt that two whole texts or conversations begin with, and the two responses.

    Conversations share their prompt up to the first message that differs, and each keeps at least its last. Texts share
    it up to the last word boundary before they differ, so that no word is cut; a first word that both responses share
    counts to the prompt, unless `prompt_end` says where prompts end.

    Args:
      chosen, rejected: both texts or both messages.
      prompt_end: the text that ends every prompt, for instance a name that opens the assistant's turn; its last
        occurrence in what both share is the end.
    Returns: (prompt, chosen, rejected); prompt followed by either is what was given.
    Raises: UserError if nothing is shared, or they do not differ.

    >>> split_prompt("Q: Why? A: For fun.", "Q: Why? A: Forever.")
    ('Q: Why? A:', ' For fun.', ' Forever.')
    """
    if type(chosen) is not type(rejected):
        raise UserError("chosen and rejected must both be text or both be lists of messages")
    if chosen == rejected:
        raise UserError("chosen and rejected are the same")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    if isinstance(chosen, str):
        shared = _word_boundary(str(chosen), str(rejected), shared, prompt_end)
    else:
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    if shared < 1:
        where = "" if prompt_end is None else f" that ends with {prompt_end!r}"
        raise UserError(f"chosen and rejected share no prompt{where}; give it in a column of its own")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _word_boundary(chosen: str, rejected: str, shared: int, prompt_end: str | None) -> int:
    if prompt_end is not None:
        place = chosen.rfind(prompt_end, 0, shared)
        end = place + len(prompt_end)
        return end if place >= 0 and end < min(len(chosen), len(rejected)) else 0
    while shared and (
        shared in (len(chosen), len(rejected)) or not (chosen[shared].isspace() and rejected[shared].isspace())
    ):
        shared -= 1
    while shared and chosen[shared - 1].isspace():
        shared -= 1
    return shared


def _side(row: Mapping[str, Any], column: str, *, answers: bool = False) -> Side:
    return _as_side(_get(row, column), column, answers)


def _as_side(value: Any, column: str, answers: bool) -> Side:
    if isinstance(value, str):
        if answers and not value:
            raise UserError(f"{column} is empty")
        return value
    return _messages(value, column, answers)


def _messages(value: Any, column: str, answers: bool = False) -> tuple[Message, ...]:
    sound = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not sound or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        raise UserError(f"{column} must be text or a list of messages with role and content, found {_shown(value)}")
    if not value:
        raise UserError(f"{column} has no messages")
    messages: tuple[Message, ...] = tuple(_without_nulls(message) for message in value)
    if answers and messages[0]["role"] != "assistant":
        raise UserError(f"{column} must begin with the assistant's message, found the role {messages[0]['role']!r}")
    return messages


def _tools(row: Mapping[str, Any]) -> Tools:
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"tools must be a list of JSON schemas, found {_shown(tools)}")
    return tuple(_without_nulls(tool) for tool in tools)


def _without_nulls(value: Any) -> Any:
    """Without the fields that a table adds to one object because another has them; `content` alone may be null."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _get(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        present = ", ".join(map(str, (name for name, value in row.items() if value is not None)))
        raise UserError(f"{column} is missing (present: {present or 'nothing'})")
    return value


def _list(row: Mapping[str, Any], column: str, least: int = 1) -> list[Any]:
    value = _get(row, column)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) < least:
        raise UserError(f"{column} must be a list of at least {least}, found {_shown(value)}")
    return list(value)


def _label(value: Any, column: str) -> bool:
    if value not in (0, 1) or isinstance(value, float):
        raise UserError(f"{column} must be true or false (or 1 or 0), found {_shown(value)}")
    return bool(value)


def _rating(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"{column} must be a finite number, found {_shown(value)}; leave out what was not rated")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _alike(prompt: Side, named: Mapping[str, Side]) -> None:
    for column, side in named.items():
        if isinstance(side, str) is not isinstance(prompt, str):
            kinds = ["text" if isinstance(each, str) else "messages" for each in (prompt, side)]
            raise UserError(
                f"prompt is {kinds[0]} and {column} is {kinds[1]}; both must be the same kind (drop the column prompt "
                "where the others hold whole conversations)"
            )
        if not isinstance(prompt, str) and tuple(side[: len(prompt)]) == prompt:
            raise UserError(f"{column} repeats the prompt; drop the column prompt, and it is found in the others")


def _text(row: Mapping[str, Any]) -> Text:
    value = _get(row, "text")
    if not isinstance(value, str) or not value:
        raise UserError(f"text must be text that is not empty, found {_shown(value)}")
    return Text(value)


def _conversation(row: Mapping[str, Any]) -> Conversation:
    return Conversation(_messages(_get(row, "messages"), "messages"), _tools(row))


def _prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt(_side(row, "prompt"), _tools(row))


def _prompt_completion(row: Mapping[str, Any]) -> PromptCompletion:
    prompt, completion = _side(row, "prompt"), _side(row, "completion", answers=True)
    _alike(prompt, {"completion": completion})
    return PromptCompletion(prompt, completion, _tools(row))


def _preference(row: Mapping[str, Any]) -> Preference:
    prompt, chosen, rejected = _side(row, "prompt"), *(_side(row, c, answers=True) for c in ("chosen", "rejected"))
    _alike(prompt, {"chosen": chosen, "rejected": rejected})
    if chosen == rejected:
        raise UserError("chosen and rejected are the same")
    return Preference(prompt, chosen, rejected, _tools(row))


def _implicit(row: Mapping[str, Any]) -> Preference:
    prompt, chosen, rejected = split_prompt(_side(row, "chosen"), _side(row, "rejected"))
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        _as_side(side, f"{column} after the shared prompt", True)
    return Preference(prompt, chosen, rejected, _tools(row))


def _unpaired(row: Mapping[str, Any]) -> Unpaired:
    prompt, completion, tools = _prompt_completion(row)
    return Unpaired(prompt, completion, _label(_get(row, "label"), "label"), tools)


def _stepwise(row: Mapping[str, Any]) -> Stepwise:
    prompt, steps, labels = _get(row, "prompt"), _list(row, "completions"), _list(row, "labels")
    if not isinstance(prompt, str) or not all(isinstance(step, str) and step for step in steps):
        raise UserError("prompt and every step of completions must be text that is not empty")
    _same_number(steps, "completions", labels, "labels")
    return Stepwise(prompt, tuple(steps), tuple(_label(label, f"labels[{i}]") for i, label in enumerate(labels)))


def _rated_one(row: Mapping[str, Any]) -> Rated:
    prompt, completion, tools = _prompt_completion(row)
    return Rated(prompt, (completion,), (_rating(_get(row, "rating"), "rating"),), tools)


def _rated(row: Mapping[str, Any]) -> Rated:
    prompt, ratings = _side(row, "prompt"), _list(row, "ratings")
    responses = _responses(row, "responses", prompt, 1)
    _same_number(responses, "responses", ratings, "ratings")
    return Rated(prompt, responses, tuple(_rating(r, f"ratings[{i}]") for i, r in enumerate(ratings)), _tools(row))


def _ranked(row: Mapping[str, Any]) -> Ranked:
    prompt = _side(row, "prompt")
    return Ranked(prompt, _responses(row, "ranked", prompt, 2), _tools(row))


def _responses(row: Mapping[str, Any], column: str, prompt: Side, least: int) -> tuple[Side, ...]:
    sides = {f"{column}[{i}]": side for i, side in enumerate(_list(row, column, least))}
    checked = {name: _as_side(side, name, True) for name, side in sides.items()}
    _alike(prompt, checked)
    return tuple(checked.values())


def _same_number(some: Sequence[Any], name: str, others: Sequence[Any], other_name: str) -> None:
    if len(some) != len(others):
        raise UserError(f"{name} has {len(some)} entries and {other_name} has {len(others)}; they must pair up")


FORMATS: tuple[Format, ...] = (
    Format("text", ("text",), _text),
    Format("conversation", ("messages",), _conversation),
    Format("prompt only", ("prompt",), _prompt),
    Format("prompt and completion", ("prompt", "completion"), _prompt_completion),
    Format("preference", ("prompt", "chosen", "rejected"), _preference),
    Format("preference, implicit prompt", ("chosen", "rejected"), _implicit),
    Format("unpaired", ("prompt", "completion", "label"), _unpaired),
    Format("stepwise", ("prompt", "completions", "labels"), _stepwise),
    Format("rated", ("prompt", "completion", "rating"), _rated_one),
    Format("rated, several responses", ("prompt", "responses", "ratings"), _rated),
    Format("ranked", ("prompt", "ranked"), _ranked),
)
