"""Single human ratings of texts, as their collectors published them.

Two collections, both rated by people from -4 (extremely negative) to 4 (extremely positive):

* the ratings archive of the `vaderSentiment` source distribution: 23,703 tweets, product-review, film-review and
  editorial sentences with 15 or more raters each (`load_ratings`);
* the lexicon that the installed `vaderSentiment` package carries: 7,500 words and emoticons with 10 raters each
  (`load_lexicon`).

Raters are anonymous: a place in a text's list of ratings is not the same person across texts.

Reference: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
"""

import dataclasses
import hashlib
import html
import importlib.resources
import json
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.errors import UserError, missing_extra

__all__ = ["SOURCES", "RatedText", "load_lexicon", "load_ratings", "parse_lexicon", "parse_ratings", "split_by_text"]

SOURCES = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
_REMEDY = "delete the file and fetch it again"


@dataclasses.dataclass(frozen=True, slots=True)
class RatedText:
    """A text and what each of its raters said.

    >>> RatedText("tweets", "1", "Nice &amp; warm", (3, 1)).mean
    2.0
    """

    source: str
    id: str
    text: str
    ratings: tuple[int, ...]  # one number per person, -4 .. 4

    @property
    def mean(self) -> float:
        """The mean of the ratings."""
        return sum(self.ratings) / len(self.ratings)

    @property
    def key(self) -> str:
        """What makes two texts the same: their words, whatever the case, spacing and punctuation."""
        folded = self.text.casefold()
        return " ".join(re.findall(r"\w+", folded)) or " ".join(folded.split())


def load_ratings(archive: str | os.PathLike[str], sources: Sequence[str] = ("tweets", "amazon")) -> list[RatedText]:
    """Read the rated texts of some collections from the ratings archive.

    Args:
      archive: path of `hutto_ICWSM_2014.tar.gz`.
      sources: any of "tweets", "amazon", "movie", "nyt".
    Returns: rated texts in file order, HTML entities resolved ("&amp;" is what the raters saw as "&").
    Raises: UserError if the archive or a line in it is broken, ValueError for an unknown source.
    """
    for source in sources:
        if source not in SOURCES:
            raise ValueError(f"sources must be among {', '.join(SOURCES)}, got {source!r}")
    path = Path(archive)
    rated: list[RatedText] = []
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            for source in sources:
                pair = []
                for kind in ("GroundTruth", "anonDataRatings"):
                    name = f"{SOURCES[source]}_{kind}.txt"
                    file = tar.extractfile(members[name]) if name in members else None
                    if file is None:
                        raise UserError(f"{path} does not hold the file {name}; {_REMEDY}")
                    pair.append(_decode(file.read(), f"{path}: {name}"))
                rated += parse_ratings(*pair, source=source, path=f"{path}: {SOURCES[source]}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of the ratings archive") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is not a complete .tar.gz archive ({error}); {_REMEDY}") from None
    return rated


def parse_ratings(texts: str, ratings: str, *, source: str, path: str = "ratings") -> list[RatedText]:
    """Join a file of texts and a file of ratings by their ids.

    Args:
      texts: lines of id, mean, text, separated by tabs. The mean is not used: it differs from the mean of the listed
        ratings for 196 of the 4,200 tweets.
      ratings: lines of id, mean, standard deviation, list of ratings.
      source: the name that the records carry.
      path: what error messages call the pair of files.
    Raises: UserError naming file and line number of the first broken line.
    """
    by_id: dict[str, tuple[int, ...]] = {}
    for where, line in _lines(ratings, f"{path}_anonDataRatings.txt"):
        identifier, mean, values = _parse_rated_line(line, where)
        if abs(sum(values) / len(values) - mean) > 0.01:
            raise UserError(f"{where}: the mean {mean:g} is not the mean of the ratings: {_shown(line)}; {_REMEDY}")
        if identifier in by_id:
            raise UserError(f"{where}: the id {identifier!r} appears twice; {_REMEDY}")
        by_id[identifier] = values
    rated, seen = [], set()
    for where, line in _lines(texts, f"{path}_GroundTruth.txt"):
        parts = line.split("\t")
        if len(parts) != 3 or not parts[2].strip():
            raise UserError(
                f"{where}: expected id, mean and text separated by tabs, found {len(parts)} fields: {_shown(line)}; "
                f"{_REMEDY}"
            )
        identifier, _, text = parts
        if identifier in seen or identifier not in by_id:
            problem = "appears twice" if identifier in seen else "has no ratings"
            raise UserError(f"{where}: the id {identifier!r} {problem}; {_REMEDY}")
        seen.add(identifier)
        rated.append(RatedText(source, identifier, html.unescape(text).strip(), by_id[identifier]))
    if len(seen) != len(by_id):
        orphan = next(identifier for identifier in by_id if identifier not in seen)
        raise UserError(f"{path}_GroundTruth.txt has no text for the rated id {orphan!r}; {_REMEDY}")
    return rated


