"""Every family beside its own implementation in transformers: logits, gradients, greedy texts, files in and out."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")
torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
safetensors = pytest.importorskip("safetensors", reason="the extra `parity` is not installed")

from rlhf_jax.generation.sampler import generate, greedy  # noqa: E402
from rlhf_jax.models.huggingface import load_pretrained, save_pretrained  # noqa: E402
from rlhf_jax.models.transformer import Transformer  # noqa: E402

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

LENGTHS = (3, 9, 1, 6)
T = max(LENGTHS)
VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = SHAPE | {"head_dim": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0]}

CASES = {
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "llama": ("Llama", SHAPE | {"rope_theta": 1000.0}),
    "llama-biased": ("Llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "Llama",
        SHAPE | {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    ),
    "llama-linear": ("Llama", SHAPE | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "smollm2": ("Llama", HEADS | {"tie_word_embeddings": True, "rope_theta": 100_000.0}),
    "mistral": ("Mistral", HEADS | {"sliding_window": 3}),
    "mistral-without-window": ("Mistral", SHAPE | {"sliding_window": None}),
    "qwen2": ("Qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", SHAPE | {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}),
    "qwen2-yarn": (
        "Qwen2",
        SHAPE | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "qwen3": ("Qwen3", HEADS),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", HEADS | {"sliding_window": 3, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", HEADS | {"sliding_window": 3, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24}),
    "gemma3-stretched": (
        "Gemma3",
        HEADS | {"sliding_window": 2, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": ("Phi3", SHAPE | {"sliding_window": 4}),
    "phi3-short": (
        "Phi3",
        SHAPE | {"hidden_size": 32, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16}
        | {"rope_scaling": LONG},
    ),
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        HEADS | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-normalised": (
        "Qwen3Moe",
        HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
    ),
}  # fmt: skip


def theirs_of(name):
    """A small model of transformers whose parameters are all random and none of them small."""
    family, entries = CASES[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    model_class = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    config = config_class(**json.loads(json.dumps(entries)))  # constructors write into what they are given
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1) * 0.5)
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(theirs, folder it was saved to, our config, our parameters)."""
    theirs = theirs_of(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder, *load_pretrained(folder)


def batch(side, seed=0):
    """tokens and mask of ragged rows, padded on one side; the last row is as long as the longest on purpose."""
    rng = np.random.default_rng(seed)
    tokens, mask = np.zeros((len(LENGTHS), T), np.int32), np.zeros((len(LENGTHS), T), bool)
    for row, length in enumerate(LENGTHS):
        place = slice(T - length, T) if side == "left" else slice(0, length)
        tokens[row, place], mask[row, place] = rng.integers(3, VOCABULARY, length), True
    return tokens, mask


def their_logits(model, tokens, mask):
    tokens, mask = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=tokens, attention_mask=mask, position_ids=place, use_cache=False).logits


@functools.partial(jax.jit, static_argnames="config")
def our_logits(config, params, tokens, mask):
    return _logits(config, params, tokens, mask)


def _logits(config, params, tokens, mask):
    model = Transformer(config)
    hidden = model.apply({"params": params}, tokens, mask).hidden
    return model.apply({"params": params}, hidden, method="logits")


@functools.partial(jax.jit, static_argnames="config")
def our_gradient(config, params, tokens, mask):
    def loss(params):
        log_probs = jax.nn.log_softmax(_logits(config, params, tokens, mask)[:, :-1])
        chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)[..., 0]
        counted = mask[:, 1:] & mask[:, :-1]
        return -jnp.sum(jnp.where(counted, chosen, 0.0)) / jnp.sum(counted)

    return jax.grad(loss)(params)


def test_logits(case):
    theirs, _, config, params = case
    for side in ("left", "right"):
        tokens, mask = batch(side)
        with torch.no_grad():
            expected = their_logits(theirs, tokens, mask).numpy()
        found = np.asarray(our_logits(config, params, tokens, mask))
        assert np.abs(expected[mask]).max() > 0.5  # the comparison is of numbers that matter
        np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients(case, side, tmp_path):
    """Their gradients take the way of the weights: written into the model, saved and loaded."""
    theirs, _, config, params = case
    tokens, mask = batch(side)
    theirs.zero_grad()
    log_probs = torch.log_softmax(their_logits(theirs, tokens, mask)[:, :-1], -1)
    chosen = log_probs.gather(-1, torch.tensor(tokens[:, 1:, None], dtype=torch.long))[..., 0]
    counted = torch.tensor(mask[:, 1:] & mask[:, :-1])
    (-(chosen * counted).sum() / counted.sum()).backward()
    kept = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(kept[name])
    _, expected = load_pretrained(tmp_path)
    found = our_gradient(config, params, tokens, mask)
    paths = jax.tree_util.tree_leaves_with_path(found)
    for (path, ours), gradient in zip(paths, jax.tree.leaves(expected), strict=True):
        size = min(max(float(jnp.abs(gradient).max()), 1e-3), 1.0)  # small gradients are compared by their own size
        np.testing.assert_allclose(ours / size, gradient / size, rtol=0, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_greedy_texts(case):
    theirs, _, config, params = case
    tokens, mask = batch("left", seed=1)
    theirs.generation_config.eos_token_id = None  # nothing ends a text, and no token is held back
    with torch.no_grad():
        texts = theirs.generate(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
        )
    run = functools.partial(generate, Transformer(config), length=6, end_token=-1, pad_token=0, choose=greedy)
    ours = jax.jit(run)(
        params, jnp.asarray(tokens), jnp.asarray(mask), jax.random.split(jax.random.key(0), len(tokens))
    )
    np.testing.assert_array_equal(ours.tokens, texts.numpy())


def stored(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("parts", [1, 3])
def test_there_and_back_is_bit_equal(case, tmp_path, parts):
    theirs, folder, config, params = case
    before = stored(folder)
    total = sum(tensor.numel() * 4 for tensor in before.values())
    save_pretrained(tmp_path, config, params, like=folder, max_file_bytes=total if parts == 1 else total // 3)
    after = stored(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) >= parts
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "generation_config.json").is_file()
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens, mask = batch("left")
    with torch.no_grad():
        assert torch.equal(their_logits(again, tokens, mask), their_logits(theirs, tokens, mask))
    assert again.config.bos_token_id == theirs.config.bos_token_id
    assert again.config.eos_token_id == theirs.config.eos_token_id
    config_again, params_again = load_pretrained(tmp_path)
    assert config_again == config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, params_again))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3-moe"])
def test_bfloat16_there_and_back_is_bit_equal(name, tmp_path):
    theirs = theirs_of(name).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "before")
    config, params = load_pretrained(tmp_path / "before")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    save_pretrained(tmp_path / "after", config, params)
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_rows_beyond_the_original_length_are_long(tmp_path):
    """LongRoPE takes its second list of factors; all rows of this batch are long, as theirs judges the whole batch."""
    theirs = theirs_of("phi3-short")
    theirs.save_pretrained(tmp_path)
    config, params = load_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (2, 20)).astype(np.int32)
    mask = np.ones_like(tokens, bool)
    with torch.no_grad():
        expected = their_logits(theirs, tokens, mask).numpy()
    np.testing.assert_allclose(our_logits(config, params, tokens, mask), expected, rtol=0, atol=2e-5)
