"""attention.py against plain float64 loops: grouped heads, windows, segments, soft caps, biases, dtypes, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import attend, visible
from rlhf_jax.models.transformer import written

B, T, N, K, H = 2, 5, 4, 2, 3


def attention_in_loops(query, key, value, allowed, scale, cap, bias):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(*query.shape[:3]):
        shared = n // (query.shape[2] // key.shape[1])
        weights = {}
        for s in np.flatnonzero(allowed[b, t]):
            score = scale * float(query[b, t, n] @ key[b, shared, s])
            score = score if cap is None else cap * np.tanh(score / cap)
            weights[s] = np.exp(score + (0.0 if bias is None else float(bias[b, n, t, s])))
        for s, weight in weights.items():
            out[b, t, n] += weight / sum(weights.values()) * value[b, shared, s]
    return out


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    mask = jnp.array([[False, True, True, True, True], [True, True, True, True, False]])
    return normal(B, T, N, H), normal(B, K, T, H), normal(B, K, T, H), normal(B, N, T, T), mask


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("segments", [None, [[0, 1, 1, 2, 2], [1, 1, 1, 2, 0]]])
@pytest.mark.parametrize(("cap", "biased"), [(None, False), (2.0, False), (None, True), (2.0, True)])
def test_attention_equals_loops(window, segments, cap, biased):
    query, key, value, bias, mask = inputs()
    span = written(mask, None, None if segments is None else jnp.array(segments))
    allowed = visible(*span, window)
    bias = bias if biased else None
    out = attend(query, key, value, allowed, scale=0.7, cap=cap, bias=bias)
    expected = attention_in_loops(query, key, value, np.asarray(allowed), 0.7, cap, bias)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    far = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    real = np.asarray(mask)[:, :, None] & np.asarray(mask)[:, None]
    seen = np.asarray(allowed) & real
    assert not seen[:, np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]].any()
    if window:
        assert not seen[:, far >= window].any()
    if segments:
        same = np.array(segments)[:, :, None] == np.array(segments)[:, None]
        assert not (seen & ~same).any()
        assert (same & np.tril(np.ones((T, T), bool)) & real & (far < (window or T)) == seen).all()


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_equal_those_of_the_softmax_written_plainly(cap):
    query, key, value, bias, mask = inputs()
    allowed = visible(*written(mask, None), None)

    def plainly(query, key, value, bias):
        repeated = lambda x: jnp.repeat(x, N // K, axis=1)
        scores = 0.7 * jnp.einsum("btnh,bnsh->bnts", query, repeated(key))
        scores = (scores if cap is None else cap * jnp.tanh(scores / cap)) + bias
        weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bnsh->btnh", weights, repeated(value))

    library = lambda query, key, value, bias: attend(query, key, value, allowed, scale=0.7, cap=cap, bias=bias)
    gradient = lambda f: jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2, 3))(query, key, value, bias)
    for a, b in zip(gradient(library), gradient(plainly), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("segments", [None, [[0, 1, 1, 2, 2], [1, 1, 1, 2, 0]]])
def test_values_and_gradients_equal_those_of_jax(window, segments):
    query, key, value, bias, mask = inputs()
    allowed = visible(*written(mask, None, None if segments is None else jnp.array(segments)), window)

    def theirs(query, key, value, bias):
        beside = lambda x: jnp.swapaxes(x, 1, 2)
        return jax.nn.dot_product_attention(query, beside(key), beside(value), bias, allowed[:, None], scale=0.7)

    ours = lambda query, key, value, bias: attend(query, key, value, allowed, scale=0.7, bias=bias)
    both = lambda f: jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 3))(query, key, value, bias)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.jit(both, static_argnums=0)(ours), jax.jit(both, static_argnums=0)(theirs))


def test_one_program_lowers_for_every_platform():
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs()[:3]]
    allowed = visible(*written(inputs()[-1], None), 2)
    loss = lambda *x: jnp.sum(attend(*x, allowed, scale=0.7, cap=5.0).astype(jnp.float32))
    lowered = jax.jit(jax.grad(loss)).trace(*shapes).lower(lowering_platforms=("cpu", "cuda", "rocm", "tpu"))
    assert "stablehlo.dot_general" in lowered.as_text()


def test_scores_of_any_size_stay_finite():
    query, key, value, _, mask = inputs()
    allowed = visible(*written(mask, None), None)
    loss = lambda query: jnp.sum(attend(1e4 * query, key, value, allowed, scale=1.0))
    out, gradient = jax.value_and_grad(loss)(query)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()


def test_half_precision_rounds_once():
    narrow = [x.astype(jnp.bfloat16) for x in inputs()[:3]]
    allowed = visible(*written(inputs()[-1], None), None)
    out = attend(*narrow, allowed, scale=0.7)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in narrow), allowed, scale=0.7)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.02, atol=0.02)
