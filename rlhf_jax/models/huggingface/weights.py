"""The stored tensors of a folder: found, opened, and compared with what the config asks for."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.encoder_decoder import EncoderDecoderConfig
from rlhf_jax.models.huggingface.families import Config, family_of, tensor_plan
from rlhf_jax.models.huggingface.safetensors import SafetensorsFile
from rlhf_jax.models.huggingface.tensors import Stored

__all__ = ["INDEX", "SINGLE", "Weights", "check_tensors", "complain", "open_weights", "read_json", "settle"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Weights:
    """Stored tensors by their full names, whichever file they are in."""

    def __init__(self, files: Sequence[SafetensorsFile], rename: Callable[[str], str]) -> None:
        self._where = {rename(name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        file, own = self._where[name]
        return file.shape(own)

    def dtype(self, name: str) -> np.dtype:
        file, own = self._where[name]
        return file.dtype(own)

    def __call__(self, name: str) -> np.ndarray:
        file, own = self._where[name]
        return file[own]


def open_weights(folder: Path, config: Config) -> Weights:
    """Opens every file of a folder; names that lack the family's prefix get it."""
    family = family_of(config)
    files = [SafetensorsFile(path) for path in _weight_files(folder)]
    bare = not any(name.startswith(family.prefix) for file in files for name in file.keys())  # noqa: SIM118
    planned = {stored.name for stored in tensor_plan(config)}
    prefixed = lambda name: family.prefix + name if bare and family.prefix + name in planned else name
    return Weights(files, prefixed)


def settle(config: Config, weights: Weights) -> Config:
    """The config with what only the weights tell.

    Newer files of a T5 1.1 say that the output table is the embedding, although they store another one.
    """
    if isinstance(config, EncoderDecoderConfig) and config.tie_embeddings and not config.scale_output:
        return dataclasses.replace(config, tie_embeddings="lm_head.weight" not in weights.names())
    return config


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise UserError(
                f"{folder / INDEX} lists {len(names)} files, of which {', '.join(missing) or 'none'} "
                f"{'is' if len(missing) == 1 else 'are'} missing; fetch the folder again"
            )
        return [folder / name for name in names]
    pickles = [path.name for path in sorted(folder.glob("*.bin"))]
    if pickles:
        raise UserError(
            f"{folder} has its weights in {', '.join(pickles)}, which can run code when opened and is not read; "
            f"expected {SINGLE} or {INDEX}. Convert it with `transformers` or take a safetensors revision"
        )
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"{folder} has no weights: expected {SINGLE} or {INDEX}, found {found}")


def check_tensors(folder: Path, config: Config, plan: Sequence[Stored], weights: Weights) -> None:
    """Compares names and shapes with the plan.

    Raises: UserError that lists what is missing, left over or of another shape.
    """
    family = family_of(config)
    ignored = re.compile(family.ignored)
    planned = {stored.name: stored.shape for stored in plan}
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    found = {name for name in weights.names() if name in planned or (not ignored.search(name) and name not in tied)}
    shapes = [
        f"{name} is {list(weights.shape(name))}, expected {list(shape)}"
        for name, shape in planned.items()
        if name in found and weights.shape(name) != shape
    ]
    complain(f"{folder}: the weights are not those of the {family.name} in config.json", set(planned), found, shapes)


def complain(what: str, expected: set[str], found: set[str], shapes: Sequence[str]) -> None:
    """An error that lists what is missing, what is left over and what has another shape; nothing if all is well."""
    problems = []
    for title, names in (
        ("missing", sorted(expected - found)),
        ("unexpected", sorted(found - expected)),
        ("of another shape", shapes),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{len(names)} {title}: {', '.join(names[:8])}{more}")
    if problems:
        raise UserError(f"{what} ({len(expected)} tensors expected, {len(found)} found). {'; '.join(problems)}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        folder = path.parent
        found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise UserError(f"{path} does not exist (found: {found or 'nothing'})") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} does not read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object, found {type(values).__name__}")
    return values
