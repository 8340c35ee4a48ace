"""models/gguf.py on tiny files: every number arrives in its place, and broken files are explained."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.gguf import load_gguf, open_gguf, read_field
from rlhf_jax.models.transformer import Transformer, TransformerConfig

FIELDS = {
    "vocab_size": 40,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 64,
    "rope_theta": 5000.0,
    "norm_epsilon": 1e-5,
    "tie_embeddings": True,
    "max_length": 128,
}
F32, F16, Q8_0, Q4_1 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "Q8_0", "Q4_1"))


def stored_weights(seed=0, tied=True):
    """name -> [out, in], the rows of queries and keys in the order of the file."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (40, 32), "output_norm.weight": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}_norm.weight": (32,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_q.weight": (32, 32), f"blk.{i}.attn_output.weight": (32, 32)}
        shapes |= {f"blk.{i}.attn_{name}.weight": (16, 32) for name in "kv"}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (64, 32) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (32, 64)}
    if not tied:
        shapes["output.weight"] = (40, 32)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, weights, *, kind=F32, architecture="llama", leave_out=(), **extra):
    writer = gguf.GGUFWriter(path, architecture)
    header = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "vocab_size": 40,
    }
    for name, value in header.items():
        if name not in leave_out:
            writer.add_uint32(f"{architecture}.{name}", extra.pop(name.replace(".", "_"), value))
    writer.add_float32(f"{architecture}.rope.freq_base", 5000.0)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in extra.items():
        writer.add_string(f"{architecture}.{name.replace('__', '.')}", value)
    for name, weight in weights.items():
        if weight.ndim == 1 or kind is F32:
            writer.add_tensor(name, weight)
        elif kind is F16:
            writer.add_tensor(name, weight.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path):
    weights = stored_weights()
    return write(tmp_path / "tiny.gguf", weights), weights


