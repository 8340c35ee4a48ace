"""data/collation.py: every kind of example, from every kind of file, becomes the arrays that its loss takes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_formats import CASES
from test_readers import write

from rlhf_jax.data.collation import (
    batch_completions,
    batch_preferences,
    batch_ranked,
    batch_rated,
    batch_stepwise,
    batch_unpaired,
)
from rlhf_jax.data.examples import Preference, PromptCompletion, Ranked, Rated, Stepwise, Unpaired
from rlhf_jax.data.readers import Rows, read_examples, read_rows
from rlhf_jax.data.tokenizer import ByteTokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.losses import ranking, rating

TOKENIZER = ByteTokenizer()
PAD, END = TOKENIZER.pad_id, TOKENIZER.eos_id
ROOM = {"prompt_length": 3, "response_length": 4}
TEXT = st.text("abc", min_size=1, max_size=3)


def row(prompt, response):
    """[P + R] tokens, mask and targets, written out."""
    own = [*response.encode(), END]
    left, right = [PAD] * (3 - len(prompt)), [PAD] * (4 - len(own))
    tokens = [*left, *prompt.encode(), *own, *right]
    targets = [3 <= i < 3 + len(own) for i in range(7)]
    return tokens, [token != PAD for token in tokens], targets


def equals(batch, rows):
    for found, expected in zip((batch.tokens, batch.mask, batch.loss_mask), zip(*rows, strict=True), strict=True):
        assert np.asarray(found).tolist() == list(expected)


class DataSet:
    """As the package `datasets` has them."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrow", "data set"])
@pytest.mark.parametrize(("given_row", "expected"), CASES)
def test_every_format_comes_from_every_source(tmp_path, suffix, given_row, expected):
    rows = [given_row, given_row]
    found = Rows(DataSet(rows), "hub") if suffix == "data set" else read_rows(write(tmp_path / f"a.{suffix}", rows))
    assert read_examples(found) == [expected] * 2


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_fields_that_a_table_adds_to_messages_are_left_out(tmp_path, suffix):
    user = {"role": "user", "content": "Q"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}, {"name": "g", "id": "1"}]}
    (found,) = read_examples(read_rows(write(tmp_path / f"a.{suffix}", [{"messages": [user, call]}])))
    assert found.messages == (user, call)


PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@given(pairs=PAIRS, seed=st.integers(0, 9))
def test_completions_preferences_and_thumbs(pairs, seed):
    valid = np.random.default_rng(seed).integers(0, 2, len(pairs)) > 0
    blank = lambda rows: [(t, m, s if v else [False] * 7) for (t, m, s), v in zip(rows, valid, strict=True)]
    expected = [row(*pair) for pair in pairs]
    equals(batch_completions([PromptCompletion(*p) for p in pairs], TOKENIZER, **ROOM), expected)
    made = batch_preferences([Preference(*p, "cba") for p in pairs], TOKENIZER, **ROOM, valid=valid)
    equals(made.chosen, blank(expected))
    equals(made.rejected, blank([row(p, "cba") for p, _ in pairs]))
    assert made.weight.tolist() == valid.tolist()

    labels = [i % 2 == 0 for i in range(len(pairs))]
    made = batch_unpaired(
        [Unpaired(*p, label) for p, label in zip(pairs, labels, strict=True)], TOKENIZER, **ROOM, valid=valid
    )
    equals(made.responses, blank(expected))
    assert made.desirable.tolist() == labels
    assert made.weight.tolist() == valid.tolist()
    counted = np.flatnonzero(valid).tolist()
    several = len(counted) > 1
    assert made.mismatched_weight.tolist() == [bool(v) and several for v in valid]
    for place, index in enumerate(counted if several else []):
        tokens, _, targets = row(pairs[index][0], pairs[counted[place - 1]][1])
        assert made.mismatched.tokens[index].tolist() == tokens
        assert made.mismatched.loss_mask[index].tolist() == targets
    assert not np.asarray(made.mismatched.loss_mask)[np.asarray(made.mismatched_weight) == 0].any()


