"""The command line that speaks and what a recogniser is given, tried on stand-ins; the real two if they are here."""

import json
import stat
import sys
import types
import wave

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.recipes import speech

FAKE = """#!{python}
import json, pathlib, sys
if {fails}:
    sys.exit("no such voice")
out = pathlib.Path(sys.argv[sys.argv.index("-w") + 1])
out.write_bytes(b"RIFF" + json.dumps([sys.argv[1:], sys.stdin.buffer.read().decode()]).encode())
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    def put(*, fails=False):
        program = tmp_path / "bin" / "espeak-ng"
        program.parent.mkdir(exist_ok=True)
        program.write_text(FAKE.format(python=sys.executable, fails=fails))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return put


def test_text_goes_in_as_text_and_a_wav_comes_out(install, tmp_path):
    install()
    exchanges = [("--version é", "fine"), ("well?", " ")]
    written = speech.speak_exchanges(tmp_path / "wav", exchanges)
    assert [path.name for path in written] == ["0_question.wav", "0_reply.wav", "1_question.wav"]
    arguments, heard = json.loads(written[0].read_bytes()[4:])
    assert arguments == ["-v", "en-us", "-w", str(written[0]), "--stdin"]
    assert heard == "--version é"


def test_what_goes_wrong_is_said(install, tmp_path):
    with pytest.raises(UserError, match="Debian's package is espeak-ng"):
        speech.speak("hello", tmp_path / "a.wav")
    install(fails=True)
    with pytest.raises(UserError, match="no such voice"):
        speech.speak("hello", tmp_path / "a.wav")


@pytest.fixture
def stub(monkeypatch):
    """Stands in for pocketsphinx: says how many samples it was given, hiss aside."""

    class Decoder:
        def __init__(self, **options):
            assert options["samprate"] == 16_000

        def start_utt(self):
            self.heard = b""

        def process_raw(self, data, *, full_utt):
            assert full_utt
            self.heard += data

        def end_utt(self): ...

        def hyp(self):
            samples = np.frombuffer(self.heard, "<i2")[4_800:-4_800]  # less the pauses
            loud = np.abs(samples).max() > 100
            return types.SimpleNamespace(hypstr=f"heard {len(samples)} samples") if loud else None

    monkeypatch.setitem(sys.modules, "pocketsphinx", types.SimpleNamespace(Decoder=Decoder))
    speech._decoder.cache_clear()
    yield
    speech._decoder.cache_clear()


def write(path, samples, *, rate=22_050, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


def test_a_tone_keeps_its_pitch_and_loudness_at_16_khz(tmp_path):
    seconds = np.arange(22_050) / 22_050
    tone = np.round(8_000 * np.sin(2 * np.pi * 440 * seconds)).astype("<i2")
    found = speech.read_wav(write(tmp_path / "tone.wav", tone))
    assert found.dtype == np.int16
    assert found.shape == (16_000,)
    wanted = 8_000 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(found[200:-200], wanted[200:-200], atol=80)
    high = np.round(8_000 * np.sin(2 * np.pi * 10_000 * seconds)).astype("<i2")  # 16 kHz cannot hold it
    assert np.abs(speech.read_wav(write(tmp_path / "high.wav", high))[200:-200]).max() < 80
    both = np.stack([tone, -tone], axis=1)
    assert not speech.read_wav(write(tmp_path / "both.wav", both, channels=2)).any()


def test_the_recogniser_is_given_samples_at_its_rate(stub, tmp_path):
    path = write(tmp_path / "a.wav", np.full(2_205, 900, "<i2"))
    assert speech.recognise(path) == "heard 1600 samples"
    assert speech.recognise(np.full(160, 900, np.int16)) == "heard 160 samples"
    assert speech.recognise(np.zeros(160, np.int16)) == ""
    assert speech.recognise(write(tmp_path / "none.wav", np.zeros(0, "<i2"))) == ""
    assert speech.hear(" ") == ""


def test_what_cannot_be_recognised_is_said(install, tmp_path, monkeypatch):
    (tmp_path / "text.wav").write_text("RIFF, but no sound")
    with pytest.raises(UserError, match="not a WAV file"):
        speech.read_wav(tmp_path / "text.wav")
    with pytest.raises(UserError, match="8 bits; 16 are wanted"):
        speech.read_wav(write(tmp_path / "narrow.wav", np.zeros(9, np.uint8), width=1))
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    speech._decoder.cache_clear()
    with pytest.raises(UserError, match=r"rlhf_jax\[speech\]"):
        speech.recognise(np.zeros(9, np.int16))


def test_a_recogniser_needs_something_that_speaks(install, monkeypatch):
    monkeypatch.setattr(speech.metadata, "version", lambda name: f"{len(name)}.0")
    assert speech.recogniser() is None
    install()
    assert speech.recogniser() == "pocketsphinx 12.0"

    def absent(name):
        raise speech.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(speech.metadata, "version", absent)
    assert speech.recogniser() is None


@pytest.mark.parametrize(
    ("said", "heard", "rate"),
    [("a b c", "A, b, c!", 0), ("a b c", "", 1), ("a b c", "b c", 1 / 3), ("a b", "a x b y", 1), ("", "a", 1),
     ("don't", "dont", 1), ("a b c d", "b a c d", 0.5), ("a", "x y z", 3)],
)  # fmt: skip
def test_word_error_rate(said, heard, rate):
    assert speech.word_error_rate([said], [heard]) == pytest.approx(rate)


@pytest.mark.skipif(speech.recogniser() is None, reason="espeak-ng and the extra `speech` are not both here")
def test_what_espeak_says_is_understood_in_part_and_the_same_each_time(tmp_path):
    text = "one two three four five"
    heard = speech.hear(text)
    assert speech.word_error_rate([text], [heard]) < 1
    speech.hear("yeah")
    (path,) = speech.speak_exchanges(tmp_path, [(text, "")])
    assert speech.recognise(path) == heard
