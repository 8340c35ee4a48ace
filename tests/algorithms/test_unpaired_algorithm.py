"""KTO, BCO and APO-zero as algorithms: loops, devices, micro-batches, garbage, order, and what is missing.

Their exact optima are in tests/probes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils

from rlhf_jax import masking
from rlhf_jax.algorithms import unpaired_preference as algorithm
from rlhf_jax.losses import unpaired_preference as losses
from rlhf_jax.training.sharding import split_devices
from rlhf_jax.training.state import path_matches, split_params

B, T, V = 8, 3, 5
CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
PARAMS = {"bias": jnp.zeros(V), "table": jnp.asarray(np.random.default_rng(0).normal(size=(V, V)), jnp.float32)}
REFERENCE = {"bias": PARAMS["bias"], "table": 0.5 * PARAMS["table"]}


def bigram(params, tokens):
    """[B, T] log-probs of tokens [B, T + 1] after the one before each."""
    scores = jax.nn.log_softmax(params["table"] + params["bias"][None])
    return scores[tokens[:, :-1], tokens[:, 1:]]


def rows(seed):
    rng = np.random.default_rng(seed)
    weight = jnp.asarray([1.0, 2, 0, 1, 0.5, 1, 1, 3])
    mask = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (B, 1)))
    tokens = jnp.asarray(rng.integers(0, V, (B, T + 1)), jnp.int32)
    return algorithm.Batch(tokens, mask, jnp.asarray(rng.integers(0, 2, B) > 0), weight)


SGD = optax.sgd(0.1, momentum=0.9)
BATCH = algorithm.with_reference(rows(1).replace(mismatched=rows(2)), bigram, REFERENCE)
LOSSES = {
    "kto": {"loss": functools.partial(losses.kto, undesirable_weight=0.7)},
    "bco": {"loss": losses.bco, "anchor": algorithm.mean_reward},
}


def start(params=PARAMS):
    state = algorithm.init(params, bigram, SGD)
    return state.replace(rewards=masking.Totals(jnp.float32(0.6), jnp.float32(4)))


@functools.cache
def compiled(name, **static):
    """(state, batch, beta, frozen) -> (state, metrics), and how often it was traced."""
    traces = []

    def step(state, batch, beta, frozen=None):
        traces.append(1)
        config = algorithm.Config(beta=beta, **LOSSES[name])
        return algorithm.update(state, batch, config=config, frozen=frozen, **static)

    return step, jax.jit(step), traces


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


def same(found, expected, **tolerance):
    jax.tree.map(functools.partial(CLOSE, **tolerance), jax.tree.leaves(found), jax.tree.leaves(expected))


def by_loops(name, beta=0.3):
    """Loss, rewards and anchor, written out with floats."""

    def ratio(batch, i):
        gaps = bigram(PARAMS, batch.inputs) - batch.reference_log_probs
        return sum(float(gaps[i, t]) for t in range(T) if batch.mask[i, t])

    others = [ratio(BATCH.mismatched, i) for i in range(B) if BATCH.weight[i] > 0]
    anchor = max(0.0, sum(others) / len(others)) if name == "kto" else 0.6 / 4
    total = {key: [0.0, 0.0] for key in ("loss", "reward", "desirable_reward", "undesirable_reward")}
    for i in range(B):
        rho, good, weight = ratio(BATCH, i), bool(BATCH.desirable[i]), float(BATCH.weight[i])
        if name == "kto":
            gain = beta * (rho - anchor)
            loss = 1 / (1 + math.exp(gain)) if good else 0.7 / (1 + math.exp(-gain))
        else:
            loss = math.log1p(math.exp(-(beta * rho - anchor) if good else beta * rho - anchor))
        for key, value, counts in (
            ("loss", loss, True),
            ("reward", beta * rho, True),
            ("desirable_reward", beta * rho, good),
            ("undesirable_reward", beta * rho, not good),
        ):
            total[key][0] += weight * value * counts
            total[key][1] += weight * counts
    return {f"preference/{key}": x / n for key, (x, n) in total.items()} | {"preference/anchor": anchor}


def test_terms_equal_loops_and_rewards_are_remembered(name):
    state, metrics = compiled(name)[1](start(), BATCH, 0.3)
    expected = by_loops(name)
    assert metrics.keys() == expected.keys() | {"optim/grad_norm"}
    for key, value in expected.items():
        CLOSE(metrics[key], value, err_msg=key)
    weight = float(BATCH.weight.sum())
    CLOSE(state.rewards, (0.6 + weight * expected["preference/reward"], 4 + weight))
    assert metrics["optim/grad_norm"] > 0.01


def test_devices_micro_batches_garbage_order_and_knobs(name):
    eager, step, traces = compiled(name)
    expected = step(start(), BATCH, 0.3)
    mapped = jax.pmap(compiled(name, axis_name="devices")[0], axis_name="devices", in_axes=(0, 0, None))
    same(jax_utils.unreplicate(mapped(jax_utils.replicate(start()), split_devices(BATCH), 0.3)), expected)
    same(compiled(name, microbatches=4)[1](start(), BATCH, 0.3), expected)
    same(eager(start(), BATCH, 0.3), expected)

    def spoil(batch):
        counts = batch.mask & (batch.weight > 0)[:, None]
        return batch.replace(reference_log_probs=jnp.where(counts, batch.reference_log_probs, jnp.nan))

    before = len(traces)
    same(step(start(), spoil(BATCH.replace(mismatched=spoil(BATCH.mismatched))), 0.3), expected, rtol=1e-6)
    order = np.random.default_rng(0).permutation(B)
    same(step(start(), jax.tree.map(lambda x: x[order], BATCH), 0.3), expected)
    assert abs(step(expected[0], BATCH, 0.6)[1]["preference/loss"] - expected[1]["preference/loss"]) > 1e-4
    assert len(traces) == before


def test_frozen_parameters_stay_and_the_rest_learns_the_same(name):
    _, step, _ = compiled(name)
    trained, frozen = split_params(PARAMS, path_matches("table"))
    found = step(start(trained), BATCH, 0.3, frozen)[0].train.params
    same(found, split_params(step(start(), BATCH, 0.3)[0].train.params, path_matches("table"))[0])


def test_no_gradient_reaches_the_anchor_or_the_reference():
    def total(reference, anchor):
        batch = BATCH.replace(reference_log_probs=reference)
        value = algorithm.loss(PARAMS, bigram, batch, anchor, config=algorithm.Config())["preference/loss"]
        return value.sum

    slopes = jax.grad(total, argnums=(0, 1))(BATCH.reference_log_probs, jnp.array(0.3))
    assert not any(jnp.any(slope) for slope in slopes)
    point = lambda params: algorithm.reference_point(params, bigram, BATCH.mismatched, config=algorithm.Config())
    assert not any(jnp.any(x) for x in jax.tree.leaves(jax.grad(point)(PARAMS)))


def test_what_is_missing_is_said():
    config = algorithm.Config()
    with pytest.raises(ValueError, match=r"needs batch\.mismatched"):
        algorithm.update(start(), BATCH.replace(mismatched=None), config=config)
    with pytest.raises(ValueError, match="no reference_log_probs"):
        algorithm.loss(PARAMS, bigram, rows(1), jnp.array(0.0), config=config)
    free = algorithm.Config(anchor=algorithm.nothing)
    _, metrics = algorithm.update(start(), BATCH.replace(mismatched=None), config=free)
    assert metrics["preference/anchor"] == 0
