"""The published families: how each writes its `config.json`, and which tensors it stores.

A family is a way of filling a `TransformerConfig` and of naming tensors; none has code of its own in the decoder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.encoder_decoder import EncoderDecoderConfig
from rlhf_jax.models.huggingface import configs, t5
from rlhf_jax.models.huggingface.fields import Fields
from rlhf_jax.models.huggingface.layouts import decoder_tensors, fused_tensors, gpt2_tensors
from rlhf_jax.models.huggingface.tensors import Stored

__all__ = ["FAMILIES", "Family", "family_of", "read_config", "tensor_plan", "write_config"]

Config = TransformerConfig | EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture as it stands in files."""

    name: str  # model_type
    architecture: str  # the class that generates text
    read: Callable[[Fields], dict[str, Any]]  # config.json -> fields of our config
    write: Callable[[Any], dict[str, Any]]  # our config -> entries of config.json
    tensors: Callable[[Any], list[Stored]]  # our config -> what is stored
    prefix: str = "model."  # of tensors of the model without its output table; some files leave it out
    ignored: str = r"rotary_emb\.inv_freq$"  # stored tensors that are no parameters
    config_class: type = TransformerConfig


def read_config(values: Mapping[str, Any], source: str = "config.json") -> Config:
    """The decoder's shape from the entries of a `config.json`.

    Args:
      values: the entries.
      source: what to call them in an error.
    Raises:
      UserError: the architecture is unknown, an entry is missing or of the wrong kind, or the decoder lacks what it
        asks for.

    >>> entries = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6,
    ...            "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> read_config(entries).head_dim
    2
    """
    fields = Fields(values, source)
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{source} is of the architecture {name!r}, expected one of {', '.join(FAMILIES)}")
    fields.refuse("quantization_config")
    found = FAMILIES[name].read(fields)
    try:
        return FAMILIES[name].config_class(**found, family=name)
    except ValueError as error:
        raise UserError(f"{source} describes a decoder that cannot be: {error}") from None


def write_config(config: Config) -> dict[str, Any]:
    """The entries of a `config.json` that `read_config` turns into the same config.

    Raises: UserError if no family has all that the config asks for.
    """
    family = family_of(config)
    return {"model_type": family.name, "architectures": [family.architecture]} | family.write(config)


def family_of(config: Config) -> Family:
    """The family named by the config, or the first that can express it.

    Raises: UserError with the fields that the closest family would lose.
    """
    if config.family is not None and config.family not in FAMILIES:
        raise UserError(f"family is {config.family!r}, expected one of {', '.join(FAMILIES)}")
    candidates = list(FAMILIES.values()) if config.family is None else [FAMILIES[config.family]]
    lost = {family.name: _lost(family, config) for family in candidates}
    closest = min(lost, key=lambda name: len(lost[name]))
    if lost[closest]:
        raise UserError(f"no family can express this decoder; {closest} would change {'; '.join(lost[closest])}")
    return FAMILIES[closest]


def _lost(family: Family, config: Config) -> list[str]:
    """What would be another if the config were written as this family and read again."""
    if not isinstance(config, family.config_class):
        return [f"{type(config).__name__} to {family.config_class.__name__}"]
    wanted = dataclasses.replace(config, family=family.name)
    if isinstance(wanted, TransformerConfig):
        windows = configs.cycle_of([wanted.window(layer) for layer in range(wanted.num_layers)])
        wanted = dataclasses.replace(wanted, windows=windows)
    try:
        values = family.write(config)
        found = family.config_class(**family.read(Fields(values, family.name)), family=family.name)
    except (UserError, ValueError, KeyError) as error:
        return [str(error)]
    names = [field.name for field in dataclasses.fields(wanted)]
    pairs = ((name, getattr(wanted, name), getattr(found, name)) for name in names)
    return [f"{name} from {ours!r} to {theirs!r}" for name, ours, theirs in pairs if ours != theirs]


def tensor_plan(config: Config) -> list[Stored]:
    """Every tensor of such a model, in the order of its layers."""
    family = family_of(config)
    return family.tensors(dataclasses.replace(config, family=family.name))


# In the order in which a config without a family tries them: the plainer ones first.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", configs.read_llama, configs.write_llama, decoder_tensors),
        Family("mistral", "MistralForCausalLM", configs.read_mistral, configs.write_mistral, decoder_tensors),
        Family("qwen2", "Qwen2ForCausalLM", configs.read_qwen2, configs.write_qwen, decoder_tensors),
        Family("qwen3", "Qwen3ForCausalLM", configs.read_qwen3, configs.write_qwen3, decoder_tensors),
        Family("gemma", "GemmaForCausalLM", configs.read_gemma, configs.write_gemma, decoder_tensors),
        Family("gemma2", "Gemma2ForCausalLM", configs.read_gemma2, configs.write_gemma2, decoder_tensors),
        Family("gemma3_text", "Gemma3ForCausalLM", configs.read_gemma3, configs.write_gemma2, decoder_tensors),
        Family("phi3", "Phi3ForCausalLM", configs.read_phi3, configs.write_phi3, fused_tensors),
        Family("mixtral", "MixtralForCausalLM", configs.read_mixtral, configs.write_mixtral, decoder_tensors),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", configs.read_qwen3_moe, configs.write_qwen3_moe, decoder_tensors),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            configs.read_gpt2,
            configs.write_gpt2,
            gpt2_tensors,
            prefix="transformer.",
            ignored=r"\.attn\.(bias|masked_bias)$",
        ),
        *(
            Family(
                name,
                f"{name.upper()}ForConditionalGeneration",
                read,
                t5.write_t5,
                t5.t5_tensors,
                prefix="",
                ignored=r"^(encoder|decoder)\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$",
                config_class=EncoderDecoderConfig,
            )
            for name, read in (("t5", t5.read_t5), ("mt5", t5.read_mt5))
        ),
    )
}
