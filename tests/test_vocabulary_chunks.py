"""vocabulary_chunks.py against float64 NumPy with all logits held, its memory, its arithmetic, and its promises."""

import functools
import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from rlhf_jax import _chunked_head, logprobs, vocabulary_chunks
from rlhf_jax.vocabulary_chunks import (
    HeadDistillation,
    HeadStatistics,
    head_distillation,
    head_log_probs,
    head_soft_cross_entropy,
    head_statistics,
)

B, T, D, V, WIDE = 2, 3, 4, 37, 5
rng = np.random.default_rng(0)
HIDDEN = rng.normal(size=(B, T, D)).astype(np.float32)
TABLE = rng.normal(size=(V, D)).astype(np.float32)
TEACHER_HIDDEN = rng.normal(size=(B, T, WIDE)).astype(np.float32)
TEACHER_TABLE = rng.normal(size=(V, WIDE)).astype(np.float32)
TOKENS = rng.integers(0, V, (B, T))
TOKENS[0, 0], TOKENS[0, 1] = 0, V - 1
WEIGHTS = rng.normal(size=(4, B, T)).astype(np.float32)

# An overlapping last chunk, chunks that divide V, one chunk, one token at a time, and the library's own choice.
CHUNKS = (10, 16, V, 1, None)


def layout(table, axis):
    return table.T if axis else table


def rows_of(hidden, table, temperature, cap=None):
    """[B, T] list of exact float64 log-prob rows."""
    products = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    logits = (products if cap is None else cap * np.tanh(products / cap)) / temperature
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def statistics_oracle(hidden, table, tokens, temperature, cap=None):
    log_p = rows_of(hidden, table, temperature, cap)
    result = np.zeros((4, B, T))
    for b in range(B):
        for t in range(T):
            row = log_p[b, t]
            product = math.fsum(hidden[b, t].astype(np.float64) * table[0])
            logit = (product if cap is None else cap * math.tanh(product / cap)) / temperature
            result[:, b, t] = (
                row[tokens[b, t]],
                -math.fsum(math.exp(x) * x for x in row),
                math.fsum(math.exp(x) ** 2 for x in row),
                logit - row[0],
            )
    return HeadStatistics(*result)


def distillation_oracle(hidden, table, teacher_hidden, teacher_table, tokens, temperature, caps=(None, None)):
    log_q = rows_of(hidden, table, temperature, caps[0])
    log_p = rows_of(teacher_hidden, teacher_table, temperature, caps[1])
    result = np.zeros((4, B, T))
    for b in range(B):
        for t in range(T):
            p, q, y = log_p[b, t], log_q[b, t], tokens[b, t]
            result[:, b, t] = (
                -math.fsum(math.exp(x) * z for x, z in zip(p, q, strict=True)),
                q[y],
                p[y],
                -math.fsum(math.exp(x) * x for x in p),
            )
    return HeadDistillation(*result)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_equal_float64(axis, chunk):
    table, teacher_table = layout(TABLE, axis), layout(TEACHER_TABLE, axis)

    @jax.jit
    def compute(temperature):
        knobs = {"temperature": temperature, "vocabulary_axis": axis, "chunk": chunk}
        arguments = (HIDDEN, table, TEACHER_HIDDEN, teacher_table)
        return (
            head_log_probs(HIDDEN, table, TOKENS, **knobs),
            *head_statistics(HIDDEN, table, TOKENS, **knobs),
            head_soft_cross_entropy(*arguments, **knobs),
            *head_distillation(*arguments, TOKENS, **knobs),
        )

    for temperature in (1.0, 0.6):
        alone = statistics_oracle(HIDDEN, TABLE, TOKENS, temperature)
        both = distillation_oracle(HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, TOKENS, temperature)
        expected = (alone.log_probs, *alone, both.cross_entropy, *both)
        for result, want in zip(compute(temperature), expected, strict=True):
            np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


CAPS = {"soft_cap": 1.5, "teacher_soft_cap": 0.8}


