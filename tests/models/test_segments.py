"""Several texts packed into one row: every one gets the numbers that it gets in a row of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import masking
from rlhf_jax.logprobs import token_log_probs
from rlhf_jax.models.rotary import LongScaling
from rlhf_jax.models.transformer import Transformer, TransformerConfig, init_cache, positions

SIZES = {
    "vocab_size": 23,
    "width": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 24,
    "rope_theta": 100.0,
    "max_length": 16,
}
LONG = LongScaling(short=(1.0,) * 4, long=(1.0, 2.0, 3.0, 4.0), original_length=5, amplitude=1.1)
GPT2 = {"learned_positions": True, "norm": "layer", "activation": "gelu_tanh", "gated": False, "mlp_bias": True}
GEMMA2 = {
    "windows": (3, None),
    "attention_soft_cap": 5.0,
    "logit_soft_cap": 4.0,
    "post_norms": True,
    "norm_offset": 1.0,
    "embedding_scale": 4.0,
}
FAMILIES = {
    "llama": {},
    "gpt2": GPT2 | {"num_kv_heads": 4, "qkv_bias": True, "out_bias": True},
    "gemma2": GEMMA2,
    "experts with long positions": {"rope_scaling": LONG, "windows": (4,)}
    | {"num_experts": 4, "experts_per_token": 2, "expert_width": 8},
}
# Five texts in two rows, padding before, between and behind them. Positions that count from the row's start, a window
# that reaches into the text before, or a text judged long by its neighbour would each change some number.
ROWS = [[0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 3], [1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0]]


def packed_and_alone():
    """(tokens, mask, segments) packed; (tokens, mask) one text per row; places [N, L, 2] of the texts' tokens."""
    rng = np.random.default_rng(0)
    segments = np.array(ROWS, np.int32)
    tokens = np.where(segments > 0, rng.integers(0, 23, segments.shape), 10**6)
    texts = [np.argwhere((segments == s) & (np.arange(2) == row)[:, None]) for row in range(2) for s in (1, 2, 3)]
    texts = [text for text in texts if len(text)]
    alone = np.full((len(texts), 6), -1)
    mask = np.arange(6) < np.array([len(text) for text in texts])[:, None]
    places = np.zeros((len(texts), 6, 2), int)
    for i, text in enumerate(texts):
        places[i, : len(text)] = text
        alone[i, : len(text)] = tokens[tuple(text.T)]
    packed = (jnp.asarray(tokens, jnp.int32), jnp.asarray(segments > 0), jnp.asarray(segments))
    return packed, (jnp.asarray(alone, jnp.int32), jnp.asarray(mask)), places


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family):
    """Log-probs of every token after a text's first one, and the gradient of their weighted sum, to 1e-6."""
    model = Transformer(TransformerConfig(**SIZES | FAMILIES[family]))
    (tokens, mask, segments), (alone, alone_mask), places = packed_and_alone()
    params = model.init(jax.random.key(0), alone, alone_mask, method="initialise")["params"]
    params["embed"]["embedding"] *= 15.0  # log-probs that differ from token to token
    at = lambda x: x[places[..., 0], places[..., 1]]
    targets = jnp.where(alone_mask, alone, 0)[:, 1:]
    counts = alone_mask[:, 1:]
    weights = jnp.cos(jnp.arange(counts.size, dtype=jnp.float32)).reshape(counts.shape)

    def weighted(params, is_packed):
        if is_packed:
            hidden = at(model.apply({"params": params}, tokens, mask, segments=segments).hidden)
        else:
            hidden = model.apply({"params": params}, alone, alone_mask).hidden
        logits = model.apply({"params": params}, hidden[:, :-1], method="logits")
        (log_probs,) = masking.zero_outside(counts, token_log_probs(logits, targets))
        return masking.token_mean(weights * log_probs, counts), log_probs

    run = jax.jit(jax.value_and_grad(weighted, has_aux=True), static_argnames="is_packed")
    (_, expected), expected_gradient = run(params, is_packed=False)
    (_, log_probs), gradient = run(params, is_packed=True)
    assert np.ptp(np.asarray(expected)[np.asarray(counts)]) > 1.0
    np.testing.assert_allclose(log_probs, expected, rtol=1e-6, atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, gradient, expected_gradient)


def test_one_segment_per_row_is_no_segments():
    model = Transformer(TransformerConfig(**SIZES | GEMMA2))
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    mask = jnp.arange(5)[None] < jnp.array([[5], [3]])
    params = model.init(jax.random.key(0), tokens, mask, method="initialise")["params"]
    plain = model.apply({"params": params}, tokens, mask).hidden
    one = model.apply({"params": params}, tokens, mask, segments=mask.astype(jnp.int32)).hidden
    np.testing.assert_array_equal(np.asarray(one)[np.asarray(mask)], np.asarray(plain)[np.asarray(mask)])


def test_positions_begin_anew_with_each_text():
    segments = jnp.array([[0, 1, 1, 2, 0, 3, 3], [1, 1, 1, 1, 2, 2, 2]])
    mask = jnp.array([[False, True, True, True, False, True, True], [True, False, True, True, False, True, True]])
    assert positions(mask, segments).tolist() == [[0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 2, 0, 0, 1]]
    np.testing.assert_array_equal(positions(mask, jnp.ones_like(segments)), positions(mask))


def test_what_segments_cannot_be():
    model = Transformer(TransformerConfig(**SIZES))
    tokens = jnp.zeros((2, 3), jnp.int32)
    call = functools.partial(jax.eval_shape, functools.partial(model.init, method="__call__"), jax.random.key(0))
    with pytest.raises(ValueError, match=r"segments must have the shape of the mask, \(2, 3\), got \(2, 4\)"):
        call(tokens, tokens == 0, segments=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="segments and a cache exclude each other"):
        call(tokens, tokens == 0, segments=tokens, cache=init_cache(model.config, 2, 5))
