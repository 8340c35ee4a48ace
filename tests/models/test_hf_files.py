"""models/huggingface on small folders: every family there and back, shardings, and what is said of broken ones."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from rlhf_jax.models.huggingface import (
    FAMILIES,
    load_pretrained,
    params_from_tensors,
    read_config,
    save_pretrained,
    tensor_plan,
    tensors_from_params,
    write_config,
)
from rlhf_jax.models.huggingface.safetensors import SafetensorsFile, write_safetensors
from rlhf_jax.models.huggingface.tensors import insert, param_shapes
from rlhf_jax.models.quantisation import int8, quantise
from rlhf_jax.models.rotary import LinearScaling, Llama3Scaling, LongScaling, YarnScaling
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.training.sharding import make_mesh, shardings

SIZES = {
    "vocab_size": 13,
    "width": 8,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "mlp_width": 6,
}
LLAMA = TransformerConfig(**SIZES, family="llama")
EXPERTS = {"num_experts": 3, "experts_per_token": 2}
GEMMA = {"norm_offset": 1.0, "embedding_scale": 8**0.5, "activation": "gelu_tanh"}
GEMMA2 = GEMMA | {"post_norms": True, "query_scale": 24**-0.5, "windows": (4, None)}
CONFIGS = {
    "llama": {"tie_embeddings": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "mistral": {"windows": (5,), "tie_embeddings": False, "rope_scaling": LinearScaling(factor=2.0)},
    "qwen2": {"qkv_bias": True, "windows": (None, 4, 4), "rope_scaling": YarnScaling(factor=4.0, original_length=32)},
    "qwen3": {"query_key_norm": True, "rope_theta": 1e6},
    "gemma": GEMMA,
    "gemma2": GEMMA2 | {"attention_soft_cap": 50.0, "logit_soft_cap": 30.0},
    "gemma3_text": GEMMA2
    | {"query_key_norm": True, "local_rope_theta": 1e4, "rope_theta": 1e6, "rope_scaling": LinearScaling(factor=8.0)},
    "phi3": {"rope_scaling": LongScaling(short=(1.0, 2.0), long=(3.0, 4.0), original_length=64, amplitude=1.25)},
    "mixtral": EXPERTS | {"expert_width": 6, "tie_embeddings": False},
    "qwen3_moe": EXPERTS
    | {"expert_width": 5, "query_key_norm": True, "dense_layers": (1,), "normalise_expert_weights": False},
    "gpt2": {
        "num_kv_heads": 2, "learned_positions": True, "norm": "layer", "qkv_bias": True, "out_bias": True,
        "mlp_bias": True, "gated": False, "activation": "gelu_tanh",
    },
}  # fmt: skip


SEQUENCES = {"num_encoder_layers": 2, "relative_buckets": 8, "relative_distance": 16}
ENCODER_DECODERS = {
    "t5": SEQUENCES | {"activation": "relu", "gated": False, "tie_embeddings": True, "scale_output": True},
    "mt5": SEQUENCES,
}
EVERY = [*CONFIGS, *ENCODER_DECODERS]


def config_of(name):
    if name in ENCODER_DECODERS:
        sizes = {key: value for key, value in SIZES.items() if key != "num_kv_heads"}
        return EncoderDecoderConfig(**sizes | ENCODER_DECODERS[name], family=name)
    return TransformerConfig(**SIZES | CONFIGS[name], family=name, max_length=128)


def params_of(config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    params = {}
    for path, shape in param_shapes(tensor_plan(config)).items():
        insert(params, path, rng.normal(size=shape).astype(dtype))
    return params


def equal(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right))


def stored(folder):
    files = map(SafetensorsFile, folder.glob("*.safetensors"))
    return {name: file[name] for file in files for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path, LLAMA, params_of(LLAMA))
    return tmp_path


def edit_weights(folder, change):
    tensors = stored(folder)
    tensors = change({name: np.array(tensor) for name, tensor in tensors.items()})
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(folder / "model.safetensors", shapes, tensors.items())


def edit_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_every_family_is_covered():
    assert set(EVERY) == FAMILIES.keys()


@pytest.mark.parametrize("name", EVERY)
def test_plan_names_every_parameter_of_the_decoder(name):
    config = config_of(name)
    ones = jnp.ones((1, 2), jnp.int32)
    model, texts = (EncoderDecoder, 2) if name in ENCODER_DECODERS else (Transformer, 1)
    init = functools.partial(model(config).init, method="initialise")
    shapes = jax.eval_shape(init, jax.random.key(0), *(ones, ones > 0) * texts)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    assert {tuple(e.key for e in path): leaf.shape for path, leaf in leaves} == param_shapes(tensor_plan(config))


@pytest.mark.parametrize("name", EVERY)
def test_there_and_back(name, tmp_path):
    config = config_of(name)
    assert read_config(write_config(config)) == config
    params = params_of(config)
    save_pretrained(tmp_path, config, params)
    found, loaded = load_pretrained(tmp_path)
    assert found == config
    assert equal(params, loaded)
    assert isinstance(jax.tree.leaves(loaded)[0], jax.Array)
    again = params_from_tensors(tensor_plan(config), dict(tensors_from_params(tensor_plan(config), params)))
    assert equal(params, again)


@pytest.mark.parametrize("name", EVERY)
def test_a_config_without_family_finds_one_that_computes_the_same(name):
    config = dataclasses.replace(config_of(name), family=None)
    found = read_config(write_config(config))
    assert dataclasses.replace(found, family=None) == config
    assert type(found) is type(config)


def test_windows_that_say_the_same_are_the_same_family():
    config = TransformerConfig(**SIZES, windows=(4, 4), family="mistral")
    assert read_config(write_config(config)).windows == (4,)


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (TransformerConfig(**SIZES, norm="layer"), "norm from 'layer' to 'rms'"),
        (TransformerConfig(**SIZES, family="qwen2"), "qkv_bias from False to True"),
        (TransformerConfig(**SIZES, windows=(2, 3), family="mistral"), r"windows from \(2, 3\) to \(2,\)"),
        (TransformerConfig(**SIZES, family="gpt3"), "family is 'gpt3', expected one of llama, mistral"),
    ],
)
def test_a_decoder_that_no_family_can_express_is_refused(config, lost, tmp_path):
    with pytest.raises(UserError, match=lost):
        save_pretrained(tmp_path, config, {})


# Rotary settings, old and new.

ENTRIES = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALING = Llama3Scaling(factor=8.0, original_length=32)


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
        {"rope_theta": 1.0, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
    ],
)
def test_older_and_newer_rotary_settings_say_the_same(entries):
    config = read_config(ENTRIES | entries)
    assert (config.rope_theta, config.rope_scaling) == (5e5, SCALING)


def test_gemma3_has_two_bases_in_either_form():
    gemma = ENTRIES | {"model_type": "gemma3_text", "head_dim": 4}
    linear = {"rope_type": "linear", "factor": 8.0}
    nested = {
        "full_attention": linear | {"rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    new = read_config(gemma | {"rope_parameters": nested})
    old = read_config(gemma | {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": linear})
    assert new == old
    assert (new.rope_theta, new.local_rope_theta, new.rope_scaling) == (2e6, 3e4, LinearScaling(factor=8.0))
    plain = read_config(gemma)
    assert (plain.rope_theta, plain.local_rope_theta) == (1e6, 1e4)


def test_absent_entries_have_the_published_defaults():
    llama = read_config(ENTRIES)
    assert (llama.num_kv_heads, llama.head_dim, llama.tie_embeddings, llama.norm_epsilon) == (2, 4, False, 1e-6)
    assert read_config(ENTRIES | {"model_type": "mistral"}).windows == (4096,)
    assert read_config(ENTRIES | {"model_type": "mistral", "sliding_window": None}).windows == (None,)
    assert read_config(ENTRIES | {"model_type": "qwen2", "sliding_window": 4}).windows == (None,)
    gemma2 = read_config(ENTRIES | {"model_type": "gemma2"})
    assert (gemma2.attention_soft_cap, gemma2.logit_soft_cap, gemma2.windows) == (50.0, 30.0, (4096, None))
    capless = read_config(ENTRIES | {"model_type": "gemma2", "final_logit_softcapping": None})
    assert capless.logit_soft_cap is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "mamba"}, "is of the architecture 'mamba', expected one of llama, mistral"),
        ({"model_type": None}, "is of the architecture None, expected one of llama"),
        ({"hidden_size": None}, "lacks hidden_size .found: hidden_size, intermediate_size"),
        ({"hidden_size": "8"}, "hidden_size must be a positive whole number, found '8'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, found 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number, found 'small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, found 1"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', expected one of silu, swish"),
        ({"num_key_value_heads": 3}, "describes a decoder that cannot be: num_kv_heads=3 must divide num_heads=2"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', expected one of default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*, which the decoder does not have"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "must name 2 layers"),
    ],
)
def test_a_config_that_cannot_be_read_is_explained(entries, message):
    with pytest.raises(UserError, match=message):
        read_config(ENTRIES | entries)


# Folders.


def test_weights_arrive_sharded_and_in_the_dtype_asked_for(folder):
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    _, plain = load_pretrained(folder)
    _, placed = load_pretrained(folder, sharding=lambda tree: shardings(tree, mesh), dtype=jnp.bfloat16)
    query = placed["layer_0"]["attention"]["query"]["kernel"]
    assert query.sharding == shardings(plain, mesh)["layer_0"]["attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(4, 4)}
    assert equal(jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain), placed)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[2])
    _, there = load_pretrained(folder, sharding=one)
    assert {leaf.sharding for leaf in jax.tree.leaves(there)} == {one}
    save_pretrained(folder / "again", LLAMA, placed, dtype=np.float32)
    _, back = load_pretrained(folder / "again")
    assert equal(jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), plain), back)


def test_experts_arrive_sharded(tmp_path):
    config = dataclasses.replace(config_of("mixtral"), num_experts=4)
    params = params_of(config)
    save_pretrained(tmp_path, config, params)
    mesh = make_mesh(data=1, fsdp=4)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, placed = load_pretrained(
        tmp_path, sharding=lambda tree: jax.tree.map(lambda x: place if len(x.shape) == 3 else everywhere, tree)
    )
    assert equal(params, placed)
    assert placed["layer_0"]["mlp"]["down"]["kernel"].addressable_shards[1].data.shape == (1, 6, 8)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weights_stay_narrow(tmp_path, dtype):
    params = params_of(LLAMA, dtype)
    save_pretrained(tmp_path, LLAMA, params)
    assert equal(params, load_pretrained(tmp_path)[1])
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name


def test_large_weights_are_spread_and_old_ones_replaced(folder):
    params = params_of(LLAMA, seed=1)
    save_pretrained(folder, LLAMA, params, max_file_bytes=1000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert "model.safetensors" not in files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert max((folder / name).stat().st_size for name in files) < 3000
    assert equal(params, load_pretrained(folder)[1])
    save_pretrained(folder, LLAMA, params)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(folder.glob(".*"))


def test_saving_into_the_folder_that_was_loaded(folder):
    config, params = load_pretrained(folder)
    changed = jax.tree.map(lambda x: x + 1, params)
    save_pretrained(folder, config, changed, like=folder)
    assert equal(params, params_of(LLAMA))
    assert equal(changed, load_pretrained(folder)[1])


def test_like_takes_over_what_stands_beside_the_weights(folder, tmp_path):
    edit_config(folder, bos_token_id=1, eos_token_id=[2, 3], hidden_act="silu", rope_theta=7.0)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"no")
    config, params = load_pretrained(folder)
    assert config.rope_theta != 7.0  # the newer entry counts
    wider = dataclasses.replace(config, norm_epsilon=1e-3)
    save_pretrained(tmp_path / "new", wider, params, like=folder)
    entries = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (entries["bos_token_id"], entries["eos_token_id"], entries["rms_norm_eps"]) == (1, [2, 3], 1e-3)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert load_pretrained(tmp_path / "new")[0] == wider


def test_harmless_differences_are_accepted(folder):
    extra = {
        "lm_head.weight": np.zeros((13, 8), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2),
    }
    edit_weights(folder, lambda tensors: tensors | extra)
    assert equal(params_of(LLAMA), load_pretrained(folder)[1])
    edit_weights(folder, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    assert equal(params_of(LLAMA), load_pretrained(folder)[1])


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), "29 tensors expected, 28 found.*1 missing: model.norm.weight"),
        (
            lambda tensors: {f"x.{name}": value for name, value in tensors.items()},
            "29 missing: model.embed_tokens.weight, .* and 21 more; 29 unexpected: x.model",
        ),
        (lambda tensors: tensors | {"score.weight": np.ones((1, 8))}, "1 unexpected: score.weight"),
        (
            lambda tensors: tensors | {"model.norm.weight": np.ones(9, np.float32)},
            r"1 of another shape: model.norm.weight is \[9\], expected \[8\]",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_listed(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


def test_parameters_that_are_not_those_of_the_config_are_listed(tmp_path):
    params = params_of(LLAMA)
    del params["final_norm"]
    params["head"] = {"embedding": np.ones((13, 8))}
    params["layer_0"]["mlp"]["up"]["kernel"] = np.ones((8, 7))
    with pytest.raises(UserError) as error:
        save_pretrained(tmp_path / "new", LLAMA, params)
    assert "1 missing: final_norm/scale; 1 unexpected: head/embedding" in str(error.value)
    assert "layer_0/mlp/up/kernel is [8, 7], expected [8, 6]" in str(error.value)
    assert not (tmp_path / "new").exists()


def test_parameters_in_few_bits_are_not_stored(tmp_path):
    params = quantise(params_of(LLAMA), lambda path: path.endswith("up/kernel"), to=functools.partial(int8, block=8))
    with pytest.raises(UserError, match=r"give dequantise\(params\) or apply_lora"):
        save_pretrained(tmp_path / "new", LLAMA, params)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path, path.stat().st_size - 1), r"cut short: [\d,]+ bytes, expected [\d,]+"),
        (lambda path: cut(path, 100), "cut short or not a safetensors file: its header would be"),
        (lambda path: cut(path, 3), "cut short: 3 bytes, expected a header"),
        (lambda path: path.write_bytes(b"<html>not found</html>" * 9), "its header would be"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "longer than its header says"),
        (lambda path: path.write_bytes((5).to_bytes(8, "little") + b"hello"), "its header does not read"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"X32"', 1)),
            "number format 'X32', expected one of F64, F32",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1)),
            r"model.embed_tokens.weight, float64 \[13, 8\], should take 832 bytes, its header says 416",
        ),
    ],
)
def test_a_damaged_file_is_noticed_before_it_is_read(folder, damage, message):
    damage(folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


def test_missing_files_and_pickles_are_explained(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.unlink()
    with pytest.raises(UserError, match=r"has no weights: expected model.safetensors or .* found config.json"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"weights in pytorch_model.bin, which can run code when opened and is not"):
        load_pretrained(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lists 2 files, of which model-00001-of-00002.safetensors, model-00002"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json does not read as JSON"):
        load_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"config.json does not exist \(found: no such folder\)"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            {"model": {"vocab": {"a": 0, "b": 13}}},
            "ids up to 13, the embedding has 13 rows .0 to 12.: 'b' = 13 lie",
        ),
        ({"model": {"vocab": [["a", -1.0]] * 14}}, "'a' = 13"),
        (
            {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": n, "content": f"<{n}>"} for n in range(12, 20)]},
            "ids up to 19.* '<17>' = 17 and 2 more lie beyond it",
        ),
    ],
)
def test_a_tokenizer_beyond_the_embedding_is_refused(folder, tokenizer, message):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)
    assert load_pretrained(folder, check_tokenizer=False)[0] == LLAMA


def test_a_tokenizer_within_the_embedding_is_accepted(folder):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 12}}, "added_tokens": []}))
    assert load_pretrained(folder)[0] == LLAMA


def test_the_format_is_by_its_description(tmp_path):
    """Eight bytes of length, the header, the numbers; a header of odd length leaves them out of line."""
    header = (
        b'{"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}'
    )
    for padding in range(3):
        text = header + b" " * padding
        numbers = np.array([-2, 300], "<i2").tobytes() + np.array(1.5, "<f4").tobytes()
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
        file = SafetensorsFile(path)
        assert file.keys() == ["a", "b"]
        assert file["a"].tolist() == [-2, 300]
        assert file["b"].shape == ()
        assert float(file["b"]) == 1.5


def test_a_file_that_is_not_written_whole_does_not_appear(tmp_path):
    path = tmp_path / "model.safetensors"
    shapes = {"a": ((2,), np.dtype(np.float32)), "b": ((1,), np.dtype(np.float32))}
    for tensors in ([("a", np.ones(2, np.float32))], [("a", np.ones(3, np.float32))], [("b", np.ones(1, np.float32))]):
        with pytest.raises(ValueError, match="tensor"):
            write_safetensors(path, shapes, tensors)
    assert not list(tmp_path.iterdir())