def halves(rows, head_dim=8):
    """Row 2i of a head goes to i, row 2i + 1 to i + head_dim / 2."""
    out = np.empty_like(rows)
    for head in range(len(rows) // head_dim):
        for i in range(head_dim // 2):
            out[head * head_dim + i] = rows[head * head_dim + 2 * i]
            out[head * head_dim + i + head_dim // 2] = rows[head * head_dim + 2 * i + 1]
    return out


def test_header_becomes_the_config(model):
    fields, _ = load_gguf(model[0])
    assert fields == FIELDS
    assert TransformerConfig(**fields).head_dim == 8


def test_every_weight_arrives_in_its_place(model):
    path, weights = model
    _, params = load_gguf(path)
    np.testing.assert_array_equal(params["embed"]["embedding"], weights["token_embd.weight"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], weights["output_norm.weight"])
    for i in range(2):
        layer, get = params[f"layer_{i}"], lambda name, i=i: weights[f"blk.{i}.{name}.weight"]
        np.testing.assert_array_equal(layer["attention"]["query"]["kernel"], halves(get("attn_q")).T)
        np.testing.assert_array_equal(layer["attention"]["key"]["kernel"], halves(get("attn_k")).T)
        np.testing.assert_array_equal(layer["attention"]["value"]["kernel"], get("attn_v").T)
        np.testing.assert_array_equal(layer["attention"]["out"]["kernel"], get("attn_output").T)
        np.testing.assert_array_equal(layer["attention_norm"]["scale"], get("attn_norm"))
        np.testing.assert_array_equal(layer["mlp_norm"]["scale"], get("ffn_norm"))
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(layer["mlp"][name]["kernel"], get(f"ffn_{name}").T)
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))


def test_attention_scores_are_those_of_the_file(model):
    """Pairs rotated with the rows of the file = halves rotated with our rows, for every distance."""
    path, weights = model
    attention = load_gguf(path)[1]["layer_1"]["attention"]
    x = np.random.default_rng(1).normal(size=(2, 32))
    angles = 5000.0 ** (-np.arange(0, 8, 2) / 8)

    def rotate(vector, position, first, second):
        out = vector.copy()
        cos, sin = np.cos(position * angles), np.sin(position * angles)
        out[first] = vector[first] * cos - vector[second] * sin
        out[second] = vector[first] * sin + vector[second] * cos
        return out

    even, odd, low, high = np.arange(0, 8, 2), np.arange(1, 8, 2), np.arange(4), np.arange(4, 8)
    for position in (0, 1, 7):
        stored_q, stored_k = (weights[f"blk.1.attn_{name}.weight"] @ row for name, row in zip("qk", x, strict=True))
        ours_q, ours_k = (
            row @ attention[name]["kernel"] for name, row in zip(("query", "key"), x.astype(np.float64), strict=True)
        )
        for head in range(4):
            q, k = slice(head * 8, head * 8 + 8), slice(head // 2 * 8, head // 2 * 8 + 8)
            expected = rotate(stored_q[q], position, even, odd) @ rotate(stored_k[k], 0, even, odd)
            found = rotate(ours_q[q], position, low, high) @ rotate(ours_k[k], 0, low, high)
            np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_takes_the_parameters(tmp_path, tied):
    weights = stored_weights(tied=tied)
    fields, params = load_gguf(write(tmp_path / "tiny.gguf", weights))
    assert fields["tie_embeddings"] is tied
    model = Transformer(TransformerConfig(**fields))
    tokens, mask = jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    expected = jax.eval_shape(
        lambda key: model.init(key, tokens, mask, method=Transformer.initialise)["params"], jax.random.key(0)
    )
    found, wanted = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (params, expected))
    assert found == wanted
    if not tied:
        np.testing.assert_array_equal(params["head"]["embedding"], weights["output.weight"])


def decode_q4_1(raw):
    """[rows, bytes] -> float64, block by block: float16 scale, float16 minimum, 16 low then 16 high half bytes."""
    rows = []
    for row in raw:
        values = []
        for block in row.reshape(-1, 20):
            scale, minimum = (float(block[i : i + 2].view(np.float16)[0]) for i in (0, 2))
            halves_ = [int(b) & 15 for b in block[4:]] + [int(b) >> 4 for b in block[4:]]
            values += [scale * h + minimum for h in halves_]
        rows.append(values)
    return np.array(rows)


def test_quantised_tensors_are_dequantised(tmp_path):
    weights = stored_weights()
    up = weights["blk.0.ffn_up.weight"]
    for kind, step in ((F16, 1e-3), (Q8_0, 4 / 127), (Q4_1, 8 / 15)):
        _, params = load_gguf(write(tmp_path / f"{kind.name}.gguf", weights, kind=kind))
        found = params["layer_0"]["mlp"]["up"]["kernel"].T
        assert 0 < np.abs(found - up).max() < step
    np.testing.assert_allclose(found, decode_q4_1(gguf.quantize(up, Q4_1)), rtol=1e-6, atol=1e-6)


def test_an_opened_file_is_read_once_for_all(model):
    reader = open_gguf(model[0])
    assert read_field(reader, "general.architecture") == "llama"
    assert read_field(reader, "no.such.field", 7) == 7
    assert load_gguf(reader)[0] == load_gguf(str(model[0]))[0]


def without(name):
    return {key: value for key, value in stored_weights().items() if key != name}


BROKEN = {
    "missing tensor": (
        lambda p: write(p, without("blk.1.ffn_up.weight")),
        r"lacks tensors: blk\.1\.ffn_up\.weight \(20 expected, 19 found\); fetch",
    ),
    "many missing": (
        lambda p: write(p, {"token_embd.weight": stored_weights()["token_embd.weight"]}),
        r"lacks tensors: .* and 14 more \(20 expected, 1 found\)",
    ),
    "unexpected tensor": (
        lambda p: write(p, stored_weights() | {"blk.0.attn_q.bias": np.zeros(32, np.float32)}),
        r"has unexpected tensors: blk\.0\.attn_q\.bias",
    ),
    "wrong shape": (
        lambda p: write(p, stored_weights() | {"blk.0.attn_v.weight": np.zeros((8, 32), np.float32)}),
        r"blk\.0\.attn_v\.weight has shape \(8, 32\) where the header asks for \(16, 32\)",
    ),
    "other architecture": (
        lambda p: write(p, {}, architecture="mamba"),
        r"architecture 'mamba'; only llama can be loaded",
    ),
    "missing field": (
        lambda p: write(p, stored_weights(), leave_out=["feed_forward_length"]),
        r"lacks the header field llama\.feed_forward_length",
    ),
    "text for a number": (
        lambda p: write(p, stored_weights(), leave_out=["block_count"], block_count="two"),
        r"no single number in its header field llama\.block_count",
    ),
    "heads": (lambda p: write(p, stored_weights(), attention_head_count_kv=3), r"4 query heads for 3 key heads"),
    "scaled positions": (lambda p: write(p, stored_weights(), rope__scaling__type="yarn"), r"'yarn' scaling"),
    "not a model": (lambda p: p.write_bytes(b"PK\x03\x04 something else"), r"not a GGUF file: it begins with b'PK"),
    "empty": (lambda p: p.write_bytes(b""), r"not a GGUF file"),
    "absent": (lambda p: None, r"does not exist"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_explained_in_one_sentence(tmp_path, name):
    make, message = BROKEN[name]
    path = tmp_path / "broken.gguf"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_file_cut_short_anywhere_is_explained(model, tmp_path):
    content = model[0].read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [4, 8, 20, 24, 30, *np.linspace(40, len(content) - 1, 60).astype(int)]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut short or damaged"):
            load_gguf(path)


def test_an_unreadable_quantisation_is_explained(model, monkeypatch):
    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(UserError, match="cannot dequantise; update it"):
        load_gguf(model[0])


def test_a_missing_package_names_the_extra(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[quickstart\]'"):
        load_gguf(model[0])
