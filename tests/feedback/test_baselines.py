"""feedback/baselines.py: accuracy by counting, and baselines that learn what is there to be learnt and no more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import baselines
from rlhf_jax.feedback.comparisons import Comparisons, mean_comparisons, single_rater_comparisons
from rlhf_jax.feedback.ratings import RatedText, load_lexicon, split_by_text

NONE = Comparisons(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))


@given(data=st.data(), scores=st.lists(st.integers(-3, 3), min_size=1, max_size=6))
def test_pair_accuracy_counts_wins_and_half_the_ties(data, scores):
    index = st.integers(0, len(scores) - 1)
    pairs = data.draw(st.lists(st.tuples(index, index), min_size=1, max_size=10))
    chosen, rejected = (np.array(side) for side in zip(*pairs, strict=True))
    expected = sum(1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0 for i, j in pairs)
    found = baselines.pair_accuracy(np.array(scores), Comparisons(chosen, rejected, np.ones(len(pairs))))
    np.testing.assert_allclose(found, expected / len(pairs))


def test_pair_accuracy_is_loud_about_nothing_and_about_nan():
    assert np.isnan(baselines.pair_accuracy(np.ones(2), NONE))
    with pytest.raises(ValueError, match="finite"):
        baselines.pair_accuracy(np.array([np.nan]), NONE)


def sentences(rng, n):
    """Texts whose rating is the number of good words less the number of bad ones; the other words say nothing."""
    items = []
    for i in range(n):
        good, bad = rng.integers(0, 3, size=2)
        filler = rng.choice(["the", "a", "cup", "tree", "walk", "blue"], size=rng.integers(1, 6)).tolist()
        words = rng.permutation(["lovely"] * good + ["awful"] * bad + filler)
        items.append(RatedText("tweets", str(i), " ".join(words), (int(good - bad),) * 3))
    return items


def test_tfidf_learns_which_words_please_and_length_does_not():
    rng = np.random.default_rng(0)
    train, held_out = sentences(rng, 300), sentences(rng, 200)
    pairs = single_rater_comparisons(rng, train, 600)
    test = mean_comparisons(rng, held_out, 500)
    texts, held_texts = ([item.text for item in part] for part in (train, held_out))
    scores = baselines.tfidf_scores(texts, pairs, held_texts)
    assert baselines.pair_accuracy(scores, test) > 0.95
    assert 0.35 < baselines.pair_accuracy(baselines.length_scores(held_texts), test) < 0.65
    words = baselines.tfidf_scores(texts, pairs, ["lovely", "cup", "awful", "never seen"])
    assert words[0] > words[1] > words[2]
    assert words[3] == 0.0  # words that training never saw say nothing


def test_tfidf_is_antisymmetric_and_shrinks_under_its_penalty():
    rng = np.random.default_rng(1)
    train = sentences(rng, 100)
    texts = [item.text for item in train]
    pairs = single_rater_comparisons(rng, train, 200)
    swapped = pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen)
    scores = baselines.tfidf_scores(texts, pairs, texts)
    np.testing.assert_allclose(baselines.tfidf_scores(texts, swapped, texts), -scores, atol=1e-3)
    heavy = baselines.tfidf_scores(texts, pairs, texts, regularization=100.0)
    assert np.abs(heavy).max() < 0.3 * np.abs(scores).max()
    with pytest.raises(ValueError, match="must not be empty"):
        baselines.tfidf_scores(texts, NONE, texts)


def test_on_human_ratings_of_words_characters_say_much_and_whole_words_nothing():
    """Held-out words are unknown as words; their parts are not. Real ratings that come with the install."""
    rng = np.random.default_rng(0)
    train, held_out = split_by_text(load_lexicon(), seed=0, fractions=(0.8, 0.2))
    pairs, test = single_rater_comparisons(rng, train, 4000), mean_comparisons(rng, held_out, 2000)
    texts, held_texts = ([item.text for item in part] for part in (train, held_out))
    by_character = baselines.tfidf_scores(texts, pairs, held_texts, analyzer="char_wb", ngrams=(1, 4))
    by_word = baselines.tfidf_scores(texts, pairs, held_texts)
    assert baselines.pair_accuracy(by_character, test) > 0.75
    assert 0.45 < baselines.pair_accuracy(by_word, test) < 0.6


def test_lexicon_knows_good_from_bad():
    scores = baselines.lexicon_scores(["I love this, it is great!", "A table.", "This is horrible."])
    assert scores[0] > 0.5 > scores[1] == 0.0 > -0.4 > scores[2]
    assert np.all(np.abs(scores) <= 1)


@pytest.mark.parametrize(
    ("module", "call", "name"),
    [
        ("sklearn.linear_model", lambda: baselines.tfidf_scores(["a"], NONE, ["a"]), "scikit-learn"),
        ("vaderSentiment.vaderSentiment", lambda: baselines.lexicon_scores(["a"]), "vaderSentiment"),
    ],
)
def test_missing_packages_name_the_extra(monkeypatch, module, call, name):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"`{name}` .*pip install 'rlhf_jax\[quickstart\]'"):
        call()
