"""What each algorithm computes from its policy's outputs, against float64 loops: losses, experience, epochs, KL."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import rewards
from rlhf_jax.algorithms import actor_critic, policy_distillation, reward_model, sft
from rlhf_jax.returns import at_next_valid
from rlhf_jax.training.sharding import split_devices
from rlhf_jax.types import ActorCritic, Distilled, PreferenceBatch

B, T = 8, 5
LENGTHS = np.array([5, 1, 0, 3, 2, 4, 1, 5])
MASK = np.arange(T)[None] < LENGTHS[:, None]
REAL = list(zip(*np.nonzero(MASK), strict=True))
RNG = np.random.default_rng(0)


def numbers(*shape, scale=1.0):
    return np.asarray(scale * RNG.normal(size=shape), np.float32)


def spoil(x):
    return jnp.where(jnp.asarray(MASK), x, jnp.nan)


def given_outputs(params, inputs):
    """A "policy" whose outputs are its parameters, so that formulas are seen without a network."""
    del inputs
    return params["outputs"]


LOG_PROBS, OLD, REFERENCE = (-np.abs(numbers(B, T)) for _ in range(3))
VALUES, OLD_VALUES, ADVANTAGES, RETURNS = (numbers(B, T) for _ in range(4))
SCORES, WEIGHTS = numbers(B), np.abs(numbers(B))


def mean(of):
    return sum(of(b, t) for b, t in REAL) / len(REAL)


def sft_case():
    batch = sft.Batch(jnp.zeros(B), jnp.asarray(MASK))
    return sft, spoil(LOG_PROBS), batch, sft.Config(), {"sft/loss": mean(lambda b, t: -float(LOG_PROBS[b, t]))}


def reward_case():
    chosen, rejected = numbers(B), numbers(B)
    batch = PreferenceBatch(jnp.zeros(B), jnp.zeros(B), jnp.asarray(WEIGHTS))
    weighted = lambda of: float(
        sum(w * of(float(c), float(r)) for w, c, r in zip(WEIGHTS, chosen, rejected, strict=True)) / sum(WEIGHTS)
    )
    sigma = lambda x: 1 / (1 + math.exp(-x))
    expected = {
        "reward/loss": weighted(lambda c, r: -0.9 * math.log(sigma(c - r)) - 0.1 * math.log(sigma(r - c))),
        "reward/centring": weighted(lambda c, r: (c + r) ** 2),
        "reward/accuracy": weighted(lambda c, r: float(c > r)),
    }
    outputs = jnp.concatenate([chosen, rejected])
    return reward_model, outputs, batch, reward_model.Config(label_smoothing=0.1), expected


def actor_critic_case():
    config = actor_critic.Config(clip=0.25, value_clip=0.4, entropy_weight=0.01)
    entropies = np.abs(numbers(B, T))

    def surrogate(b, t):
        ratio, gain = math.exp(LOG_PROBS[b, t] - OLD[b, t]), float(ADVANTAGES[b, t])
        free, bounded = ratio * gain, min(max(ratio, 0.75), 1.25) * gain
        return -min(free, bounded), float(bounded < free)

    def error(b, t):
        v, old, target = float(VALUES[b, t]), float(OLD_VALUES[b, t]), float(RETURNS[b, t])
        return max((v - target) ** 2, (min(max(v, old - 0.4), old + 0.4) - target) ** 2)

    def distance(b, t):
        ratio = float(LOG_PROBS[b, t] - OLD[b, t])
        return math.exp(ratio) - 1 - ratio

    expected = {
        "policy/loss": mean(lambda b, t: surrogate(b, t)[0]),
        "policy/clip_fraction": mean(lambda b, t: surrogate(b, t)[1]),
        "value/loss": mean(error),
        "policy/step_kl": mean(distance),
        "policy/entropy": mean(lambda b, t: float(entropies[b, t])),
    }
    batch = actor_critic.Batch(
        jnp.zeros(B), jnp.asarray(MASK), *(jnp.asarray(x) for x in (OLD, OLD_VALUES, ADVANTAGES, RETURNS))
    )
    return actor_critic, ActorCritic(*map(spoil, (LOG_PROBS, VALUES, entropies))), batch, config, expected


def distillation_case():
    soft, own, importance = np.abs(numbers(B, T)), np.abs(numbers(B, T)), np.abs(numbers(B))
    batch = policy_distillation.Batch(jnp.zeros(B), jnp.asarray(MASK), jnp.asarray(WEIGHTS), jnp.asarray(importance))
    objective = lambda b, t: float(importance[b] * (soft[b, t] + (WEIGHTS[b] - 1) * -LOG_PROBS[b, t]))
    expected = {
        "distillation/loss": mean(objective),
        "distillation/forward_kl": mean(lambda b, t: float(soft[b, t] - own[b, t])),
    }
    outputs = Distilled(*map(spoil, (soft, LOG_PROBS, own)))
    return policy_distillation, outputs, batch, policy_distillation.Config(), expected


@pytest.mark.parametrize("case", [sft_case, reward_case, actor_critic_case, distillation_case])
def test_terms_equal_loops(case):
    module, outputs, batch, config, expected = case()
    state = module.init({"outputs": outputs}, given_outputs, optax.sgd(0.1))
    _, metrics = jax.jit(functools.partial(module.update, config=config))(state, batch)
    assert metrics.keys() == expected.keys() | {"optim/grad_norm"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.isfinite(metrics["optim/grad_norm"])


def test_the_actor_critics_gradient_is_that_of_its_weighted_terms():
    module, outputs, batch, config, _ = actor_critic_case()
    state = module.init({"outputs": outputs}, given_outputs, optax.sgd(1.0))

    def objective(outputs):
        terms = module.loss({"outputs": outputs}, given_outputs, batch, config=config)
        means = {name: total / count for name, (total, count) in terms.items()}
        return means["policy/loss"] + config.value_weight * means["value/loss"] - 0.01 * means["policy/entropy"]

    learnt, _ = jax.jit(functools.partial(module.update, config=config))(state, batch)
    moved = jax.tree.map(lambda before, after: before - after, outputs, learnt.train.params["outputs"])
    for step, gradient in zip(moved, jax.jit(jax.grad(objective))(outputs), strict=True):
        np.testing.assert_allclose(np.where(MASK, step, 0), gradient, atol=1e-6)
        assert np.abs(gradient).max() > 0


# --- experience -------------------------------------------------------------------------------------------------------

BETA, DISCOUNT, LAMBDA = 0.3, 0.97, 0.9
CONFIG = actor_critic.Config(discount=DISCOUNT, gae_lambda=LAMBDA)


def experience(inputs, mask, *arrays, axis_name=None):
    return actor_critic.experience(inputs, mask, *arrays, kl_coefficient=BETA, config=CONFIG, axis_name=axis_name)


ARGUMENTS = (jnp.arange(float(B)), jnp.asarray(MASK), *map(jnp.asarray, (OLD, REFERENCE, OLD_VALUES, SCORES)))


def experience_by_loops():
    advantages, returns = np.zeros((B, T)), np.zeros((B, T))
    for b, length in enumerate(LENGTHS):
        carried = 0.0
        for t in reversed(range(length)):
            reward = -BETA * float(OLD[b, t] - REFERENCE[b, t]) + (float(SCORES[b]) if t == length - 1 else 0.0)
            after = float(OLD_VALUES[b, t + 1]) if t + 1 < length else 0.0
            carried = reward + DISCOUNT * after - float(OLD_VALUES[b, t]) + DISCOUNT * LAMBDA * carried
            advantages[b, t], returns[b, t] = carried, carried + float(OLD_VALUES[b, t])
    real = advantages[MASK]
    white = np.where(MASK, (advantages - real.mean()) / np.sqrt(real.var() + 1e-8), 0.0)
    rows = [b for b in range(B) if LENGTHS[b]]
    metrics = {
        "human/score": float(np.mean(SCORES)),
        "policy/kl": sum(float(OLD[b, t] - REFERENCE[b, t]) for b, t in REAL) / len(rows),
        "policy/length": float(np.mean(LENGTHS)),
        "value/explained_variance": 1 - np.var((returns - OLD_VALUES)[MASK]) / np.var(returns[MASK]),
    }
    return white, returns, metrics


def mapped(*arguments):
    run = jax.pmap(functools.partial(experience, axis_name="devices"), axis_name="devices")
    batch, metrics = run(*split_devices(arguments, 4))
    for value in metrics.values():
        np.testing.assert_array_equal(value, np.broadcast_to(value[:1], value.shape))
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), batch), {name: x[0] for name, x in metrics.items()}


def spoiled(*arguments):
    inputs, mask, old, reference, values, scores = arguments
    return jax.jit(experience)(inputs, mask, spoil(old), spoil(reference), spoil(values), scores)


@pytest.mark.parametrize("way", [jax.jit(experience), mapped, spoiled], ids=["one device", "four devices", "garbage"])
def test_experience_equals_loops(way):
    white, returns, expected = experience_by_loops()
    batch, metrics = way(*ARGUMENTS)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(batch.advantages, white)
    close(batch.returns, returns)
    close(batch.old_log_probs, np.where(MASK, OLD, 0))
    close(batch.old_values, np.where(MASK, OLD_VALUES, 0))
    np.testing.assert_array_equal(batch.mask, MASK)
    np.testing.assert_array_equal(batch.inputs, ARGUMENTS[0])
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        close(metrics[name], value, err_msg=name)


def test_scores_per_token_land_where_they_are():
    whole, told = experience(*ARGUMENTS)
    landed = rewards.score_at_last_token(ARGUMENTS[-1], ARGUMENTS[1])
    batch, metrics = experience(*ARGUMENTS[:-1], spoil(landed))
    jax.tree.map(np.testing.assert_array_equal, batch, whole)
    empty = float(np.mean(np.where(np.asarray(LENGTHS) > 0, 0, SCORES)))  # an empty row has no token to carry a score
    np.testing.assert_allclose(metrics["human/score"], told["human/score"] - empty, rtol=1e-5)


def test_a_potential_moves_the_values_and_no_advantage():
    """Rewards s_t + γ Φ(s_{t+1}) - Φ(s_t) with values V - Φ give the advantages of s_t with V: Φ is a critic."""
    inputs, mask, *logs, values, scores = ARGUMENTS
    potential = jnp.asarray(np.random.default_rng(0).normal(size=(B, T)), jnp.float32)
    shaped = rewards.score_at_last_token(scores, mask)
    shaped += DISCOUNT * at_next_valid(potential, mask, jnp.zeros(B)) - potential
    plain, _ = experience(*ARGUMENTS)
    moved, _ = experience(inputs, mask, *logs, values - potential, shaped)
    np.testing.assert_allclose(moved.advantages, plain.advantages, rtol=1e-4, atol=1e-4)


def test_integer_scores_are_refused():
    with pytest.raises(TypeError, match="scores must be floating"):
        experience(*ARGUMENTS[:-1], jnp.ones(B, jnp.int32))


# --- turns ------------------------------------------------------------------------------------------------------------


def linear(params, inputs):
    return ActorCritic(-jnp.square(inputs["x"] @ params["actor"]), inputs["x"] @ params["critic"])


def turn_material():
    rng = np.random.default_rng(3)
    inputs = {"x": jnp.asarray(rng.normal(size=(B, T, 3)), jnp.float32)}
    params = {"actor": jnp.asarray(rng.normal(size=3), jnp.float32), "critic": jnp.zeros(3)}
    batch = actor_critic.Batch(
        inputs, jnp.asarray(MASK), *(jnp.where(MASK, x, 0.0) for x in (OLD, OLD_VALUES, ADVANTAGES, RETURNS))
    )
    return actor_critic.init(params, linear, optax.adam(0.01)), batch


@pytest.mark.parametrize("microbatches", [1, 2])
def test_epochs_without_minibatches_are_updates_in_a_row(microbatches):
    state, batch = turn_material()
    config = actor_critic.Config()
    run = functools.partial(actor_critic.update_epochs, epochs=3, config=config, microbatches=microbatches)
    found, metrics = jax.jit(run)(state, batch, jax.random.key(0))
    told = []
    for _ in range(3):
        state, now = jax.jit(functools.partial(actor_critic.update, config=config))(state, batch)
        told.append(now)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found.train.params, state.train.params)
    assert found.train.step == 3
    for name, value in metrics.items():
        np.testing.assert_allclose(value, np.mean([t[name] for t in told]), rtol=1e-4, atol=1e-7, err_msg=name)


def test_an_epoch_visits_every_row_once_in_a_fresh_order():
    """Row numbers are learnt from: each step's gradient is the mean of its rows' numbers, so a pass sums to all."""
    whole = actor_critic.Batch(
        jnp.arange(float(B)),
        jnp.ones((B, 1), bool),
        *(jnp.zeros((B, 1)) for _ in range(2)),
        jnp.ones((B, 1)),
        jnp.zeros((B, 1)),
    )

    def numbered(params, inputs):
        here = params["w"] * inputs[:, None]
        return ActorCritic(here - jax.lax.stop_gradient(here), jnp.zeros((B // 4, 1)))

    def trace():
        """Keeps every gradient that it is given."""
        init = lambda params: (jnp.zeros(8), jnp.int32(0))
        keep = lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), (s[0].at[s[1]].set(g["w"]), s[1] + 1))
        return optax.GradientTransformation(init, keep)

    state = actor_critic.init({"w": jnp.float32(1)}, numbered, trace())
    run = functools.partial(actor_critic.update_epochs, epochs=2, minibatches=4, config=actor_critic.Config())
    state, _ = jax.jit(run)(state, whole, jax.random.key(0))
    steps = np.asarray(state.train.opt_state[0]).reshape(2, 4)
    np.testing.assert_allclose(steps.sum(axis=-1), -sum(range(B)) / 2, rtol=1e-5)  # means of pairs of rows
    assert not np.allclose(np.sort(steps[0]), np.sort(steps[1]))
    with pytest.raises(ValueError, match="batches=3, B=8"):
        actor_critic.update_epochs(
            state, whole, jax.random.key(0), epochs=1, minibatches=3, config=actor_critic.Config()
        )


@pytest.mark.parametrize(("distance", "share"), [(12.0, 0.2), (6.6, 0.1), (0.0, -0.2), (6.0, 0.0)])
def test_steering_moves_the_coefficient_by_the_clipped_error(distance, share):
    state, _ = turn_material()
    config = actor_critic.Config(kl_target=6.0, kl_horizon=1000.0)
    steered = actor_critic.steer(state, jnp.float32(distance), sequences=50, config=config)
    np.testing.assert_allclose(steered.kl.coefficient, 0.15 * (1 + share * 50 / 1000), rtol=1e-5)
    endless = actor_critic.steer(
        state, jnp.float32(distance), sequences=50, config=actor_critic.Config(kl_horizon=jnp.inf)
    )
    assert float(endless.kl.coefficient) == float(state.kl.coefficient)


# --- proposal ---------------------------------------------------------------------------------------------------------


def test_a_proposal_keeps_expectations_and_bounds_coefficients():
    rng = np.random.default_rng(4)
    weights = np.exp(rng.normal(size=200) * 2)
    weights /= weights.mean()
    found = rng.normal(size=200)
    probabilities, importance = map(np.asarray, policy_distillation.proposal(jnp.asarray(weights, jnp.float32)))
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-5)
    for of_row in (found, (weights - 1) * found):
        np.testing.assert_allclose(np.sum(probabilities * importance * of_row), np.mean(of_row), rtol=1e-4, atol=1e-5)
    coefficients = importance * (weights - 1)
    assert coefficients.min() >= -2
    assert coefficients.max() < 2
    plain, even = policy_distillation.proposal(jnp.ones(4))
    assert (plain.tolist(), even.tolist()) == ([0.25] * 4, [1.0] * 4)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5])
def test_a_label_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=rf"label_smoothing must lie in .* got {smoothing}"):
        reward_model.Config(label_smoothing=smoothing)
