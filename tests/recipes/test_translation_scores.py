"""Scores of translations: as sacrebleu's own, and gains paired."""

import numpy as np
import pytest

pytest.importorskip("sacrebleu", reason="sacrebleu is part of the extra translation")

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from rlhf_jax.recipes import translation_scores

SAID = ["to go to the house now", "a red house is there", "he is", "we see them all here"]
RIGHT = ["to go to the old house", "a red house is there", "he was here", "we see them here"]


def test_scores_are_those_of_the_package():
    found = translation_scores.scores(SAID, RIGHT, draws=20)
    assert found["BLEU"]["score"] == pytest.approx(BLEU().corpus_score(SAID, [RIGHT]).score)
    each = [CHRF().sentence_score(*pair).score for pair in zip(SAID, ([right] for right in RIGHT), strict=True)]
    assert found["chrF"]["score"] == pytest.approx(np.mean(each))
    np.testing.assert_allclose(translation_scores.chrf(SAID, RIGHT), each)
    balanced = [
        CHRF(beta=1, word_order=2).sentence_score(said, [right]).score for said, right in zip(SAID, RIGHT, strict=True)
    ]
    np.testing.assert_allclose(translation_scores.chrf(SAID, RIGHT, **translation_scores.BALANCED), balanced)
    assert found["words"] == {"texts": 4.5, "references": 4.5}


def test_everyone_is_resampled_alike_so_gains_are_paired():
    one, other = translation_scores.scores(SAID, RIGHT), translation_scores.scores(SAID[::-1], RIGHT[::-1])
    assert len(one["chrF"]["draws"]) == len(one["BLEU"]["draws"]) == 500
    same = translation_scores.gain(one["BLEU"], translation_scores.scores(SAID, RIGHT)["BLEU"])
    assert same == {"score": 0.0, "half": 0.0}
    assert one["chrF"]["draws"] != other["chrF"]["draws"]
    better = {"score": 3.0, "draws": [1.0, 5.0, 3.0]}
    assert translation_scores.gain(better, {"score": 2.0, "draws": [0.0, 4.0, 2.0]}) == {"score": 1.0, "half": 0.0}
    assert translation_scores.half(range(1001)) == pytest.approx(475.0)
