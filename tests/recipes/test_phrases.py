"""German phrases with their English: reading them, and what is refused."""

import pathlib

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.recipes import phrases


def test_words_and_phrases_of_a_dictionary_stand_opposite_each_other():
    text = (
        "# a comment\n"
        "Hund {m} | ein großer Hund; ein Riesenhund (zool.) :: dog | a big dog [Am.]; a huge dog\n"
        "kein Trenner\n"
        "Guten Tag! [ugs.] :: Good day! (greeting)\n"
    )
    assert phrases.read_dictionary(text.splitlines()) == [
        ("Hund", "dog"),
        ("ein großer Hund", "a big dog"),
        ("Guten Tag!", "Good day!"),
    ]


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    with pytest.raises(UserError, match="cannot be read"):
        phrases.load_pairs(str(path))
    path.write_text("ein Hund\ta dog\nein Hund\tone dog\neine Katze\ta cat\n")
    assert phrases.load_pairs(str(path)) == [("ein Hund", "one dog"), ("eine Katze", "a cat")]
    assert phrases.load_pairs(str(path), most=1) == [("ein Hund", "a dog")]
    path.write_text("ein Hund\ta dog\neine Katze a cat\n")
    with pytest.raises(UserError, match="Line 2"):
        phrases.load_pairs(str(path))


def test_without_debians_client_the_alternative_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(phrases.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--pairs FILE"):
        phrases.load_pairs("")


def test_a_changed_package_stops_with_both_hashes(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(phrases.shutil, "which", lambda name: name)

    def fetch(command, cwd, **_):
        (pathlib.Path(cwd) / "trans-de-en.deb").write_bytes(b"other")
        return phrases.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(phrases.subprocess, "run", fetch)
    wanted = phrases.hashlib.sha256(b"other").hexdigest()
    with pytest.raises(UserError, match=f"{wanted} instead of {phrases.SHA256}"):
        phrases.load_pairs("")
