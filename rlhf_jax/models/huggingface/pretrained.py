"""Whole folders: `config.json` and one or several safetensors files, in and out."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from rlhf_jax.errors import UserError
from rlhf_jax.models.adapters import Adapted
from rlhf_jax.models.huggingface.families import Config, read_config, tensor_plan, write_config
from rlhf_jax.models.huggingface.safetensors import write_safetensors
from rlhf_jax.models.huggingface.tensors import (
    Stored,
    assemble,
    insert,
    param_shapes,
    pieces_of,
    tensors_from_params,
)
from rlhf_jax.models.huggingface.weights import (
    INDEX,
    SINGLE,
    check_tensors,
    complain,
    open_weights,
    read_json,
    settle,
)
from rlhf_jax.models.quantisation import Quantised

__all__ = ["check_vocabulary", "load_pretrained", "save_pretrained"]

Folder = str | os.PathLike[str]
Placement = Sharding | Mapping[str, Any] | Callable[[dict[str, Any]], Any]

# What stands beside the weights and has nothing to do with their numbers.
_COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def load_pretrained(
    folder: Folder,
    *,
    sharding: Placement | None = None,
    dtype: DTypeLike | None = None,
    check_tokenizer: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """Loads a model from a folder as Hugging Face writes them.

    Files are memory-mapped and parameters placed one after the other: host memory holds one at a time, and of that only
    the parts that this process's devices need.

    Args:
      folder: with `config.json` and `model.safetensors`, or several files and their index.
      sharding: where parameters go: one sharding for all, a tree of shardings, or a function from the tree of
        `jax.ShapeDtypeStruct` to a tree of shardings (such as `lambda tree: shardings(tree, mesh)`); None is the first
        local device.
      dtype: of the parameters; None keeps what is stored.
      check_tokenizer: compares the ids of `tokenizer.json`, if there is one, with the embedding (`check_vocabulary`).
    Returns:
      (config, params): a `TransformerConfig`, so that `Transformer(config).apply({"params": params}, ...)` runs it,
      or, for T5, an `EncoderDecoderConfig` for `EncoderDecoder`.
    Raises:
      UserError: an unknown architecture, a file that is missing, damaged or a pickle, a tensor that is missing, left
        over or of another shape, or a tokenizer with ids beyond the embedding.
    """
    folder = Path(folder)
    config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    if check_tokenizer:
        check_vocabulary(folder, config)
    read = open_weights(folder, config)
    config = settle(config, read)
    plan = tensor_plan(config)
    check_tensors(folder, config, plan, read)
    sources = pieces_of(plan)
    tree: dict[str, Any] = {}
    for path, shape in param_shapes(plan).items():
        kept = read.dtype(sources[path][0].stored.name) if dtype is None else np.dtype(dtype)
        insert(tree, path, jax.ShapeDtypeStruct(shape, kept))
    places = _places(sharding, tree)

    def load(path: Any, struct: jax.ShapeDtypeStruct, place: Sharding) -> jax.Array:
        found = sources[tuple(entry.key for entry in path)]
        part = lambda index: assemble(found, read, index).astype(struct.dtype, copy=False)
        return jax.make_array_from_callback(struct.shape, place, part)

    return config, jax.tree_util.tree_map_with_path(load, tree, places)


def _places(sharding: Placement | None, tree: dict[str, Any]) -> Any:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, Sharding):
        return jax.tree.map(lambda _: sharding, tree)
    return sharding(tree) if callable(sharding) else sharding


def save_pretrained(
    folder: Folder,
    config: Config,
    params: Mapping[str, Any],
    *,
    like: Folder | None = None,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `transformers` loads, and `load_pretrained` too.

    The family is `config.family`, or the plainest one that can express the config. Existing weights in the folder are
    replaced once the new ones are whole. Parameters must be addressable from this process.

    Args:
      folder: made if it does not exist.
      config: the decoder's shape.
      params: its parameters; leaves may be sharded. One is brought to the host at a time.
      like: a folder to take the tokenizer, the generation settings and further entries of `config.json` from.
      dtype: to store; None keeps the parameters' own.
      max_file_bytes: beyond this, weights are spread over several files with an index.
    Raises:
      UserError: no family can express the config, or the parameters are not those of the config.
    """
    folder = Path(folder)
    plan = tensor_plan(config)
    _check_params(plan, params)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {path: leaf.dtype if dtype is None else np.dtype(dtype) for path, leaf in _leaves(params).items()}
    shapes = {tensor.name: (tensor.shape, np.dtype(stored[tensor.pieces[0].path])) for tensor in plan}

    files = _spread(shapes, max_file_bytes)
    arrays = tensors_from_params(plan, params)
    for file, names in files.items():
        some = {name: shapes[name] for name in names}
        written = ((name, array.astype(shapes[name][1], copy=False)) for name, array in _take(arrays, len(names)))
        write_safetensors(folder / file, some, written, metadata={"format": "pt"})
    if len(files) > 1:
        sizes = [np.dtype(kind).itemsize * int(np.prod(shape)) for shape, kind in shapes.values()]
        index = {name: file for file, names in files.items() for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in files and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", stale.name):
            stale.unlink()

    embedding = stored[("embed", "embedding")]
    entries = write_config(config) | {"torch_dtype": embedding.name, "dtype": embedding.name}
    if like is not None:
        entries = _take_over(Path(like), folder, entries)
    _write_json(folder / "config.json", entries)


def _take(pairs: Any, count: int) -> Any:
    for _ in range(count):
        yield next(pairs)


def _spread(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], limit: int) -> dict[str, list[str]]:
    """File name -> tensors, in order, none larger than `limit` unless a single tensor is."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, (shape, dtype) in shapes.items():
        size = dtype.itemsize * int(np.prod(shape))
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _take_over(source: Path, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Copies what stands beside the weights; returns the entries with those of the source that say nothing of them."""
    old = read_json(source / "config.json")
    ours = set(write_config(read_config(old, str(source / "config.json"))))
    extra = {name: value for name, value in old.items() if name not in ours and name not in entries}
    for name in _COMPANIONS:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    return extra | entries


