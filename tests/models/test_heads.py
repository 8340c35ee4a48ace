"""models/heads.py against float64 loops; start, padding, dtypes, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses import categorical_value
from rlhf_jax.models.heads import CategoricalHead, ScalarHead, SequenceScore

B, T, D = 5, 4, 6
LENGTHS = np.array([4, 1, 0, 3, 2])
MASK = jnp.asarray(np.arange(T)[None] < LENGTHS[:, None])
HEADS = [ScalarHead(), ScalarHead(hidden=3), CategoricalHead(7), CategoricalHead(2, hidden=3)]


def some_params(head, *inputs, seed=0, dtype=jnp.float32):
    shapes = jax.eval_shape(head.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)


def features(seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), jnp.float32)


def oracle(params, x):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
    if "hidden" in p:
        x = np.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    out = x @ p["out"]["kernel"] + p["out"]["bias"]
    return out[0] if len(out) == 1 else out


@pytest.mark.parametrize("head", HEADS, ids=["linear", "hidden", "atoms", "atoms, hidden"])
def test_a_head_gives_its_numbers_per_feature_vector(head):
    x = features()
    params = some_params(head, x)
    found = jax.jit(head.apply)({"params": params}, x)
    np.testing.assert_allclose(found, [[oracle(params, x[b, t]) for t in range(T)] for b in range(B)], rtol=1e-4)


@pytest.mark.parametrize("hidden", [0, 500])
def test_a_head_starts_as_published_and_a_scale_of_zero_starts_it_at_zero(hidden):
    width = 400
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, width)), jnp.float32)
    inner = hidden or width
    out = jax.jit(ScalarHead(hidden).init)(jax.random.key(0), x)["params"]["out"]
    deviation = float(jnp.std(out["kernel"])) * (inner + 1) ** 0.5
    assert abs(deviation - 1) < 5 / np.sqrt(2 * inner)
    assert not out["bias"].any()
    silent = ScalarHead(hidden, scale=0.0)
    assert not silent.apply(jax.jit(silent.init)(jax.random.key(0), x), x).any()


def test_a_distribution_starts_even_and_learns_a_value_per_token():
    support, x = jnp.linspace(-2.0, 2.0, 9), features()
    head = CategoricalHead(9, scale=0.0)
    params = jax.jit(head.init)(jax.random.key(0), x)["params"]
    values = lambda params: categorical_value.mean(head.apply({"params": params}, x), support)
    np.testing.assert_allclose(values(params), 0.0, atol=1e-6)
    returns = jnp.where(x[..., 0] > 0, 1.3, -0.4)
    target, optimizer = categorical_value.two_hot(returns, support), optax.adam(0.1)

    def loss(params):
        return jnp.mean(categorical_value.cross_entropy(head.apply({"params": params}, x), target))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=2000)[0][0])
    np.testing.assert_allclose(values(train(params)), returns, atol=0.02)


def test_a_sequence_is_scored_by_the_mean_of_its_tokens():
    head, x = SequenceScore(hidden=3), features()
    params = some_params(head, x, MASK)
    found = jax.jit(head.apply)({"params": params}, x, MASK)
    means = [np.mean(x[b, :n], axis=0) if n else np.zeros(D) for b, n in enumerate(LENGTHS)]
    np.testing.assert_allclose(found, [oracle(params["head"], m) for m in means], rtol=1e-4)


def test_order_and_side_of_padding_do_not_matter_to_a_score():
    head, x = SequenceScore(), features()
    params = some_params(head, x, MASK)
    score = jax.jit(head.apply)
    expected = score({"params": params}, x, MASK)
    np.testing.assert_allclose(score({"params": params}, x[:, ::-1], MASK[:, ::-1]), expected, rtol=1e-5)


def test_garbage_in_padding_changes_neither_scores_nor_gradients():
    head, x = SequenceScore(hidden=3), features()
    params = some_params(head, x, MASK)

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def look(params, x):
        return jnp.sum(jnp.sin(head.apply({"params": params}, x, MASK)))

    clean = look(params, x)
    dirty = look(params, jnp.where(MASK[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))


def test_narrow_features_and_parameters_give_float32():
    head, x = SequenceScore(hidden=3), features()
    wide = some_params(head, x, MASK)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide)
    found = head.apply({"params": narrow}, x.astype(jnp.bfloat16), MASK)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, head.apply({"params": wide}, x, MASK), atol=0.1)


def test_gradients_equal_finite_differences_in_float64():
    with jax.enable_x64():
        head = SequenceScore(hidden=3)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)))
        params = some_params(head, x, MASK, dtype=jnp.float64)
        # The empty row's features are all 0, where the norm is steep.
        score = lambda params, x: head.apply({"params": params}, x, MASK)[LENGTHS > 0]
        assert score(params, x).dtype == jnp.float64
        check_grads(score, (params, x), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
