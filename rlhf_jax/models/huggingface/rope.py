"""Rotary settings of a `config.json`: `rope_theta` beside `rope_scaling`, or the newer `rope_parameters` for both."""

import math
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.huggingface.fields import Fields
from rlhf_jax.models.rotary import LinearScaling, Llama3Scaling, LongScaling, RotaryScaling, YarnScaling

__all__ = ["read_rope", "write_rope"]

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


def read_rope(fields: Fields, *, theta: float = 10_000.0, local_theta: float | None = None) -> dict[str, Any]:
    """The rotary fields of a `TransformerConfig`.

    Args:
      fields: the config.
      theta: the base if the config names none.
      local_theta: the base of layers with a window, for families that have a second one.
    """
    merged = _merged(fields, "full_attention")
    found: dict[str, Any] = {
        "rope_theta": merged.number("rope_theta", theta),
        "rope_scaling": _scaling(merged),
        "rotary_fraction": merged.number("partial_rotary_factor", 1.0),
    }
    if local_theta is not None:
        local = _merged(fields, "sliding_attention") if _is_nested(fields) else fields
        name = "rope_theta" if _is_nested(fields) else "rope_local_base_freq"
        found["local_rope_theta"] = local.number(name, local_theta)
        if _is_nested(fields):
            local.refuse("rope_type", "default")
    return found


def _is_nested(fields: Fields) -> bool:
    return "full_attention" in fields.get("rope_parameters", {})


def _merged(fields: Fields, layer_type: str) -> Fields:
    """Rotary settings from wherever they stand: the newer place first."""
    legacy = fields.get("rope_scaling", {})
    newer = fields.get("rope_parameters", {})
    if _is_nested(fields):
        newer = newer.get(layer_type) or {}
        legacy = legacy if layer_type == "full_attention" else {}
    names = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "original_max_position_embeddings")
    if _is_nested(fields) and layer_type != "full_attention":
        names = ()
    around = {name: fields.get(name) for name in names}
    merged = {name: value for name, value in around.items() if value is not None} | legacy | newer
    if around.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = around["original_max_position_embeddings"]
    return Fields(merged, f"{fields.source} (rotary settings)")


def _scaling(fields: Fields) -> RotaryScaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind in ("su", "yarn") and fields.get("short_factor") is not None:
        kind = "longrope"  # as early Phi-3 files call it
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=fields.number("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=fields.number("factor"),
                low_frequency=fields.number("low_freq_factor"),
                high_frequency=fields.number("high_freq_factor"),
                original_length=_original_length(fields),
            )
        case "yarn":
            return YarnScaling(
                factor=fields.number("factor"),
                original_length=_original_length(fields),
                fast=fields.number("beta_fast", 32.0),
                slow=fields.number("beta_slow", 1.0),
                amplitude=_yarn_amplitude(fields),
                whole_bounds=fields.flag("truncate", True),
            )
        case "longrope":
            return LongScaling(
                short=tuple(map(float, fields.get("short_factor", ()))),
                long=tuple(map(float, fields.get("long_factor", ()))),
                original_length=_original_length(fields),
                amplitude=_long_amplitude(fields),
            )
    raise UserError(f"{fields.source}: rope_type is {kind!r}, expected one of {', '.join(SCALINGS)}")


def _original_length(fields: Fields) -> int:
    return fields.integer("original_max_position_embeddings", fields.integer("max_position_embeddings", 2048))


def _yarn_amplitude(fields: Fields) -> float | None:
    if fields.get("attention_factor") is not None:
        return fields.number("attention_factor")
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        grown = lambda scale: 0.1 * scale * math.log(fields.number("factor")) + 1.0
        return grown(fields.number("mscale")) / grown(fields.number("mscale_all_dim"))
    return None


def _long_amplitude(fields: Fields) -> float:
    original = _original_length(fields)
    stretched = fields.number("factor", fields.integer("max_position_embeddings", original) / original)
    default = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
    return fields.number("attention_factor", default)


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """Entries of a `config.json` in both the older and the newer way of writing them."""
    scaling = _written(config.rope_scaling)
    partial = {} if config.rotary_fraction == 1.0 else {"partial_rotary_factor": config.rotary_fraction}
    whole = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling | partial
    entries: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": whole,
    } | partial
    if config.local_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        entries["rope_local_base_freq"] = config.local_rope_theta
        entries["rope_parameters"] = {"full_attention": whole, "sliding_attention": local}
    return entries


def _written(scaling: RotaryScaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {}
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency,
                "high_freq_factor": scaling.high_frequency,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YarnScaling():
            entries = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.fast,
                "beta_slow": scaling.slow,
                "truncate": scaling.whole_bounds,
            }
            return entries if scaling.amplitude is None else entries | {"attention_factor": scaling.amplitude}
        case LongScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                "original_max_position_embeddings": scaling.original_length,
                "attention_factor": scaling.amplitude,
            }