def check_vocabulary(folder: Folder, config: Config) -> None:
    """Compares the ids of `tokenizer.json` with the rows of the embedding; larger embeddings are common and fine.

    Raises: UserError that names ids beyond the embedding: they would be read as other tokens.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return
    tokenizer = read_json(path)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        ids = {int(token_id): token for token, token_id in vocabulary.items()}
    else:  # unigram models list (token, score)
        ids = {index: entry[0] for index, entry in enumerate(vocabulary)}
    ids |= {int(added["id"]): added["content"] for added in tokenizer.get("added_tokens", [])}
    beyond = sorted(token_id for token_id in ids if token_id >= config.vocab_size)
    if beyond:
        some = ", ".join(f"{ids[token_id]!r} = {token_id}" for token_id in beyond[:5])
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        raise UserError(
            f"{path} has ids up to {beyond[-1]}, the embedding has {config.vocab_size} rows (0 to "
            f"{config.vocab_size - 1}): {some}{more} lie beyond it. Take the tokenizer that belongs to the model, or "
            "pass check_tokenizer=False if those tokens never occur"
        )


def _check_params(plan: Sequence[Stored], params: Mapping[str, Any]) -> None:
    held = lambda leaf: isinstance(leaf, Quantised | Adapted)
    if any(held(leaf) for leaf in jax.tree.leaves(params, is_leaf=held)):
        raise UserError("quantised or adapted kernels cannot be stored; give dequantise(params) or apply_lora(...)")
    planned = {"/".join(path): shape for path, shape in param_shapes(plan).items()}
    found = {"/".join(path): tuple(leaf.shape) for path, leaf in _leaves(params).items()}
    shapes = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in planned.items()
        if name in found and found[name] != shape
    ]
    complain("the parameters are not those of the config", set(planned), set(found), shapes)


def _leaves(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return {
        tuple(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params))
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
