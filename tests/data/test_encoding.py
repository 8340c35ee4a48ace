"""data/encoding.py: what is learnt of texts and conversations, and the mistakes that would otherwise be silent."""

import dataclasses

import pytest
from test_chat import CHAT, CHATML, LLAMA3, MISTRAL, TAGGED
from test_folder_tokenizer import CONFIG, write

from rlhf_jax.data.encoding import (
    EncodedRow,
    check_rows,
    encode_conversation,
    encode_pair,
    encode_prompt,
    encode_text,
    row_batch,
)
from rlhf_jax.data.examples import Conversation
from rlhf_jax.data.folder_tokenizer import load_tokenizer
from rlhf_jax.data.tokenizer import ByteTokenizer
from rlhf_jax.errors import UserError

EOT = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write(tmp_path_factory.mktemp("model"), control=EOT, tokenizer_config=CONFIG))


def speaking(tokenizer, template):
    return dataclasses.replace(tokenizer, chat_template=template)


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, "Hello<|im_end|>So long<|im_end|>"),
        (LLAMA3, "Hello<|eot_id|>So long<|eot_id|>"),
        (MISTRAL, " Hello</s> So long</s>"),
        (TAGGED, "Hello<|im_end|>So long<|im_end|>"),
    ],
)
def test_of_a_conversation_the_assistants_turns_are_learnt_with_their_end(tokenizer, template, learnt):
    tokenizer = speaking(tokenizer, template)
    row = encode_conversation(Conversation(tuple(CHAT)), tokenizer)
    assert tokenizer.decode(row.tokens, control_tokens=True) == tokenizer.render_chat(CHAT, False)
    wanted = [token for token, target in zip(row.tokens, row.targets, strict=True) if target]
    assert tokenizer.decode(wanted, control_tokens=True) == learnt
    prompt, response = encode_pair(CHAT[:4], CHAT[4:], tokenizer)
    assert prompt == encode_prompt(CHAT[:4], tokenizer) == tokenizer.encode_chat(CHAT[:4])
    assert [*prompt, *response] == row.tokens[: len(prompt) + len(response)]
    assert wanted[-len(response) :] == response


def test_texts_begin_and_end(tokenizer):
    prompt, response = encode_pair("hello", " there", tokenizer)
    assert (prompt, response) == ([1, *tokenizer.encode("hello")], [*tokenizer.encode(" there"), 2])
    row = encode_text("hello", tokenizer)
    assert (row.tokens, row.targets) == ([*prompt, 2], [False] + [True] * len(prompt))
    with pytest.raises(UserError, match="begins with '<s>'"):
        encode_text("<s>hello", tokenizer)


@pytest.mark.parametrize("template", [
    CHATML.replace("<|im_end|>\n", "\n\n"),
    TAGGED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
])  # fmt: skip
def test_a_turn_whose_end_is_not_learnt_is_an_error(tokenizer, template):
    with pytest.raises(UserError, match="no end token to learn"):
        encode_conversation(Conversation(tuple(CHAT)), speaking(tokenizer, template))


def test_what_does_not_fit_together_is_said(tokenizer):
    with pytest.raises(UserError, match="both be text"):
        encode_pair("hi", CHAT[2:3], tokenizer)
    with pytest.raises(UserError, match="one message"):
        encode_pair(CHAT[:2], CHAT[2:], speaking(tokenizer, CHATML))
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(CHAT[:2], speaking(tokenizer, None))
    with pytest.raises(UserError, match="need a tokenizer with a chat template"):
        encode_prompt(CHAT[:2], ByteTokenizer())


def test_rows_become_a_batch():
    rows = [EncodedRow([5, 6, 7], [True, False, True]), EncodedRow([5, 6], [False, True])]
    batch = row_batch(rows, ByteTokenizer(), length=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 256], [5, 6, 256, 256]]
    assert batch.mask.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2]
    assert batch.loss_mask.tolist() == [[False, False, True, False], [False, True, False, False]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            EncodedRow([5] * 5, [False] * 4 + [True]),
            "data:1 has 5 tokens but only 4 slots; 0 of 1 targets fit",
        ),
        (EncodedRow([257, 257, 5], [True] * 3), "data:1 begins with the begin token twice"),
        (EncodedRow([5, 256], [True] * 2), "data:1 holds the padding token 256 at 1"),
        (EncodedRow([5, 6], [True, False]), "data:1 has nothing to learn: none of its 2"),
    ],
)
def test_silent_mistakes_name_their_row(row, message):
    sound = EncodedRow([5, 6], [False, True])
    with pytest.raises(UserError, match=message):
        check_rows([sound, row], ByteTokenizer(), length=4, names=["data:0", "data:1"])
    with pytest.raises(UserError, match="row 0: padding and the end token are both 258"):
        check_rows([sound], ByteTokenizer(pad_id=258), length=4)
