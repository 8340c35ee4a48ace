"""Delay credit against numerical integration, and TAMER's regressions against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.losses import tamer, value

rng = np.random.default_rng(10)
B, T, F = 3, 6, 4
LENGTHS = rng.uniform(0.1, 0.4, (B, T))
STARTS = (np.cumsum(LENGTHS, -1) - LENGTHS).astype(np.float32)
ENDS = np.cumsum(LENGTHS, -1).astype(np.float32)
MASK = np.ones((B, T), bool)
MASK[0, 4:] = False
MASK[1] = False
TIMES = np.sort(rng.uniform(0.3, 2.0, (B, F)), -1).astype(np.float32)
DENSITIES = {
    "uniform": (tamer.uniform_delay, scipy.stats.uniform(0.2, 0.4)),
    "gamma": (tamer.gamma_delay, scipy.stats.gamma(2.0, scale=0.28)),
    "gamma of other knobs": (
        functools.partial(tamer.gamma_delay, shape=3.0, scale=0.1), scipy.stats.gamma(3.0, scale=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSITIES)
def test_distributions_equal_scipy(name):
    distribution, reference = DENSITIES[name]
    delays = np.linspace(-1, 3, 50).astype(np.float32)
    np.testing.assert_allclose(distribution(delays), reference.cdf(delays), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DENSITIES)
def test_credit_is_the_share_of_the_delay_density_over_the_step(name):
    distribution, reference = DENSITIES[name]
    expected = np.zeros((B, F, T))
    for b in range(B):
        for f in range(F):
            for t in range(T):
                if MASK[b, t]:  # the midpoint rule over the moments of the step
                    moments = STARTS[b, t] + (ENDS[b, t] - STARTS[b, t]) * (np.arange(2000) + 0.5) / 2000
                    expected[b, f, t] = np.mean(reference.pdf(TIMES[b, f] - moments)) * (ENDS[b, t] - STARTS[b, t])
            expected[b, f] /= expected[b, f].sum() or 1.0
    found = tamer.delay_credit(TIMES, STARTS, ENDS, MASK, distribution=distribution)
    np.testing.assert_allclose(found, expected, atol=3e-3)
    sums = np.asarray(found).sum(-1)
    np.testing.assert_allclose(sums[sums > 0], 1.0, rtol=1e-5)
    assert not np.any(found[1])
    assert (sums[[0, 2]] > 0).any()


def test_credit_needs_only_differences_of_times_and_ignores_padded_ones():
    found = tamer.delay_credit(TIMES, STARTS, ENDS, MASK)
    np.testing.assert_allclose(tamer.delay_credit(TIMES + 8, STARTS + 8, ENDS + 8, MASK), found, atol=1e-4)
    dirty = np.where(MASK, STARTS, np.nan), np.where(MASK, ENDS, np.inf)
    np.testing.assert_array_equal(tamer.delay_credit(TIMES, *(x.astype(np.float32) for x in dirty), MASK), found)
    with pytest.raises(ValueError, match="share leading axes"):
        tamer.delay_credit(TIMES[:2], STARTS, ENDS, MASK)


def test_a_signal_before_anything_could_be_meant_credits_nothing():
    early = tamer.delay_credit(jnp.array([0.1]), jnp.array([0.0]), jnp.array([0.2]), jnp.ones(1, bool))
    assert early.tolist() == [[0.0]]


CREDIT = np.where(MASK[:, None, :], rng.dirichlet(np.ones(T), (B, F)), 0).astype(np.float32)
PREDICTIONS = np.where(MASK, rng.normal(size=(B, T)), np.nan).astype(np.float32)
SIGNALS = rng.choice([-1.0, 1.0], (B, F)).astype(np.float32)


def test_tamer_and_deep_tamer_equal_loops():
    whole, pairs = np.zeros((B, F)), np.zeros((B, F, T))
    for b in range(B):
        for f in range(F):
            steps = [t for t in range(T) if MASK[b, t]]
            predicted = sum(float(CREDIT[b, f, t]) * float(PREDICTIONS[b, t]) for t in steps)
            whole[b, f] = (float(SIGNALS[b, f]) - predicted) ** 2
            for t in steps:
                pairs[b, f, t] = float(CREDIT[b, f, t]) * (float(PREDICTIONS[b, t]) - float(SIGNALS[b, f])) ** 2
    np.testing.assert_allclose(tamer.tamer(PREDICTIONS, CREDIT, MASK, SIGNALS), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tamer.deep_tamer(PREDICTIONS, CREDIT, MASK, SIGNALS), pairs, rtol=1e-5, atol=1e-6)


def test_all_credit_on_one_step_is_the_squared_error_there():
    predictions, mask = jnp.asarray(rng.normal(size=T), jnp.float32), jnp.ones(T, bool)
    signals = jnp.ones(T)
    expected = value.squared_error(predictions, signals)
    np.testing.assert_allclose(tamer.tamer(predictions, jnp.eye(T), mask, signals), expected, rtol=1e-5)
    pairs = tamer.deep_tamer(predictions, jnp.eye(T), mask, signals)
    np.testing.assert_allclose(jnp.sum(pairs, -1), expected, rtol=1e-5)


def test_deep_tamer_is_never_below_tamer_for_credits_that_sum_to_one():
    mask, predictions = np.ones((B, T), bool), rng.normal(size=(B, T)).astype(np.float32)
    credit = rng.dirichlet(np.ones(T), (B, F)).astype(np.float32)
    pairs = np.sum(tamer.deep_tamer(predictions, credit, mask, SIGNALS), -1)
    assert (pairs >= np.asarray(tamer.tamer(predictions, credit, mask, SIGNALS)) - 1e-5).all()


def test_regression_recovers_the_reward_that_the_person_had_in_mind():
    """Signals arrive late and are still credited to the step that earned them."""
    starts = jnp.arange(30, dtype=jnp.float32) * 0.2
    kinds = rng.integers(0, 3, 30)
    hidden = jnp.array([-1.0, 0.0, 1.0])
    credit = tamer.delay_credit(starts + 0.5, starts, starts + 0.2, jnp.ones(30, bool))
    signals = credit @ hidden[kinds]
    loss = lambda table: jnp.sum(tamer.tamer(table[kinds], credit, jnp.ones(30, bool), signals))
    step = jax.jit(lambda table: table - 0.04 * jax.grad(loss)(table))
    table = jnp.zeros(3)
    for _ in range(300):
        table = step(table)
    np.testing.assert_allclose(table, hidden, atol=1e-2)


def test_shapes_are_checked_in_words():
    with pytest.raises(ValueError, match=r"credit must be \[..., F, T\]"):
        tamer.tamer(PREDICTIONS, CREDIT[:, :2], MASK, SIGNALS)
