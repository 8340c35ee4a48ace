"""Adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`, in and out."""

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from rlhf_jax.errors import UserError
from rlhf_jax.models.adapters import Scale, lora_scale, rslora_scale
from rlhf_jax.models.encoder_decoder import EncoderDecoderConfig
from rlhf_jax.models.huggingface.families import Config, tensor_plan
from rlhf_jax.models.huggingface.fields import Fields
from rlhf_jax.models.huggingface.safetensors import SafetensorsFile, write_safetensors
from rlhf_jax.models.huggingface.tensors import Stored
from rlhf_jax.models.huggingface.weights import complain, read_json

__all__ = ["PeftAdapters", "load_peft", "save_peft"]

_PREFIX = "base_model.model."
_SUFFIXES = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_PATTERN = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?$")
_PARTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}


class PeftAdapters(NamedTuple):
    """What a PEFT folder holds: arguments of `apply_lora`, or of `apply_dora` if the adapters have magnitudes."""

    adapters: dict[str, Any]
    alpha: float
    scale: Scale  # lora_scale or rslora_scale
    has_magnitudes: bool


def _modules(config: Config) -> dict[str, Stored]:
    """Module name -> stored weight, for every linear layer of the model that is not an expert's."""
    linear = [stored for stored in tensor_plan(config) if stored.pieces[0].path[-1] == "kernel"]
    return {stored.name.removesuffix(".weight"): stored for stored in linear if stored.pieces[0].expert is None}


def load_peft(folder: str | os.PathLike[str], config: Config) -> PeftAdapters:
    """Reads adapters for a model of this config.

    An adapter of a fused layer (GPT-2, Phi-3) becomes one for each of our kernels, with a copy of `down` each.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      config: of the base model.
    Returns:
      `PeftAdapters`, NumPy arrays.
    Raises:
      UserError: another kind of adapter, something beside low-rank products, a layer that the model does not have, or a
        tensor that is missing or of another shape.
    """
    folder = Path(folder)
    fields = Fields(read_json(folder / "adapter_config.json"), str(folder / "adapter_config.json"))
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{fields.source} holds adapters of the type {fields.get('peft_type')!r}, expected 'LORA'")
    fields.refuse("bias", "none")
    for name in ("modules_to_save", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices"):
        fields.refuse(name, False, [], {})
    alpha = fields.number("lora_alpha", 8.0)
    scale = rslora_scale if fields.flag("use_rslora", False) else lora_scale
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder} has only adapter_model.bin, which can run code when opened and is not read")
    parts = _read_parts(SafetensorsFile(path), _modules(config), fields.flag("use_dora", False))

    flat: dict[tuple[str, ...], np.ndarray] = {}
    for module, (stored, part) in parts.items():
        rank = part["down"].shape[0]
        own = next((a for p, a in fields.get("alpha_pattern", {}).items() if _matches(p, module)), alpha)
        up = part["up"] * np.asarray(float(own) / alpha, part["up"].dtype)
        start = 0
        for piece in stored.pieces:
            rows = slice(start, start + piece.size)
            flat[*piece.path, "down"] = np.array(part["down"].T)
            flat[*piece.path, "up"] = np.array(up[rows].T).reshape(rank, piece.size)
            if "magnitude" in part:
                flat[*piece.path, "magnitude"] = np.array(part["magnitude"].reshape(-1)[rows])
            start += piece.size
    return PeftAdapters(traverse_util.unflatten_dict(flat), alpha, scale, fields.flag("use_dora", False))


def _matches(pattern: str, module: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _read_parts(
    file: SafetensorsFile, modules: Mapping[str, Stored], dora: bool
) -> dict[str, tuple[Stored, dict[str, np.ndarray]]]:
    """Module -> (stored weight, its parts), checked against the model."""
    found: dict[str, dict[str, np.ndarray]] = {}
    strange = []
    for name in file.keys():  # noqa: SIM118
        match = _PATTERN.fullmatch(name.removeprefix(_PREFIX))
        if match is None or match["module"] not in modules:
            strange.append(name)
        else:
            found.setdefault(match["module"], {})[_PARTS[match["part"]]] = file[name]
    if strange:
        raise UserError(f"{file.path} has adapters for layers that the model does not have: {', '.join(strange[:5])}")
    expected: dict[str, tuple[int, ...]] = {}
    for module, part in found.items():
        stored = modules[module]
        inputs = stored.shape[1 - stored.axis]
        outputs = stored.shape[stored.axis]
        rank = part["down"].shape[0] if "down" in part else 0
        expected |= {f"{module}/down": (rank, inputs), f"{module}/up": (outputs, rank)}
        if dora:
            expected[f"{module}/magnitude"] = (outputs,)
    shapes = {f"{module}/{name}": x.shape for module, part in found.items() for name, x in part.items()}
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(n for n in shapes[name] if n > 1 or len(shape) > 1) != shape
    ]
    complain(f"{file.path} does not fit the model", set(expected), set(shapes), wrong)
    return {module: (modules[module], part) for module, part in found.items()}


