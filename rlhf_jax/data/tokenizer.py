"""Text to token ids and back: the tokenizer inside a GGUF file, and bytes.

Padding has an id of its own, never the end token's: a model that learns to stop must be able to see the stop.
Text is only ever text: control tokens written in it, such as "<|im_end|>", are encoded letter by letter unless the
caller says that the text was rendered by a chat template.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from rlhf_jax.data.chat import Message, render_chat
from rlhf_jax.errors import UserError, missing_extra
from rlhf_jax.models.gguf import open_gguf, read_field

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer as Backend

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "ChatTokenizer",
    "ModelTokenizer",
    "Tokenizer",
    "load_gguf_tokenizer",
    "template_of",
]

_CONTROL = 3  # the token type that GGUF gives to control tokens
_DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r")  # one digit at a time, then as GPT-2
_PLAIN = ("gpt-2", "gpt2", "default")


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class ChatTokenizer(Tokenizer, Protocol):
    """What conversations need of a tokenizer besides."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def special_tokens(self) -> dict[str, str]: ...
    @property
    def control_ids(self) -> dict[str, int]: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Each UTF-8 byte is a token; padding, begin and end have the three ids after the bytes.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("hé")
    [104, 195, 169]
    >>> tokenizer.decode([*tokenizer.encode("hé"), tokenizer.eos_id])
    'hé'
    """

    pad_id: int = 256
    bos_id: int = 257
    eos_id: int = 258
    vocab_size: int = 259

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`, with no begin or end token."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


def template_of(tokenizer: "ChatTokenizer | ModelTokenizer") -> str:
    """The tokenizer's chat template.

    Raises: UserError if it has none.
    """
    if tokenizer.chat_template is None:
        raise UserError("This model's tokenizer has no chat template: use a model tuned for chat, or plain text")
    return tokenizer.chat_template


class ModelTokenizer(Protocol):
    """What tokenizers of the `tokenizers` package have in common, wherever their files come from."""

    backend: "Backend"
    pad_id: int
    control_ids: dict[str, int]  # control token -> id
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as chat templates name them
    chat_template: str | None

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int], *, control_tokens: bool = False) -> str:
        """The text of `ids`. Control tokens are left out unless `control_tokens`; half characters become U+FFFD."""
        hidden = frozenset() if control_tokens else frozenset(self.control_ids.values()) | {self.pad_id}
        return self.backend.decode([i for i in map(int, ids) if i not in hidden], skip_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on, by the model's own template.

        Args:
          messages: dicts with the keys "role" ("system", "user" or "assistant") and "content".
          add_generation_prompt: end with the opening of an assistant's turn.
        Returns: the text for `encode(text, control_tokens=True)`. The template runs in a sandbox.
        Raises: UserError if the model has no template or the template refuses the messages.
        """
        return render_chat(
            template_of(self), messages, add_generation_prompt=add_generation_prompt, variables=self.special_tokens
        )

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; a control token written inside a message counts as a control token."""
        return self.encode(self.render_chat(messages, add_generation_prompt), control_tokens=True)


@dataclasses.dataclass(frozen=True)
class BPETokenizer(ModelTokenizer):
    """A byte-level BPE tokenizer with control tokens and a chat template. `load_gguf_tokenizer` makes one."""

    backend: "Backend"
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    control_ids: dict[str, int]  # control token -> id
    chat_template: str | None

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """Token ids of `text`, with no begin or end token added.

        Args:
          text: any text.
          control_tokens: True reads control tokens in the text as such. Only for text from `render_chat`.
        """
        if not control_tokens:
            return self.backend.encode(text).ids
        return self.encode_with_places(text)[0]

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of text from `render_chat`, with the characters (first, end) that each token stands for."""
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        for piece in pieces:
            control = self.control_ids.get(piece)
            if control is not None:
                ids.append(control)
                places.append((start, start + len(piece)))
            elif piece:
                encoding = self.backend.encode(piece)
                ids += encoding.ids
                places += [(start + first, start + end) for first, end in encoding.offsets]
            start += len(piece)
        return ids, places

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the begin and the end token, by the names that chat templates have for them."""
        return {"bos_token": self._token(self.bos_id), "eos_token": self._token(self.eos_id)}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the end token."""
        return (self.eos_id,)

    def _token(self, token_id: int) -> str:
        return self.backend.id_to_token(token_id) or ""


def load_gguf_tokenizer(source: "str | os.PathLike[str] | GGUFReader") -> BPETokenizer:
    """Build the byte-level BPE tokenizer that a GGUF file carries.

    If the file pads with the end token, padding takes another control token that is neither begin nor end.

    Args:
      source: a path, or what `rlhf_jax.models.gguf.open_gguf` returned.
    Raises: UserError if the file has another kind of tokenizer, or `tokenizers` is not installed.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers
    except ImportError:
        raise missing_extra("tokenizers", "quickstart", "read a model's tokenizer") from None

    reader = open_gguf(source) if isinstance(source, str | os.PathLike) else source
    path = str(getattr(reader.data, "filename", "the GGUF file"))
    kind, splitting = (read_field(reader, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or splitting not in (*_DIGIT_SPLITTING, *_PLAIN):
        raise UserError(
            f"{path} has a tokenizer of kind {kind!r} with splitting {splitting!r}; only 'gpt2' (byte-level BPE) with "
            f"{', '.join(map(repr, (*_DIGIT_SPLITTING, *_PLAIN)))} can be read, so choose another file"
        )
    tokens: list[str] = read_field(reader, "tokenizer.ggml.tokens", [])
    merges: list[str] = read_field(reader, "tokenizer.ggml.merges", [])
    types: list[int] = read_field(reader, "tokenizer.ggml.token_type", [])
    eos_id = read_field(reader, "tokenizer.ggml.eos_token_id")
    if not tokens or eos_id is None:
        missing = "tokenizer.ggml.eos_token_id" if tokens else "tokenizer.ggml.tokens"
        raise UserError(f"{path} lacks the header field {missing}; fetch the file again or use another one")

    vocabulary = {token: index for index, token in enumerate(tokens)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ", 1)) for merge in merges], fuse_unk=False)  # type: ignore[arg-type]
    )
    backend.pre_tokenizer = (  # type: ignore[assignment]
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if splitting in _DIGIT_SPLITTING
        else byte_level
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]

    control_ids = {
        token: index for index, token in enumerate(tokens) if index < len(types) and types[index] == _CONTROL
    }
    bos_id = read_field(reader, "tokenizer.ggml.bos_token_id", eos_id)
    pad_id = read_field(reader, "tokenizer.ggml.padding_token_id")
    if pad_id is None or pad_id in (bos_id, eos_id):
        pad_id = next((index for index in control_ids.values() if index not in (bos_id, eos_id)), None)
    if pad_id is None:
        raise UserError(f"{path} has no control token to pad with besides begin and end; use another file")
    return BPETokenizer(
        backend=backend,
        vocab_size=len(tokens),
        bos_id=int(bos_id),
        eos_id=int(eos_id),
        pad_id=int(pad_id),
        control_ids=control_ids,
        chat_template=read_field(reader, "tokenizer.chat_template"),
    )
