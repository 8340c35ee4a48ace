"""The tokenizer of a Hugging Face folder: `tokenizer.json`, and what the files beside it say of special tokens.

Which tokens begin, end and pad is said in up to four files; the first of `tokenizer_config.json`,
`special_tokens_map.json`, `generation_config.json` and `config.json` that names one decides. Padding never is the begin
or the end token. As everywhere here, control tokens written in plain text are spelt out; only text rendered by a chat
template may hold them.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.tokenizer import ModelTokenizer, Tokenizer
from rlhf_jax.errors import UserError, missing_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["FolderTokenizer", "check_embedding", "load_tokenizer"]

_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


@dataclasses.dataclass(frozen=True)
class FolderTokenizer(ModelTokenizer):
    """A tokenizer of the `tokenizers` package with its special tokens. `load_tokenizer` makes one."""

    backend: "Backend"  # reads control tokens in the text as such
    text_backend: "Backend"  # spells them out
    vocab_size: int  # the largest id + 1
    bos_id: int  # the end token's where the model has no begin token
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]  # all tokens that end a response, the end token first
    control_ids: dict[str, int]  # special token -> id
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as chat templates name them
    begins_texts: bool  # whether the model was trained with the begin token before plain texts
    chat_template: str | None

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """Token ids of `text`, with no begin or end token added.

        Args:
          text: any text.
          control_tokens: True reads control tokens in the text as such. Only for text from `render_chat`.
        """
        backend = self.backend if control_tokens else self.text_backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of text from `render_chat`, with the characters (first, end) that each token stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def load_tokenizer(
    folder: str | os.PathLike[str],
    *,
    pad_token: str | None = None,
    template_name: str = "default",
    vocab_size: int | None = None,
) -> FolderTokenizer:
    """The tokenizer of a folder as Hugging Face writes them.

    Args:
      folder: with `tokenizer.json`, and possibly the files that name its special tokens.
      pad_token: what to pad with; None takes the folder's, or, where that is the begin or end token or missing, another
        special token, preferably one made for it.
      template_name: which chat template, where the folder has several.
      vocab_size: rows of the model's embedding, to be compared with; None takes `config.json`'s, if it is there.
    Raises: UserError if files are missing or damaged, special tokens are not in the vocabulary, no token can pad, or
      ids lie beyond the embedding.
    """
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise missing_extra("tokenizers", "data", "read a model's tokenizer") from None

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        beside = ", ".join(sorted(each.name for each in folder.glob("*"))[:8]) or "nothing"
        raise UserError(f"{path} does not exist (found there: {beside}); give a folder that has this file")
    backends = []
    for spelt_out in (False, True):
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"{path} is not a tokenizer that can be read ({error}); fetch the file again") from None
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = spelt_out
        backends.append(backend)
    backend, text_backend = backends

    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
    files = {name: _read(folder / name) for name in names}
    added = backend.get_added_tokens_decoder()
    control_ids = {token.content: index for index, token in added.items() if token.special}
    found = {role: _special(role, files, backend, folder) for role in _ROLES}
    if found["eos"] is None:
        raise UserError(f"{folder} names no end token; set eos_token in {folder / names[0]}")
    eos_id = found["eos"]
    bos_id = eos_id if found["bos"] is None else found["bos"]
    pad_id = _padding(pad_token, found["pad"], bos_id, eos_id, control_ids, backend, folder)
    stops = files["generation_config.json"].get("eos_token_id")
    stop_ids = (eos_id, *(i for i in (stops if isinstance(stops, list) else [stops]) if isinstance(i, int)))
    tokens = {f"{role}_token": backend.id_to_token(i) for role, i in (found | {"pad": pad_id}).items() if i is not None}
    control_ids |= {backend.id_to_token(index): index for index in (bos_id, eos_id)}
    start = backend.encode("a", add_special_tokens=True).ids[:1]
    tokenizer = FolderTokenizer(
        backend=backend,
        text_backend=text_backend,
        vocab_size=1 + max(backend.get_vocab().values()),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        stop_ids=tuple(dict.fromkeys(stop_ids)),
        control_ids=control_ids,
        special_tokens=tokens,
        begins_texts=found["bos"] is not None and start == [bos_id],
        chat_template=_template(folder, files["tokenizer_config.json"], template_name),
    )
    config = files["config.json"]
    rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    for expected in (vocab_size, rows):
        if expected is not None:
            check_embedding(tokenizer, expected, source=str(path))
    return tokenizer


def check_embedding(tokenizer: Tokenizer, rows: int, *, source: str = "The tokenizer") -> None:
    """Compares a tokenizer with the model that it is to feed; larger embeddings are common and fine.

    Args:
      tokenizer: any.
      rows: of the model's embedding, its `vocab_size`.
      source: what to call the tokenizer in an error.
    Raises: UserError with both sizes if ids lie beyond the embedding: they would be read as other tokens.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> check_embedding(ByteTokenizer(), 320)
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{source} has ids up to {tokenizer.vocab_size - 1}, so that an embedding of at least "
            f"{tokenizer.vocab_size} rows was expected, and one of {rows} was found; take the model's own "
            "tokenizer"
        )


def _special(role: str, files: Mapping[str, Mapping[str, Any]], backend: "Backend", folder: Path) -> int | None:
    for name, entries in files.items():
        token = entries.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            index = backend.token_to_id(token)
            if index is None:
                raise UserError(f"{folder / name} has {role}_token {token!r}, which {folder / 'tokenizer.json'} lacks")
            return index
        index = entries.get(f"{role}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and backend.id_to_token(index) is not None:
            return index
    return None


def _padding(
    wanted: str | None,
    named: int | None,
    bos_id: int,
    eos_id: int,
    control_ids: Mapping[str, int],
    backend: "Backend",
    folder: Path,
) -> int:
    if wanted is not None:
        index = backend.token_to_id(wanted)
        if index is None or index in (bos_id, eos_id):
            what = "not in the vocabulary" if index is None else "the begin or end token, which the model must see"
            raise UserError(f"pad_token {wanted!r} is {what} of {folder}; give another token")
        return index
    if named is not None and named not in (bos_id, eos_id):
        return named
    others = [(token, index) for token, index in control_ids.items() if index not in (bos_id, eos_id)]
    for hint in ("pad", "reserved", "unused", "unk", ""):
        for token, index in others:
            if hint in token.lower():
                return index
    raise UserError(
        f"{folder} pads with its end token or not at all, and has no special token besides; give pad_token=, any token "
        "of the vocabulary that no text of yours contains (positions are masked, whatever stands there)"
    )


def _template(folder: Path, config: Mapping[str, Any], name: str) -> str | None:
    named: dict[str, str] = {}
    entry = config.get("chat_template")
    if isinstance(entry, str):
        named["default"] = entry
    elif isinstance(entry, list):
        named |= {each["name"]: each["template"] for each in entry}
    entry = _read(folder / "chat_template.json").get("chat_template")
    if isinstance(entry, str):
        named["default"] = entry
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        named["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if name not in named and (named or name != "default"):
        raise UserError(f"{folder} has no chat template {name!r}, only {', '.join(sorted(named)) or 'none at all'}")
    return named.get(name)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, found a {type(values).__name__}")
    return values