def save_peft(
    folder: str | os.PathLike[str],
    config: Config,
    adapters: Mapping[str, Any],
    *,
    alpha: float = 16.0,
    scale: Scale = lora_scale,
    base: str | None = None,
) -> None:
    """Writes adapters that PEFT loads on the model that `save_pretrained` writes.

    Adapters of kernels that are stored fused become one of the summed rank, unless they share `down`.

    Args:
      folder: made if it does not exist.
      config: of the base model.
      adapters: from `init_lora` or `init_dora`.
      alpha: α that the adapters were trained with.
      scale: `lora_scale` or `rslora_scale`.
      base: name or path of the base model, for readers.
    Raises:
      UserError: an adapter stands at a kernel that PEFT cannot adapt, or only a part of a fused layer has DoRA's
        magnitudes.
    """
    if scale not in (lora_scale, rslora_scale):
        raise UserError("PEFT knows lora_scale and rslora_scale alone; give one of the two")
    leaves = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(dict(adapters)).items()}
    modules = _modules(config)
    left = {path[:-1] for path in leaves} - {piece.path for stored in modules.values() for piece in stored.pieces}
    if left:
        names = ", ".join(sorted("/".join(map(str, path)) for path in left)[:5])
        raise UserError(f"PEFT has no layer for the adapters at {names}")
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, float] = {}
    for module, stored in modules.items():
        part = _written(module, stored, leaves, alpha, scale)
        if part is not None:
            alphas[module] = part.pop("alpha").item()
            tensors |= {f"{_PREFIX}{module}{_SUFFIXES[name]}": array for name, array in part.items()}
    ranks = {module: tensors[f"{_PREFIX}{module}.lora_A.weight"].shape[0] for module in alphas}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    entries = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if isinstance(config, EncoderDecoderConfig) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {module: found for module, found in ranks.items() if found != rank},
        "alpha_pattern": {module: found for module, found in alphas.items() if found != alpha},
        "target_modules": _targets(list(alphas), list(modules)),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": scale is rslora_scale,
        "use_dora": any(name.endswith("magnitude_vector") for name in tensors),
        "fan_in_fan_out": any(not modules[module].turned for module in alphas),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", shapes, tensors.items(), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _written(
    module: str, stored: Stored, leaves: Mapping[tuple[str, ...], np.ndarray], alpha: float, scale: Scale
) -> dict[str, np.ndarray] | None:
    """Parts of one module's adapter in PEFT's layout, and its alpha; None if it has none."""
    present = [piece for piece in stored.pieces if (*piece.path, "up") in leaves]
    if not present:
        return None
    downs = [leaves[*piece.path, "down"].T for piece in present]
    whole = len(present) == len(stored.pieces)
    shared = whole and all(np.array_equal(down, downs[0]) for down in downs)
    down = downs[0] if shared else np.concatenate(downs)
    outputs = stored.shape[stored.axis]
    up = np.zeros((outputs, down.shape[0]), down.dtype)
    row = column = 0
    factor = lambda rank: float(np.asarray(scale(1.0, rank)))
    first = factor(downs[0].shape[0])
    for piece in stored.pieces:
        if piece in present:
            part = leaves[*piece.path, "up"].T
            rank = part.shape[1]
            start = 0 if shared else column
            relative = np.asarray(factor(rank) / first, part.dtype)
            up[row : row + piece.size, start : start + rank] = part * relative
            column += rank
        row += piece.size
    own = alpha if shared else alpha * first / factor(down.shape[0])
    found = {"down": np.ascontiguousarray(down), "up": up, "alpha": np.asarray(own)}
    magnitudes = [leaves.get((*piece.path, "magnitude")) for piece in stored.pieces]
    if all(magnitude is not None for magnitude in magnitudes):
        found["magnitude"] = np.concatenate([magnitude for magnitude in magnitudes if magnitude is not None])
    elif any(magnitude is not None for magnitude in magnitudes):
        missing = ", ".join("/".join(p.path) for p, m in zip(stored.pieces, magnitudes, strict=True) if m is None)
        raise UserError(f"{module} is stored as one layer; DoRA adapts all of it or nothing, but {missing} has none")
    return found


def _targets(adapted: Sequence[str], every: Sequence[str]) -> list[str]:
    """Last parts of names where all layers of that name are adapted, whole names elsewhere."""
    last = lambda module: module.rpartition(".")[2]
    partly = {last(module) for module in every if module not in set(adapted)}
    return sorted({module if last(module) in partly else last(module) for module in adapted})
