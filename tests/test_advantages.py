"""returns.py and advantages.py against float64 sums over the valid tokens of each row, written without recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax import advantages, returns

ROWS, TOKENS = 4, 6
TABLE = hnp.arrays(np.float32, (ROWS, TOKENS), elements=st.floats(-8, 8, width=32))
UNIT = hnp.arrays(np.float32, (ROWS, TOKENS), elements=st.floats(0, 1, width=32))
MASK = hnp.arrays(np.bool_, (ROWS, TOKENS))
FLAGS = hnp.arrays(np.bool_, (ROWS, TOKENS), elements=st.sampled_from([False, False, True]))
FINAL = hnp.arrays(np.float32, (ROWS,), elements=st.floats(-8, 8, width=32))

# Functions of (rewards, values, mask, final, discount, lambda) -> [B, T] or a tuple of them.
FUNCTIONS = {
    "discounted_returns": lambda r, v, m, f, d, k: returns.discounted_returns(r, m, bootstrap_value=f, discount=d),
    "n_step_returns 3": lambda r, v, m, f, d, k: returns.n_step_returns(r, v, m, n=3, bootstrap_value=f, discount=d),
    "n_step_returns 9": lambda r, v, m, f, d, k: returns.n_step_returns(r, v, m, n=9, bootstrap_value=f, discount=d),
    "lambda_returns": lambda r, v, m, f, d, k: returns.lambda_returns(
        r, v, m, bootstrap_value=f, discount=d, trace_lambda=k
    ),
    "gae": lambda r, v, m, f, d, k: advantages.gae(r, v, m, bootstrap_value=f, discount=d, gae_lambda=k),
    "gae_through_holes": lambda r, v, m, f, d, k: advantages.gae_through_holes(
        r, v, m, bootstrap_value=f, discount=d, gae_lambda=k
    ),
    # the tables of this file double as log-probs and values of successors
    "gae_with_truncation": lambda r, v, m, f, d, k: advantages.gae_with_truncation(
        r, v, v + r, jnp.zeros_like(m), jnp.zeros_like(m), m, discount=d, gae_lambda=k
    ),
    "vtrace": lambda r, v, m, f, d, k: advantages.vtrace(
        r / 4, v / 4, r, v, m, bootstrap_value=f, discount=d, trace_lambda=k, rho_bar=1.5, c_bar=1.2
    ),
}
COMPILED = {name: jax.jit(function) for name, function in FUNCTIONS.items()}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


# --- oracles: one row, only its valid tokens, plain sums and products -------------------------------------------------


def products(factors):
    """1, f0, f0 f1, ..."""
    return np.concatenate([[1.0], np.cumprod(factors)])


def n_step(r, v, final, d, n):
    tail = np.append(v, final)
    out = []
    for t in range(len(r)):
        steps = min(n, len(r) - t)
        weight = products(d[t : t + steps])
        out.append(sum(weight[i] * r[t + i] for i in range(steps)) + weight[steps] * tail[t + steps])
    return np.array(out)


def lambda_return(r, v, final, d, k):
    """The average of n-step returns with weights (1 - λ) λ^{n-1}; the longest one gets what is left."""
    out = []
    for t in range(len(r)):
        total = 0.0
        for n in range(1, len(r) - t + 1):
            last = n == len(r) - t
            weight = products(k[t:])[n - 1] * (1.0 if last else 1.0 - k[t + n - 1])
            total += weight * n_step(r, v, final, d, n)[t]
        out.append(total)
    return np.array(out)


def gae_sum(r, v, next_v, d, decay):
    errors = r + d * next_v - v
    return np.array([sum(products(decay[t:])[i] * errors[t + i] for i in range(len(r) - t)) for t in range(len(r))])


def gae_row(r, v, final, d, k):
    advantage = gae_sum(r, v, np.append(v, final)[1:], d, d * k)
    return advantage, advantage + v


def vtrace_row(log_ratio, r, v, final, d, k, rho_bar, c_bar):
    rho, c = np.minimum(np.exp(log_ratio), rho_bar), k * np.minimum(np.exp(log_ratio), c_bar)
    next_v = np.append(v, final)[1:]
    errors = rho * (r + d * next_v - v)
    target = np.array(
        [v[s] + sum(products((d * c)[s:])[t - s] * errors[t] for t in range(s, len(r))) for s in range(len(r))]
    )
    return rho * (r + d * np.append(target, final)[1:] - v), target, rho


ORACLES = {
    "discounted_returns": lambda r, v, f, d, k: n_step(r, np.zeros_like(v), f, d, len(r)),
    "n_step_returns 3": lambda r, v, f, d, k: n_step(r, v, f, d, 3),
    "n_step_returns 9": lambda r, v, f, d, k: n_step(r, v, f, d, 9),
    "lambda_returns": lambda_return,
    "gae": gae_row,
    "gae_with_truncation": lambda r, v, f, d, k: (lambda a: (a, a + v))(gae_sum(r, v, v + r, d, d * k)),
    "vtrace": lambda r, v, f, d, k: vtrace_row((r - v) / 4, r, v, f, d, k, 1.5, 1.2),
}


def by_rows(oracle, mask, *tables, final):
    """Applies a row oracle to the valid tokens of each row and puts the results back."""
    outputs = None
    for b, kept in enumerate(mask):
        if not kept.any():
            continue
        results = oracle(*(table[b][kept].astype(np.float64) for table in tables), final=float(final[b]))
        results = results if isinstance(results, tuple) else (results,)
        outputs = [np.zeros(mask.shape) for _ in results] if outputs is None else outputs
        for output, result in zip(outputs, results, strict=True):
            output[b][kept] = result
    return outputs


def assert_close(got, expected, **tolerance):
    got = got if isinstance(got, tuple) else (got,)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, **({"rtol": 1e-4, "atol": 2e-4} | tolerance))


@pytest.mark.parametrize("name", ORACLES)
@given(r=TABLE, v=TABLE, mask=MASK, final=FINAL, d=UNIT, k=UNIT)
def test_equals_the_definition(name, r, v, mask, final, d, k):
    got = COMPILED[name](np.where(mask, r, np.nan), np.where(mask, v, np.inf), mask, final, d, k)
    oracle = lambda r, v, d, k, final: ORACLES[name](r, v, final, d, k)
    expected = by_rows(oracle, mask, r, v, d, k, final=final)
    assert_close(got, expected or [np.zeros(mask.shape)] * len(got if isinstance(got, tuple) else (got,)))


@given(r=TABLE, v=TABLE, mask=MASK, final=FINAL, d=UNIT, k=UNIT)
def test_gae_through_holes_takes_a_hole_for_a_step_of_nothing(r, v, mask, final, d, k):
    got = COMPILED["gae_through_holes"](np.where(mask, r, np.nan), np.where(mask, v, np.inf), mask, final, d, k)
    up_to_last = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] > 0
    oracle = lambda r, v, d, k, final: gae_row(r, v, final, d, k)
    expected = by_rows(oracle, up_to_last, np.where(mask, r, 0), np.where(mask, v, 0), d, k, final=final)
    assert_close(got, [np.where(mask, e, 0) for e in expected] if expected else [np.zeros(mask.shape)] * 2)


gae_with_truncation = jax.jit(advantages.gae_with_truncation)


@given(r=TABLE, v=TABLE, mask=MASK, next_v=TABLE, terminations=FLAGS, truncations=FLAGS)
def test_truncation_bootstraps_and_termination_does_not(r, v, mask, next_v, terminations, truncations):
    next_v = np.where(terminations, np.nan, next_v)
    got = gae_with_truncation(r, v, next_v, terminations, truncations, mask, discount=0.9, gae_lambda=0.7)
    for b in range(ROWS):
        steps = np.flatnonzero(mask[b])
        ends = [i for i, t in enumerate(steps) if terminations[b, t] or truncations[b, t]]
        for episode in np.split(steps, [i + 1 for i in ends]):
            if len(episode):
                after = np.where(terminations[b, episode], 0.0, next_v[b, episode].astype(np.float64))
                steady = np.full(len(episode), 0.9)
                expected = gae_sum(r[b, episode].astype(np.float64), v[b, episode], after, steady, steady * 0.7)
                np.testing.assert_allclose(got.advantages[b, episode], expected, rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(got.returns[b, episode], expected + v[b, episode], rtol=1e-4, atol=1e-4)
    assert not np.asarray(got.advantages)[~mask].any()
    assert not np.asarray(got.returns)[~mask].any()


# --- what every function promises -------------------------------------------------------------------------------------


def example(seed=0, tokens=TOKENS):
    """A batch with an empty row, a full row, padding on both sides and a hole; knobs per step."""
    rng = np.random.default_rng(seed)
    mask = np.ones((ROWS, tokens), bool)
    mask[0] = False
    mask[2, [0, -1]] = False
    mask[3, [2, 3, -1]] = False
    r, v = rng.normal(size=(2, ROWS, tokens)).astype(np.float32)
    d, k = rng.uniform(0.3, 1.0, size=(2, ROWS, tokens)).astype(np.float32)
    return r, v, mask, rng.normal(size=ROWS).astype(np.float32), d, k


def total(name, mask):
    """A scalar of every output, to take gradients of."""
    return lambda r, v, f, d, k: sum(
        jnp.sum(jnp.sin(x) * jnp.arange(1.0, 1 + TOKENS)[None])
        for x in jax.tree.leaves(FUNCTIONS[name](r, v, mask, f, d, k))
    )


@each_function
def test_garbage_outside_the_mask_changes_no_value_and_no_gradient(name):
    r, v, mask, final, d, k = example()
    loss = jax.jit(jax.value_and_grad(total(name, mask), argnums=(0, 1, 2)))
    value, gradients = loss(r, v, final, d, k)
    for garbage in (np.nan, np.inf, -1e9):
        dirty = [np.where(mask, x, garbage).astype(np.float32) for x in (r, v, d, k)]
        if name == "gae_through_holes":
            dirty[2:] = [d, k]  # the discounts of a hole do count there
        dirty_value, dirty_gradients = loss(*dirty[:2], final, *dirty[2:])
        np.testing.assert_array_equal(dirty_value, value)
        jax.tree.map(np.testing.assert_array_equal, dirty_gradients, gradients)
    for gradient in gradients[:2]:
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[~mask].any()


@each_function
def test_padding_on_either_side_and_the_order_of_rows_change_nothing(name):
    r, v, mask, final, d, k = example()
    expected = FUNCTIONS[name](r, v, mask, final, d, k)
    pad = lambda x, fill: np.pad(x, ((0, 0), (2, 3)), constant_values=fill)
    wide = FUNCTIONS[name](*(pad(x, 7.0) for x in (r, v)), pad(mask, False), final, *(pad(x, 1.0) for x in (d, k)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 2:-3], b, rtol=1e-6), wide, expected)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a[:, [0, 1, -1]], 0), wide)
    order = np.array([2, 0, 3, 1])
    mixed = FUNCTIONS[name](*(x[order] for x in (r, v, mask, final, d, k)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[order], rtol=1e-6), mixed, expected)


@each_function
def test_one_row_one_token_and_more_leading_axes(name):
    r, v, mask, final, d, k = example()
    whole = FUNCTIONS[name](r, v, mask, final, d, k)
    row = FUNCTIONS[name](*(jnp.asarray(x[3]) for x in (r, v, mask, final, d, k)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[3], rtol=1e-6), row, whole)
    folded = FUNCTIONS[name](*(jnp.asarray(x).reshape(2, 2, *x.shape[1:]) for x in (r, v, mask, final, d, k)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-6), folded, whole)
    one = np.float32([[2.0]])
    got = FUNCTIONS[name](one, one, np.array([[True]]), np.float32([0.5]), one * 0.25, one * 0.25)
    oracle = ORACLES["gae" if name == "gae_through_holes" else name]
    results = oracle(*(np.array([2.0]),) * 2, 0.5, np.array([0.5]), np.array([0.5]))
    assert_close(got, [np.reshape(x, (1, 1)) for x in (results if isinstance(results, tuple) else (results,))])


@each_function
def test_compiled_equals_eager_and_knobs_sweep_by_vmap(name):
    r, v, mask, final, d, k = example()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        COMPILED[name](r, v, mask, final, d, k),
        FUNCTIONS[name](r, v, mask, final, d, k),
    )
    knobs = np.float32([0.5, 0.9])
    swept = jax.vmap(lambda f, d, k: FUNCTIONS[name](r, v, mask, f, d, k))(knobs, knobs, knobs)
    for i, knob in enumerate(knobs):
        constant = np.full(mask.shape, knob)
        by_step = FUNCTIONS[name](r, v, mask, np.full(ROWS, knob), constant, constant)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), swept, by_step)


@each_function
def test_gradients_equal_finite_differences(name):
    r, v, mask, final, d, k = example()
    with jax.enable_x64():
        tables = tuple(jnp.asarray(x, jnp.float64) for x in (r, v, final, d, k))
        loss = total(name, mask)
        arguments = slice(0, 5)
        if name == "vtrace":  # rewards are log-probs there as well, and those are stopped
            loss, arguments = (lambda v, f, d, k: vtrace_total(tables, mask, v, f, d, k)), slice(1, 5)
        check_grads(jax.jit(loss), tables[arguments], order=1, modes=["rev"])


def vtrace_total(tables, mask, v, f, d, k):
    r, behaviour = tables[:2]
    outputs = advantages.vtrace(
        r, behaviour, r, v, mask, bootstrap_value=f, discount=d, trace_lambda=k, rho_bar=1.5, c_bar=1.2
    )
    return sum(jnp.sum(jnp.sin(x)) for x in outputs)


@each_function
def test_dtypes(name):
    r, v, mask, final, d, k = example()
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (r, v)]
    got = FUNCTIONS[name](*narrow, mask, final, d, k)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02) or assert_float32(a),
        got,
        FUNCTIONS[name](*(x.astype(jnp.float32) for x in narrow), mask, final, d, k),
    )
    with jax.enable_x64():
        wide = FUNCTIONS[name](*(jnp.asarray(x, jnp.float64) for x in (r, v)), mask, final, d, k)
        assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float64)}


def assert_float32(x):
    assert x.dtype == jnp.float32


@each_function
def test_mistakes_are_refused_in_words(name):
    r, v, mask, final, d, k = (jnp.asarray(x) for x in example())
    if name != "vtrace" and name != "gae_with_truncation":  # they divide and add the tables first
        with pytest.raises(TypeError, match="rewards must be floating point"):
            FUNCTIONS[name](r.astype(int), v, mask, final, d, k)
    with pytest.raises(TypeError, match="bool"):
        FUNCTIONS[name](r, v, mask.astype(jnp.float32), final, d, k)
    with pytest.raises(AssertionError):
        FUNCTIONS[name](r, v, mask[:, 1:], final, d, k)
    with pytest.raises(ValueError, match="discount must be one number or have shape"):
        FUNCTIONS[name](r, v, mask, final, d[0], k)
    if name != "gae_with_truncation":
        with pytest.raises(ValueError, match="bootstrap_value must be one number or have shape"):
            FUNCTIONS[name](r, v, mask, final[:2], d, k)


def test_more_mistakes_are_refused_in_words():
    r, v, mask, *_ = (jnp.asarray(x) for x in example())
    for n in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="n must be an int >= 1"):
            returns.n_step_returns(r, v, mask, n=n)
    with pytest.raises(TypeError, match="values must be floating point"):
        advantages.gae(r, v.astype(int), mask)
    with pytest.raises(TypeError, match="rewards must be floating point"):
        advantages.vtrace(r, v, r.astype(int), v, mask)
    with pytest.raises(TypeError, match="next_values must be floating point"):
        advantages.gae_with_truncation(r, v, v.astype(int), mask, mask, mask)
    with pytest.raises(TypeError, match="terminations must be bool"):
        advantages.gae_with_truncation(r, v, v, mask * 1, mask, mask)
    with pytest.raises(TypeError, match="truncations must be bool"):
        advantages.gae_with_truncation(r, v, v, mask, mask * 1.0, mask)
    with pytest.raises(ValueError, match="gae_lambda must be"):
        advantages.gae(r, v, mask, gae_lambda=v[0])
    with pytest.raises(ValueError, match="trace_lambda must be"):
        returns.lambda_returns(r, v, mask, trace_lambda=v[0])
    with pytest.raises(AssertionError):
        advantages.vtrace(r, v[:, 1:], r, v, mask)


# --- limits said in the docstrings ------------------------------------------------------------------------------------


def test_limits_of_returns():
    r, v, mask, final, d, _ = example()
    knobs = {"bootstrap_value": final, "discount": d}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    discounted = returns.discounted_returns(r, mask, **knobs)
    one_step = returns.n_step_returns(r, v, mask, n=1, **knobs)
    close(returns.lambda_returns(r, v, mask, trace_lambda=1.0, **knobs), discounted)
    close(returns.lambda_returns(r, v, mask, trace_lambda=0.0, **knobs), one_step)
    close(returns.n_step_returns(r, v, mask, n=TOKENS, **knobs), discounted)
    close(returns.discounted_returns(r, mask, discount=0.0, bootstrap_value=final), np.where(mask, r, 0))
    to_go = np.cumsum(np.where(mask, r, 0)[:, ::-1], axis=1)[:, ::-1]
    close(returns.discounted_returns(r, mask), np.where(mask, to_go, 0))  # the default discount is 1
    close(returns.lambda_returns(r, v, mask, **knobs), advantages.gae(r, v, mask, **knobs).returns)


def test_limits_of_gae():
    r, v, mask, final, d, _ = example()
    knobs = {"bootstrap_value": final, "discount": d}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    monte_carlo = advantages.gae(r, v, mask, gae_lambda=1.0, **knobs)
    close(monte_carlo.advantages, np.where(mask, returns.discounted_returns(r, mask, **knobs) - v, 0))
    one_step = advantages.gae(r, v, mask, gae_lambda=0.0, **knobs)
    close(one_step.returns, returns.n_step_returns(r, v, mask, n=1, **knobs))
    close(advantages.gae(r, v, mask).advantages, FUNCTIONS["gae"](r, v, mask, 0.0, 1.0, 0.95).advantages)  # defaults
    # a row with holes gives what the row of its valid tokens gives
    kept = np.flatnonzero(mask[3])
    dense = advantages.gae(r[3:, kept], v[3:, kept], mask[3:, kept], gae_lambda=0.9)
    close(advantages.gae(r, v, mask, gae_lambda=0.9).advantages[3, kept], dense.advantages[0])
    # without holes the hole rule does not matter, with holes it does
    both = [f(r, v, mask, gae_lambda=0.9) for f in (advantages.gae, advantages.gae_through_holes)]
    close(both[0].advantages[:3], both[1].advantages[:3])
    assert np.abs(both[0].advantages[3] - both[1].advantages[3]).max() > 0.01
    # a discount of 0 ends an episode inside a row
    cut = np.ones_like(r)
    cut[1, 2] = 0.0
    first = advantages.gae(r[1:2, :3], v[1:2, :3], mask[1:2, :3]).advantages
    close(advantages.gae(r, v, mask, discount=cut, bootstrap_value=final).advantages[1, :3], first[0])


def test_gae_with_truncation_without_ends_is_gae():
    r, v, mask, final, *_ = example()
    following = returns.at_next_valid(jnp.asarray(v), mask, jnp.asarray(final))
    never = np.zeros_like(mask)
    got = advantages.gae_with_truncation(r, v, following, never, never, mask)
    expected = advantages.gae(r, v, mask, bootstrap_value=final, discount=0.99, gae_lambda=0.95)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    both = advantages.gae_with_truncation(r, v, following, ~never, ~never, mask)  # termination wins
    np.testing.assert_allclose(both.returns, np.where(mask, r, 0), rtol=1e-5, atol=1e-6)


def test_vtrace_limits_stopped_log_probs_and_extremes():
    r, v, mask, final, d, k = example()
    knobs = {"bootstrap_value": final, "discount": d}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    on_policy = advantages.vtrace(r, r, r, v, mask, trace_lambda=k, **knobs)
    close(on_policy.returns, returns.lambda_returns(r, v, mask, trace_lambda=k, **knobs))
    close(on_policy.weights, mask)
    defaults = advantages.vtrace(r, v, r, v, mask)
    ones = {"discount": 0.99, "trace_lambda": 1.0, "rho_bar": 1.0, "c_bar": 1.0}
    close(defaults.returns, advantages.vtrace(r, v, r, v, mask, bootstrap_value=0.0, **ones).returns)
    # without clips, one step: importance sampling
    unclipped = advantages.vtrace(r, v, r, v, mask, rho_bar=jnp.inf, c_bar=jnp.inf, trace_lambda=0.0, **knobs)
    close(unclipped.weights, np.where(mask, np.exp(r - v), 0))
    following = np.asarray(returns.at_next_valid(jnp.asarray(v), mask, jnp.asarray(final)))
    close(unclipped.returns, np.where(mask, v + np.exp(r - v) * (r + d * following - v), 0))

    gradients = jax.grad(lambda p, q: sum(jnp.sum(x) for x in advantages.vtrace(p, q, r, v, mask)), (0, 1))(r, v)
    assert not any(g.any() for g in gradients)
    for gap in (-80.0, 80.0):
        far = advantages.vtrace(np.full_like(r, min(gap, 0)), np.full_like(r, min(-gap, 0)), r, v, mask, **knobs)
        assert all(np.isfinite(x).all() for x in far)
        close(far.weights, np.where(mask, min(1.0, np.exp(gap)), 0))


def test_recursion_and_look_ahead_give_their_final_value_to_empty_rows():
    mask = jnp.zeros((2, 3), bool)
    assert not returns.backward_recursion(jnp.ones((2, 3)), jnp.ones((2, 3)), mask, jnp.ones(2)).any()
    np.testing.assert_array_equal(
        returns.at_next_valid(jnp.ones((2, 3)), mask, jnp.array([4.0, 5.0])), [[4] * 3, [5] * 3]
    )


def test_rho_bar_decides_what_the_values_of_vtrace_converge_to():
    # a bandit of three actions: the rows are its actions, weighted by how often the behaviour takes them
    pi, mu, r = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5]), np.array([1.0, 2.0, 6.0])
    column = lambda x: np.float32(x)[:, None]
    for rho_bar in (0.5, 2.0, np.inf):
        clipped = np.minimum(rho_bar * mu, pi)
        fixed_point = (clipped * r).sum() / clipped.sum()
        at = lambda v, rho_bar=rho_bar: advantages.vtrace(
            column(np.log(pi)), column(np.log(mu)), column(r), np.full((3, 1), v, np.float32), np.ones((3, 1), bool),
            rho_bar=rho_bar,
        ).returns[:, 0]  # fmt: skip
        np.testing.assert_allclose(mu @ at(fixed_point), fixed_point, rtol=1e-5)
    np.testing.assert_allclose(fixed_point, pi @ r)  # infinity: the value of π
