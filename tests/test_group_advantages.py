"""group_advantages.py, token_advantages.py and pass_at_k.py against float64 loops over prompts."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax import advantages, group_advantages, pass_at_k, returns, token_advantages

GROUP, ROWS, TOKENS = 4, 12, 5
# Multiples of 1/128, exact in float32: a processor may take what lies below 1e-38 for 0, and equal rewards are special.
STEPS = st.integers(-6400, 6400).map(lambda steps: steps / 128)
REWARDS = hnp.arrays(np.float32, (ROWS,), elements=st.one_of(STEPS, st.sampled_from([0.0, 1.0])))
LENGTHS = hnp.arrays(np.int32, (ROWS,), elements=st.integers(0, 9))
MASK = hnp.arrays(np.bool_, (ROWS,), elements=st.sampled_from([True, True, True, False]))
TABLE = hnp.arrays(np.float32, (ROWS, TOKENS), elements=st.floats(-8, 8, width=32))
TOKEN_MASK = hnp.arrays(np.bool_, (ROWS, TOKENS))
SEED_LENGTHS = np.arange(1, ROWS + 1)


def gdpo_of_two(r, m, group, **knobs):
    """The second reward is a cosine of the first, of which its own derivative is clean outside the mask."""
    two = jnp.stack([r, jnp.cos(r if m is None else jnp.where(m, r, 0.0))], 1)
    mask = None if m is None else jnp.stack([m, m], 1)
    return group_advantages.gdpo(two, mask, group=group, weights=jnp.array([1.0, 0.5]), epsilon=EPSILON, **knobs)


EPSILON = 1e-2
# Functions of (rewards [B], mask [B], group) -> [B].
FUNCTIONS = {
    "group_centred": lambda r, m, g=GROUP, **kw: group_advantages.group_centred(r, m, group=g),
    "group_relative": lambda r, m, g=GROUP, **kw: group_advantages.group_relative(r, m, group=g, epsilon=1e-2),
    "group_relative ddof 0": lambda r, m, g=GROUP, **kw: group_advantages.group_relative(
        r, m, group=g, ddof=0, epsilon=1e-2
    ),
    "group_relative_batch_std": lambda r, m, g=GROUP, **kw: group_advantages.group_relative_batch_std(
        r, m, group=g, epsilon=1e-2, **kw
    ),
    "leave_one_out": lambda r, m, g=GROUP, **kw: group_advantages.leave_one_out(r, m, group=g),
    "optimal_reward_baseline": lambda r, m, g=GROUP, **kw: group_advantages.optimal_reward_baseline(
        r, np.resize(SEED_LENGTHS, r.shape), m, group=g
    ),
    "gpg": lambda r, m, g=GROUP, **kw: group_advantages.gpg(r, m, group=g, normaliser=2.0, **kw),
    "best_of_group_advantage": lambda r, m, g=GROUP, **kw: pass_at_k.best_of_group_advantage(r, m, group=g),
    "gdpo": lambda r, m, g=GROUP, **kw: gdpo_of_two(r, m, g, **kw),
}
COMPILED = {name: jax.jit(function) for name, function in FUNCTIONS.items()}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def spread(x, ddof):
    return math.sqrt(sum((v - sum(x) / len(x)) ** 2 for v in x) / (len(x) - ddof)) if len(x) > ddof else 0.0


def batch_spread(groups, ddof):
    return spread([r for group in groups for r in group.values()], ddof)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# Oracles of one group {row: reward} of the rewards that count, and of all groups -> {row: advantage}.
def centred(group, groups):
    return {i: r - mean(group.values()) for i, r in group.items()}


def relative(ddof):
    return lambda group, groups: {
        i: a / (spread(group.values(), ddof) + EPSILON) for i, a in centred(group, groups).items()
    }


def batch_std(group, groups):
    return {i: a / (batch_spread(groups, 1) + EPSILON) for i, a in centred(group, groups).items()}


def others(group, i):
    return [r for j, r in group.items() if j != i]


def leave_one_out(group, groups):
    return {i: r - mean(others(group, i)) if len(group) > 1 else 0.0 for i, r in group.items()}


def length_weighted(group, groups):
    lengths = {i: float(SEED_LENGTHS[i]) for i in group}
    baseline = sum(lengths[i] * r for i, r in group.items()) / sum(lengths.values())
    return {i: r - baseline for i, r in group.items()}


def gpg(group, groups):
    counted = sum(len(g) for g in groups)
    flat = sum(len(g) for g in groups if len(set(g.values())) == 1)
    alpha = counted / (counted - flat) if counted > flat else 0.0
    return {i: alpha * a / 2.0 for i, a in centred(group, groups).items()}


def best(group, groups):
    if len(group) == 1:
        return dict.fromkeys(group, 0.0)
    return {i: max(group.values()) - max(others(group, i)) for i in group}


def gdpo(group, groups):
    def summed(group):
        second = {i: math.cos(r) for i, r in group.items()}
        each = relative(1)(group, groups), relative(1)(second, groups)
        return {i: each[0][i] + 0.5 * each[1][i] for i in group}

    everything = {i: a for g in groups for i, a in summed(g).items()}
    centre = mean(everything.values())
    variance = mean((a - centre) ** 2 for a in everything.values())
    return {i: (everything[i] - centre) / math.sqrt(variance + 1e-8) for i in group}


ORACLES = {
    "group_centred": centred,
    "group_relative": relative(1),
    "group_relative ddof 0": relative(0),
    "group_relative_batch_std": batch_std,
    "leave_one_out": leave_one_out,
    "optimal_reward_baseline": length_weighted,
    "gpg": gpg,
    "best_of_group_advantage": best,
    "gdpo": gdpo,
}


def by_groups(oracle, rewards, mask, group=GROUP):
    groups = [
        {i: float(rewards[i]) for i in range(start, start + group) if mask[i]}
        for start in range(0, len(rewards), group)
    ]
    out = np.zeros(len(rewards))
    for members in filter(None, groups):
        for i, advantage in oracle(members, list(filter(None, groups))).items():
            out[i] = advantage
    return out


@each_function
@given(rewards=REWARDS, mask=MASK)
def test_equals_the_definition(name, rewards, mask):
    got = np.asarray(COMPILED[name](np.where(mask, rewards, np.nan), mask))
    expected = by_groups(ORACLES[name], rewards, mask)
    if name == "gdpo" and np.abs(expected).max() > 0 and np.std(expected[mask]) < 0.5:
        return  # whitening of rounding noise
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
    assert not got[~mask].any()


@each_function
def test_groups_of_one_and_equal_rewards_give_exactly_zero(name):
    rewards = np.repeat(np.float32([0.1, 1e6 + 0.3, -7.7]), GROUP)
    everyone = np.ones(ROWS, bool)
    assert not COMPILED[name](rewards, everyone).any()
    assert not FUNCTIONS[name](jnp.arange(12.0), everyone, 1).any()
    alone = np.arange(ROWS) % GROUP == 2
    assert not COMPILED[name](np.float32(np.arange(12)), alone).any()
    assert not COMPILED[name](np.float32(np.arange(12)), ~everyone).any()


@each_function
def test_missing_rewards_show_unless_masked(name):
    rewards = np.float32(np.arange(12) ** 2 % 7)
    rewards[5] = np.nan
    whole_batch = name in ("group_relative_batch_std", "gdpo")
    got = np.isnan(COMPILED[name](rewards, np.ones(ROWS, bool)))
    assert got[5]
    assert got[:4].any() == whole_batch
    if name != "optimal_reward_baseline" and name != "best_of_group_advantage":
        assert got[4:8].all()
    assert not np.isnan(COMPILED[name](rewards, ~np.isnan(rewards))).any()
    everything = np.ones(ROWS, bool)
    np.testing.assert_allclose(
        COMPILED[name](rewards * 0 + 1, None)[:4], COMPILED[name](rewards * 0 + 1, everything)[:4]
    )


@each_function
def test_garbage_changes_no_gradient_and_gradients_equal_finite_differences(name):
    rng = np.random.default_rng(0)
    rewards, mask = rng.normal(size=ROWS), rng.random(ROWS) < 0.7
    mask[:4], mask[4:8] = [True, False, False, False], True
    rewards[4:8] = 0.3  # all equal: the derivative of a spread of 0 must not be infinite
    loss = jax.jit(jax.grad(lambda r: jnp.sum(jnp.sin(FUNCTIONS[name](r, mask)) * jnp.arange(12.0))))
    clean = loss(jnp.float32(np.where(mask, rewards, 0)))
    assert np.isfinite(clean).all()
    assert not np.asarray(clean)[~mask].any()
    for garbage in (np.nan, np.inf, -1e9):
        np.testing.assert_array_equal(loss(jnp.float32(np.where(mask, rewards, garbage))), clean)
    with jax.enable_x64():
        spread_out = jnp.asarray(rng.permutation(ROWS) + 0.1 * rng.normal(size=ROWS))
        check_grads(jax.jit(lambda r: FUNCTIONS[name](r, mask)), (spread_out,), order=1, modes=["rev"])
        assert FUNCTIONS[name](spread_out, mask).dtype == jnp.float64


@each_function
def test_shift_permutation_dtype_and_errors(name):
    rng = np.random.default_rng(1)
    rewards, mask = rng.normal(size=ROWS).astype(np.float32), np.ones(ROWS, bool)
    value = np.asarray(COMPILED[name](rewards, mask))
    if name != "gdpo":  # whose second reward in this table is a cosine
        shifted = rewards + np.repeat(np.float32([3, -2, 0]), GROUP) * (name != "group_relative_batch_std")
        np.testing.assert_allclose(COMPILED[name](shifted, mask), value, rtol=1e-3, atol=1e-4)
    prompts = np.array([2, 0, 1])
    if name != "optimal_reward_baseline":  # whose lengths in this table belong to rows
        inside = rng.permutation(GROUP)
        order = (prompts[:, None] * GROUP + inside[None]).reshape(-1)
        np.testing.assert_allclose(COMPILED[name](rewards[order], mask), value[order], rtol=1e-4, atol=1e-5)
    assert FUNCTIONS[name](jnp.asarray(rewards, jnp.bfloat16), mask).dtype == jnp.float32
    np.testing.assert_allclose(FUNCTIONS[name](rewards, mask), value, rtol=1e-4, atol=1e-5)  # eager
    if name != "gdpo":
        with pytest.raises(TypeError, match="rewards must be floating point"):
            FUNCTIONS[name](jnp.arange(12), mask)
    with pytest.raises(TypeError, match="mask must be bool"):
        FUNCTIONS[name](jnp.asarray(rewards), jnp.ones(ROWS))
    for group in (5, 0, 4.0, True):
        with pytest.raises(ValueError, match="group must"):
            FUNCTIONS[name](rewards, mask, group)
    if name != "gdpo":
        with pytest.raises(AssertionError):
            FUNCTIONS[name](jnp.asarray(rewards), mask[:6])


def test_limits_said_in_the_docstrings():
    rng = np.random.default_rng(2)
    r, mask = rng.normal(size=ROWS).astype(np.float32), rng.random(ROWS) < 0.8
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    ga = group_advantages
    centre = ga.group_centred(r, mask, group=4)
    close(centre.reshape(3, 4).sum(1), np.zeros(3))
    n = np.repeat(mask.reshape(3, 4).sum(1), 4)
    close(centre, np.maximum(n - 1, 0) / np.maximum(n, 1) * ga.leave_one_out(r, mask, group=4))
    close(ga.leave_one_out(r, group=2), (r.reshape(-1, 2) @ np.array([[1, -1], [-1, 1]])).reshape(-1))
    exact = lambda x: ga.group_relative(x, mask, group=4, epsilon=0.0)
    close(exact(r * 50), exact(r))
    close(ga.group_relative(r, group=ROWS), ga.group_relative_batch_std(r, group=ROWS))
    close(ga.group_relative(r, mask, group=4), ga.group_relative(r, mask, group=4, ddof=1, epsilon=1e-4))  # defaults
    close(ga.group_relative_batch_std(r, group=4), ga.group_relative_batch_std(r, group=4, ddof=1, epsilon=1e-4))
    close(ga.gpg(r, mask, group=4), centre)
    close(ga.optimal_reward_baseline(r, np.full(ROWS, 7), mask, group=4), centre)
    assert not ga.optimal_reward_baseline(r, np.zeros(ROWS, int), mask, group=4).any()
    close(ga.remax(r, r), np.zeros(ROWS))
    close(ga.remax(r, 2 * r), -r)
    both = np.stack([r, np.sin(40 * r)], 1)
    close(ga.gdpo(both * np.float32([1, 1e3]), group=4, epsilon=0.0), ga.gdpo(both, group=4, epsilon=0.0))
    close(ga.gdpo(both, group=4, weights=2.0), ga.gdpo(both, group=4))
    # combinations of the same sum stay apart
    apart = ga.gdpo(np.float32([[0, 1], [1, 0], [1, 0], [1, 1]]), group=4)
    assert abs(apart[0] - apart[1]) > 0.1
    # a missing reward adds nothing, its row keeps the other
    holes = np.ones((ROWS, 2), bool)
    holes[3, 1] = holes[6, :] = False
    partly = ga.gdpo(np.where(holes, both, np.nan), holes, group=4, epsilon=1e-2)
    assert np.isfinite(partly).all()
    assert partly[6] == 0
    with pytest.raises(TypeError, match="greedy_rewards must be floating point"):
        ga.remax(jnp.zeros(2), jnp.zeros(2, int))
    with pytest.raises(AssertionError):
        ga.remax(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(TypeError, match="rewards must be floating point"):
        ga.gdpo(jnp.zeros((4, 2), int), group=4)
    for shape in ((4, 3), (8, 2)):
        with pytest.raises(AssertionError):
            ga.gdpo(jnp.zeros((4, 2)), jnp.ones(shape, bool), group=4)
    with pytest.raises(AssertionError):
        ga.optimal_reward_baseline(jnp.zeros(4), jnp.zeros(8), group=4)


def test_leave_one_out_gives_an_unbiased_gradient():
    # two answers of chance p and 1 - p, rewards 1 and 0: all groups of two, enumerated
    p = 0.3
    scores = np.array([1 / p, -1 / (1 - p)])  # derivative of the log-chance by p
    total = 0.0
    for draw in itertools.product([0, 1], repeat=2):
        chance = np.prod([p if a == 0 else 1 - p for a in draw])
        rewards = jnp.array([1.0 - a for a in draw])
        total += chance * np.mean(np.asarray(group_advantages.leave_one_out(rewards, group=2)) * scores[list(draw)])
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)  # the mean reward is p


def test_length_weighted_baseline_has_the_least_weighted_variance():
    rng = np.random.default_rng(3)
    r, lengths = rng.normal(size=4).astype(np.float32), np.array([1, 5, 2, 9])
    baseline = r - np.asarray(group_advantages.optimal_reward_baseline(r, lengths, group=4))
    cost = lambda b: (lengths * (r - b) ** 2).sum()
    assert cost(baseline[0]) < min(cost(baseline[0] + 0.01), cost(baseline[0] - 0.01))


# --- knobs and devices ------------------------------------------------------------------------------------------------


def test_knobs_sweep_by_vmap():
    r = np.random.default_rng(4).normal(size=ROWS).astype(np.float32)
    knobs = np.float32([1e-3, 0.5])
    for sweep in (
        lambda e: group_advantages.group_relative(r, group=4, epsilon=e),
        lambda e: group_advantages.group_relative_batch_std(r, group=4, epsilon=e, ddof=e),
        lambda e: group_advantages.gpg(r, group=4, normaliser=e),
        lambda e: group_advantages.gdpo(jnp.stack([r, r * r], 1), group=4, weights=jnp.stack([e, 1 - e]), epsilon=e),
    ):
        np.testing.assert_allclose(jax.vmap(sweep)(knobs), [sweep(e) for e in knobs], rtol=1e-4, atol=1e-5)


def token_mask(rows=ROWS):
    lengths = np.random.default_rng(5).integers(1, TOKENS + 1, rows)
    return np.arange(TOKENS) < lengths[:, None]


@pytest.mark.parametrize("map_devices", [lambda f, axis_name: jax.jit(jax.vmap(f, axis_name=axis_name)), jax.pmap])
def test_four_devices_equal_one(map_devices):
    rng = np.random.default_rng(6)
    r = np.float32(rng.integers(0, 2, 16))
    r[:4] = 1.0
    mask, tokens = rng.random(16) < 0.8, token_mask(16)
    table = rng.normal(size=(16, TOKENS)).astype(np.float32)
    shard = lambda x: x.reshape(4, 4, *x.shape[1:])
    for function, arrays in (
        (FUNCTIONS["group_relative_batch_std"], (r, mask)),
        (FUNCTIONS["gpg"], (r, mask)),
        (FUNCTIONS["gdpo"], (r, mask)),
        (lambda *a, **kw: token_advantages.reinforce_plus_plus(*a, **kw).advantages, (table, tokens)),
        (lambda *a, **kw: token_advantages.reinforce_plus_plus_baseline(*a, group=4, **kw), (r, tokens)),
    ):
        expected = function(*arrays)
        sharded = map_devices(lambda *a, f=function: f(*a, axis_name="data"), axis_name="data")
        got = sharded(*map(shard, arrays)).reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# --- per token --------------------------------------------------------------------------------------------------------


def whitened(values):
    centre = sum(values) / len(values)
    variance = sum((v - centre) ** 2 for v in values) / len(values)
    return [(v - centre) / math.sqrt(variance + 1e-4) for v in values]


reinforce_plus_plus = jax.jit(token_advantages.reinforce_plus_plus)
baseline_form = jax.jit(token_advantages.reinforce_plus_plus_baseline, static_argnames="group")


@given(rewards=TABLE, mask=TOKEN_MASK)
def test_reinforce_plus_plus_whitens_returns(rewards, mask):
    got = reinforce_plus_plus(np.where(mask, rewards, np.nan), mask, discount=0.9, epsilon=1e-4)
    expected = np.asarray(returns.discounted_returns(rewards, mask, discount=0.9))
    np.testing.assert_allclose(got.returns, expected, rtol=1e-5, atol=1e-5)
    assert not np.asarray(got.advantages)[~mask].any()
    if mask.any():
        np.testing.assert_allclose(
            got.advantages[mask], whitened(expected[mask].astype(np.float64).tolist()), rtol=2e-3, atol=2e-3
        )


@given(rewards=REWARDS, mask=TOKEN_MASK)
def test_reinforce_plus_plus_baseline_whitens_centred_rewards_over_tokens(rewards, mask):
    has_tokens = mask.any(1)
    got = np.asarray(baseline_form(np.where(has_tokens, rewards, np.nan), mask, group=GROUP, epsilon=1e-4))
    assert not got[~mask].any()
    expected = np.where(mask, by_groups(centred, rewards, has_tokens)[:, None], 0.0)
    if mask.any():
        np.testing.assert_allclose(got[mask], whitened(expected[mask].tolist()), rtol=5e-3, atol=5e-3)


def optimal_token_baseline_loop(rewards, log_probs, squares, mask, group):
    out = np.zeros(mask.shape)
    for start in range(0, len(mask), group):
        rows = []
        for b in range(start, start + group):
            kept = np.flatnonzero(mask[b])
            r = rewards[b, kept].astype(np.float64)
            energy = 1 - 2 * np.exp(log_probs[b, kept].astype(np.float64)) + squares[b, kept]
            rows.append(
                (b, kept, [r[t:].sum() for t in range(len(kept))], [energy[: t + 1].sum() for t in range(len(kept))])
            )
        for b, kept, row_returns, _ in rows:
            for t, slot in enumerate(kept):
                alive = [(g[t], w[t]) for _, _, g, w in rows if len(g) > t]
                weight = sum(w for _, w in alive)
                baseline = sum(g * w for g, w in alive) / weight if weight > 0 else 0.0
                out[b, slot] = row_returns[t] - baseline
    return out


def probabilities(seed, rows=ROWS):
    logits = np.random.default_rng(seed).normal(size=(rows, TOKENS, 4)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.log(p[..., 0]).astype(np.float32), (p**2).sum(-1).astype(np.float32)


optimal_token_baseline = jax.jit(token_advantages.optimal_token_baseline, static_argnames="group")


@given(rewards=TABLE, mask=TOKEN_MASK, seed=st.integers(0, 99))
def test_optimal_token_baseline_equals_a_loop(rewards, mask, seed):
    log_probs, squares = probabilities(seed)
    dirty = [np.where(mask, x, fill) for x, fill in ((rewards, np.nan), (log_probs, np.inf), (squares, -1e9))]
    got = optimal_token_baseline(*dirty, mask, group=GROUP)
    expected = optimal_token_baseline_loop(rewards, log_probs, squares, mask, GROUP)
    np.testing.assert_allclose(got.advantages, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got.returns, returns.discounted_returns(rewards, mask), rtol=1e-4, atol=1e-4)


def test_optimal_token_baseline_limits():
    rewards, mask = np.zeros((ROWS, TOKENS), np.float32), np.ones((ROWS, TOKENS), bool)
    rewards[:, -1] = np.random.default_rng(7).normal(size=ROWS)
    same = np.full((ROWS, TOKENS), -1.0, np.float32), np.full((ROWS, TOKENS), 0.3, np.float32)
    got = token_advantages.optimal_token_baseline(rewards, *same, mask, group=4)
    centre = group_advantages.group_centred(rewards[:, -1], group=4)
    np.testing.assert_allclose(got.advantages, np.repeat(centre[:, None], TOKENS, 1), rtol=1e-4, atol=1e-5)
    alone = token_advantages.optimal_token_baseline(rewards, *same, mask, group=1)
    np.testing.assert_allclose(alone.advantages, np.zeros_like(rewards), atol=1e-6)
    # a row that goes on alone is compared with itself
    longer = mask.copy()
    longer[1:4, 2:] = False
    tail = token_advantages.optimal_token_baseline(rewards, *same, longer, group=4).advantages[0, 2:]
    np.testing.assert_allclose(tail, np.zeros(3), atol=1e-6)
    # padding on the left instead of the right: positions are counts of valid tokens
    log_probs, squares = probabilities(1)
    roll = lambda x: np.roll(x, 3, axis=1)
    short = mask.copy()
    short[:, 2:] = False
    right = token_advantages.optimal_token_baseline(rewards + 1, log_probs, squares, short, group=4).advantages
    left = token_advantages.optimal_token_baseline(
        *map(roll, (rewards + 1, log_probs, squares)), roll(short), group=4
    ).advantages
    np.testing.assert_allclose(roll(right), left, rtol=1e-5, atol=1e-6)
    # deterministic rows have no gradient and no baseline; log-probs are constants
    certain = token_advantages.optimal_token_baseline(rewards, rewards * 0, rewards * 0 + 1, mask, group=4)
    np.testing.assert_allclose(certain.advantages, certain.returns)
    total = lambda p, s: jnp.sum(token_advantages.optimal_token_baseline(rewards, p, s, mask, group=4).advantages ** 2)
    assert not any(g.any() for g in jax.grad(total, (0, 1))(log_probs, squares))


def test_token_functions_gradients_and_errors():
    rng = np.random.default_rng(8)
    mask = token_mask()
    log_probs, squares = probabilities(2)
    with jax.enable_x64():
        table, row = jnp.asarray(rng.normal(size=(ROWS, TOKENS))), jnp.asarray(rng.normal(size=ROWS))
        plus = lambda r: token_advantages.reinforce_plus_plus(r, mask, discount=0.9)
        otb = lambda r: token_advantages.optimal_token_baseline(r, log_probs, squares, mask, group=4, discount=0.9)
        check_grads(jax.jit(plus), (table,), order=1, modes=["rev"])
        check_grads(jax.jit(otb), (table,), order=1, modes=["rev"])
        check_grads(lambda r: baseline_form(r, mask, group=4), (row,), order=1, modes=["rev"])
    spread_out = group_advantages.to_tokens(jnp.arange(12.0), mask)
    np.testing.assert_array_equal(spread_out, np.where(mask, np.arange(12.0)[:, None], 0))
    shifted = token_advantages.reinforce_plus_plus(np.float32(table), mask, discount=0.0, ddof=1)
    again = token_advantages.reinforce_plus_plus(np.float32(table) + 3, mask, discount=0.0, ddof=1)
    np.testing.assert_allclose(shifted.advantages, again.advantages, rtol=1e-3, atol=1e-4)
    assert isinstance(shifted, advantages.Advantages)
    bad_mask, integers = mask.astype(np.float32), np.zeros((ROWS, TOKENS), int)
    for function, arrays, group in (
        (token_advantages.reinforce_plus_plus, (np.float32(table),), {}),
        (token_advantages.reinforce_plus_plus_baseline, (np.float32(row),), {"group": 4}),
        (token_advantages.optimal_token_baseline, (np.float32(table), log_probs, squares), {"group": 4}),
    ):
        with pytest.raises(TypeError, match="mask must be bool"):
            function(*arrays, bad_mask, **group)
        with pytest.raises(TypeError, match="must be floating point"):
            function(integers[:, 0] if arrays[0].ndim == 1 else integers, *arrays[1:], mask, **group)
        with pytest.raises((AssertionError, ValueError)):
            function(*arrays, mask[:4], **group)
        if group:
            with pytest.raises(ValueError, match="group must divide"):
                function(*arrays, mask, group=5)
    with pytest.raises(AssertionError):
        group_advantages.to_tokens(jnp.zeros(3), mask)


# --- pass@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_equals_all_sets_of_k(k):
    n, c = (x.reshape(-1) for x in np.meshgrid(np.arange(7), np.arange(7), indexing="ij"))
    got = pass_at_k.pass_at_k(c, n, k=k)
    for samples, correct, value in zip(n, c, got, strict=True):
        sets = list(itertools.combinations(range(samples), k))
        if sets and correct <= samples:
            exact = np.mean([any(i < correct for i in chosen) for chosen in sets])
            np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-6)
    assert np.isnan(got[n < k]).all()


def test_pass_at_k_does_not_overflow_and_refuses_mistakes():
    exact = 1 - math.comb(9_000, 100) / math.comb(10_000, 100)
    np.testing.assert_allclose(pass_at_k.pass_at_k(jnp.array(1_000), 10_000, k=100), exact, rtol=1e-5)
    by_row = pass_at_k.pass_at_k(jnp.array([[1, 2]]), jnp.array([[2, 4]]), k=1)
    np.testing.assert_allclose(by_row, [[0.5, 0.5]])
    assert by_row.dtype == jnp.float32
    for k in (0, 1.0, True):
        with pytest.raises(ValueError, match="k must be an int >= 1"):
            pass_at_k.pass_at_k(jnp.array(1), 4, k=k)
        with pytest.raises(ValueError, match="k must be an int >= 1"):
            pass_at_k.pass_at_k_advantage(jnp.array([True]), group=1, k=k)
    with pytest.raises(ValueError, match="k must be at most group = 2"):
        pass_at_k.pass_at_k_advantage(jnp.array([True, False]), group=2, k=3)
    with pytest.raises(TypeError, match="correct must be bool"):
        pass_at_k.pass_at_k_advantage(jnp.array([1.0, 0.0]), group=2, k=1)
    with pytest.raises(TypeError, match="mask must be bool"):
        pass_at_k.pass_at_k_advantage(jnp.array([True, False]), jnp.ones(2), group=2, k=1)
    with pytest.raises(ValueError, match="group must divide"):
        pass_at_k.pass_at_k_advantage(jnp.array([True, False, True]), group=2, k=1)


def set_advantages(correct, k):
    """Every set of k answers earns its best; its standardised reward is shared out to its members and averaged."""
    sets = list(itertools.combinations(range(len(correct)), k))
    earned = np.array([float(any(correct[i] for i in chosen)) for chosen in sets])
    if not sets or earned.std() == 0:
        return np.zeros(len(correct))
    standard = (earned - earned.mean()) / earned.std()
    return np.array([np.mean([a for a, s in zip(standard, sets, strict=True) if i in s]) for i in range(len(correct))])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_advantage_equals_all_sets_of_k(k):
    advantage = jax.jit(pass_at_k.pass_at_k_advantage, static_argnames=("group", "k"))
    for bits in itertools.product([False, True], repeat=4):
        for missing in (None, 0, 3):
            kept = np.array([i != missing for i in range(4)])
            got = np.asarray(advantage(np.array(bits), kept, group=4, k=k))
            expected = np.zeros(4)
            expected[kept] = set_advantages(np.array(bits)[kept], k)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    correct = jnp.array([True, False, True, True])
    pair = jnp.concatenate([correct, ~correct])
    np.testing.assert_allclose(
        pass_at_k.pass_at_k_advantage(pair, group=4, k=k)[4:], pass_at_k.pass_at_k_advantage(~correct, group=4, k=k)
    )


def test_pass_at_1_is_group_relative_and_few_wrong_answers_cost_nothing():
    correct = jnp.array([True, False, True, True])
    expected = group_advantages.group_relative(correct.astype(jnp.float32), group=4, ddof=0, epsilon=0.0)
    np.testing.assert_allclose(pass_at_k.pass_at_k_advantage(correct, group=4, k=1), expected, rtol=1e-5)
    assert not pass_at_k.pass_at_k_advantage(correct, group=4, k=2).any()


def test_best_of_group_never_punishes():
    rewards = np.random.default_rng(9).normal(size=ROWS).astype(np.float32)
    got = np.asarray(pass_at_k.best_of_group_advantage(rewards, group=4)).reshape(3, 4)
    assert (got >= 0).all()
    np.testing.assert_array_equal((got > 0).sum(1), [1, 1, 1])
    np.testing.assert_array_equal(got.argmax(1), rewards.reshape(3, 4).argmax(1))
    assert np.isnan(pass_at_k.best_of_group_advantage(jnp.array([jnp.nan]), group=1)).all()
