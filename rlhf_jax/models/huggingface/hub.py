"""Models by name, from the Hugging Face Hub: the folder that `load_pretrained` and `load_tokenizer` read.

Only safetensors, JSON, vocabularies and templates are fetched. Pickles are neither asked for nor opened.
"""

import os
from pathlib import Path

from rlhf_jax.errors import UserError, missing_extra

__all__ = ["ALLOWED_FILES", "REFUSED_FILES", "download"]

ALLOWED_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")
REFUSED_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz", "*.h5", "*.msgpack", "*.py")


def download(
    repo: str, *, revision: str = "main", cache: str | os.PathLike[str] | None = None, offline: bool = False
) -> Path:
    """Fetches a model into the Hub's cache, or finds it there.

    Args:
      repo: its name, "owner/model".
      revision: a branch, a tag, or best a commit: only a commit is the same model tomorrow.
      cache: the folder for downloads; None is the Hub's own.
      offline: only look into the cache.
    Returns: the folder, for `load_pretrained`.
    Raises: UserError if `huggingface_hub` is missing, the model cannot be fetched, or it has no safetensors.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise missing_extra("huggingface_hub", "hub", "fetch models from the Hugging Face Hub") from None

    try:
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=None if cache is None else str(cache),
            local_files_only=offline,
            allow_patterns=list(ALLOWED_FILES),
            ignore_patterns=list(REFUSED_FILES),
        )
    except Exception as error:  # the package and the network under it have many kinds of failure
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repo} at revision {revision} cannot be fetched ({type(error).__name__}: {reason}); check the name, the "
            "revision, the network, and for gated models that you have access and ran `hf auth login`"
        ) from error
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        beside = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
        raise UserError(
            f"{repo} at revision {revision} has no safetensors (found: {beside}); pickles are never opened, so choose "
            "a revision or a copy of the model with safetensors"
        )
    return folder
