"""models/transformer.py against plain float64 attention; padding, cache, slices, dtype and devices change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention
from rlhf_jax.models.rotary import rotate, rotation
from rlhf_jax.models.transformer import Transformer, TransformerConfig, init_cache, output_table, positions
from rlhf_jax.training.sharding import make_mesh, shard, shard_batch

SIZES = {
    "vocab_size": 23,
    "width": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 24,
    "rope_theta": 100.0,
    "max_length": 32,
}
CONFIG = TransformerConfig(**SIZES)
MODEL = Transformer(CONFIG)
LENGTHS = (3, 7, 1, 5)
T = max(LENGTHS)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def random_params(config, seed=0):
    """Every parameter random and of size one, norms and biases included, so that none of them can be lost unseen."""
    ones = jnp.ones((1, 1), jnp.int32)
    shapes = jax.eval_shape(
        functools.partial(Transformer(config).init, method="initialise"), jax.random.key(0), ones, ones > 0
    )["params"]
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 1.0), x.dtype)
    return jax.tree.map(draw, shapes)


def rows(seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n) for n in lengths]


def padded(texts, side, length=T, garbage=0):
    """tokens [B, T], mask [B, T]; padding holds `garbage`, which may lie outside the vocabulary."""
    tokens = np.full((len(texts), length), garbage, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for i, text in enumerate(texts):
        place = slice(length - len(text), length) if side == "left" else slice(0, len(text))
        tokens[i, place], mask[i, place] = text, True
    return jnp.asarray(tokens), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=("first", "last", "tap"))
def run(params, inputs, mask, cache=None, **slices):
    return MODEL.apply({"params": params}, inputs, mask, cache=cache, **slices)


def real(states, mask):
    """The states of real tokens, row by row, without their padding."""
    return [np.asarray(x)[np.asarray(m)] for x, m in zip(states, mask, strict=True)]


def compare(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or CLOSE))


# The oracle: one row at a time, float64, loops over heads and positions.


def norm_of(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def turned(x, position, theta):
    """Complex multiplication: the pair (x_i, x_{i + d/2}) is turned by position · theta^(-2i/d)."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-2 * np.arange(half) / (2 * half)))
    return np.concatenate([z.real, z.imag])


def attention_of(x, p, config):
    length, dim = len(x), config.head_dim
    heads = {n: (x @ p[n]["kernel"]).reshape(length, -1, dim) for n in ("query", "key", "value")}
    out = np.zeros((length, config.num_heads, dim))
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        for t in range(length):
            query = turned(heads["query"][t, head], t, config.rope_theta)
            keys = [turned(heads["key"][s, shared], s, config.rope_theta) for s in range(t + 1)]
            scores = np.exp([float(query @ key) / np.sqrt(dim) for key in keys])
            out[t, head] = sum(w * heads["value"][s, shared] for s, w in enumerate(scores / scores.sum()))
    return out.reshape(length, -1) @ p["out"]["kernel"]


