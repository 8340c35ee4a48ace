"""What each family's `config.json` says of the decoder, in both directions.

Entries that are absent have the family's published defaults.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.huggingface.fields import Fields
from rlhf_jax.models.huggingface.rope import read_rope, write_rope

__all__ = [
    "cycle_of",
    "read_gemma",
    "read_gemma2",
    "read_gemma3",
    "read_gpt2",
    "read_llama",
    "read_mistral",
    "read_mixtral",
    "read_phi3",
    "read_qwen2",
    "read_qwen3",
    "read_qwen3_moe",
    "write_gemma",
    "write_gemma2",
    "write_gpt2",
    "write_llama",
    "write_mistral",
    "write_mixtral",
    "write_phi3",
    "write_qwen",
    "write_qwen3",
    "write_qwen3_moe",
]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_WRITTEN_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


# Windows.


def cycle_of(windows: Sequence[int | None]) -> tuple[int | None, ...]:
    """The shortest tuple that gives these windows when it is repeated.

    >>> cycle_of([8, None, 8])
    (8, None)
    """
    for length in range(1, len(windows)):
        if all(window == windows[layer % length] for layer, window in enumerate(windows)):
            return tuple(windows[:length])
    return tuple(windows)


def _every_layer(layer: int) -> bool:
    del layer
    return True


def _read_windows(
    fields: Fields, layers: int, has_window: Callable[[int], bool] = _every_layer, *, default: int | None = 4096
) -> tuple[int | None, ...]:
    """Windows from `sliding_window` and `layer_types`.

    Args:
      fields: the config.
      layers: number of layers.
      has_window: which layers have one if `layer_types` is absent.
      default: the window if `sliding_window` is absent; a null means none.
    """
    if fields.values.get("sliding_window", default) is None:
        return (None,)
    window = fields.integer("sliding_window", default)
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if has_window(layer) else "full_attention" for layer in range(layers)]
    known = {"sliding_attention": window, "full_attention": None}
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise UserError(
            f"{fields.source}: layer_types must name {layers} layers, each of {' or '.join(known)}, found {kinds}"
        )
    return cycle_of([known[kind] for kind in kinds])


def _write_windows(config: TransformerConfig) -> dict[str, Any]:
    windows = [config.window(layer) for layer in range(config.num_layers)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"sliding_window": next((window for window in windows if window), None), "layer_types": kinds}


# What most families share.


def _read_common(
    fields: Fields, *, tied: bool = False, epsilon: float = 1e-6, theta: float = 10_000.0
) -> dict[str, Any]:
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", max(width // heads, 1)),
        "mlp_width": fields.integer("intermediate_size"),
        "max_length": fields.integer("max_position_embeddings", 2048),
        "norm_epsilon": fields.number("rms_norm_eps", epsilon),
        "activation": fields.one_of("hidden_act", _ACTIVATIONS, "silu"),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
    } | read_rope(fields, theta=theta)


def _write_common(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": _WRITTEN_ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
    } | write_rope(config)


# Families.


def read_llama(fields: Fields) -> dict[str, Any]:
    biased = fields.flag("attention_bias", False)
    extra = {"qkv_bias": biased, "out_bias": biased, "mlp_bias": fields.flag("mlp_bias", False)}
    return _read_common(fields) | extra


def write_llama(config: TransformerConfig) -> dict[str, Any]:
    return _write_common(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def read_mistral(fields: Fields) -> dict[str, Any]:
    common = _read_common(fields)
    return common | {"windows": _read_windows(fields, common["num_layers"])}


def write_mistral(config: TransformerConfig) -> dict[str, Any]:
    return _write_common(config) | {"sliding_window": _write_windows(config)["sliding_window"]}


def _read_qwen(fields: Fields) -> dict[str, Any]:
    common = _read_common(fields)
    if not fields.flag("use_sliding_window", False):
        return common
    start = fields.get("max_window_layers", 28)
    return common | {"windows": _read_windows(fields, common["num_layers"], lambda layer: layer >= start)}


def write_qwen(config: TransformerConfig) -> dict[str, Any]:
    windows = _write_windows(config)
    kinds = windows["layer_types"]
    full = kinds.index("sliding_attention") if "sliding_attention" in kinds else config.num_layers
    used = {"use_sliding_window": windows["sliding_window"] is not None, "max_window_layers": full}
    return _write_common(config) | windows | used


def read_qwen2(fields: Fields) -> dict[str, Any]:
    return _read_qwen(fields) | {"qkv_bias": True}


def read_qwen3(fields: Fields) -> dict[str, Any]:
    biased = fields.flag("attention_bias", False)
    head_dim = fields.integer("head_dim", 128)
    return _read_qwen(fields) | {"head_dim": head_dim, "query_key_norm": True, "qkv_bias": biased, "out_bias": biased}


def write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    return write_qwen(config) | {"attention_bias": config.qkv_bias}


def read_gemma(fields: Fields) -> dict[str, Any]:
    common = _read_common(fields, tied=True)
    biased = fields.flag("attention_bias", False)
    return common | {
        "head_dim": fields.integer("head_dim", 256),
        # The first Gemma files say "gelu" in hidden_act and mean the tanh approximation.
        "activation": fields.one_of("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "embedding_scale": common["width"] ** 0.5,
        "qkv_bias": biased,
        "out_bias": biased,
    }


def write_gemma(config: TransformerConfig) -> dict[str, Any]:
    activation = _WRITTEN_ACTIVATIONS[config.activation]
    return _write_common(config) | {"hidden_activation": activation, "attention_bias": config.qkv_bias}


def read_gemma2(fields: Fields) -> dict[str, Any]:
    fields.refuse("use_bidirectional_attention", False)
    common = read_gemma(fields)
    return common | {
        "post_norms": True,
        "query_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_soft_cap": _cap(fields, "attn_logit_softcapping", 50.0),
        "logit_soft_cap": _cap(fields, "final_logit_softcapping", 30.0),
        "windows": _read_windows(fields, common["num_layers"], lambda layer: layer % 2 == 0),
    }


def write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    scalar = round(scale**-2, 6)
    return (
        write_gemma(config)
        | _write_windows(config)
        | {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": config.attention_soft_cap,
            "final_logit_softcapping": config.logit_soft_cap,
        }
    )


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A soft cap; an entry that is null means none, one that is absent the family's default."""
    value = fields.values.get(name, default)
    return None if value is None else fields.number(name, default)


