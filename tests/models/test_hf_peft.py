"""models/huggingface/peft.py: adapters there and back, and what is said of those that do not fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.adapters import apply_dora, apply_lora, init_dora, init_lora, lora_scale, rslora_scale
from rlhf_jax.models.huggingface import load_peft, params_from_tensors, save_peft, tensor_plan, tensors_from_params
from rlhf_jax.models.huggingface.safetensors import SafetensorsFile, write_safetensors
from rlhf_jax.models.huggingface.tensors import insert, param_shapes
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.training.state import path_matches

SIZES = {"vocab_size": 7, "width": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "mlp_width": 6}
LLAMA = TransformerConfig(**SIZES, family="llama")
PHI3 = TransformerConfig(**SIZES, family="phi3")
GPT2 = TransformerConfig(
    **SIZES | {"num_kv_heads": 2}, family="gpt2", learned_positions=True, norm="layer", qkv_bias=True, out_bias=True,
    mlp_bias=True, gated=False, activation="gelu_tanh",
)  # fmt: skip
ALL = path_matches("kernel$")


def base_of(config):
    params, rng = {}, np.random.default_rng(0)
    for path, shape in param_shapes(tensor_plan(config)).items():
        insert(params, path, rng.normal(size=shape).astype(np.float32))
    return params


def grown(adapters, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(size=x.shape) * 0.3, np.float32), adapters)


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


@pytest.mark.parametrize("config", [LLAMA, PHI3, GPT2], ids=lambda config: config.family)
@pytest.mark.parametrize("scale", [lora_scale, rslora_scale])
@pytest.mark.parametrize(
    "chosen", ["kernel$", r"layer_1/attention/(query|out)/kernel$", "query/kernel$", "(up|key)/kernel$"]
)
def test_lora_there_and_back_adds_the_same(config, scale, chosen, tmp_path):
    base = base_of(config)
    adapters = grown(init_lora(jax.random.key(0), base, path_matches(chosen), 2))
    save_peft(tmp_path, config, adapters, alpha=6.0, scale=scale, base="somewhere/model")
    found = load_peft(tmp_path, config)
    assert (found.alpha, found.scale, found.has_magnitudes) == (6.0, scale, False)
    close(
        apply_lora(base, found.adapters, alpha=found.alpha, scale=found.scale),
        apply_lora(base, adapters, alpha=6.0, scale=scale),
    )


@pytest.mark.parametrize("config", [LLAMA, PHI3, GPT2], ids=lambda config: config.family)
def test_dora_there_and_back_adds_the_same(config, tmp_path):
    base = base_of(config)
    adapters = grown(init_dora(jax.random.key(0), base, ALL, 2))
    save_peft(tmp_path, config, adapters, alpha=4.0)
    found = load_peft(tmp_path, config)
    assert found.has_magnitudes
    close(apply_dora(base, found.adapters, alpha=found.alpha), apply_dora(base, adapters, alpha=4.0))


def test_the_files_are_those_of_peft(tmp_path):
    """Names, [r, in] and [out, r], and settings; tensors of separate layers are bit-equal."""
    adapters = grown(
        init_lora(jax.random.key(0), base_of(LLAMA), path_matches("query/kernel$", "layer_0/mlp/up/kernel$"), 3)
    )
    save_peft(tmp_path, LLAMA, adapters, base="somewhere/model")
    file = SafetensorsFile(tmp_path / "adapter_model.safetensors")
    assert file.metadata == {"format": "pt"}
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    adapter = adapters["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(file[f"{name}A.weight"], adapter["down"].T)
    np.testing.assert_array_equal(file[f"{name}B.weight"], adapter["up"].T)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert entries["target_modules"] == ["model.layers.0.mlp.up_proj", "q_proj"]
    assert (entries["r"], entries["lora_alpha"], entries["task_type"]) == (3, 16, "CAUSAL_LM")
    assert (entries["rank_pattern"], entries["alpha_pattern"], entries["fan_in_fan_out"]) == ({}, {}, False)
    assert entries["base_model_name_or_path"] == "somewhere/model"


def test_a_fused_layer_with_one_down_stays_small(tmp_path):
    adapters = grown(init_lora(jax.random.key(0), base_of(GPT2), path_matches("(query|key|value)/kernel$"), 2))
    save_peft(tmp_path / "wide", GPT2, adapters)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert SafetensorsFile(tmp_path / "wide" / "adapter_model.safetensors").shape(name) == (6, 8)
    entries = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    assert (entries["r"], entries["fan_in_fan_out"], entries["target_modules"]) == (6, True, ["c_attn"])
    for layer in ("layer_0", "layer_1"):
        heads = adapters[layer]["attention"]
        for head in ("key", "value"):
            heads[head]["kernel"]["down"] = heads["query"]["kernel"]["down"]
    save_peft(tmp_path / "narrow", GPT2, adapters)
    assert SafetensorsFile(tmp_path / "narrow" / "adapter_model.safetensors").shape(name) == (2, 8)
    close(load_peft(tmp_path / "narrow", GPT2).adapters, adapters)


def test_patterns_of_rank_and_alpha_are_read(tmp_path):
    base = base_of(LLAMA)
    adapters = grown(init_lora(jax.random.key(0), base, path_matches("query/kernel$"), 2))
    save_peft(tmp_path, LLAMA, adapters, alpha=8.0)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"layers.1.self_attn.q_proj": 32.0}}))
    found = load_peft(tmp_path, LLAMA).adapters
    query = lambda tree, layer: tree[layer]["attention"]["query"]["kernel"]["up"]
    np.testing.assert_array_equal(query(found, "layer_0"), query(adapters, "layer_0"))
    np.testing.assert_allclose(query(found, "layer_1"), 4 * query(adapters, "layer_1"))


def edit(folder, entries=None, tensors=None):
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | (entries or {})))
    file = SafetensorsFile(weights)
    found = {name: np.array(file[name]) for name in file.keys()} | (tensors or {})  # noqa: SIM118
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    write_safetensors(weights, {name: (x.shape, x.dtype) for name, x in found.items()}, found.items())


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("entries", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "adapters of the type 'IA3', expected 'LORA'"),
        ({"bias": "all"}, {}, "bias is 'all', which the decoder does not have"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save is \['lm_head'\]"),
        ({"use_dora": True}, {}, "2 missing: model.layers.0.self_attn.q_proj/magnitude"),
        ({}, {f"{QUERY}.lora_B.weight": None}, "1 missing: model.layers.0.self_attn.q_proj/up"),
        ({}, {f"{QUERY}.lora_B.weight": np.ones((9, 2))}, r"q_proj/up is \[9, 2\], expected \[8, 2\]"),
        ({}, {f"{QUERY}.lora_A.weight": np.ones((8, 2))}, r"q_proj/down is \[8, 2\], expected \[8, 8\]"),
        (
            {},
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.ones((2, 8))},
            "does not have: base",
        ),
        ({}, {f"{QUERY}.bias": np.ones(8)}, "does not have: base_model.model.model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_adapters_that_do_not_fit_are_explained(entries, tensors, message, tmp_path):
    save_peft(tmp_path, LLAMA, init_lora(jax.random.key(0), base_of(LLAMA), path_matches("query/kernel$"), 2))
    edit(tmp_path, entries, tensors)
    with pytest.raises(UserError, match=message):
        load_peft(tmp_path, LLAMA)


def test_a_pickle_is_not_opened(tmp_path):
    save_peft(tmp_path, LLAMA, init_lora(jax.random.key(0), base_of(LLAMA), path_matches("query/kernel$"), 2))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="can run code when opened"):
        load_peft(tmp_path, LLAMA)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    sparse = dataclasses.replace(
        LLAMA, family="mixtral", num_experts=2, experts_per_token=1, expert_width=6, tie_embeddings=False
    )
    for config, chosen, init, message in (
        (sparse, "mlp/up/kernel$", init_lora, "PEFT has no layer for the adapters at layer_0/mlp/up/kernel"),
        (PHI3, "query/kernel$", init_dora, "qkv_proj is stored as one layer; DoRA adapts all of it or nothing"),
    ):
        adapters = init(jax.random.key(0), base_of(config), path_matches(chosen), 2)
        with pytest.raises(UserError, match=message):
            save_peft(tmp_path, config, adapters)
    adapters = init_lora(jax.random.key(0), base_of(LLAMA), ALL, 2)
    with pytest.raises(UserError, match="lora_scale and rslora_scale alone"):
        save_peft(tmp_path, LLAMA, adapters, scale=lambda alpha, rank: alpha)


def test_plans_are_their_own_inverse():
    """What the sums above rest on: parameters to stored tensors and back."""
    for config in (LLAMA, PHI3, GPT2):
        params = base_of(config)
        plan = tensor_plan(config)
        jax.tree.map(
            np.testing.assert_array_equal, params, params_from_tensors(plan, dict(tensors_from_params(plan, params)))
        )
