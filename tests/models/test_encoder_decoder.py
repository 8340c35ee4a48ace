"""models/encoder_decoder.py against plain float64 attention; padding, cache and slices change nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation.sampler import generate, greedy
from rlhf_jax.models.encoder_decoder import Decoder, EncoderDecoder, EncoderDecoderConfig
from rlhf_jax.models.relative import relative_bucket
from rlhf_jax.models.transformer import init_cache

CONFIG = EncoderDecoderConfig(
    vocab_size=19, width=8, num_layers=2, num_encoder_layers=1, num_heads=2, head_dim=4, mlp_width=12,
    relative_buckets=8, relative_distance=6, scale_output=True,
)  # fmt: skip
MODEL = EncoderDecoder(CONFIG)
SOURCES, TARGETS = (3, 6, 1), (4, 2, 5)
S, T = max(SOURCES), max(TARGETS)
CLOSE = {"rtol": 5e-5, "atol": 5e-5}


@pytest.fixture(scope="module")
def params():
    ones = jnp.ones((1, 1), jnp.int32)
    init = functools.partial(MODEL.init, method="initialise")
    shapes = jax.eval_shape(init, jax.random.key(0), ones, ones > 0, ones, ones > 0)["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 1.0), x.dtype)
    return jax.tree.map(draw, shapes)


def texts(lengths, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n) for n in lengths]


def padded(rows, side, length, garbage=0):
    tokens, mask = np.full((len(rows), length), garbage, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


def real(states, mask):
    return [np.asarray(x)[np.asarray(m)] for x, m in zip(states, mask, strict=True)]


def compare(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@functools.partial(jax.jit, static_argnames=("first", "last", "tap"))
def decode(params, inputs, mask, memory, cache=None, **slices):
    return MODEL.apply({"params": params}, inputs, mask, memory, cache=cache, method="decode", **slices)


@jax.jit
def remember(params, source, mask):
    return MODEL.apply({"params": params}, source, mask, method="memory")


# The oracle: one row at a time, float64, loops over heads and positions.


def bucket_of(distance, both_ways):
    buckets, offset = CONFIG.relative_buckets, 0
    if both_ways:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = -abs(distance)
    distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    grown = math.log(distance / exact) / math.log(CONFIG.relative_distance / exact) * (buckets - exact)
    return offset + min(exact + math.floor(grown + 1e-9), buckets - 1)


def norm_of(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + CONFIG.norm_epsilon) * scale


def attention_of(x, memory, p, bias, causal):
    """bias(key position - query position, head) is added to scores that are not scaled."""
    split = lambda y, name: (y @ p[name]["kernel"]).reshape(len(y), CONFIG.num_heads, CONFIG.head_dim)
    query, key, value = split(x, "query"), split(memory, "key"), split(memory, "value")
    out = np.zeros_like(query)
    for head in range(CONFIG.num_heads):
        for t in range(len(x)):
            seen = range(t + 1) if causal else range(len(memory))
            scores = np.exp([float(query[t, head] @ key[s, head]) + bias(s - t, head) for s in seen])
            out[t, head] = sum(w * value[s, head] for w, s in zip(scores / scores.sum(), seen, strict=True))
    return out.reshape(len(x), -1) @ p["out"]["kernel"]


def mlp_of(x, p):
    gate = x @ p["gate"]["kernel"]
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def states_of(source, target, params):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def run(x, side, layers, memory=None):
        table = p[f"{side}_bias"]["embedding"]
        bias = lambda distance, head: table[bucket_of(distance, side == "encoder"), head]
        for index in range(layers):
            layer = p[f"{side}_{index}"]
            h = norm_of(x, layer["attention_norm"]["scale"])
            x = x + attention_of(h, h, layer["attention"], bias, side == "decoder")
            if memory is not None:
                h = norm_of(x, layer["cross_norm"]["scale"])
                x = x + attention_of(h, memory, layer["cross"], lambda distance, head: 0.0, False)
            x = x + mlp_of(norm_of(x, layer["mlp_norm"]["scale"]), layer["mlp"])
        return x

    encoded = run(p["embed"]["embedding"][source], "encoder", CONFIG.num_encoder_layers)
    encoded = norm_of(encoded, p["encoder_norm"]["scale"])
    decoded = run(p["embed"]["embedding"][target], "decoder", CONFIG.num_layers, encoded)
    return norm_of(decoded, p["final_norm"]["scale"]) * CONFIG.width**-0.5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("garbage", [0, CONFIG.vocab_size + 3])
def test_states_equal_the_float64_oracle_under_any_padding(params, side, garbage):
    sources, targets = texts(SOURCES, 0), texts(TARGETS, 1)
    source, target = padded(sources, side, S, garbage), padded(targets, side, T, garbage)
    expected = [states_of(*pair, params) for pair in zip(sources, targets, strict=True)]
    found = jax.jit(lambda p, *x: MODEL.apply({"params": p}, *x).hidden)(params, *source, *target)
    compare(real(found, target[1]), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_one_pass(params, side):
    memory = remember(params, *padded(texts(SOURCES, 0), "left", S))
    tokens, mask = padded(texts(TARGETS, 1), side, T)
    whole = decode(params, tokens, mask, memory, tap=1)
    cache, hidden, tapped = init_cache(CONFIG, len(TARGETS), T + 2), [], []
    for start, stop in [(0, 2), *((t, t + 1) for t in range(2, T))]:
        out = decode(params, tokens[:, start:stop], mask[:, start:stop], memory, cache, tap=1)
        cache = out.cache
        hidden.append(out.hidden)
        tapped.append(out.tap)
    assert int(cache.length) == T
    compare(real(jnp.concatenate(hidden, 1), mask), real(whole.hidden, mask))
    compare(real(jnp.concatenate(tapped, 1), mask), real(whole.tap, mask))


def test_slices_compose_to_the_whole(params):
    memory = remember(params, *padded(texts(SOURCES, 0), "left", S))
    tokens, mask = padded(texts(TARGETS, 1), "right", T)
    lower = decode(params, tokens, mask, memory, last=1)
    upper = decode(params, lower.hidden, mask, memory, first=1)
    compare(real(upper.hidden, mask), real(decode(params, tokens, mask, memory).hidden, mask))


def test_an_empty_source_and_padding_stay_finite(params):
    source, source_mask = padded([*texts(SOURCES, 0)[:2], []], "left", S, garbage=10**6)
    target, target_mask = padded([*texts(TARGETS, 1)[:2], []], "right", T, garbage=-5)
    loss = lambda p: jnp.sum(jnp.sin(MODEL.apply({"params": p}, source, source_mask, target, target_mask).hidden))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_generation_equals_scoring(params):
    """Greedy texts and their log-probs are those of a forward pass over source and target."""
    source, source_mask = padded(texts(SOURCES, 0), "left", S)
    start = jnp.zeros((len(SOURCES), 1), jnp.int32)

    @jax.jit
    def run(params, source, source_mask):
        held = {"model": params, "memory": MODEL.apply({"params": params}, source, source_mask, method="memory")}
        keys = jax.random.split(jax.random.key(0), len(SOURCES))
        rollout = generate(
            Decoder(MODEL), held, start, start == 0, keys, length=4, end_token=-1, pad_token=0, choose=greedy
        )
        hidden = MODEL.apply({"params": params}, source, source_mask, rollout.tokens, rollout.mask).hidden[:, :-1]
        return rollout, jax.nn.log_softmax(MODEL.apply({"params": params}, hidden, method="logits"))

    rollout, log_probs = run(params, source, source_mask)
    np.testing.assert_array_equal(rollout.responses, jnp.argmax(log_probs, -1))
    np.testing.assert_allclose(rollout.log_probs, jnp.max(log_probs, -1), rtol=1e-4, atol=1e-4)


def test_buckets_are_near_exact_and_far_logarithmic():
    distance = np.arange(-30, 30)
    for both_ways in (True, False):
        found = relative_bucket(jnp.asarray(distance), buckets=8, longest=6, both_ways=both_ways)
        np.testing.assert_array_equal(found, [bucket_of(int(d), both_ways) for d in distance])


def test_packed_rows_are_refused():
    (source, source_mask), (target, target_mask) = (padded(texts(SOURCES, seed), "right", S) for seed in (0, 1))
    rows = (source, source_mask, target, target_mask)
    with pytest.raises(ValueError, match=r"takes no segments: a row is one source and one target; .* into buckets"):
        jax.eval_shape(functools.partial(MODEL.init, segments=source), jax.random.key(0), *rows)