def test_soft_caps_bend_the_logits_before_the_temperature_divides_them():
    @jax.jit
    def compute(soft_cap, teacher_soft_cap):
        knobs = {"temperature": 0.6, "chunk": 10, "soft_cap": soft_cap}
        teacher = (TEACHER_HIDDEN, TEACHER_TABLE)
        return (
            head_log_probs(HIDDEN, TABLE, TOKENS, **knobs),
            *head_statistics(HIDDEN, TABLE, TOKENS, **knobs),
            head_soft_cross_entropy(HIDDEN, TABLE, *teacher, teacher_soft_cap=teacher_soft_cap, **knobs),
            *head_distillation(HIDDEN, TABLE, *teacher, TOKENS, teacher_soft_cap=teacher_soft_cap, **knobs),
        )

    for caps in ((1.5, 0.8), (0.8, 30.0), (1e6, 1e6), (None, 0.8), (1.5, None)):
        alone = statistics_oracle(HIDDEN, TABLE, TOKENS, 0.6, caps[0])
        both = distillation_oracle(HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, TOKENS, 0.6, caps)
        for result, want in zip(compute(*caps), (alone[0], *alone, both[0], *both), strict=True):
            np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)
    for result, want in zip(compute(1e6, 1e6), compute(None, None), strict=True):  # what the docstring says of c -> inf
        np.testing.assert_allclose(result, want, rtol=1e-4, atol=1e-5)


def weighted(results):
    """One number in which every result of every slot has its own weight; slot [1, 1] has none."""
    weights = jnp.asarray(WEIGHTS).at[:, 1, 1].set(0.0)
    return sum(jnp.sum(w * x) for w, x in zip(weights, results, strict=False))


def chunked_objectives(axis, chunk, soft_cap=None, teacher_soft_cap=None):
    """Functions of (hidden, table, teacher's hidden and table, tokens, temperature)."""
    knobs = {"vocabulary_axis": axis, "chunk": chunk, "soft_cap": soft_cap}

    def log_probs(hidden, table, _, __, tokens, temperature):
        return weighted([head_log_probs(hidden, layout(table, axis), tokens, temperature=temperature, **knobs)])

    def statistics(hidden, table, _, __, tokens, temperature):
        return weighted(head_statistics(hidden, layout(table, axis), tokens, temperature=temperature, **knobs))

    def distillation(hidden, table, teacher_hidden, teacher_table, tokens, temperature):
        tables = layout(table, axis), layout(teacher_table, 1 - axis)
        return weighted(
            head_distillation(
                *(hidden, tables[0], teacher_hidden, tables[1], tokens),
                temperature=temperature,
                teacher_soft_cap=teacher_soft_cap,
                teacher_vocabulary_axis=1 - axis,
                **knobs,
            )
        )

    return log_probs, statistics, distillation


def dense_objectives(soft_cap=None, teacher_soft_cap=None):
    """The same of logits that are held."""

    def logits_of(hidden, table, cap, temperature):
        products = hidden @ table.T
        return (products if cap is None else cap * jnp.tanh(products / cap)) / temperature

    def chosen(log_p, tokens):
        return log_p[jnp.arange(B)[:, None], jnp.arange(T), tokens]

    def log_probs(hidden, table, _, __, tokens, temperature):
        return weighted([chosen(jax.nn.log_softmax(logits_of(hidden, table, soft_cap, temperature)), tokens)])

    def statistics(hidden, table, _, __, tokens, temperature):
        logits = logits_of(hidden, table, soft_cap, temperature)
        log_p = jax.nn.log_softmax(logits)
        p = jnp.exp(log_p)
        return weighted([chosen(log_p, tokens), -(p * log_p).sum(-1), (p * p).sum(-1), jax.nn.logsumexp(logits, -1)])

    def distillation(hidden, table, teacher_hidden, teacher_table, tokens, temperature):
        temperature = jax.lax.stop_gradient(temperature)
        log_q = jax.nn.log_softmax(logits_of(hidden, table, soft_cap, temperature))
        teacher = logits_of(teacher_hidden, teacher_table, teacher_soft_cap, temperature)
        p = jax.nn.softmax(jax.lax.stop_gradient(teacher))
        return weighted([-(p * log_q).sum(-1), chosen(log_q, tokens)])

    return log_probs, statistics, distillation