def test_lists_of_responses_go_into_their_losses():
    rated = [Rated("q", ("a", "b"), (5.0, 1.0)), Rated("p", ("abc",), (3.0,))]
    batch = batch_rated(rated, TOKENIZER, **ROOM, slots=3, valid=[True, True])
    assert batch.present.tolist() == [[True, True, False], [True, False, False]]
    assert batch.ratings.tolist() == [[5, 1, 0], [3, 0, 0]]
    equals(type(batch.responses)(*(x[0, :2] for x in vars(batch.responses).values())), [row("q", "a"), row("q", "b")])
    assert batch.responses.tokens[1].tolist() == [row("p", "abc")[0]] * 3
    assert batch.responses.loss_mask.sum(-1).tolist() == [[2, 2, 0], [4, 0, 0]]
    assert batch.responses.mask.any(-1).all()
    scores = np.full((2, 3), 2.0, np.float32)
    assert rating.rating_regression(scores, batch.ratings)[np.asarray(batch.present)].tolist() == [9, 1, 1]

    ranked = batch_ranked([Ranked("q", ("a", "b")), Ranked("q", ("b", "c"))], TOKENIZER, **ROOM, slots=2)
    assert ranked.ratings is None
    assert [int(x) for x in ranked.responses.tokens[1, :, 3]] == [98, 99]
    assert ranking.plackett_luce(np.zeros((2, 2), np.float32), ranked.present).tolist() == pytest.approx(
        [np.log(2)] * 2
    )
    filled = batch_ranked([Ranked("q", ("a", "b"))] * 2, TOKENIZER, **ROOM, slots=2, valid=[True, False])
    assert filled.present.tolist() == [[True, True], [False, False]]
    assert filled.responses.loss_mask.any(-1).tolist() == [[True, True], [False, False]]


def test_steps_are_judged_at_their_last_tokens():
    examples = [Stepwise("q", ("ab", "c"), (True, False)), Stepwise("qq", ("a",), (True,))]
    batch = batch_stepwise(examples, TOKENIZER, length=7)
    assert batch.tokens.tolist() == [[113, 97, 98, 10, 99, 10, PAD], [113, 113, 97, 10, PAD, PAD, PAD]]
    assert batch.mask.sum(-1).tolist() == [6, 4]
    assert [np.flatnonzero(x).tolist() for x in batch.step_mask] == [[3, 5], [3]]
    assert batch.step_labels.tolist() == [[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    logits = np.zeros((2, 7), np.float32)
    losses = rating.process_rewards(logits, batch.step_labels, batch.step_mask)
    assert losses.sum() == pytest.approx(3 * np.log(2))
    bare = batch_stepwise(examples, TOKENIZER, length=7, separator="", valid=[True, False])
    assert [np.flatnonzero(x).tolist() for x in bare.step_mask] == [[2, 3], []]
    assert not bare.step_labels[1].any()


class Beginning(ByteTokenizer):
    """One whose caller adds a begin token that the text has already."""

    begins_texts = True

    def encode(self, text):
        return [self.bos_id, *super().encode(text)]


STEPS = Stepwise("q", ("a",), (True,))
THUMB = Unpaired("q", "a", True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: batch_completions([PromptCompletion("q", "abcd")], TOKENIZER, **ROOM, names=n),
         "here:7: the response has 5 tokens but only 4 slots"),
        (lambda n: batch_preferences([Preference("q", "a", "abcd")], TOKENIZER, **ROOM, names=n),
         "here:7: the rejected has 5 tokens"),
        (lambda n: batch_unpaired([Unpaired("long", "a", True)], TOKENIZER, **ROOM, names=n),
         "here:7: the prompt has 4 tokens but only 3 slots"),
        (lambda n: batch_unpaired([THUMB], ByteTokenizer(pad_id=END), **ROOM, names=n),
         "here:7 holds the padding token 258 at 2; if texts end with it, pad with another"),
        (lambda n: batch_unpaired([THUMB], Beginning(), **ROOM, names=n), "here:7 begins with the begin token twice"),
        (lambda n: batch_unpaired([Unpaired("q", ({"role": "assistant"},), True)], TOKENIZER, **ROOM, names=n),
         "here:7: prompt and response must both be text"),
        (lambda n: batch_rated([Rated("q", ("a", "b"), (1.0, 2.0))], TOKENIZER, **ROOM, names=n),
         "here:7 has 2 responses but only 1 slots"),
        (lambda n: batch_ranked([Ranked("q", ("a", "abcd"))], TOKENIZER, **ROOM, slots=2, names=n),
         "here:7: the response 1 has 5 tokens"),
        (lambda n: batch_ranked([Ranked("q", ("a", "b"))], ByteTokenizer(pad_id=98), **ROOM, slots=2, names=n),
         "here:7, response 1, holds the padding token 98"),
        (lambda n: batch_stepwise([STEPS], TOKENIZER, length=2, names=n), "here:7: the solution has 3 tokens"),
        (lambda n: batch_stepwise([STEPS], ByteTokenizer(pad_id=10), length=4, names=n), "here:7 holds the padding"),
        (lambda n: batch_stepwise([Stepwise("q", ("",), (True,))], TOKENIZER, length=4, separator="", names=n),
         "here:7: step 0 has no token"),
    ],
)  # fmt: skip
def test_mistakes_name_their_row(make, message):
    with pytest.raises(UserError, match=message):
        make(["here:7"])
    with pytest.raises(UserError, match=message.replace("here:7", "row 0")):
        make([])


def test_a_stream_without_length_is_refused():
    with pytest.raises(UserError, match="hub is a stream"):
        Rows(iter([json.loads("{}")]), "hub")
