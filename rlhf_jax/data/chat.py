"""Conversations as the text that a model was trained on, and which of its characters the assistant wrote.

Templates are jinja2 as Hugging Face folders and GGUF files carry them. They come from strangers and run in a sandbox.
Where a template marks the assistant's part (`{% generation %}`), the marks are taken at their word. Where it does not,
a turn is what the template adds to the conversation before it with the assistant's turn opened; a template that writes
earlier turns differently once later ones follow cannot be read so, and the message where that shows is named.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.errors import UserError, missing_extra

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["Message", "RenderedChat", "assistant_spans", "render_chat"]

Message = Mapping[str, Any]  # "role" and "content", and whatever else the template reads

_START, _END = "rlhf_jax_generation_start", "rlhf_jax_generation_end"
_UNUSED = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # code points that are no characters and never will be
_TROUBLE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


class RenderedChat(NamedTuple):
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int, int], ...]  # (message or -1, first character, end) of what the assistant wrote


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> str:
    """A conversation as text, by a chat template.

    Args:
      template: the template's source. It runs in a sandbox and sees `raise_exception`, `strftime_now` and `tojson`.
      messages: with the keys "role" and "content" at least; entries that are None count as absent.
      add_generation_prompt: end with the opening of an assistant's turn.
      tools: JSON schemas of what the assistant may call, passed through.
      variables: further names that the template sees, such as bos_token.
      now: what `strftime_now` formats; None is the clock. Give it where texts must be the same tomorrow.
    Raises: UserError if the template refuses the messages or is none.

    >>> render_chat("{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}",
    ...             [{"role": "user", "content": "Hi"}])
    '[user] Hi\\n'
    """
    names = _names(messages, add_generation_prompt, tools, variables, now)
    return _render(template, names | {_START: "", _END: ""})


def assistant_spans(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> RenderedChat:
    """A whole conversation as text, with the characters that the assistant wrote; arguments as in `render_chat`.

    Returns: the text and the ranges, in order. By marks, the message of a range is -1: they do not say it.
    Raises: UserError that names the message for which the template cannot give them, or that there is none.

    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}]
    >>> text, spans = assistant_spans("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    ...                               "{% if add_generation_prompt %}assistant:{% endif %}", chat)
    >>> [text[start:end] for _, start, end in spans]
    [' Oh;']
    """
    options = {"tools": tools, "variables": variables, "now": now or datetime.datetime.now()}
    turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise UserError(f"None of the {len(messages)} messages is the assistant's, so that there is nothing to learn")
    if _has_marks(template):
        return _by_marks(template, messages, turns, options)
    text = render_chat(template, messages, **options)
    return RenderedChat(text, tuple(_by_prefix(template, messages, turn, text, options) for turn in turns))


def _by_marks(
    template: str, messages: Sequence[Message], turns: Sequence[int], options: Mapping[str, Any]
) -> RenderedChat:
    text, spans = _marked(template, messages, options)
    written = [text[start:end] for start, end in spans]
    for turn in turns:
        content = messages[turn].get("content")
        content = content.strip() if isinstance(content, str) else ""
        if content and content in text and not any(content in part for part in written):
            raise _unmarked(turn)
    if len(spans) < len(turns):
        place = 0
        for turn in turns:
            content = str(messages[turn].get("content") or "").strip()
            found = text.find(content, place) if content else -1
            if found >= 0 and not any(start <= found < end for start, end in spans):
                raise _unmarked(turn)
            place = max(place, found + len(content))
        raise _unmarked(turns[len(spans)])
    return RenderedChat(text, tuple((-1, start, end) for start, end in spans))


def _unmarked(turn: int) -> UserError:
    return UserError(
        f"message {turn} is the assistant's, but the chat template puts it outside of {{% generation %}}; correct the "
        "template, or take the marks out of it so that turns are found by comparing texts"
    )


def _by_prefix(
    template: str, messages: Sequence[Message], turn: int, text: str, options: Mapping[str, Any]
) -> tuple[int, int, int]:
    try:
        before = render_chat(template, messages[:turn], add_generation_prompt=True, **options)
        after = render_chat(template, messages[: turn + 1], **options)
    except UserError as error:
        raise UserError(
            f"message {turn}: the assistant's part cannot be found, because the chat template does not render the "
            f"conversation up to there ({error}); give a template with {{% generation %}}"
        ) from None
    for part, whole, what in (
        (before, after, "opens the turn differently when the answer is to be generated than when it is there"),
        (after, text, "writes it differently when further messages follow"),
    ):
        if not whole.startswith(part):
            place = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
            shown = part[max(0, place - 20) : place + 20], whole[max(0, place - 20) : place + 20]
            raise UserError(
                f"message {turn}: the assistant's part cannot be found, because the chat template {what} "
                f"({shown[0]!r} became {shown[1]!r}); give a template with {{% generation %}}"
            )
    if len(after) == len(before):
        raise UserError(f"message {turn}: the chat template writes nothing for this turn of the assistant")
    return turn, len(before), len(after)


def _marked(
    template: str, messages: Sequence[Message], options: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the ranges between marks that are not empty."""
    plain = render_chat(template, messages, **options)
    start, end = [mark for mark in _UNUSED if mark not in plain][:2]
    names = _names(messages, False, options["tools"], options["variables"], options["now"])
    marked = _render(template, names | {_START: start, _END: end})
    if marked.replace(start, "").replace(end, "") != plain:
        raise UserError("The chat template treats what is inside {% generation %} as text to compute with; move it out")
    spans, length, opened = [], 0, 0
    for character in marked:
        if character == start:
            opened = length
        elif character == end:
            if length > opened:
                spans.append((opened, length))
        else:
            length += 1
    return plain, spans


def _has_marks(template: str) -> bool:
    from jinja2 import nodes

    environment = _compiled(template).environment
    return any(name.name == _START for name in environment.parse(template).find_all(nodes.Name))


def _names(
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
    now: datetime.datetime | None,
) -> dict[str, Any]:
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return {
        **{name: _plain(value, name) for name, value in (variables or {}).items()},
        "messages": [_plain(message, f"message {index}") for index, message in enumerate(present)],
        "tools": _plain(tools, "tools"),
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(form),
    }


def _plain(value: Any, name: str) -> Any:
    """A copy made of nothing but JSON's types: a template can call no method of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    raise UserError(f"{name} holds a {type(value).__name__}; chat templates are given text, numbers, lists and dicts")


def _render(template: str, names: Mapping[str, Any]) -> str:
    compiled = _compiled(template)
    from jinja2 import TemplateError

    try:
        return compiled.render(names)
    except (TemplateError, *_TROUBLE) as error:
        raise UserError(f"The model's chat template does not accept these messages: {error}") from None


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> "Template":
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise missing_extra("jinja2", "data", "render a chat template") from None

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`: its content between two names, which are empty or marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (nodes.Output([nodes.Name(name, "load")]) for name in (_START, _END))
            return nodes.Scope([start, *body, end], lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"The model's chat template is not valid: {error}") from None
