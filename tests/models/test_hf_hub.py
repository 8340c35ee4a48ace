"""models/huggingface/hub.py with a stand-in for the Hub: what is asked for, what comes back, what goes wrong."""

import fnmatch
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.huggingface import load_pretrained, save_pretrained
from rlhf_jax.models.huggingface.hub import ALLOWED_FILES, REFUSED_FILES, download
from rlhf_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=11, width=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_width=8, max_length=16
)


@pytest.fixture
def repository(tmp_path):
    """A folder as a repository has it, with files that must not come along."""
    ones = jnp.ones((1, 2), jnp.int32)
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), ones, ones > 0)["params"]
    save_pretrained(tmp_path / "repository", CONFIG, params)
    for name in ("pytorch_model.bin", "optimizer.pt", "data.pkl", "modeling.py", "README.md"):
        (tmp_path / "repository" / name).write_bytes(b"no")
    return tmp_path / "repository", params


def serve(monkeypatch, folder, target, calls):
    def snapshot_download(repo_id, *, revision, cache_dir, local_files_only, allow_patterns, ignore_patterns):
        calls.append((repo_id, revision, cache_dir, local_files_only))
        target.mkdir()
        for path in folder.iterdir():
            wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignore_patterns):
                (target / path.name).write_bytes(path.read_bytes())
        return str(target)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)


def test_what_comes_back_loads_and_holds_no_pickle(monkeypatch, repository, tmp_path):
    folder, params = repository
    calls = []
    serve(monkeypatch, folder, tmp_path / "snapshot", calls)
    found = download("owner/model", revision="abc", cache=tmp_path)
    assert calls == [("owner/model", "abc", str(tmp_path), False)]
    assert {path.name for path in found.iterdir()} == {"config.json", "model.safetensors"}
    config, loaded = load_pretrained(found)
    assert config.width == CONFIG.width
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), dict(params))


def test_patterns_ask_for_no_pickle():
    names = ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.pickle", "a.npy", "model.h5", "code.py"]
    for name in names:
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ALLOWED_FILES)
        assert any(fnmatch.fnmatch(name, pattern) for pattern in REFUSED_FILES)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "a.jinja"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in ALLOWED_FILES)


def test_failures_are_said_in_words(monkeypatch, repository, tmp_path):
    folder, _ = repository
    (folder / "model.safetensors").unlink()
    serve(monkeypatch, folder, tmp_path / "snapshot", [])
    with pytest.raises(UserError, match=r"no safetensors \(found: config\.json\)"):
        download("owner/model")

    def refuse(*args, **options):
        raise OSError("connection refused")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(UserError, match=r"owner/model at revision v2 .*OSError: connection refused"):
        download("owner/model", revision="v2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[hub\]'"):
        download("owner/model")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 11
