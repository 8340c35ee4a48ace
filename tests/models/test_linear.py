"""models/linear.py: one product for every rank and kind of kernel, whose gradients sum over one axis of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.adapters import Adapted
from rlhf_jax.models.linear import plain_kernel, product
from rlhf_jax.models.quantisation import int8

KEY = jax.random.key(0)
PLAIN = jax.random.normal(KEY, (8, 6))
DOWN, UP = jax.random.normal(jax.random.fold_in(KEY, 1), (8, 2)), jax.random.normal(jax.random.fold_in(KEY, 2), (2, 6))
KERNELS = {
    "plain": PLAIN,
    "quantised": int8(PLAIN, block=4),
    "adapted": Adapted(PLAIN, DOWN, UP, jnp.float32(0.5)),
    "weight-decomposed": Adapted(PLAIN, DOWN, UP, jnp.float32(0.5), jnp.linspace(1.0, 2.0, 6)),
}


def contractions(jaxpr):
    """How many axes of the left side every product inside sums over."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield len(equation.params["dimension_numbers"][0][0])
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(parameter, "jaxpr"):
                yield from contractions(parameter.jaxpr)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (3, 5, 8), (2, 3, 5, 8), (0, 5, 8)])
def test_every_rank_is_the_product_of_its_rows(name, shape):
    x = jax.random.normal(jax.random.fold_in(KEY, 3), shape)
    kernel = np.asarray(plain_kernel(KERNELS[name]), np.float64)
    found, pull = jax.vjp(lambda x: product(x, KERNELS[name]), x)
    assert found.shape == (*shape[:-1], 6)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ kernel, rtol=1e-4, atol=1e-5)
    back = np.asarray(found, np.float64)
    np.testing.assert_allclose(pull(found)[0], back @ kernel.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "adapted", "weight-decomposed"])
def test_gradients_of_kernels_sum_over_one_axis(name):
    x = jax.random.normal(KEY, (3, 5, 8))
    loss = lambda kernel, x: jnp.sum(jnp.square(product(x, kernel)))
    found = list(contractions(jax.make_jaxpr(jax.grad(loss, (0, 1)))(KERNELS[name], x).jaxpr))
    assert len(found) >= 3  # forward, and a gradient of each side
    assert set(found) == {1}
