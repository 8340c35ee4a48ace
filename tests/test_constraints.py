"""constraints.py against loops, and a constrained problem whose multiplier is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from rlhf_jax import advantages, constraints, group_advantages

COSTS = st.lists(st.floats(0, 10, width=32), min_size=1, max_size=8)
GAINS = st.floats(0, 2)
update_lagrange = jax.jit(constraints.update_lagrange)
update_pid_lagrange = jax.jit(constraints.update_pid_lagrange)


@given(costs=COSTS, limit=st.floats(0, 10), rate=GAINS)
def test_dual_ascent_equals_a_loop(costs, limit, rate):
    state, expected = constraints.init_lagrange(0.5), 0.5
    for cost in costs:
        state = update_lagrange(state, cost, limit=limit, learning_rate=rate)
        expected = max(0.0, expected + rate * (cost - limit))
    np.testing.assert_allclose(state.multiplier, expected, rtol=1e-3, atol=1e-4)


@given(costs=COSTS, limit=st.floats(0, 10), kp=GAINS, ki=st.floats(0.01, 2), kd=GAINS)
def test_pid_equals_a_loop(costs, limit, kp, ki, kd):
    state = constraints.init_pid_lagrange(0.5, integral_gain=ki)
    assert float(state.multiplier) == 0.5
    integral, previous = 0.5 / ki, None
    for cost in costs:
        state = update_pid_lagrange(
            state, cost, limit=limit, proportional_gain=kp, integral_gain=ki, derivative_gain=kd
        )
        integral = max(0.0, integral + cost - limit)
        growth = 0.0 if previous is None else max(0.0, cost - previous)
        expected, previous = max(0.0, kp * (cost - limit) + ki * integral + kd * growth), cost
    np.testing.assert_allclose(state.multiplier, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(state.integral, integral, rtol=1e-3, atol=1e-3)
    assert int(state.updates) == len(costs)


@given(costs=COSTS)
def test_pid_with_the_integral_alone_is_dual_ascent(costs):
    plain, pid = constraints.init_lagrange(0.3), constraints.init_pid_lagrange(0.3, integral_gain=0.2)
    for cost in costs:
        plain = update_lagrange(plain, cost, limit=4.0, learning_rate=0.2)
        pid = update_pid_lagrange(pid, cost, limit=4.0, proportional_gain=0.0, integral_gain=0.2, derivative_gain=0.0)
    np.testing.assert_allclose(pid.multiplier, plain.multiplier, rtol=1e-3, atol=1e-4)


def test_fixed_points_defaults_and_broken_measurements():
    state = constraints.init_lagrange(0.7)
    assert float(constraints.update_lagrange(state, 2.0, limit=2.0).multiplier) == float(state.multiplier)
    assert float(constraints.update_lagrange(constraints.init_lagrange(), 1.0, limit=2.0).multiplier) == 0.0
    np.testing.assert_allclose(constraints.update_lagrange(state, 4.0, limit=2.0).multiplier, 0.8, rtol=1e-6)
    pid = constraints.update_pid_lagrange(constraints.init_pid_lagrange(0.7), 4.0, limit=2.0)
    np.testing.assert_allclose(pid.multiplier, 0.05 * 2 + 0.01 * (70 + 2), rtol=1e-5)
    falling = constraints.update_pid_lagrange(pid, 3.0, limit=2.0, derivative_gain=5.0)
    np.testing.assert_allclose(falling.multiplier, 0.05 * 1 + 0.01 * 73, rtol=1e-5)
    assert float(constraints.init_pid_lagrange(0.0, integral_gain=0.0).integral) == 0.0
    assert math.isnan(constraints.update_lagrange(state, jnp.nan, limit=2.0).multiplier)
    assert math.isnan(constraints.update_pid_lagrange(pid, jnp.nan, limit=2.0).multiplier)


def test_learning_rates_sweep_by_vmap():
    rates = jnp.array([0.1, 0.2])
    plain = jax.vmap(
        lambda r: constraints.update_lagrange(constraints.init_lagrange(), 3.0, limit=1.0, learning_rate=r)
    )
    np.testing.assert_allclose(plain(rates).multiplier, [0.2, 0.4], rtol=1e-6)
    start = constraints.init_pid_lagrange()
    pid = jax.vmap(lambda r: constraints.update_pid_lagrange(start, 3.0, limit=1.0, proportional_gain=r))
    np.testing.assert_allclose(pid(rates).multiplier, [0.22, 0.42], rtol=1e-6)


@pytest.mark.parametrize("mix", [constraints.penalised_rewards, constraints.constrained_advantages])
def test_mixtures(mix):
    rng = np.random.default_rng(0)
    gain, cost = rng.normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(mix)(gain, cost, 0.6), (gain - 0.6 * cost) / 1.6, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mix(gain, cost, 0.0), gain)
    np.testing.assert_allclose(mix(gain, cost, 1e9), -cost, rtol=1e-4, atol=1e-5)
    assert jax.grad(lambda m: jnp.sum(mix(gain, cost, m)))(1.0) == 0
    with jax.enable_x64():
        check_grads(
            jax.jit(lambda g, c: mix(g, c, 0.6)), (gain.astype(np.float64), cost.astype(np.float64)), 1, ["rev"]
        )
    assert mix(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16), 0.5).dtype == jnp.float32
    with pytest.raises(TypeError, match="must be floating point"):
        mix(jnp.arange(3), jnp.zeros(3), 0.5)
    with pytest.raises(TypeError, match="cost"):
        mix(jnp.zeros(3), jnp.arange(3), 0.5)
    with pytest.raises(AssertionError):
        mix(jnp.zeros(3), jnp.zeros((3, 1)), 0.5)


def test_advantages_that_are_linear_commute_with_the_mixture():
    rng = np.random.default_rng(1)
    r, c, v, w = rng.normal(size=(4, 3, 5)).astype(np.float32)
    mask = np.ones((3, 5), bool)
    each = constraints.constrained_advantages(
        advantages.gae(r, v, mask).advantages, advantages.gae(c, w, mask).advantages, 0.6
    )
    mixed_values = constraints.penalised_rewards(v, w, 0.6)
    together = advantages.gae(constraints.penalised_rewards(r, c, 0.6), mixed_values, mask).advantages
    np.testing.assert_allclose(each, together, rtol=1e-4, atol=1e-5)
    loo = lambda x: group_advantages.leave_one_out(x, group=3)
    np.testing.assert_allclose(
        constraints.constrained_advantages(loo(r[:, 0]), loo(c[:, 0]), 0.6),
        loo(constraints.penalised_rewards(r[:, 0], c[:, 0], 0.6)),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["plain", "pid"])
def test_the_multiplier_of_a_known_problem_is_found(kind):
    """A softmax policy of two actions, rewards (1, 0), costs (1, 0), entropy weight 1, limit 0.4.

    Under λ the optimum is softmax of the rewards minus λ costs, so P(first) = sigmoid(1 - λ), which is 0.4 for
    λ = 1 - log(0.4 / 0.6).
    """

    def step(state, _):
        cost = jax.nn.sigmoid(1.0 - state.multiplier)
        if kind == "plain":
            return constraints.update_lagrange(state, cost, limit=0.4, learning_rate=0.5), cost
        return constraints.update_pid_lagrange(
            state, cost, limit=0.4, proportional_gain=0.5, integral_gain=0.5, derivative_gain=0.5
        ), cost

    start = constraints.init_lagrange() if kind == "plain" else constraints.init_pid_lagrange(integral_gain=0.5)
    state, costs = jax.lax.scan(step, start, length=200)
    np.testing.assert_allclose(state.multiplier, 1.0 - math.log(0.4 / 0.6), rtol=1e-3)
    np.testing.assert_allclose(costs[-1], 0.4, rtol=1e-3)