@pytest.mark.parametrize("index", range(3), ids=["log_probs", "statistics", "distillation"])
@pytest.mark.parametrize(
    ("chunk", "axis", "caps"),
    [(10, 0, {}), (10, 1, {}), (16, 0, {}), (V, 1, {}), (10, 0, CAPS), (10, 1, CAPS), (V, 0, CAPS)],
)
def test_gradients_equal_those_of_dense_logits(index, chunk, axis, caps):
    arguments = (HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, TOKENS, 0.6)
    where = (0, 1, 2, 3, 5)
    got = jax.jit(jax.grad(chunked_objectives(axis, chunk, **caps)[index], where))(*arguments)
    want = jax.jit(jax.grad(dense_objectives(**caps)[index], where))(*arguments)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)
    for teacher in got[2:4]:
        assert not teacher.any()
    assert bool(got[4]) == (index < 2)  # a temperature shared with a teacher is stopped


def test_no_gradient_reaches_a_soft_cap():
    def objective(caps):
        knobs = {"chunk": 10, "soft_cap": caps[0]}
        both = head_distillation(
            HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, TOKENS, teacher_soft_cap=caps[1], **knobs
        )
        alone = head_log_probs(HIDDEN, TABLE, TOKENS, **knobs), *head_statistics(HIDDEN, TABLE, TOKENS, **knobs)
        return sum(jnp.sum(x) for x in (*alone, *both))

    np.testing.assert_array_equal(jax.grad(objective)(jnp.array([1.5, 0.8])), 0.0)


@pytest.mark.parametrize("caps", [{}, CAPS], ids=["plain", "capped"])
def test_gradients_equal_finite_differences(caps):
    with jax.enable_x64(True):
        small = [jnp.asarray(x, jnp.float64) for x in (HIDDEN[:, :2, :2], TABLE[:7, :2])]
        teacher = [jnp.asarray(x, jnp.float64) for x in (TEACHER_HIDDEN[:, :2], TEACHER_TABLE[:7])]
        tokens = TOKENS[:, :2] % 7

        def objective(hidden, table, temperature):
            knobs = {"chunk": 3, "soft_cap": caps.get("soft_cap")}
            statistics = head_statistics(hidden, table, tokens, temperature=temperature, **knobs)
            both = head_distillation(hidden, table, *teacher, tokens, chunk=3, **caps)
            log_probs = head_log_probs(hidden, table, tokens, temperature=temperature, **knobs)
            assert log_probs.dtype == statistics.entropy.dtype == both.cross_entropy.dtype == jnp.float64
            return sum(jnp.sum(jnp.sin((i + 1) * x)) for i, x in enumerate((log_probs, *statistics, *both[:2])))

        close = {"atol": 1e-6, "rtol": 1e-6, "eps": 1e-5}
        jax.test_util.check_grads(jax.jit(objective), (*small, 0.8), order=1, modes=["rev"], **close)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("function", [head_log_probs, head_statistics])
def test_a_slot_that_nobody_uses_may_hold_anything(function, soft_cap):
    unused = np.zeros((B, T), bool)
    unused[0, 1] = unused[1, 2] = True

    def objective(hidden, table, tokens):
        first = jax.tree.leaves(function(hidden, table, tokens, soft_cap=soft_cap, chunk=10))
        return sum(jnp.sum(jnp.sin(jnp.where(unused, 0.0, x))) for x in first)

    gradient = jax.jit(jax.value_and_grad(objective, (0, 1)))
    clean = np.where(unused[..., None], 0, HIDDEN).astype(np.float32)
    expected = gradient(clean, TABLE, np.where(unused, 0, TOKENS))
    for garbage, token in ((np.nan, -100), (np.inf, V), (-1e30, 2**30)):
        dirty = np.where(unused[..., None], garbage, HIDDEN).astype(np.float32)
        tokens = np.where(unused, token, TOKENS)
        value, (hidden, table) = gradient(dirty, TABLE, tokens)
        np.testing.assert_array_equal(value, expected[0])
        np.testing.assert_array_equal(hidden, expected[1][0])
        np.testing.assert_array_equal(table, expected[1][1])
        assert not np.asarray(hidden)[unused].any()


