"""Value losses against plain Python, and distributional critics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.losses import categorical_value, value

rng = np.random.default_rng(6)
N = 400
VALUES, OLD, RETURNS = (rng.choice([0.3, 1.0, 5.0], N) * rng.normal(size=N) for _ in range(3))
VALUES, OLD, RETURNS = (x.astype(np.float32) for x in (VALUES, OLD, RETURNS))
OLD[:100] = VALUES[:100]


def clipped(v, old, r, c):
    bounded = old + min(max(v - old, -c), c)
    return max((v - r) ** 2, (bounded - r) ** 2)


def huber(v, r, delta):
    e = abs(v - r)
    return 0.5 * e * e if e <= delta else delta * (e - 0.5 * delta)


ORACLES = {
    "squared": (lambda v, o, r: value.squared_error(v, r), lambda v, o, r: (v - r) ** 2),
    "clipped": (
        lambda v, o, r: value.clipped_squared_error(v, o, r, clip=0.4),
        lambda v, o, r: clipped(v, o, r, 0.4),
    ),
    "huber": (lambda v, o, r: value.huber(v, r, delta=0.7), lambda v, o, r: huber(v, r, 0.7)),
    "expectile": (
        lambda v, o, r: value.expectile_error(v, r, expectile=0.8),
        lambda v, o, r: (0.8 if r >= v else 0.2) * (r - v) ** 2,
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_plain_python(name):
    function, oracle = ORACLES[name]
    expected = [oracle(*map(float, item)) for item in zip(VALUES, OLD, RETURNS, strict=True)]
    np.testing.assert_allclose(function(VALUES, OLD, RETURNS), expected, rtol=1e-4, atol=1e-5)


def slope(function, values, *rest):
    return jax.grad(lambda x: jnp.sum(function(x, *rest)))(jnp.asarray(values))


def test_what_equals_what():
    squares = value.squared_error(VALUES, RETURNS)
    unbounded = lambda v: value.clipped_squared_error(v, OLD, RETURNS, clip=jnp.inf)
    np.testing.assert_array_equal(unbounded(VALUES), squares)
    np.testing.assert_allclose(slope(unbounded, VALUES), 2 * (VALUES - RETURNS), rtol=1e-5)
    np.testing.assert_allclose(2 * value.huber(VALUES, RETURNS, delta=jnp.inf), squares, rtol=1e-6)
    np.testing.assert_allclose(2 * value.expectile_error(VALUES, RETURNS, expectile=0.5), squares, rtol=1e-6)
    assert (value.clipped_squared_error(VALUES, OLD, RETURNS) >= squares).all()


def test_where_the_value_did_not_move_the_clipped_loss_has_the_full_gradient():
    found = slope(value.clipped_squared_error, VALUES[:100], OLD[:100], RETURNS[:100])
    np.testing.assert_allclose(found, 2 * (VALUES - RETURNS)[:100], rtol=1e-5)


def test_a_value_beyond_the_clip_moves_only_back():
    towards, away = jnp.array([1.0]), jnp.array([-1.0])  # the old value is 0, the return 5
    old, returns = jnp.zeros(1), jnp.array([5.0])
    assert slope(value.clipped_squared_error, towards, old, returns) == 0
    assert slope(value.clipped_squared_error, away, old, returns) == -12


def test_huber_gradient_stays_at_delta():
    np.testing.assert_allclose(
        slope(lambda v: value.huber(v, jnp.zeros(3), delta=0.5), [-9.0, 0.2, 9.0]), [-0.5, 0.2, 0.5]
    )


@pytest.mark.parametrize(("level", "expected"), [(0.5, 2.0), (0.9, 4.2 / 1.3), (0.999, 4.002 / 1.003)])
def test_the_minimum_of_the_expectile_error_moves_from_the_mean_to_the_maximum(level, expected):
    targets = jnp.array([0.0, 1.0, 2.0, 3.0, 4.0])
    grid = jnp.linspace(0, 4, 4001)
    losses = jax.vmap(lambda v: jnp.sum(value.expectile_error(jnp.full(5, v), targets, expectile=level)))(grid)
    np.testing.assert_allclose(grid[jnp.argmin(losses)], expected, atol=2e-3)


@pytest.mark.parametrize("kappa", [0.0, 0.6])
def test_quantile_huber_equals_loops(kappa):
    quantiles, targets = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    expected = []
    for row, goals in zip(quantiles, targets, strict=True):
        total = 0.0
        for i, theta in enumerate(row, start=1):
            level = (2 * i - 1) / (2 * len(row))
            for goal in goals:
                u = float(goal) - float(theta)
                loss = abs(u) if kappa == 0 else huber(u, 0.0, kappa) / kappa
                total += abs(level - (u < 0)) * loss / len(goals)
        expected.append(total)
    np.testing.assert_allclose(value.quantile_huber(quantiles, targets, kappa=kappa), expected, rtol=1e-5)


def test_quantile_regression_finds_the_quantiles():
    samples = jnp.asarray(np.arange(100, dtype=np.float32))
    quantiles = jnp.zeros(4)
    step = jax.jit(lambda q: q - 2.0 * jax.grad(value.quantile_huber)(q, samples, kappa=0.0))
    for _ in range(400):
        quantiles = step(quantiles)
    np.testing.assert_allclose(quantiles, [12, 37, 62, 87], atol=2)


def test_one_quantile_is_half_of_huber_over_kappa():
    v, r = jnp.asarray(VALUES), jnp.asarray(RETURNS)
    found = value.quantile_huber(v[:, None], r[:, None], kappa=0.5)
    np.testing.assert_allclose(found, 0.5 * value.huber(v, r, delta=0.5) / 0.5, rtol=1e-5)


def test_quantiles_and_targets_must_share_leading_axes():
    with pytest.raises(ValueError, match="share leading axes"):
        value.quantile_huber(jnp.zeros((2, 3)), jnp.zeros((3, 3)))


# --- distributions over fixed atoms -----------------------------------------------------------------------------------

SUPPORT = np.array([-2.0, -1.0, 0.5, 1.0, 3.0], np.float32)  # not evenly spaced


def two_hot(v):
    v = min(max(v, -2.0), 3.0)
    out = [0.0] * 5
    for i in range(4):
        low, high = float(SUPPORT[i]), float(SUPPORT[i + 1])
        if low <= v <= high:
            out = [0.0] * 5
            out[i], out[i + 1] = (high - v) / (high - low), (v - low) / (high - low)
    return out


def test_two_hot_equals_loops_and_keeps_the_mean():
    values = np.concatenate([rng.uniform(-4, 4, 50), SUPPORT]).astype(np.float32)
    found = categorical_value.two_hot(values, SUPPORT)
    np.testing.assert_allclose(found, [two_hot(float(v)) for v in values], atol=1e-6)
    np.testing.assert_allclose(found @ SUPPORT, np.clip(values, -2, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(categorical_value.two_hot(SUPPORT, SUPPORT), np.eye(5), atol=1e-7)


def test_projection_equals_c51_and_keeps_sum_and_mean():
    atoms = np.linspace(-2, 2, 5, dtype=np.float32)
    p = rng.dirichlet(np.ones(5), 20).astype(np.float32)
    locations = (rng.normal(size=(20, 1)) + rng.choice([0.0, 0.9], (20, 1)) * atoms).astype(np.float32)
    expected = np.zeros((20, 5))
    for row in range(20):
        for i in range(5):
            for j in range(5):  # Bellemare et al. 2017, eq. 7, with spacing 1
                at = min(max(float(locations[row, j]), -2.0), 2.0)
                expected[row, i] += min(max(1 - abs(at - float(atoms[i])), 0.0), 1.0) * float(p[row, j])
    found = categorical_value.project(p, locations, atoms)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.sum(found, -1), np.ones(20), rtol=1e-5)
    inside = np.abs(locations).max(-1) <= 2
    assert inside.sum() > 3
    np.testing.assert_allclose((found @ atoms)[inside], (p * locations).sum(-1)[inside], rtol=1e-4, atol=1e-5)


def test_hl_gauss_equals_the_normal_distribution_cut_at_the_edges():
    edges = np.linspace(-2, 2, 9, dtype=np.float32)
    values = rng.uniform(-3, 3, 30).astype(np.float32)
    for smoothing in (0.2, 0.75, 2.0):
        expected = []
        for v in np.clip(values, -2, 2).astype(np.float64):
            cdf = scipy.stats.norm.cdf(edges.astype(np.float64), v, smoothing * 0.5)
            expected.append(np.diff(cdf) / (cdf[-1] - cdf[0]))
        np.testing.assert_allclose(categorical_value.hl_gauss(values, edges, smoothing=smoothing), expected, atol=2e-6)
    one_hot = categorical_value.hl_gauss(jnp.array(0.3), edges, smoothing=1e-4)
    assert one_hot.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def test_cross_entropy_is_least_at_the_target_and_mean_reads_the_value():
    logits, p = rng.normal(size=(6, 5)).astype(np.float32), rng.dirichlet(np.ones(5), 6).astype(np.float32)
    q = np.exp(logits.astype(np.float64))
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(categorical_value.cross_entropy(logits, p), -(p * np.log(q)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(categorical_value.mean(logits, SUPPORT), q @ SUPPORT, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slope(categorical_value.cross_entropy, np.log(p), p), np.zeros((6, 5)), atol=1e-6)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(categorical_value.cross_entropy(np.log(p), p), entropy, rtol=1e-5)
    impossible = categorical_value.cross_entropy(jnp.array([0.0, -jnp.inf]), jnp.array([1.0, 0.0]))
    assert impossible == 0.0  # a target of 0 asks nothing of a logit of -inf


def test_supports_are_checked_in_words():
    with pytest.raises(ValueError, match="support must be one axis of at least 2"):
        categorical_value.two_hot(jnp.zeros(3), jnp.zeros(1))
    with pytest.raises(ValueError, match="edges must be one axis"):
        categorical_value.hl_gauss(jnp.zeros(3), jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="one entry per atom"):
        categorical_value.mean(jnp.zeros((3, 4)), jnp.arange(5.0))


def test_extremes_are_finite():
    big = jnp.array([80.0, -80.0, 1e8])
    for target in (categorical_value.two_hot(big, SUPPORT), categorical_value.hl_gauss(big, SUPPORT)):
        np.testing.assert_allclose(jnp.sum(target, -1), np.ones(3), rtol=1e-6)
    assert math.isfinite(float(categorical_value.cross_entropy(jnp.array([80.0, -80.0]), jnp.array([0.0, 1.0]))))
