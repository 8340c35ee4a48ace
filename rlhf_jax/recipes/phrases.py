"""Short German phrases with their English, from Debian's trans-de-en (GPL-2+) or from a file."""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rlhf_jax.data.fetch import cache_folder
from rlhf_jax.errors import UserError

__all__ = ["load_pairs", "read_dictionary"]

PACKAGE, SHA256 = "trans-de-en=1.9-6", "45f6b4cf1c434776fba6811d7bc522efabb5425c43ba8afd0e289bf9e2e53df4"


def dictionary() -> str:
    """Debian's German-English dictionary, fetched once by Debian's client and checked."""
    kept = cache_folder() / "trans-de-en-1.9-6" / "de-en"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError("Debian's apt-get and dpkg-deb are not here to fetch trans-de-en; give --pairs FILE instead")
    with tempfile.TemporaryDirectory() as folder:
        told = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True)
        found = list(Path(folder).glob("*.deb"))
        if told.returncode or not found:
            reason = (told.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"apt-get could not fetch {PACKAGE} ({reason}); give --pairs FILE instead")
        if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != SHA256:
            raise UserError(f"{PACKAGE} is not the file that was expected: its SHA-256 is {digest} instead of {SHA256}")
        subprocess.run(["dpkg-deb", "-x", str(found[0]), folder], check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "usr/share/trans/de-en", kept)
    return kept.read_text(encoding="utf-8")


def read_dictionary(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Words and phrases that stand opposite each other, without remarks in brackets, of at most eight words a side."""
    clean = lambda phrase: " ".join(re.sub(r"\{[^}]*\}|\[[^]]*\]|\([^)]*\)|/[^/]*/|<[^>]*>", " ", phrase).split())
    pairs: dict[str, str] = {}
    for line in lines:
        if line.startswith("#") or " :: " not in line:
            continue
        sides = [[group.split(";") for group in side.split("|")] for side in line.split(" :: ", 1)]
        for german, english in zip(*sides, strict=False):
            one, other = clean(german[0]), clean(english[0])
            if 1 <= len(one.split()) <= 8 and 1 <= len(other.split()) <= 8:
                pairs.setdefault(one, other)
    return list(pairs.items())


def load_pairs(path: str, *, most: int | None = None) -> list[tuple[str, str]]:
    """Pairs of a file of lines German, tab, English; those of Debian's dictionary if there is none.

    Args:
      path: of the file, or "".
      most: lines that are read, from the beginning; all by default.
    Raises:
      UserError: neither can be read.
    """
    if not path:
        return read_dictionary(dictionary().splitlines()[:most])
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:most]
    except OSError as error:
        raise UserError(f"--pairs {path} cannot be read: {error.strerror}") from None
    if bad := [number for number, line in enumerate(lines, 1) if line.count("\t") != 1]:
        raise UserError(f"Line {bad[0]} of {path} is not German, tab, English")
    return list({german: (german, english) for german, english in (line.split("\t") for line in lines)}.values())
