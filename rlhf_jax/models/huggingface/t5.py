"""T5 and mT5: how they write their `config.json` and name their tensors."""

from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.encoder_decoder import EncoderDecoderConfig
from rlhf_jax.models.huggingface.fields import Fields
from rlhf_jax.models.huggingface.tensors import Path, Stored, linear, table, vector

__all__ = ["read_mt5", "read_t5", "t5_tensors", "write_t5"]

# feed_forward_proj -> (activation, gated)
_PROJECTIONS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
}
_WRITTEN = {value: name for name, value in _PROJECTIONS.items()}


def read_t5(fields: Fields) -> dict[str, Any]:
    """Fields of an `EncoderDecoderConfig` from the config of a T5."""
    return _read(fields, projection="relu", tied=True)


def read_mt5(fields: Fields) -> dict[str, Any]:
    """Fields of an `EncoderDecoderConfig` from the config of an mT5."""
    return _read(fields, projection="gated-gelu", tied=False)


def _read(fields: Fields, *, projection: str, tied: bool) -> dict[str, Any]:
    activation, gated = fields.one_of("feed_forward_proj", _PROJECTIONS, projection)
    shared = fields.flag("tie_word_embeddings", tied)
    layers = fields.integer("num_layers", 6)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "width": fields.integer("d_model"),
        "num_layers": fields.integer("num_decoder_layers", layers),
        "num_encoder_layers": layers,
        "num_heads": fields.integer("num_heads"),
        "head_dim": fields.integer("d_kv"),
        "mlp_width": fields.integer("d_ff"),
        "activation": activation,
        "gated": gated,
        "norm_epsilon": fields.number("layer_norm_epsilon", 1e-6),
        "relative_buckets": fields.integer("relative_attention_num_buckets", 32),
        "relative_distance": fields.integer("relative_attention_max_distance", 128),
        "tie_embeddings": shared,
        "scale_output": fields.flag("scale_decoder_outputs", shared),
    }


def write_t5(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Entries of a `config.json`."""
    if (config.activation, config.gated) not in _WRITTEN:
        raise UserError(f"activation {config.activation!r}, gated={config.gated} is none of {', '.join(_PROJECTIONS)}")
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_width,
        "feed_forward_proj": _WRITTEN[config.activation, config.gated],
        "layer_norm_epsilon": config.norm_epsilon,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_output,
        "is_encoder_decoder": True,
    }


def t5_tensors(config: EncoderDecoderConfig) -> list[Stored]:
    """Every stored tensor of a T5."""
    plan = [table("shared.weight", ("embed",), config.vocab_size, config.width)]
    for side, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_layers)):
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        plan.append(table(bias, (f"{side}_bias",), config.relative_buckets, config.num_heads))
        parts = ["attention", "mlp"] if side == "encoder" else ["attention", "cross", "mlp"]
        for index in range(layers):
            for position, part in enumerate(parts):
                name, path = f"{side}.block.{index}.layer.{position}", (f"{side}_{index}",)
                plan.append(vector(f"{name}.layer_norm.weight", (*path, f"{part}_norm", "scale"), config.width))
                plan += _mlp(config, name, (*path, part)) if part == "mlp" else _attention(config, name, (*path, part))
        norm = "encoder_norm" if side == "encoder" else "final_norm"
        plan.append(vector(f"{side}.final_layer_norm.weight", (norm, "scale"), config.width))
    if not config.tie_embeddings:
        plan.append(table("lm_head.weight", ("head",), config.vocab_size, config.width))
    return plan


def _attention(config: EncoderDecoderConfig, name: str, path: Path) -> list[Stored]:
    block = f"{name}.SelfAttention" if path[-1] == "attention" else f"{name}.EncDecAttention"
    inner = config.num_heads * config.head_dim
    plan = []
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        plan += linear(f"{block}.{theirs}", [((*path, ours), inner)], config.width)
    return plan + linear(f"{block}.o", [((*path, "out"), config.width)], inner)


def _mlp(config: EncoderDecoderConfig, name: str, path: Path) -> list[Stored]:
    block = f"{name}.DenseReluDense"
    names = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    plan = []
    for theirs, ours in names.items():
        plan += linear(f"{block}.{theirs}", [((*path, ours), config.mlp_width)], config.width)
    return plan + linear(f"{block}.wo", [((*path, "down"), config.width)], config.mlp_width)
