"""What a run works on: a language model with its tokenizer, and texts that people have rated."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.fetch import MODEL, RATINGS, fetch
from rlhf_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_gguf_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.ratings import RatedText, load_lexicon, load_ratings, split_by_text
from rlhf_jax.models.gguf import load_gguf, open_gguf
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.quickstart.settings import Settings

__all__ = ["Material", "Tokens", "load_full", "load_tiny", "pack", "prompts"]


class Tokens(NamedTuple):
    """Token rows on the host."""

    tokens: np.ndarray  # [N, T] int32
    mask: np.ndarray  # [N, T] bool


@dataclasses.dataclass(frozen=True)
class Material:
    """Model and data of a run. The judge's texts are seen by nothing that is trained for the policy."""

    config: TransformerConfig
    params: dict[str, Any]  # of the model as it came, on the host
    tokenizer: Tokenizer
    train: Sequence[RatedText]
    judge: Sequence[RatedText]
    prefix: Callable[[str], str | None]  # the beginning of a text that is to be continued; None if it is too short
    what: str  # the rated texts, as a reader would call them
    words: bool = False  # whether the texts are single words


def load_full(settings: Settings) -> Material:
    """SmolLM2-135M-Instruct, and the tweets and product-review sentences with their ratings; fetched once."""
    model_path, ratings_path = fetch(MODEL), fetch(RATINGS)
    reader = open_gguf(model_path)
    fields, params = load_gguf(reader)
    train, judge = split_by_text(load_ratings(ratings_path), seed=settings.seed)

    def prefix(text: str) -> str | None:
        words = text.split()
        return " ".join(words[:4]) if len(words) >= 6 else None

    return Material(
        TransformerConfig(**fields),
        params,
        load_gguf_tokenizer(reader),
        _first(train, settings.train_texts),
        _first(judge, settings.judge_texts),
        prefix,
        "tweets and product-review sentences",
    )


def load_tiny(settings: Settings) -> Material:
    """A small byte-level model with random weights, and the rated words that the vaderSentiment package brings."""
    tokenizer = ByteTokenizer()
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=128,
        max_length=64,
    )
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(lambda key: Transformer(config).init(key, one, one == 0, method="initialise"))(
        jax.random.key(settings.seed)
    )["params"]
    words = [item for item in load_lexicon() if item.text.isalpha() and item.text.isascii() and len(item.text) >= 4]
    train, judge = split_by_text(words, seed=settings.seed)
    return Material(
        config,
        jax.device_get(params),
        tokenizer,
        _first(train, settings.train_texts),
        _first(judge, settings.judge_texts),
        lambda word: word[:2],
        "English words",
        words=True,
    )


def _first(items: Sequence[RatedText], count: int) -> Sequence[RatedText]:
    if len(items) < count:
        raise UserError(f"{count} rated texts are needed, but this half of the ratings has only {len(items)}")
    return items[:count]


def pack(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """Texts as right-padded rows, each with its end token unless it is cut."""
    tokens = np.full((len(texts), length), tokenizer.eos_id, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = [*tokenizer.encode(text), tokenizer.eos_id][:length]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return Tokens(tokens, mask)


def prompts(material: Material, items: Sequence[RatedText], length: int) -> Tokens:
    """The beginnings of rated texts as left-padded rows, without repetition."""
    seen: dict[tuple[int, ...], None] = {}
    for item in items:
        prefix = material.prefix(item.text)
        if prefix is not None and len(ids := material.tokenizer.encode(prefix)) <= length:
            seen.setdefault(tuple(ids))
    tokens = np.full((len(seen), length), material.tokenizer.eos_id, np.int32)
    mask = np.zeros((len(seen), length), bool)
    for row, ids in enumerate(seen):
        tokens[row, length - len(ids) :], mask[row, length - len(ids) :] = ids, True
    return Tokens(tokens, mask)
