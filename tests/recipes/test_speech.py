"""The command line that speaks, tried on a stand-in for espeak-ng."""

import json
import stat
import sys

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
    assert [path.name for path in written] == ["0_said.wav", "0_answered.wav", "1_said.wav"]
    arguments, heard = json.loads(written[0].read_bytes()[4:])
    assert arguments == ["-v", "en-us", "-w", str(written[0]), "--stdin"]
    assert heard == "--version é"


def test_what_goes_wrong_is_said(install, tmp_path):
    with pytest.raises(UserError, match="Debian's package is espeak-ng"):
        speech.speak("hello", tmp_path / "a.wav")
    install(fails=True)
    with pytest.raises(UserError, match="no such voice"):
        speech.speak("hello", tmp_path / "a.wav")
