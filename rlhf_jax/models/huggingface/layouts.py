"""Names and shapes of stored tensors, per way of writing them; almost all families write like Llama."""

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.huggingface.tensors import Path, Stored, linear, table, vector

__all__ = ["decoder_tensors", "fused_tensors", "gpt2_tensors"]


def decoder_tensors(config: TransformerConfig) -> list[Stored]:
    """One tensor per kernel, named as in Llama; experts as in Mixtral or Qwen3-MoE."""
    return _decoder(config, fused=False)


def fused_tensors(config: TransformerConfig) -> list[Stored]:
    """Queries, keys and values in one tensor, gate and up in another, as in Phi-3."""
    return _decoder(config, fused=True)


def _decoder(config: TransformerConfig, *, fused: bool) -> list[Stored]:
    plan = [table("model.embed_tokens.weight", ("embed",), config.vocab_size, config.width)]
    for index in range(config.num_layers):
        name, path = f"model.layers.{index}", (f"layer_{index}",)
        plan += _norms(config, name, path)
        plan += _attention(config, f"{name}.self_attn", (*path, "attention"), fused=fused)
        if config.is_sparse(index):
            plan += _experts(config, name, (*path, "mlp"))
        else:
            plan += _mlp(config, f"{name}.mlp", (*path, "mlp"), fused=fused)
    plan.append(vector("model.norm.weight", ("final_norm", "scale"), config.width))
    if not config.tie_embeddings:
        plan.append(table("lm_head.weight", ("head",), config.vocab_size, config.width))
    return plan


def _norms(config: TransformerConfig, name: str, path: Path) -> list[Stored]:
    names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norms:
        names |= {
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    return [vector(f"{name}.{theirs}.weight", (*path, ours, "scale"), config.width) for theirs, ours in names.items()]


def _attention(config: TransformerConfig, name: str, path: Path, *, fused: bool) -> list[Stored]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    heads = {"q_proj": ("query", queries), "k_proj": ("key", keys), "v_proj": ("value", keys)}
    outputs = {theirs: ((*path, ours), size) for theirs, (ours, size) in heads.items()}
    if fused:
        plan = linear(f"{name}.qkv_proj", list(outputs.values()), config.width, bias=config.qkv_bias)
    else:
        plan = []
        for theirs, output in outputs.items():
            plan += linear(f"{name}.{theirs}", [output], config.width, bias=config.qkv_bias)
    plan += linear(f"{name}.o_proj", [((*path, "out"), config.width)], queries, bias=config.out_bias)
    if config.query_key_norm:
        for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            plan.append(vector(f"{name}.{theirs}.weight", (*path, ours, "scale"), config.head_dim))
    return plan


def _mlp(config: TransformerConfig, name: str, path: Path, *, fused: bool) -> list[Stored]:
    gate, up = (((*path, ours), config.mlp_width) for ours in ("gate", "up"))
    if fused:
        plan = linear(f"{name}.gate_up_proj", [gate, up], config.width, bias=config.mlp_bias)
    else:
        plan = linear(f"{name}.gate_proj", [gate], config.width, bias=config.mlp_bias)
        plan += linear(f"{name}.up_proj", [up], config.width, bias=config.mlp_bias)
    return plan + linear(f"{name}.down_proj", [((*path, "down"), config.width)], config.mlp_width, bias=config.mlp_bias)


def _experts(config: TransformerConfig, name: str, path: Path) -> list[Stored]:
    mixtral = config.family == "mixtral"
    block = f"{name}.block_sparse_moe" if mixtral else f"{name}.mlp"
    gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    plan = linear(f"{block}.gate", [((*path, "router"), config.num_experts)], config.width)
    for expert in range(config.num_experts):
        part = f"{block}.experts.{expert}"
        plan += linear(f"{part}.{gate}", [((*path, "gate"), config.expert_width)], config.width, expert=expert)
        plan += linear(f"{part}.{up}", [((*path, "up"), config.expert_width)], config.width, expert=expert)
        plan += linear(f"{part}.{down}", [((*path, "down"), config.width)], config.expert_width, expert=expert)
    return plan


def gpt2_tensors(config: TransformerConfig) -> list[Stored]:
    """GPT-2: kernels stored [in, out], queries, keys and values in one."""
    plan = [
        table("transformer.wte.weight", ("embed",), config.vocab_size, config.width),
        table("transformer.wpe.weight", ("position_embed",), config.max_length, config.width),
    ]
    for index in range(config.num_layers):
        name, path = f"transformer.h.{index}", (f"layer_{index}",)
        plan += _layer_norm(config, f"{name}.ln_1", (*path, "attention_norm"))
        heads = [((*path, "attention", ours), config.width) for ours in ("query", "key", "value")]
        plan += linear(f"{name}.attn.c_attn", heads, config.width, bias=True, turned=False)
        out = [((*path, "attention", "out"), config.width)]
        plan += linear(f"{name}.attn.c_proj", out, config.width, bias=True, turned=False)
        plan += _layer_norm(config, f"{name}.ln_2", (*path, "mlp_norm"))
        up, down = (*path, "mlp", "up"), (*path, "mlp", "down")
        plan += linear(f"{name}.mlp.c_fc", [(up, config.mlp_width)], config.width, bias=True, turned=False)
        plan += linear(f"{name}.mlp.c_proj", [(down, config.width)], config.mlp_width, bias=True, turned=False)
    plan += _layer_norm(config, "transformer.ln_f", ("final_norm",))
    if not config.tie_embeddings:
        plan.append(table("lm_head.weight", ("head",), config.vocab_size, config.width))
    return plan


def _layer_norm(config: TransformerConfig, name: str, path: Path) -> list[Stored]:
    return [
        vector(f"{name}.{theirs}", (*path, ours), config.width)
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ]
