"""What any learned reward must beat: a bag of words, the length of the text, and a hand-made lexicon.

Each gives one score per text; `pair_accuracy` turns scores into the share of held-out comparisons that they get right.
A reward model's scores go through the same function.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf_jax.errors import missing_extra
from rlhf_jax.feedback.comparisons import Comparisons

__all__ = ["length_scores", "lexicon_scores", "pair_accuracy", "tfidf_scores"]


def pair_accuracy(scores: np.ndarray, comparisons: Comparisons) -> float:
    """Share of comparisons whose chosen text scores higher; equal scores count half.

    Args:
      scores: [items] one score per text; higher means preferred.
      comparisons: pairs of indices into the items.
    Returns: a share in [0, 1], NaN without comparisons.

    >>> pairs = Comparisons(np.array([0, 1]), np.array([1, 2]), np.ones(2))
    >>> pair_accuracy(np.array([3.0, 1.0, 2.0]), pairs)
    0.5
    """
    scores = np.asarray(scores)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if not len(comparisons.chosen):
        return float("nan")
    return float(np.mean((np.sign(scores[comparisons.chosen] - scores[comparisons.rejected]) + 1) / 2))


def tfidf_scores(
    train_texts: Sequence[str],
    comparisons: Comparisons,
    texts: Sequence[str],
    *,
    analyzer: Literal["word", "char_wb"] = "word",
    ngrams: tuple[int, int] = (1, 2),
    regularization: float = 1.0,
) -> np.ndarray:
    """Scores of `texts` by a linear Bradley-Terry model over tf-idf n-grams, fitted on comparisons of `train_texts`.

    P(a over b) = sigmoid(w . (tfidf(a) - tfidf(b))), w by maximum likelihood with an L2 penalty.

    Args:
      train_texts: texts that the comparisons point to; vocabulary and document frequencies come from them alone.
      comparisons: the training pairs.
      texts: texts to score.
      analyzer: n-grams of words, or of characters within words (for single words).
      ngrams: shortest and longest n-gram.
      regularization: strength of the penalty; 1 is scikit-learn's default.
    Returns: [len(texts)] float64 scores.
    Raises: UserError if scikit-learn is not installed; ValueError without comparisons.
    Reference: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs".
    """
    try:
        from scipy import sparse
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise missing_extra("scikit-learn", "quickstart", "fit the tf-idf baseline") from None
    if not len(comparisons.chosen):
        raise ValueError("comparisons must not be empty")
    # Punctuation and emoticons count as words. Scikit-learn warns of any pattern but its own where it uses none.
    pattern = r"(?u)\w+|[^\w\s]+" if analyzer == "word" else r"(?u)\b\w\w+\b"
    vectorizer = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, sublinear_tf=True, token_pattern=pattern)
    features = vectorizer.fit_transform(train_texts)
    differences = features[comparisons.chosen] - features[comparisons.rejected]
    # Every pair in both directions: the model then has no preference for a side, and both classes exist.
    both = sparse.vstack([differences, -differences])
    labels = np.repeat([1, 0], len(comparisons.chosen))
    model = LogisticRegression(fit_intercept=False, C=1.0 / regularization, max_iter=1000)
    model.fit(both, labels)
    return vectorizer.transform(texts) @ model.coef_[0]


def length_scores(texts: Sequence[str]) -> np.ndarray:
    """[len(texts)] the number of characters: "the longer text wins".

    >>> length_scores(["ab", "c"]).tolist()
    [2.0, 1.0]
    """
    return np.array([len(text) for text in texts], np.float64)


def lexicon_scores(texts: Sequence[str]) -> np.ndarray:
    """[len(texts)] VADER's compound sentiment in [-1, 1]: people's ratings of words joined by hand-made rules.

    Raises: UserError if `vaderSentiment` is not installed.
    Reference: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
      Text".
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise missing_extra("vaderSentiment", "quickstart", "score texts by its lexicon") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it opens its files by a function that Python retires
        analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], np.float64)
