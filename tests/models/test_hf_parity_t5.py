"""T5 beside its own implementation in transformers: buckets, logits, gradients, greedy texts, files in and out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")
torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")

from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

from rlhf_jax.generation.sampler import generate, greedy  # noqa: E402
from rlhf_jax.models.encoder_decoder import Decoder, EncoderDecoder  # noqa: E402
from rlhf_jax.models.huggingface import load_pretrained, save_pretrained  # noqa: E402
from rlhf_jax.models.huggingface.safetensors import SafetensorsFile  # noqa: E402
from rlhf_jax.models.relative import relative_bucket  # noqa: E402

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SHAPE = {
    "vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CASES = {
    "t5": ("T5", {"feed_forward_proj": "relu"}),
    "t5-1.1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
S, T = 11, 6


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(theirs, folder it was saved to, our config, our parameters)."""
    family, entries = CASES[request.param]
    config = getattr(transformers, f"{family}Config")(**SHAPE, **entries)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    if "tie_word_embeddings" in entries:  # published models of this kind have an output table of their own
        theirs.config.tie_word_embeddings = False
        theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 16))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            scale = 1.0 if "shared" in name else scale
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1) * 0.5)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder, *load_pretrained(folder)


def rows(side, lengths, width, seed):
    rng = np.random.default_rng(seed)
    tokens, mask = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        tokens[row, place], mask[row, place] = rng.integers(2, 61, length), True
    return tokens, mask


def batch(side):
    source, source_mask = rows(side, (4, 11, 1, 7), S, 0)
    target, target_mask = rows("right", (6, 2, 4, 1), T, 1)
    target[:, 0] = 0  # the start token
    return source, source_mask, target, target_mask


def their_logits(model, source, source_mask, target, target_mask):
    as_long = lambda x: torch.tensor(x, dtype=torch.long)
    return model(
        input_ids=as_long(source),
        attention_mask=as_long(source_mask),
        decoder_input_ids=as_long(target),
        decoder_attention_mask=as_long(target_mask),
        use_cache=False,
    ).logits


def our_logits(config, params, *texts):
    model = EncoderDecoder(config)
    hidden = model.apply({"params": params}, *texts).hidden
    return model.apply({"params": params}, hidden, method="logits")


def test_buckets():
    distance = np.arange(-300, 300)
    for both_ways in (True, False):
        for buckets, longest in ((32, 128), (8, 12)):
            expected = T5Attention._relative_position_bucket(torch.tensor(distance), both_ways, buckets, longest)
            found = relative_bucket(jnp.asarray(distance), buckets=buckets, longest=longest, both_ways=both_ways)
            np.testing.assert_array_equal(found, expected.numpy())


def test_logits(case):
    theirs, _, config, params = case
    run = jax.jit(functools.partial(our_logits, config))
    for side in ("left", "right"):
        texts = batch(side)
        with torch.no_grad():
            expected = their_logits(theirs, *texts).numpy()
        kept = texts[3]
        assert np.abs(expected[kept]).max() > 0.5
        np.testing.assert_allclose(np.asarray(run(params, *texts))[kept], expected[kept], rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients(case, side, tmp_path):
    """Their gradients take the way of the weights: written into the model, saved and loaded."""
    theirs, _, config, params = case
    texts = batch(side)
    theirs.zero_grad()
    kept = torch.tensor(texts[3])
    (torch.sin(their_logits(theirs, *texts))[kept]).sum().backward()
    before = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(before[name])
    _, expected = load_pretrained(tmp_path)
    loss = lambda p: jnp.sum(jnp.where(texts[3][..., None], jnp.sin(our_logits(config, p, *texts)), 0.0))
    found = jax.jit(jax.grad(loss))(params)
    paths = jax.tree_util.tree_leaves_with_path(found)
    for (path, ours), gradient in zip(paths, jax.tree.leaves(expected), strict=True):
        size = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(ours / size, gradient / size, rtol=0, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_greedy_texts(case):
    theirs, _, config, params = case
    source, source_mask, _, _ = batch("left")
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        texts = theirs.generate(
            input_ids=torch.tensor(source, dtype=torch.long),
            attention_mask=torch.tensor(source_mask, dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
        )
    model = EncoderDecoder(config)

    @jax.jit
    def run(params):
        memory = model.apply({"params": params}, source, source_mask, method="memory")
        start = jnp.zeros((len(source), 1), jnp.int32)
        keys = jax.random.split(jax.random.key(0), len(source))
        held = {"model": params, "memory": memory}
        return generate(
            Decoder(model), held, start, start == 0, keys, length=6, end_token=-1, pad_token=0, choose=greedy
        )

    np.testing.assert_array_equal(run(params).tokens, texts.numpy())


def test_there_and_back_is_bit_equal(case, tmp_path):
    theirs, folder, config, params = case
    save_pretrained(tmp_path, config, params, like=folder)
    before, after = (SafetensorsFile(path / "model.safetensors") for path in (folder, tmp_path))
    assert sorted(before.keys()) == sorted(after.keys())
    assert all(np.array_equal(before[name], after[name]) for name in before.keys())  # noqa: SIM118
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(their_logits(again, *batch("left")), their_logits(theirs, *batch("left")))
    assert load_pretrained(tmp_path)[0] == config
