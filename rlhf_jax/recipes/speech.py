"""Text as speech and back: if they are installed, `espeak-ng` writes WAV files and pocketsphinx understands them."""

import math
import re
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

from rlhf_jax.errors import UserError, missing_extra

__all__ = ["ABSENT", "espeak", "hear", "recognise", "recogniser", "speak", "speak_exchanges", "word_error_rate"]

ABSENT = "espeak-ng is not here, so nothing was spoken; Debian's package is espeak-ng"
RATE = 16_000  # samples a second, as pocketsphinx's English model expects


def espeak() -> str | None:
    """Where the program is, or None."""
    return shutil.which("espeak-ng")


def recogniser() -> str | None:
    """The recogniser's name and version if it and espeak-ng are here, or None."""
    try:
        return f"pocketsphinx {metadata.version('pocketsphinx')}" if espeak() else None
    except metadata.PackageNotFoundError:
        return None


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
    """What was asked and what was answered, as pairs of WAV files; empty texts stay unsaid."""
    written = []
    for number, exchange in enumerate(exchanges):
        for what, text in zip(("question", "reply"), exchange, strict=True):
            if text.strip():
                written.append(folder / f"{number}_{what}.wav")
                speak(text, written[-1])
    return written


def recognise(audio: Path | np.ndarray) -> str:
    """What pocketsphinx understands, with the English model that it brings; what it heard before does not matter.

    It is used to rooms: it hears a pause before and after, and a hiss of 72 dB below full scale, always the same one.

    Args:
      audio: a WAV file of 16-bit samples, at any rate; or [N] int16 samples, 16,000 a second, one channel.
    Returns:
      Words in lower case; "" if it understood none.
    Raises: UserError if pocketsphinx is not installed or the file is not such a WAV.
    """
    samples, decoder = read_wav(audio) if isinstance(audio, Path) else audio, _decoder()
    if not samples.size:
        return ""
    decoder.start_utt()
    sound = np.pad(samples.astype(np.float64), round(0.3 * RATE))
    sound += np.random.default_rng(0).normal(scale=8, size=sound.size)
    decoder.process_raw(_int16(sound).tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found else ""


def read_wav(path: Path) -> np.ndarray:
    """[N] int16 samples of a WAV file as `recognise` takes them: channels averaged, resampled to 16,000 a second."""
    try:
        with wave.open(str(path)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise UserError(f"{path} is not a WAV file ({error})") from None
    if width != 2:
        raise UserError(f"{path} has samples of {8 * width} bits; 16 are wanted")
    sound, common = np.frombuffer(data, "<i2").reshape(-1, channels).mean(axis=1), math.gcd(rate, RATE)
    if sound.size:
        sound = resample_poly(sound, RATE // common, rate // common)
    return _int16(sound)


def _int16(sound: np.ndarray) -> np.ndarray:
    return np.clip(np.round(sound), -(2**15), 2**15 - 1).astype("<i2")


def hear(text: str) -> str:
    """`text` as the recogniser understands it when espeak-ng speaks it."""
    with tempfile.TemporaryDirectory() as folder:
        return " ".join(recognise(path) for path in speak_exchanges(Path(folder), [(text, "")]))


@cache
def _decoder() -> Any:
    try:
        from pocketsphinx import Decoder  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_extra("pocketsphinx", "speech", "recognise speech") from error
    return Decoder(samprate=RATE, cmn="batch", loglevel="ERROR")


def word_error_rate(said: Iterable[str], heard: Iterable[str]) -> float:
    """Words dropped, put in or replaced over words said, in all texts together; case and punctuation do not count.

    The fewest such edits that make one text the other; as words can be put in, the rate can pass 1.

    >>> word_error_rate(["What is the weather?", "Hello!"], ["what is whether", "hello"])
    0.4
    """
    pairs = [tuple(re.findall(r"[\w']+", text.lower()) for text in pair) for pair in zip(said, heard, strict=True)]
    return sum(_edits(*pair) for pair in pairs) / max(sum(len(words) for words, _ in pairs), 1)


def _edits(said: list[str], heard: list[str]) -> int:
    row = list(range(len(heard) + 1))  # edits from the words of `said` so far to each beginning of `heard`
    for word in said:
        above, row = row, [row[0] + 1]
        for i, other in enumerate(heard):
            row.append(min(above[i] + (word != other), above[i + 1] + 1, row[i] + 1))
    return row[-1]
