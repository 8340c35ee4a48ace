"""Text as speech: `espeak-ng`, if it is installed, writes WAV files."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from rlhf_jax.errors import UserError

__all__ = ["ABSENT", "espeak", "speak", "speak_exchanges"]

ABSENT = "espeak-ng is not here, so nothing was spoken; Debian's package is espeak-ng"


def espeak() -> str | None:
    """Where the program is, or None."""
    return shutil.which("espeak-ng")


def speak(text: str, path: Path, *, voice: str = "en-us") -> None:
    """Writes `text`, spoken, to a WAV file; what the text holds is never taken for an option.

    Raises: UserError if espeak-ng is absent, fails or writes no WAV.
    """
    program = espeak()
    if program is None:
        raise UserError(ABSENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = subprocess.run(
        [program, "-v", voice, "-w", str(path), "--stdin"],
        input=text, capture_output=True, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if told.returncode or not path.is_file() or path.read_bytes()[:4] != b"RIFF":
        reason = (told.stderr.strip().splitlines() or [f"exit status {told.returncode}, no WAV"])[-1]
        raise UserError(f"espeak-ng could not speak {path.name}: {reason}")


def speak_exchanges(folder: Path, exchanges: Iterable[tuple[str, str]]) -> list[Path]:
    """What was said and what was answered, as pairs of WAV files; empty answers stay unsaid."""
    written = []
    for number, exchange in enumerate(exchanges):
        for who, text in zip(("said", "answered"), exchange, strict=True):
            if text.strip():
                written.append(folder / f"{number}_{who}.wav")
                speak(text, written[-1])
    return written