@pytest.mark.parametrize("caps", [{}, CAPS], ids=["plain", "capped"])
def test_garbage_of_student_and_teacher_in_an_unused_slot_of_distillation(caps):
    unused = np.zeros((B, T), bool)
    unused[1, 0] = True

    def objective(hidden, table, teacher_hidden, tokens):
        both = head_distillation(hidden, table, teacher_hidden, TEACHER_TABLE, tokens, chunk=10, **caps)
        return sum(jnp.sum(jnp.where(unused, 0.0, x)) for x in both)

    slots = unused[..., None]
    gradient = jax.jit(jax.value_and_grad(objective, (0, 1)))
    expected = gradient(np.where(slots, 0, HIDDEN), TABLE, np.where(slots, 0, TEACHER_HIDDEN), TOKENS)
    garbage = np.float32(np.nan)
    got = gradient(
        np.where(slots, garbage, HIDDEN), TABLE, np.where(slots, garbage, TEACHER_HIDDEN), np.where(unused, -1, TOKENS)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_token_outside_the_vocabulary_is_nan_and_spoils_no_other_result():
    tokens = TOKENS.copy()
    tokens[0, 0], tokens[1, 1] = -1, V
    outside = (tokens < 0) | (tokens >= V)
    for log_probs in (
        head_log_probs(HIDDEN, TABLE, tokens, chunk=10),
        head_statistics(HIDDEN, TABLE, tokens, chunk=10).log_probs,
        head_distillation(HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, tokens, chunk=10).log_probs,
    ):
        np.testing.assert_array_equal(np.isnan(log_probs), outside)

    def soft(hidden):
        return head_distillation(hidden, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, tokens, chunk=10).cross_entropy.sum()

    expected = jax.grad(lambda h: head_soft_cross_entropy(h, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, chunk=10).sum())
    np.testing.assert_array_equal(jax.grad(soft)(HIDDEN), expected(HIDDEN))


def test_extreme_logits_keep_their_digits():
    hidden = jnp.array([[1.0], [-1.0], [0.0]])
    table = jnp.array([80.0, -80.0, 80.0, 1e4, 9999.0])[:, None]
    tokens = jnp.array([4, 1, 2])
    statistics, gradient = jax.vjp(lambda h, t: head_statistics(h, t, tokens, chunk=2), hidden, table)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    np.testing.assert_allclose(statistics.log_probs, log_p[np.arange(3), tokens], rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(statistics.entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-5, atol=1e-6)
    for leaf in jax.tree.leaves(gradient(jax.tree.map(jnp.ones_like, statistics))):
        assert np.isfinite(leaf).all()
    both, gradient = jax.vjp(lambda h: head_distillation(h, table, -hidden, table, tokens, chunk=2), hidden)
    assert all(np.isfinite(x).all() for x in both)
    assert np.isfinite(gradient(jax.tree.map(jnp.ones_like, both))[0]).all()


def test_equal_student_and_teacher_reach_the_lower_bound():
    both = head_distillation(HIDDEN, TABLE, HIDDEN, TABLE, TOKENS, chunk=10)
    np.testing.assert_array_equal(both.cross_entropy, both.teacher_entropy)
    np.testing.assert_array_equal(both.log_probs, both.teacher_log_probs)
    gradient = jax.grad(lambda h: head_soft_cross_entropy(h, TABLE, HIDDEN, TABLE, chunk=10).sum())(HIDDEN)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    apart = head_distillation(HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, TOKENS, chunk=10)
    assert (apart.cross_entropy > apart.teacher_entropy).all()


def test_narrow_inputs_are_summed_in_float32():
    hidden, table = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(TABLE, jnp.bfloat16)
    wide = hidden.astype(jnp.float32), table.astype(jnp.float32)
    expected, log_p = statistics_oracle(np.asarray(wide[0]), np.asarray(wide[1]), TOKENS, 1.0), None
    for result, want in zip(head_statistics(hidden, table, TOKENS, chunk=10), expected, strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)
    log_p = head_log_probs(hidden, table, TOKENS, chunk=10)
    np.testing.assert_allclose(log_p, expected.log_probs, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda h, t: head_log_probs(h, t, TOKENS, chunk=10).sum(), (0, 1))(hidden, table)
    wider = jax.grad(lambda h, t: head_log_probs(h, t, TOKENS, chunk=10).sum(), (0, 1))(*wide)
    for narrow, want in zip(gradients, wider, strict=True):
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_allclose(narrow.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)
    mixed = head_log_probs(hidden, wide[1], TOKENS, chunk=10)  # a float32 table under bfloat16 activations
    np.testing.assert_allclose(mixed, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_temperature_is_traced_and_swept():
    temperatures = jnp.array([0.5, 1.0, 3.0])
    for function in (
        lambda t: head_log_probs(HIDDEN, TABLE, TOKENS, temperature=t, chunk=10),
        lambda t: head_statistics(HIDDEN, TABLE, TOKENS, temperature=t, chunk=10).entropy,
        lambda t: head_soft_cross_entropy(HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE, temperature=t, chunk=10),
    ):
        looped = jnp.stack([function(t) for t in temperatures])
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(temperatures), looped, rtol=1e-5, atol=1e-6)


# --- what it costs ----------------------------------------------------------------------------------------------------

ROWS, WIDTH, VOCABULARY, CHUNK = 64, 16, 4096, 256
PRODUCT = 2 * ROWS * WIDTH * VOCABULARY  # floating-point operations of one pass of logits
ALL_LOGITS = 4 * ROWS * VOCABULARY  # bytes


@functools.cache
def cost(name, where):
    """(products, temporary bytes) of one compiled function and its gradient with respect to the arguments `where`."""
    tokens = jnp.zeros(ROWS, jnp.int32)
    knobs = {"chunk": CHUNK}

    def objective(hidden, table, teacher_hidden, teacher_table):
        if name.endswith("log_probs"):
            cap = 30.0 if name.startswith("capped") else None
            return jnp.sum(head_log_probs(hidden, table, tokens, soft_cap=cap, **knobs))
        if name == "statistics":
            return sum(jnp.sum(x) for x in head_statistics(hidden, table, tokens, **knobs))
        if name == "distillation":
            both = head_distillation(hidden, table, teacher_hidden, teacher_table, tokens, **knobs)
            return jnp.sum(both.cross_entropy) + jnp.sum(both.log_probs)
        return jnp.sum(jax.nn.log_softmax(hidden @ table.T)[:, 0])

    function = jax.grad(objective, where) if where else objective
    rows, table = jax.ShapeDtypeStruct((ROWS, WIDTH), "float32"), jax.ShapeDtypeStruct((VOCABULARY, WIDTH), "float32")
    compiled = jax.jit(function).lower(rows, table, rows, table).compile()
    repeats = 1 if name == "dense" else VOCABULARY // CHUNK  # the analysis counts the body of a loop once
    return compiled.cost_analysis()["flops"] * repeats / PRODUCT, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("name", "where", "products"),
    [
        ("log_probs", (), 1),
        ("log_probs", (0,), 2),  # a frozen table: as many as dense autodiff
        ("log_probs", (1,), 3),
        ("log_probs", (0, 1), 4),
        ("statistics", (), 1),
        ("statistics", (0,), 3),
        ("statistics", (0, 1), 4),
        ("distillation", (), 2),
        ("distillation", (0,), 4),
        ("distillation", (0, 1), 7),
        ("dense", (0,), 2),
        ("dense", (0, 1), 3),
    ],
)
def test_products_are_as_many_as_promised(name, where, products):
    counted = cost(name, where)[0]
    assert products * 0.99 <= counted <= products + 0.8  # the rest is the softmax itself, at this narrow width


@pytest.mark.parametrize("name", ["log_probs", "statistics", "distillation", "capped log_probs"])
@pytest.mark.parametrize("where", [(), (0,), (0, 1)])
def test_logits_of_the_whole_vocabulary_are_never_held(name, where):
    assert cost(name, where)[1] < 0.4 * ALL_LOGITS
    assert cost("dense", where)[1] >= ALL_LOGITS


def test_chunks_are_chosen_by_the_number_of_rows():
    for size, rows in ((49152, 1024), (50257, 1024), (49152, 65536), (49152, 1), (7, 10**9), (4096, 1024)):
        plan = _chunked_head.plan_chunks(size, rows, None)
        assert plan.count * plan.chunk >= size > (plan.count - 1) * plan.chunk
        assert plan.chunk <= size
        limit = max(_chunked_head.CHUNK_ELEMENTS // rows, _chunked_head.SMALLEST_CHUNK)
        assert min(size, 0.8 * limit) <= plan.chunk <= limit + 16
    assert _chunked_head.plan_chunks(4096, 1024, None).count == 1


@pytest.mark.parametrize("function", [head_log_probs, head_statistics])
def test_rows_are_hidden_states_wherever_they_stand(function, monkeypatch):
    asked = []
    plan_chunks = _chunked_head.plan_chunks
    monkeypatch.setattr(vocabulary_chunks, "plan_chunks", lambda *a: asked.append(a) or plan_chunks(*a))
    jax.eval_shape(function, HIDDEN, TABLE, TOKENS)
    assert asked == [(V, B * T, None)]


def test_batches_sharded_over_devices_stay_sharded():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    hidden, tokens = np.tile(HIDDEN, (2, 1, 1)), np.tile(TOKENS, (2, 1))
    gradient = jax.value_and_grad(lambda h, t, y: head_log_probs(h, t, y, chunk=10).mean(), (0, 1))
    expected = gradient(hidden, TABLE, tokens)
    sharded = jax.jit(gradient, in_shardings=(rows, whole, rows))
    value, (for_hidden, for_table) = sharded(hidden, TABLE, tokens)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(for_hidden, expected[1][0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(for_table, expected[1][1], rtol=1e-5, atol=1e-7)
    assert for_hidden.sharding.spec[0] == "data"
    compiled = sharded.lower(hidden, TABLE, tokens).compile().as_text()
    assert "all-gather" not in compiled


def test_mistakes_are_refused_in_words():
    good = (HIDDEN, TABLE, TOKENS)
    with pytest.raises(ValueError, match=r"table must be \[V, D\] with vocabulary_axis=0 and D as in hidden"):
        head_log_probs(HIDDEN, TABLE.T, TOKENS)
    with pytest.raises(ValueError, match=r"table must be \[D, V\] with vocabulary_axis=1"):
        head_statistics(*good, vocabulary_axis=1)
    with pytest.raises(ValueError, match="vocabulary_axis must be 0"):
        head_log_probs(*good, vocabulary_axis=2)
    for chunk in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="chunk must be a positive int or None"):
            head_log_probs(*good, chunk=chunk)
    with pytest.raises(TypeError, match="tokens must be integers, got dtype float"):
        head_log_probs(HIDDEN, TABLE, TOKENS.astype(np.float32))
    with pytest.raises(ValueError, match=r"tokens must have shape \(2, 3\)"):
        head_statistics(HIDDEN, TABLE, TOKENS[:1])
    with pytest.raises(ValueError, match=r"teacher_table must be \[V, D\]"):
        head_soft_cross_entropy(HIDDEN, TABLE, TEACHER_HIDDEN, TABLE)
    with pytest.raises(ValueError, match="must share one vocabulary, got V = 37 and 36"):
        head_soft_cross_entropy(HIDDEN, TABLE, TEACHER_HIDDEN, TEACHER_TABLE[1:])
    with pytest.raises(ValueError, match="hidden and teacher_hidden must agree"):
        head_soft_cross_entropy(HIDDEN, TABLE, TEACHER_HIDDEN[:1], TEACHER_TABLE)


def test_logprobs_offers_the_same_functions():
    assert logprobs.head_log_probs is vocabulary_chunks.head_log_probs
    assert logprobs.head_statistics is vocabulary_chunks.head_statistics