def read_gemma3(fields: Fields) -> dict[str, Any]:
    pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    found = read_gemma2(fields)
    return (
        found
        | read_rope(fields, theta=1_000_000.0, local_theta=10_000.0)
        | {
            "query_key_norm": True,
            "attention_soft_cap": _cap(fields, "attn_logit_softcapping", None),
            "logit_soft_cap": _cap(fields, "final_logit_softcapping", None),
            "windows": _read_windows(fields, found["num_layers"], lambda layer: (layer + 1) % pattern != 0),
        }
    )


def read_phi3(fields: Fields) -> dict[str, Any]:
    common = _read_common(fields, epsilon=1e-5)
    return common | {"windows": _read_windows(fields, common["num_layers"], default=None)}


def write_phi3(config: TransformerConfig) -> dict[str, Any]:
    original = getattr(config.rope_scaling, "original_length", config.max_length)
    window = _write_windows(config)["sliding_window"]
    return _write_common(config) | {"sliding_window": window, "original_max_position_embeddings": original}


def read_mixtral(fields: Fields) -> dict[str, Any]:
    common = _read_common(fields, epsilon=1e-5, theta=1_000_000.0)
    return common | {
        "num_experts": fields.integer("num_local_experts", 8),
        "experts_per_token": fields.integer("num_experts_per_tok", 2),
        "expert_width": common["mlp_width"],
        "windows": _read_windows(fields, common["num_layers"], default=None),
    }


def write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    return write_mistral(config) | {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def read_qwen3_moe(fields: Fields) -> dict[str, Any]:
    found = read_qwen3(fields)
    layers, step = found["num_layers"], fields.integer("decoder_sparse_step", 1)
    plain = fields.get("mlp_only_layers", [])
    if fields.flag("use_sliding_window", False):
        found["windows"] = _read_windows(fields, layers)
    heads, width = found["num_heads"], found["width"]
    return found | {
        "head_dim": fields.integer("head_dim", max(width // heads, 1)),
        "num_experts": fields.integer("num_experts", fields.get("num_local_experts", 128)),
        "experts_per_token": fields.integer("num_experts_per_tok", 8),
        "expert_width": fields.integer("moe_intermediate_size", 768),
        "normalise_expert_weights": fields.flag("norm_topk_prob", False),
        "dense_layers": tuple(layer for layer in range(layers) if layer in plain or (layer + 1) % step),
    }


def write_qwen3_moe(config: TransformerConfig) -> dict[str, Any]:
    return write_qwen3(config) | {
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_width,
        "norm_topk_prob": config.normalise_expert_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    }


def read_gpt2(fields: Fields) -> dict[str, Any]:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        fields.refuse(name, False)
    heads, width = fields.integer("n_head"), fields.integer("n_embd")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "num_layers": fields.integer("n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": max(width // heads, 1),
        "mlp_width": fields.integer("n_inner", 4 * width),
        "max_length": fields.integer("n_positions", 1024),
        "learned_positions": True,
        "norm": "layer",
        "norm_epsilon": fields.number("layer_norm_epsilon", 1e-5),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated": False,
        "query_scale": None if fields.flag("scale_attn_weights", True) else 1.0,
        "activation": fields.one_of("activation_function", _ACTIVATIONS, "gelu_new"),
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
    }


def write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "scale_attn_weights": config.query_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
    }
