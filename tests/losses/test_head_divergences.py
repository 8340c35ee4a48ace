"""losses/head_divergences.py against the same divergences of float64 logits, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import distillation, head_divergences

B, T, D, V, WIDE = 2, 3, 4, 23, 3
rng = np.random.default_rng(0)
HIDDEN, TABLE = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
TEACHER_HIDDEN = rng.normal(size=(B, T, WIDE)).astype(np.float32)
TEACHER_TABLE = rng.normal(size=(V, WIDE)).astype(np.float32)
WEIGHTS = rng.normal(size=(B, T)).astype(np.float32)
ARGUMENTS = (HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE)

DENSE = {
    head_divergences.head_forward_kl: distillation.forward_kl,
    head_divergences.head_reverse_kl: distillation.reverse_kl,
    head_divergences.head_generalised_jsd: distillation.generalised_jsd,
    head_divergences.head_total_variation: distillation.total_variation,
}


def dense_of(function, *, capped=False, **knobs):
    def result(hidden, table, teacher_hidden, teacher_table):
        logits, teacher_logits = hidden @ table.T, teacher_hidden @ teacher_table.T
        if capped:
            logits, teacher_logits = 1.5 * jnp.tanh(logits / 1.5), 0.8 * jnp.tanh(teacher_logits / 0.8)
        return DENSE[function](logits, teacher_logits, **knobs)

    return result


def gradient_of(function):
    """(weighted sum, per token), gradients."""

    def total(*arguments):
        per_token = function(*arguments)
        return jnp.sum(WEIGHTS * per_token), per_token

    return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))


@functools.cache
def exact(function, capped):
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in ARGUMENTS]
        return jax.tree.map(np.asarray, gradient_of(dense_of(function, temperature=0.7, capped=capped))(*wide))


@pytest.mark.parametrize("function", DENSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("axis", "chunk", "capped"), [(0, 7, False), (1, 7, False), (1, V, False), (0, None, False), (0, 7, True)]
)
def test_values_and_gradients_equal_dense_float64(function, axis, chunk, capped):
    caps = {"soft_cap": 1.5, "teacher_soft_cap": 0.8} if capped else {}

    def chunked(hidden, table, teacher_hidden, teacher_table):
        tables = (table.T, teacher_table) if axis else (table, teacher_table.T)
        return function(
            *(hidden, tables[0], teacher_hidden, tables[1]),
            temperature=0.7,
            vocabulary_axis=axis,
            teacher_vocabulary_axis=1 - axis,
            chunk=chunk,
            **caps,
        )

    (_, per_token), gradients = gradient_of(chunked)(*ARGUMENTS)
    (_, expected), want = exact(function, capped)
    np.testing.assert_allclose(per_token, expected, rtol=2e-5, atol=2e-6)
    for got, exactly in zip(gradients, want, strict=True):
        np.testing.assert_allclose(got, exactly, rtol=2e-4, atol=2e-6)
    assert not any(teacher.any() for teacher in gradients[2:])


def test_beta_is_traced_and_swept():
    betas = jnp.array([0.1, 0.5, 0.9])
    swept = jax.vmap(lambda b: head_divergences.head_generalised_jsd(*ARGUMENTS, beta=b, chunk=7))(betas)
    looped = [dense_of(head_divergences.head_generalised_jsd, beta=b)(*ARGUMENTS) for b in betas]
    np.testing.assert_allclose(swept, jnp.stack(looped), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", DENSE, ids=lambda f: f.__name__)
def test_equal_heads_unused_slots_and_extremes(function):
    np.testing.assert_allclose(function(HIDDEN, TABLE, HIDDEN, TABLE, chunk=7), 0.0, atol=1e-6)
    unused = np.zeros((B, T), bool)
    unused[0, 2] = True

    def total(hidden, table, teacher_hidden):
        return jnp.sum(jnp.where(unused, 0.0, function(hidden, table, teacher_hidden, TEACHER_TABLE, chunk=7)))

    gradient = jax.jit(jax.value_and_grad(total, (0, 1)))
    clean, dirty = (
        gradient(np.where(unused[..., None], x, HIDDEN), TABLE, np.where(unused[..., None], x, TEACHER_HIDDEN))
        for x in (np.float32(0), np.float32(np.nan))
    )
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    for value in jax.tree.leaves(gradient(80 * HIDDEN, TABLE, -80 * TEACHER_HIDDEN)):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("function", DENSE, ids=lambda f: f.__name__)
def test_narrow_inputs_and_mistakes(function):
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in ARGUMENTS]
    result = function(*narrow, chunk=7)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(
        result, dense_of(function)(*(x.astype(jnp.float32) for x in narrow)), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="must share one vocabulary"):
        function(HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE[1:])


@pytest.mark.parametrize("function", DENSE, ids=lambda f: f.__name__)
def test_logits_of_the_whole_vocabulary_are_never_held(function):
    rows, table = jax.ShapeDtypeStruct((64, 16), "float32"), jax.ShapeDtypeStruct((4096, 16), "float32")
    objective = jax.grad(lambda *a: jnp.sum(function(*a, chunk=256)), (0, 1))
    compiled = jax.jit(objective).lower(rows, table, rows, table).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * 64 * 4096