def load_lexicon() -> list[RatedText]:
    """The words and emoticons of the installed `vaderSentiment` package, ten human ratings each. Needs no download.

    Raises: UserError if the package is missing or a line of its lexicon is broken.
    """
    try:
        file = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
        content = file.read_bytes()
    except ModuleNotFoundError:
        raise missing_extra("vaderSentiment", "quickstart", "read its human ratings of words") from None
    except OSError:
        raise UserError(
            "The installed `vaderSentiment` package lacks its file vader_lexicon.txt: "
            "pip install --force-reinstall vaderSentiment"
        ) from None
    return parse_lexicon(_decode(content, str(file)), path=str(file))


def parse_lexicon(lexicon: str, *, path: str = "vader_lexicon.txt") -> list[RatedText]:
    """Parse lines of word, mean, standard deviation and list of ratings. A word listed twice keeps its first line.

    The mean is not used: the lexicon's author set some by hand.

    Raises: UserError naming file and line number of the first broken line.

    >>> parse_lexicon("great\\t3.5\\t0.5\\t[3, 4]")[0].ratings
    (3, 4)
    """
    rated: dict[str, RatedText] = {}
    for number, (where, line) in enumerate(_lines(lexicon, path), start=1):
        word, _, values = _parse_rated_line(line, where)
        rated.setdefault(word, RatedText("lexicon", str(number), word, values))
    return list(rated.values())


def split_by_text(
    items: Sequence[RatedText], *, seed: int, fractions: Sequence[float] = (0.5, 0.5)
) -> tuple[list[RatedText], ...]:
    """Deal rated texts to disjoint parts; texts with the same `key` always go to the same part.

    Where a text goes depends on the seed and its own words alone, so that adding, removing or reordering other texts
    moves none. Part sizes are therefore only close to the fractions.

    Args:
      items: rated texts.
      seed: another seed, another split.
      fractions: expected share of each part; they add up to 1.
    Returns: one list per fraction, in the order of `items`.
    """
    if any(fraction < 0 for fraction in fractions) or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be non-negative and add up to 1, got {tuple(fractions)}")
    parts: tuple[list[RatedText], ...] = tuple([] for _ in fractions)
    for item in items:
        digest = hashlib.sha256(f"{seed}\n{item.key}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for part, fraction in zip(parts, fractions, strict=True):
            place -= fraction
            if place < 0:
                part.append(item)
                break
        else:
            parts[-1].append(item)  # the fractions fell short of 1 by rounding
    return parts


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not valid UTF-8 (byte {content[error.start]:#x}); {_REMEDY}") from None


def _lines(content: str, path: str) -> list[tuple[str, str]]:
    """(where, line) of every line that is not blank. Only newlines end a line; other separators may be text."""
    lines = (line.rstrip("\r") for line in content.removeprefix("\ufeff").split("\n"))
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_rated_line(line: str, where: str) -> tuple[str, float, tuple[int, ...]]:
    parts = line.split("\t")
    problem = f"expected 4 fields separated by tabs, found {len(parts)}"
    if len(parts) == 4:
        try:
            mean, values = float(parts[1]), json.loads(parts[3])
            if isinstance(values, list) and values and all(type(v) is int and -4 <= v <= 4 for v in values):
                return parts[0], mean, tuple(values)
            problem = "the ratings must be a list of whole numbers from -4 to 4"
        except ValueError:
            problem = "a number or the list of ratings cannot be read"
    raise UserError(f"{where}: {problem}: {_shown(line)}; {_REMEDY}")


def _shown(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
