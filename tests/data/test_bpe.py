"""A vocabulary learned on the spot: round trips, frequent words, text that looks like control tokens."""

import pytest

pytest.importorskip("tokenizers")

from rlhf_jax.data.bpe import train_bpe


def test_any_text_comes_back_and_frequent_words_are_short():
    tokenizer = train_bpe(["hello there, hello world"] * 20, vocab_size=280)
    for text in ("hello", "été \n日本", "<end> is text"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert max(ids) < tokenizer.vocab_size
    assert len(tokenizer.encode("hello")) < len(tokenizer.encode("xqzjk"))
    assert tokenizer.decode([*tokenizer.encode("hello"), tokenizer.eos_id]) == "hello"


def test_the_same_texts_give_the_same_vocabulary():
    one, other = (train_bpe(["a bb ccc dddd"] * 5, vocab_size=265) for _ in range(2))
    assert one.backend.get_vocab() == other.backend.get_vocab()


def test_further_control_tokens_and_single_digits():
    tokenizer = train_bpe(["turn 21 21 on"] * 9, vocab_size=300, control=("<do>", "on="), single_digits=True)
    marks = [tokenizer.control_ids[name] for name in ("<do>", "on=")]
    assert not set(marks) & set(tokenizer.encode("<do> on="))
    assert len(tokenizer.encode("2121")) == 4
    ids = [marks[0], *tokenizer.encode(" 21")]
    assert tokenizer.decode(ids) == " 21"
    assert tokenizer.decode(ids, control_tokens=True) == "<do> 21"
    with pytest.raises(ValueError, match="at least 261"):
        train_bpe(["a"], vocab_size=260, control=("<do>", "on="))


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 259"):
        train_bpe(["a"], vocab_size=100)
