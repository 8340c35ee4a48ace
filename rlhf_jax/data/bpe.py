"""A byte-level BPE vocabulary learned from the texts at hand, for models that start from nothing."""

from collections.abc import Iterable, Sequence

from rlhf_jax.data.tokenizer import BPETokenizer
from rlhf_jax.errors import missing_extra

__all__ = ["train_bpe"]


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, control: Sequence[str] = (), single_digits: bool = False
) -> BPETokenizer:
    """Byte-level BPE: every text can be encoded, and what is frequent takes few tokens.

    Args:
      texts: what to learn from.
      vocab_size: ids at most, 259 of them for padding, begin, end and the bytes.
      control: names of further tokens, in `control_ids` of what is returned; no text is encoded to them.
      single_digits: every digit of a number is a token.
    Raises: ValueError if vocab_size is below 259 + len(control), UserError if `tokenizers` is not installed.

    >>> tokenizer = train_bpe(["low lower lowest"] * 9, vocab_size=262)
    >>> len(tokenizer.encode("low")), tokenizer.decode(tokenizer.encode("slow, é"))
    (1, 'slow, é')
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing_extra("tokenizers", "quickstart", "learn a vocabulary") from None
    control = ["<pad>", "<begin>", "<end>", *control]
    if vocab_size < 256 + len(control):
        raise ValueError(f"vocab_size must be at least {256 + len(control)}, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] * single_digits
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Texts are only ever text: "<end>" written by somebody is letters, so the control tokens are no special ones here.
    plain = Tokenizer(
        models.BPE(vocab=backend.get_vocab(with_added_tokens=True), merges=_merges(backend), fuse_unk=False)
    )
    plain.pre_tokenizer, plain.decoder = backend.pre_tokenizer, backend.decoder  # type: ignore[assignment]
    ids = {name: index for index, name in enumerate(control)}
    return BPETokenizer(
        backend=plain,
        vocab_size=plain.get_vocab_size(),
        pad_id=ids["<pad>"],
        bos_id=ids["<begin>"],
        eos_id=ids["<end>"],
        control_ids=ids,
        chat_template=None,
    )


def _merges(backend) -> list[tuple[str, str]]:
    import json

    merges = json.loads(backend.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in merges]
