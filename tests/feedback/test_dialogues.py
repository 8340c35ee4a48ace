"""Chats and their ratings: what counts as rated, and comparisons of any and of equal length."""

import json

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.dialogues import load_dialogues, matched_comparisons, rating_comparisons, without_length


def chat(turns, **ratings):
    messages = [[{"text": text} for text in turn] for turn in turns]
    return {"messages": messages} | ({"ratings": ratings} if ratings else {})


def test_untouched_sliders_count_as_no_rating(tmp_path):
    path = tmp_path / "dataset.json"
    chats = {
        "a": chat([["Hi", "how  are you?"], [" "], ["Fine"]], witty=4, upbeat=5, interesting=9),
        "b": chat([["Hi"]], witty=5, upbeat=5, interesting=5),
        "c": chat([["Hi"]]),
    }
    path.write_text(json.dumps(chats))
    rated, untouched, unrated = load_dialogues(path)
    assert rated.turns == ("Hi how are you?", "Fine")
    assert (rated.rating, rated.words) == (6.0, 5)
    assert untouched.rating is unrated.rating is None


@pytest.mark.parametrize("content", ["[]", "{", '{"a": {}}', '{"a": {"messages": [[{}]]}}'])
def test_another_file_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        load_dialogues(path)


def test_comparisons_keep_gap_and_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 500, size=200)
    ratings = np.clip(np.log(lengths) + rng.normal(size=200) * 2, 1, 10)  # the longer, the better rated
    free = rating_comparisons(rng, ratings, 2000, min_gap=2.0)
    matched = matched_comparisons(rng, ratings, lengths, 2000, min_gap=2.0, within=0.1)
    for pairs in (free, matched):
        assert (ratings[pairs.chosen] - ratings[pairs.rejected] >= 2.0).all()
        np.testing.assert_allclose(pairs.margin, ratings[pairs.chosen] - ratings[pairs.rejected], rtol=1e-6)
    assert (np.abs(np.log(lengths[matched.chosen] / lengths[matched.rejected])) <= 0.1).all()
    longer = lambda pairs: np.mean(lengths[pairs.chosen] > lengths[pairs.rejected])
    assert longer(free) > 0.6
    assert abs(longer(matched) - 0.5) < 0.1
    with pytest.raises(ValueError, match="like length"):
        matched_comparisons(rng, np.array([1.0, 9.0]), np.array([1, 100]), 1)


def test_what_is_left_is_uncorrelated_with_length():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 100, size=50)
    values = np.stack([3 + 2 * np.log(lengths), rng.normal(size=50)], axis=1)
    rest, line = without_length(values, lengths)
    np.testing.assert_allclose(line[:, 0], [3, 2], atol=1e-9)
    np.testing.assert_allclose(rest[:, 0], 0, atol=1e-9)
    assert abs(np.corrcoef(rest[:, 1], np.log(lengths))[0, 1]) < 1e-9
    alone, own = without_length(values[:, 1], lengths)
    np.testing.assert_allclose(alone, rest[:, 1])
    np.testing.assert_allclose(own, line[:, 1])
