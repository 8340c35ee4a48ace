"""Read a Llama-type language model from a GGUF file into the parameters of our decoder.

GGUF stores the query and key rows of Llama models for rotary embeddings over pairs (2i, 2i + 1). Our decoder rotates
halves (i, i + head_dim / 2), so those rows are put back in order. Weights are dequantised one tensor at a time to
float32 and turned to [in, out], the layout of a Flax kernel.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.errors import UserError, missing_extra

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["load_gguf", "open_gguf", "read_field"]

ARCHITECTURES = ("llama",)

# GGUF name within a block -> path of the parameter within our layer.
_LAYER = {
    "attn_norm": ("attention_norm", "scale"),
    "attn_q": ("attention", "query", "kernel"),
    "attn_k": ("attention", "key", "kernel"),
    "attn_v": ("attention", "value", "kernel"),
    "attn_output": ("attention", "out", "kernel"),
    "ffn_norm": ("mlp_norm", "scale"),
    "ffn_gate": ("mlp", "gate", "kernel"),
    "ffn_up": ("mlp", "up", "kernel"),
    "ffn_down": ("mlp", "down", "kernel"),
}


def open_gguf(path: str | os.PathLike[str]) -> "GGUFReader":
    """Open a GGUF file; pass the result to `load_gguf` and `load_gguf_tokenizer` to read its header only once.

    Raises: UserError if the file is absent, cut short or not GGUF, or if the `gguf` package is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise missing_extra("gguf", "quickstart", "read a GGUF model") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; give the path of a .gguf model")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it begins with {magic!r} rather than b'GGUF'; fetch it again")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        # The reader slices a memory map and does not notice the end of the file by itself.
        raise UserError(
            f"{path} is cut short or damaged ({path.stat().st_size:,} bytes, {type(error).__name__} while reading its "
            "header); delete it and fetch it again"
        ) from None


def read_field(reader: "GGUFReader", name: str, default: Any = None) -> Any:
    """A metadata value as a Python number, string, bool or list; `default` if the file does not have it."""
    field = reader.get_field(name)
    return default if field is None else field.contents()


def load_gguf(source: "str | os.PathLike[str] | GGUFReader") -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a Llama-type model: the fields of a TransformerConfig, and the decoder's parameters.

    Args:
      source: a path, or what `open_gguf` returned.
    Returns:
      (fields, params): `TransformerConfig(**fields)` is the model's shape; params is the nested dict of float32 NumPy
      arrays that its `apply` takes as `{"params": params}`, with `head/embedding` only if the embeddings are untied.
    Raises: UserError if the architecture is another one, or a tensor is missing, unexpected or of another shape.
    """
    reader = open_gguf(source) if isinstance(source, str | os.PathLike) else source
    from gguf import dequantize  # open_gguf has said so if it is missing

    path = _path(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = _config_fields(reader, path, tied="output.weight" not in tensors)
    plan = _plan(fields)
    _check_names(path, set(plan), set(tensors))

    params: dict[str, Any] = {}
    for name, (parameter, shape) in plan.items():
        tensor = tensors[name]
        found = tuple(int(size) for size in reversed(tensor.shape))
        if found != shape:
            raise UserError(f"{path}: the tensor {name} has shape {found} where the header asks for {shape}; {_REMEDY}")
        try:
            weight = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{path}: the tensor {name} is quantised as {tensor.tensor_type.name}, which the installed `gguf` "
                "package cannot dequantise; update it (pip install -U gguf) or use a Q8_0 or F16 file"
            ) from None
        weight = weight.astype(np.float32, copy=False).reshape(shape)
        if name.endswith("attn_q.weight"):
            weight = _pairs_to_halves(weight, fields["num_heads"])
        elif name.endswith("attn_k.weight"):
            weight = _pairs_to_halves(weight, fields["num_kv_heads"])
        if parameter[-1] == "kernel":
            weight = weight.T
        _insert(params, parameter, np.array(weight, dtype=np.float32, order="C"))  # a copy, free of the memory map
    return fields, params


_REMEDY = "fetch the file again or use another one"


def _path(reader: "GGUFReader") -> str:
    return str(getattr(reader.data, "filename", "the GGUF file"))


def _config_fields(reader: "GGUFReader", path: str, *, tied: bool) -> dict[str, Any]:
    architecture = read_field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of architecture {architecture!r}; only {', '.join(ARCHITECTURES)} can be loaded, so "
            "choose another file"
        )

    def get(name: str, default: Any = None) -> Any:
        value = read_field(reader, f"{architecture}.{name}", default)
        if not isinstance(value, int | float):
            problem = "lacks the" if value is None else "has no single number in its"
            raise UserError(f"{path} {problem} header field {architecture}.{name}; {_REMEDY}")
        return value

    scaling = read_field(reader, f"{architecture}.rope.scaling.type", "none")
    experts = read_field(reader, f"{architecture}.expert_count", 0)
    if scaling != "none" or experts:
        what = f"{experts} experts" if experts else f"{scaling!r} scaling of its rotary embeddings"
        raise UserError(f"{path} uses {what}, which the decoder does not have; choose another file")
    heads, width = get("attention.head_count"), get("embedding_length")
    kv_heads = get("attention.head_count_kv", heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{path} declares {heads} query heads for {kv_heads} key heads; {_REMEDY}")
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads))
    vocab_size = read_field(reader, f"{architecture}.vocab_size")
    if vocab_size is None:
        vocab_size = len(read_field(reader, "tokenizer.ggml.tokens", []))
    return {
        "vocab_size": int(vocab_size),
        "width": int(width),
        "num_layers": int(get("block_count")),
        "num_heads": int(heads),
        "num_kv_heads": int(kv_heads),
        "head_dim": int(head_dim),
        "mlp_width": int(get("feed_forward_length")),
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "norm_epsilon": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32: 1e-5, not 9.99e-6
        "tie_embeddings": tied,
        "max_length": int(get("context_length")),
    }


def _plan(fields: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Every tensor of such a model: GGUF name -> (path of our parameter, shape in the file, [out, in])."""
    width, mlp, vocab = fields["width"], fields["mlp_width"], fields["vocab_size"]
    queries, keys = (fields[heads] * fields["head_dim"] for heads in ("num_heads", "num_kv_heads"))
    shapes = {
        "attn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_norm": (width,),
        "ffn_gate": (mlp, width),
        "ffn_up": (mlp, width),
        "ffn_down": (width, mlp),
    }
    plan: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    plan["token_embd.weight"] = (("embed", "embedding"), (vocab, width))
    for layer in range(fields["num_layers"]):
        for name, parameter in _LAYER.items():
            plan[f"blk.{layer}.{name}.weight"] = ((f"layer_{layer}", *parameter), shapes[name])
    plan["output_norm.weight"] = (("final_norm", "scale"), (width,))
    if not fields["tie_embeddings"]:
        plan["output.weight"] = (("head", "embedding"), (vocab, width))
    return plan


def _check_names(path: str, expected: set[str], found: set[str]) -> None:
    for names, problem in ((expected - found, "lacks"), (found - expected, "has unexpected")):
        if names:
            some = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(
                f"{path} {problem} tensors: {some} ({len(expected)} expected, {len(found)} found); {_REMEDY}"
            )


def _pairs_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from the order (2i, 2i + 1) to (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
