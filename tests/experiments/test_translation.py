"""The translation script: reading pairs, what is refused, and its smoke run on a file of pairs."""

import importlib.util
import json
import pathlib
import sys

import pytest

from rlhf_jax.errors import UserError

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "translation.py"


@pytest.fixture(scope="module")
def translation():
    for package in ("sacrebleu", "tokenizers", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is part of the extra translation")
    spec = importlib.util.spec_from_file_location("translation", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["translation"] = module
    spec.loader.exec_module(module)
    return module


def test_phrases_of_a_dictionary_stand_opposite_each_other(translation):
    text = (
        "# a comment\n"
        "Hund {m} | ein großer Hund; ein Riesenhund (zool.) :: dog | a big dog [Am.]; a huge dog\n"
        "kein Trenner\n"
        "Guten Tag! [ugs.] :: Good day! (greeting)\n"
    )
    assert translation.read_dictionary(text) == [("ein großer Hund", "a big dog"), ("Guten Tag!", "Good day!")]


def test_pairs_from_a_file(translation, tmp_path):
    path = tmp_path / "pairs.tsv"
    config = translation.Config(pairs=str(path))
    with pytest.raises(UserError, match="cannot be read"):
        translation.load_pairs(config)
    path.write_text("ein Hund\ta dog\nein Hund\tone dog\neine Katze\ta cat\n")
    assert translation.load_pairs(config) == [("ein Hund", "one dog"), ("eine Katze", "a cat")]
    path.write_text("ein Hund\ta dog\neine Katze a cat\n")
    with pytest.raises(UserError, match="Line 2"):
        translation.load_pairs(config)


def test_without_debians_client_the_alternative_is_named(translation, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(translation.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--pairs FILE"):
        translation.load_pairs(translation.Config())


def test_a_changed_package_stops_with_both_hashes(translation, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(translation.shutil, "which", lambda name: name)

    def fetch(command, cwd, **_):
        (pathlib.Path(cwd) / "trans-de-en.deb").write_bytes(b"other")
        return translation.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(translation.subprocess, "run", fetch)
    wanted = translation.hashlib.sha256(b"other").hexdigest()
    with pytest.raises(UserError, match=f"{wanted} instead of {translation.SHA256}"):
        translation.load_pairs(translation.Config())


@pytest.mark.slow
def test_the_smoke_run_leaves_a_labelled_folder_and_resumes(translation, tmp_path, capsys):
    path = tmp_path / "pairs.tsv"
    things = [f"{a} {b}\t{c} {d}" for a, c in NUMBERS for b, d in NOUNS]
    path.write_text("\n".join(things))
    arguments = ["--smoke", "--pairs", str(path), "--count", "60", "--held-out", "12", "--out", str(tmp_path / "run")]
    translation.main(arguments)
    first = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(first)["feedback"] == "scripted"
    assert set(translation.WHO) <= set(json.loads(first)["seeds"]["0"])
    assert "scripted" in (tmp_path / "run" / "report.html").read_text()
    seconds = (tmp_path / "run" / "seconds.json").read_text()
    translation.main(arguments)
    assert (tmp_path / "run" / "results.json").read_text() == first
    assert (tmp_path / "run" / "seconds.json").read_text() == seconds
    capsys.readouterr()


NUMBERS = [("zwei", "two"), ("drei", "three"), ("vier", "four"), ("fünf", "five"), ("sechs", "six"), ("acht", "eight")]
NOUNS = [("Hunde", "dogs"), ("Katzen", "cats"), ("Autos", "cars"), ("Lampen", "lamps"), ("Türen", "doors"),
         ("Bäume", "trees"), ("Häuser", "houses"), ("Bücher", "books"), ("Räder", "wheels"), ("Blumen", "flowers"),
         ("Vögel", "birds"), ("Uhren", "clocks")]  # fmt: skip
