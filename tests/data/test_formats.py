"""data/formats.py: every kind is recognised by its columns, prompts are found, and what a row lacks is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.examples import (
    Conversation,
    Preference,
    Prompt,
    PromptCompletion,
    Ranked,
    Rated,
    Stepwise,
    Text,
    Unpaired,
)
from rlhf_jax.data.formats import FORMATS, detect_format, split_prompt
from rlhf_jax.errors import UserError

USER, BOT, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
WORDS = st.lists(st.sampled_from(["a", "b", "ab", "c"]), min_size=1, max_size=5)

CASES = [
    ({"text": "x"}, Text("x")),
    ({"messages": [USER, BOT], "tools": [{"name": "f"}]}, Conversation((USER, BOT), ({"name": "f"},))),
    ({"prompt": "p"}, Prompt("p")),
    ({"prompt": "p", "completion": "c", "tools": None}, PromptCompletion("p", "c")),
    ({"prompt": [USER], "completion": [BOT]}, PromptCompletion((USER,), (BOT,))),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, Preference("p", "a", "b")),
    ({"chosen": "p q a", "rejected": "p q b"}, Preference("p q", " a", " b")),
    ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, Preference((USER,), (BOT,), (OTHER,))),
    ({"prompt": "p", "completion": "c", "label": 1}, Unpaired("p", "c", True)),
    ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, Stepwise("p", ("a", "b"), (True, False))),
    ({"prompt": "p", "completion": "c", "rating": 4}, Rated("p", ("c",), (4.0,))),
    ({"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2.5]}, Rated("p", ("a", "b"), (1.0, 2.5))),
    ({"prompt": [USER], "ranked": [[BOT], [OTHER]]}, Ranked((USER,), ((BOT,), (OTHER,)))),
]


@pytest.mark.parametrize(("row", "expected"), CASES)
def test_columns_decide_the_kind(row, expected):
    found = detect_format(["id", *row, "source"])
    assert found.example(row | {"id": 3}) == expected
    assert set(found.columns) == set(row) - {"tools"}


def test_every_kind_is_tried():
    assert {detect_format(row).name for row, _ in CASES} == {each.name for each in FORMATS}
    assert len({frozenset(each.columns) for each in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    "columns", [["prompt", "chosen"], ["id"], [], ["text", "label"], ["messages", "chosen", "rejected"]]
)
def test_other_columns_are_listed_beside_what_was_expected(columns):
    with pytest.raises(UserError) as caught:
        detect_format(columns)
    assert all(column in str(caught.value) for column in columns)
    assert all(each.name in str(caught.value) for each in FORMATS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "text must be text that is not empty"),
        ({"prompt": "p", "completion": None}, r"completion is missing \(present: prompt\)"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": "p", "completion": [BOT]}, "prompt is text and completion is messages"),
        ({"prompt": [USER], "completion": [USER, BOT]}, "must begin with the assistant's message"),
        ({"prompt": [BOT], "completion": [BOT, BOT]}, "repeats the prompt"),
        ({"prompt": 3, "completion": "c"}, "prompt must be text or a list of messages"),
        ({"prompt": [], "completion": [BOT]}, "prompt has no messages"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"chosen": "a", "rejected": "b"}, "share no prompt"),
        ({"prompt": "p", "completion": "c", "label": 0.5}, "label must be true or false"),
        ({"prompt": "p", "completion": "c", "rating": float("nan")}, "rating must be a finite number"),
        ({"prompt": "p", "responses": ["a"], "ratings": [1, 2]}, "responses has 1 entries and ratings has 2"),
        ({"prompt": "p", "completions": ["a"], "labels": []}, "labels must be a list of at least 1"),
        ({"prompt": "p", "ranked": ["a"]}, "ranked must be a list of at least 2"),
        ({"messages": [USER], "tools": "f"}, "tools must be a list of JSON schemas"),
    ],
)  # fmt: skip
def test_what_a_row_lacks_is_said(row, message):
    with pytest.raises(UserError, match=message):
        detect_format(row).example(row)


@given(prompt=WORDS, chosen=WORDS, rejected=WORDS)
def test_texts_are_split_between_words_and_join_again(prompt, chosen, rejected):
    if chosen == rejected:
        return
    whole = [" ".join(prompt + side) for side in (chosen, rejected)]
    found, *sides = split_prompt(*whole)
    assert [found + side for side in sides] == whole
    assert all(side.startswith(" ") for side in sides)
    assert found.split()[: len(prompt)] == prompt or whole[0].startswith(whole[1]) or whole[1].startswith(whole[0])


def test_a_marker_says_where_prompts_end():
    texts = ("H: Hi A: I do", "H: Hi A: I will")
    assert split_prompt(*texts) == ("H: Hi A: I", " do", " will")
    assert split_prompt(*texts, prompt_end=" A:") == ("H: Hi A:", " I do", " I will")
    with pytest.raises(UserError, match="that ends with 'Bot:'"):
        split_prompt(*texts, prompt_end="Bot:")
    with pytest.raises(UserError, match="both be text"):
        split_prompt("a", (BOT,))
    assert split_prompt((USER, BOT), (USER, BOT, USER, OTHER)) == ((USER,), (BOT,), (BOT, USER, OTHER))
