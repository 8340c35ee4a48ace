"""feedback/ratings.py: every record and every rating is read, and a broken line is named."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.ratings import (
    RatedText,
    load_lexicon,
    load_ratings,
    parse_lexicon,
    parse_ratings,
    split_by_text,
)

TEXTS = "1\t9.9\tFish &amp; chips\r\n2\t-1\tA sad day\r\n\r\n"
RATINGS = "\ufeff2\t-1.0\t0.8\t[-2, 0, -1]\n1\t2.5\t0.5\t[3, 2]\n"


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"folder/{name}")
            content = content.encode() if isinstance(content, str) else content
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def tweets(texts=TEXTS, ratings=RATINGS):
    return {"tweets_GroundTruth.txt": texts, "tweets_anonDataRatings.txt": ratings}


def test_texts_and_ratings_are_joined_by_id(tmp_path):
    rated = load_ratings(archive(tmp_path / "ratings.tar.gz", tweets()), ["tweets"])
    assert rated == [
        RatedText("tweets", "1", "Fish & chips", (3, 2)),
        RatedText("tweets", "2", "A sad day", (-2, 0, -1)),
    ]
    assert [item.mean for item in rated] == [2.5, -1.0]  # of the ratings, whatever the first file says


def test_several_collections_come_one_after_the_other(tmp_path):
    files = tweets() | {
        "amazonReviewSnippets_GroundTruth.txt": "1_1\t0\tok\u2028still one line",
        "amazonReviewSnippets_anonDataRatings.txt": "1_1\t0\t0\t[0]",
    }
    rated = load_ratings(archive(tmp_path / "ratings.tar.gz", files))
    assert [(item.source, item.id) for item in rated] == [("tweets", "1"), ("tweets", "2"), ("amazon", "1_1")]
    assert rated[-1].text == "ok\u2028still one line"


BROKEN = {
    "too few fields": ({"texts": "1\t2.5\n2\t-1\tA sad day"}, r"GroundTruth\.txt, line 1: expected id, mean and text"),
    "no text": ({"texts": "1\t2.5\ta\n2\t-1\t "}, r"GroundTruth\.txt, line 2: .* found 3 fields"),
    "no list": ({"ratings": RATINGS + "3\t1\t0\n"}, r"anonDataRatings\.txt, line 3: expected 4 fields .* found 3"),
    "cut list": ({"ratings": "1\t2.5\t0.5\t[3, 2"}, r"line 1: a number or the list of ratings cannot be read"),
    "no number": ({"ratings": "1\tmany\t0.5\t[3, 2]"}, r"line 1: a number or the list"),
    "off the scale": ({"ratings": "1\t5\t0\t[5]"}, r"line 1: the ratings must be a list of whole numbers from -4 to 4"),
    "fractions": ({"ratings": "1\t2.5\t0\t[2.5]"}, r"line 1: the ratings must be"),
    "no ratings": ({"ratings": "1\t2.5\t0\t[]"}, r"line 1: the ratings must be"),
    "a lost rating": ({"ratings": "1\t2.5\t0.5\t[3]"}, r"line 1: the mean 2\.5 is not the mean of the ratings"),
    "same id twice": ({"ratings": RATINGS + RATINGS[1:]}, r"line 3: the id '2' appears twice"),
    "same text id twice": ({"texts": TEXTS + TEXTS}, r"GroundTruth\.txt, line 4: the id '1' appears twice"),
    "unrated": ({"texts": TEXTS + "7\t1\tx"}, r"GroundTruth\.txt, line 4: the id '7' has no ratings"),
    "textless": ({"texts": "1\t1\tx"}, r"has no text for the rated id '2'"),
    "not UTF-8": ({"texts": b"1\t1\tx\n2\t1\t\xff"}, r"tweets_GroundTruth\.txt, line 2: not valid UTF-8 \(byte 0xff\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named(tmp_path, name):
    changes, message = BROKEN[name]
    path = archive(tmp_path / "ratings.tar.gz", tweets(**changes))
    with pytest.raises(UserError, match=message) as caught:
        load_ratings(path, ["tweets"])
    assert str(path) in str(caught.value)
    assert "delete the file and fetch it again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_archives_are_named(tmp_path):
    path = tmp_path / "ratings.tar.gz"
    with pytest.raises(UserError, match="does not exist"):
        load_ratings(path)
    archive(path, {"tweets_GroundTruth.txt": TEXTS})
    with pytest.raises(UserError, match=r"does not hold the file tweets_anonDataRatings\.txt"):
        load_ratings(path, ["tweets"])
    long = "".join(f"{i}\t0\ttext {i * 7919 % 1009}\n" for i in range(500))
    content = archive(path, tweets(texts=long)).read_bytes()
    for size in (0, 1, 30, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"ratings\.tar\.gz is not a complete \.tar\.gz archive"):
            load_ratings(path, ["tweets"])
    with pytest.raises(ValueError, match=r"sources must be among tweets, .* got 'reddit'"):
        load_ratings(path, ["reddit"])


def test_the_installed_lexicon_has_ten_human_ratings_for_every_word():
    lexicon = load_lexicon()
    assert len(lexicon) > 7000
    assert {len(item.ratings) for item in lexicon} == {10}
    words = {item.text: item for item in lexicon}
    assert len(words) == len(lexicon)
    assert words["great"].mean > 2.5 > 0 > -2 > words["horrible"].mean


def test_lexicon_lines_are_checked_too():
    assert parse_lexicon("hm\t9\t0\t[1]\nhm\t9\t0\t[2]") == [RatedText("lexicon", "1", "hm", (1,))]
    with pytest.raises(UserError, match=r"words\.txt, line 2: expected 4 fields"):
        parse_lexicon("ok\t1\t0\t[1]\nbad", path="words.txt")


def test_a_missing_lexicon_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[quickstart\]'"):
        load_lexicon()


SAYINGS = ["Good", "good!", "GOOD", " good", "bad", "Bad...", ":-)", ":-(", "fine day"]


def items_of(texts):
    return [RatedText("tweets", str(i), text, (1,)) for i, text in enumerate(texts)]


@given(texts=st.lists(st.sampled_from(SAYINGS), max_size=30), seed=st.integers(0, 9), share=st.floats(0, 1))
def test_a_split_is_a_partition_that_no_text_straddles(texts, seed, share):
    items = items_of(texts)
    parts = split_by_text(items, seed=seed, fractions=(share, 1 - share))
    assert sorted((item for part in parts for item in part), key=items.index) == items
    assert not {item.key for item in parts[0]} & {item.key for item in parts[1]}
    assert all(part == sorted(part, key=items.index) for part in parts)
    alone = split_by_text(items[:1], seed=seed, fractions=(share, 1 - share))
    assert [part[:1] for part in parts if items and items[0] in part] == [part for part in alone if part]


def test_split_sizes_are_close_to_the_fractions_and_seeds_differ():
    items = items_of([f"text {i}" for i in range(2000)])
    parts = split_by_text(items, seed=0, fractions=(0.6, 0.3, 0.1))
    for part, share in zip(parts, (0.6, 0.3, 0.1), strict=True):
        assert abs(len(part) / 2000 - share) < 0.05
    assert split_by_text(items, seed=0) != split_by_text(items, seed=1)
    assert split_by_text(items, seed=0) == split_by_text(items, seed=0)
    for fractions in ((0.5, 0.4), (1.5, -0.5)):
        with pytest.raises(ValueError, match="add up to 1"):
            split_by_text(items, seed=0, fractions=fractions)


def test_same_words_are_the_same_text_and_emoticons_differ():
    keys = [item.key for item in items_of(["So GOOD!!", "so good", ":-)", ":-("])]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_parse_ratings_names_the_files_it_was_told():
    with pytest.raises(UserError, match=r"^somewhere_anonDataRatings\.txt, line 1"):
        parse_ratings(TEXTS, "nonsense", source="tweets", path="somewhere")
