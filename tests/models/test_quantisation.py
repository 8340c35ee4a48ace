"""models/quantisation.py and linear.py: nearest levels, few bytes, one kernel at a time, and errors that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.models.linear import Dense, product
from rlhf_jax.models.quantisation import NF4_LEVELS, Quantised, dequantise, int8, nf4, quantise, stored_bytes
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.training.state import path_matches

INT8_LEVELS = np.arange(-127, 128) / 127
PUBLISHED = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
WAYS = {int8: INT8_LEVELS, nf4: np.array(PUBLISHED)}


def test_levels_are_the_published_ones():
    np.testing.assert_allclose(NF4_LEVELS, PUBLISHED, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@given(
    seed=st.integers(0, 1000), shape=st.sampled_from([(8, 3), (4, 1), (2, 8, 2)]), size=st.sampled_from([1e-6, 1, 1e6])
)
def test_every_number_goes_to_the_nearest_level_of_its_block(way, seed, shape, size):
    weight = (np.random.default_rng(seed).normal(size=shape) * size).astype(np.float32)
    found = np.asarray(way(jnp.asarray(weight), block=4).dequantised())
    for index in np.ndindex(*shape):
        *lead, row, column = index
        block = weight[(*lead, slice(row // 4 * 4, row // 4 * 4 + 4), column)]
        scale = float(np.abs(block).max())
        best = np.abs(WAYS[way] * scale - float(weight[index])).min()
        assert abs(float(found[index]) - float(weight[index])) <= best + 2e-6 * scale


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_zeros_and_extremes_stay_exact(way):
    weight = jnp.array([[0.0, 3.0], [0.0, -3.0], [0.0, 0.0], [0.0, 3.0]])
    np.testing.assert_array_equal(way(weight, block=4).dequantised(), weight)


@pytest.mark.parametrize(("way", "bits", "error"), [(int8, 8.5, 0.007), (nf4, 4.5, 0.1)])
def test_bytes_and_accuracy_of_normal_weights(way, bits, error):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(512, 64)), jnp.float32)
    found = way(weight)
    assert stored_bytes(found) * 8 == bits * weight.size
    assert (found.shape, found.ndim) == (weight.shape, 2)
    relative = float(jnp.linalg.norm(found.dequantised() - weight) / jnp.linalg.norm(weight))
    assert 0.7 * error < relative < error


def test_the_dtype_of_the_kernel_comes_back():
    assert int8(jnp.ones((2, 1), jnp.bfloat16), block=2).dequantised().dtype == jnp.bfloat16


def test_dense_is_that_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    ours, theirs = Dense(4), nn.Dense(4)
    params = theirs.init(jax.random.key(1), x)
    for path, leaf in jax.tree.leaves_with_path(ours.init(jax.random.key(1), x)):
        np.testing.assert_array_equal(leaf, dict(jax.tree.leaves_with_path(params))[path])
    for dtype in (jnp.float32, jnp.bfloat16):
        narrow = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype) + 1, params)
        expected = theirs.apply(narrow, x.astype(dtype))
        found = ours.apply(narrow, x.astype(dtype))
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"kernel must have the shape \(6, 4\), got \(5, 4\)"):
        ours.apply(params, jnp.ones((2, 6)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("columns", [1, 2, 4, 15])  # in 1, 2, 4 and 3 parts
def test_products_and_their_gradients_are_those_of_the_dequantised_kernel(way, columns):
    kernel = way(jax.random.normal(jax.random.key(0), (6, columns)), block=2)
    x = jax.random.normal(jax.random.key(1), (2, 3, 6))
    both = lambda kernel: jax.value_and_grad(lambda x: jnp.sum(jnp.sin(product(x, kernel))))(x)
    for a, b in zip(both(kernel), both(kernel.dequantised()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_quantised_model_is_near_its_base_and_holds_one_kernel_at_a_time():
    config = TransformerConfig(
        vocab_size=16, width=64, num_layers=6, num_heads=4, num_kv_heads=4, head_dim=16, mlp_width=256
    )
    model = Transformer(config)
    tokens = jnp.arange(8)[None]
    params = model.init(jax.random.key(0), tokens, tokens >= 0, method="initialise")["params"]
    kernels = path_matches("kernel$")
    small = quantise(params, kernels, to=nf4)
    assert stored_bytes(small) < 0.2 * stored_bytes(params)
    run = jax.jit(lambda params: model.apply({"params": params}, tokens, tokens >= 0).hidden)
    exact = run(params)
    error = lambda x: float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))
    tiny = quantise(params, kernels, to=int8)
    near = run(tiny)

    def independent_errors(quantised):
        """Relative errors of the kernels, added in squares: what independent roundings would do one after another."""
        pairs = zip(jax.tree.leaves(dequantise(quantised)), jax.tree.leaves(params), strict=True)
        return sum(float(jnp.sum((a - b) ** 2) / jnp.sum(b**2)) for a, b in pairs) ** 0.5

    assert error(near) < independent_errors(tiny)
    assert error(near) < error(run(small)) < independent_errors(small)
    np.testing.assert_allclose(run(small), run(dequantise(small)), rtol=1e-4, atol=1e-4)

    def gradient(params):
        x = jnp.zeros((1, 8, 64))
        return jax.grad(lambda x: jnp.sum(model.apply({"params": params}, x, tokens >= 0, first=1).hidden))(x)

    temporary = lambda tree: jax.jit(gradient).lower(tree).compile().memory_analysis().temp_size_in_bytes
    one_layer = 4 * sum(x.size for x in jax.tree.leaves(params["layer_0"]))
    assert temporary(small) < temporary(params) + one_layer  # and not + 5 layers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: int8(jnp.ones((6, 2)), block=4), "block=4 must divide the 6 rows"),
        (lambda: nf4(jnp.ones((6, 2)), block=3), "block=3 must be even"),
        (lambda: quantise({"bias": jnp.ones(2)}, lambda path: True), "bias has the shape .2,.; only kernels"),
        (lambda: quantise({"bias": jnp.ones(2)}, lambda path: False), "predicate chooses none of the 1 parameters"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_quantised_leaf_passes_through_jit_and_tree_map():
    leaf = jax.jit(functools.partial(nf4, block=2))(jnp.ones((4, 2)))
    assert isinstance(leaf, Quantised)
    assert jax.tree.map(lambda x: x, leaf).shape == (4, 2)