def states_of(text, params, config):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embed"]["embedding"][text]
    for index in range(config.num_layers):
        layer = p[f"layer_{index}"]
        x = x + attention_of(
            norm_of(x, layer["attention_norm"]["scale"], config.norm_epsilon), layer["attention"], config
        )
        h = norm_of(x, layer["mlp_norm"]["scale"], config.norm_epsilon)
        gate = h @ layer["mlp"]["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp"]["up"]["kernel"])) @ layer["mlp"]["down"]["kernel"]
    return norm_of(x, p["final_norm"]["scale"], config.norm_epsilon)


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_equal_the_float64_oracle(params, side):
    texts = rows()
    tokens, mask = padded(texts, side)
    expected = [states_of(text, params, CONFIG) for text in texts]
    compare(real(run(params, tokens, mask).hidden, mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_states_times_the_output_table(params, tied):
    config = TransformerConfig(**SIZES, tie_embeddings=tied)
    params = random_params(config)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, CONFIG.width))
    logits = Transformer(config).apply({"params": params}, hidden, method="logits")
    assert ("head" in params) is not tied
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.einsum("btd,vd->btv", hidden, output_table(params)), **CLOSE)
    table = "embed" if tied else "head"
    assert output_table(params) is params[table]["embedding"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("garbage", [CONFIG.vocab_size + 7, -1])
def test_padding_changes_neither_states_nor_gradients(params, side, garbage):
    texts = rows()
    reference = padded(texts, "right")
    other = padded(texts, side, T + 4, garbage)

    @jax.jit
    def value_and_gradient(params, tokens, mask):
        def loss(params):
            hidden = MODEL.apply({"params": params}, tokens, mask).hidden
            return jnp.sum(jnp.where(mask[..., None], jnp.sin(hidden), 0.0))

        return jax.value_and_grad(loss)(params)

    compare(real(run(params, *other).hidden, other[1]), real(run(params, *reference).hidden, reference[1]))
    expected, expected_gradient = value_and_gradient(params, *reference)
    value, gradient = value_and_gradient(params, *other)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_row_of_padding_alone_is_finite_and_leaves_its_neighbours_alone(params):
    tokens, mask = padded([*rows(), []], "left", garbage=10**6)

    def loss(params):
        hidden = MODEL.apply({"params": params}, tokens, mask).hidden
        return jnp.sum(jnp.sin(hidden))  # padding counts here on purpose

    assert np.isfinite(run(params, tokens, mask).hidden).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
    alone, kept = padded(rows(), "left")
    compare(real(run(params, tokens, mask).hidden[:-1], mask[:-1]), real(run(params, alone, kept).hidden, kept))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prefill", [0, 4])
def test_cached_decoding_equals_one_pass(params, side, prefill):
    """Many tokens at once, then one by one, into a cache with slots to spare; rows are ragged at either side."""
    tokens, mask = padded(rows(), side)
    whole = run(params, tokens, mask, tap=1)
    cache = init_cache(CONFIG, len(LENGTHS), T + 3)
    hidden, tapped = [], []
    for start, stop in [(0, prefill)] * (prefill > 0) + [(t, t + 1) for t in range(prefill, T)]:
        out = run(params, tokens[:, start:stop], mask[:, start:stop], cache, tap=1)
        cache = out.cache
        hidden.append(out.hidden)
        tapped.append(out.tap)
    assert int(cache.length) == T
    assert cache.capacity == T + 3
    np.testing.assert_array_equal(cache.mask[:, :T], mask)
    compare(real(jnp.concatenate(hidden, 1), mask), real(whole.hidden, mask))
    compare(real(jnp.concatenate(tapped, 1), mask), real(whole.tap, mask))


def test_slices_compose_to_the_whole(params):
    tokens, mask = padded(rows(), "left")
    whole = run(params, tokens, mask)
    for split in range(1, CONFIG.num_layers):
        lower = run(params, tokens, mask, last=split)
        upper = run(params, lower.hidden, mask, first=split)
        compare(real(upper.hidden, mask), real(whole.hidden, mask))
        tapped = run(params, tokens, mask, tap=split).tap
        compare(real(tapped, mask), real(lower.hidden, mask))
    assert whole.tap is None
    assert whole.cache is None
    end = CONFIG.num_layers
    entering = run(params, tokens, mask, last=end, tap=end)
    np.testing.assert_array_equal(entering.tap, entering.hidden)  # the final norm has not been applied


def test_slices_share_one_cache(params):
    """The lower layers fill their part of the cache, the upper ones theirs."""
    tokens, mask = padded(rows(), "left")
    whole = run(params, tokens, mask, init_cache(CONFIG, len(LENGTHS), T))
    lower = run(params, tokens, mask, init_cache(CONFIG, len(LENGTHS), T), last=1)
    assert not np.any(lower.cache.keys[1])
    upper = run(params, lower.hidden, mask, init_cache(CONFIG, len(LENGTHS), T), first=1)
    for index in range(CONFIG.num_layers):
        part = (lower if index == 0 else upper).cache
        slots = lambda x: real(jnp.swapaxes(x, 1, 2), mask)
        compare(slots(part.keys[index]), slots(whole.cache.keys[index]))
        compare(slots(part.values[index]), slots(whole.cache.values[index]))


def test_upper_layers_do_not_need_the_lower_parameters(params):
    tokens, mask = padded(rows(), "left")
    lower = run(params, tokens, mask, last=2)
    kept = {name: params[name] for name in ("layer_2", "final_norm")}
    np.testing.assert_array_equal(
        run(kept, lower.hidden, mask, first=2).hidden, run(params, lower.hidden, mask, first=2).hidden
    )


def test_rotation_is_by_its_definition_and_only_distances_count():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    place = rng.integers(0, 2000, (2, 5))
    out = np.asarray(rotate(jnp.asarray(x), rotation(jnp.asarray(place), 8, 10_000.0)))
    for index in np.ndindex(2, 5, 3):
        expected = turned(x[index].astype(np.float64), place[index[:2]], 10_000.0)
        np.testing.assert_allclose(out[index], expected, atol=1e-3)  # float32 angles of up to 2000 radians
    still = rotation(jnp.zeros((2, 5), jnp.int32), 8, 10_000.0)
    np.testing.assert_array_equal(rotate(jnp.asarray(x), still), x)
    near, far = (rotate(x, rotation(jnp.arange(5)[None] + shift, 8, 100.0)) for shift in (0, 9))
    score = lambda turned: jnp.einsum("btnd,bsnd->bnts", turned, turned)
    np.testing.assert_allclose(score(near), score(far), rtol=1e-4, atol=1e-4)


def test_positions_count_real_tokens():
    mask = jnp.array([[False, False, True, True], [True, False, True, False], [False] * 4])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_bfloat16_parameters_give_bfloat16_states_near_float32(params):
    tokens, mask = padded(rows(), "left")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hidden = run(narrow, tokens, mask).hidden
    assert hidden.dtype == jnp.bfloat16
    exact = run(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), tokens, mask).hidden
    assert float(jnp.max(jnp.abs(hidden - exact)) / jnp.max(jnp.abs(exact))) < 0.05
    cache = run(narrow, tokens, mask, init_cache(CONFIG, len(LENGTHS), T, dtype=jnp.bfloat16)).cache
    assert cache.keys[0].dtype == jnp.bfloat16
    logits = MODEL.apply({"params": narrow}, hidden, method="logits")
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 1, "fsdp": 2, "tensor": 2}], ids=str)
def test_sharded_equals_one_device(params, axes):
    tokens, mask = padded(rows(), "left")
    mesh = make_mesh(**axes)
    tokens_sharded, mask_sharded = shard_batch((tokens, mask), mesh)
    out = run(shard(params, mesh), tokens_sharded, mask_sharded).hidden
    assert len(out.sharding.device_set) == 4
    compare(real(out, mask), real(run(params, tokens, mask).hidden, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"), ({"head_dim": 7}, "head_dim=7 must be even")],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SIZES | change)


def test_layers_and_calls_of_the_same_shapes_share_one_trace(monkeypatch):
    traced = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **kwargs: traced.append(1) or attend(*args, **kwargs))
    own = TransformerConfig(**SIZES | {"mlp_width": 40})  # of no other test
    params, mask = random_params(own), jnp.ones((2, T), bool)

    @jax.jit
    def twice(params, tokens):
        read = lambda tokens: Transformer(own, kernel=None).apply({"params": params}, tokens, mask).hidden
        return read(tokens) + read(tokens + 1)

    traced.clear()
    twice.trace(params, jnp.ones((2, T), jnp.int32))
    assert len(traced) == 1
