"""Scoring on the host while the device acts: who acts, in which order, and what a resumed run sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.training.ahead import Ahead, init_ahead, step_ahead
from rlhf_jax.training.loop import run


@jax.jit
def act(state, index):
    """A rollout that tells whose it is."""
    return {"policy": state["updates"], "noise": jax.random.normal(jax.random.fold_in(jax.random.key(0), index))}


@jax.jit
def learn(state, rollout, scores):
    new = {"updates": state["updates"] + 1, "weight": 0.9 * state["weight"] + scores}
    return new, {"policy": rollout["policy"], "weight": new["weight"]}


def score(rollout):
    assert isinstance(rollout["noise"], np.ndarray | np.generic)
    return np.float32(np.tanh(rollout["noise"]))


STEP = functools.partial(step_ahead, act=act, score=score, learn=learn)


def start():
    return init_ahead({"updates": jnp.int32(0), "weight": jnp.float32(0.0)}, act)


def test_the_policy_that_acted_is_one_step_older():
    told = []
    run(STEP, start(), range(4), on_step=lambda done, metrics: told.append(int(metrics["policy"])))
    assert told == [0, 0, 1, 2]


def test_rollouts_are_those_of_taking_turns_where_the_policy_does_not_matter():
    weight = jnp.float32(0.0)
    for index in range(5):
        noise = act({"updates": jnp.int32(0)}, index)["noise"]
        weight = 0.9 * weight + score({"noise": np.asarray(noise)})
    assert run(STEP, start(), range(5)).state["weight"] == pytest.approx(float(weight), rel=1e-6)


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_from_its_arrays_it_goes_on_as_before(stop):
    saved = jax.device_get(run(STEP, start(), range(stop)))
    resumed = run(STEP, Ahead(*jax.device_put(saved)), range(stop, 5))
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(run(STEP, start(), range(5))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_next_rollout_is_under_way_while_the_last_one_is_scored():
    """Half a second of products, of which the host waits for none."""
    slow = jax.jit(lambda x, index: jax.lax.fori_loop(0, 100 + index, lambda _, y: jnp.tanh(y @ y), x))
    asked = []

    def remembered(state, index):
        asked.append(slow(state, index))
        return asked[-1]

    def scored(rollout):
        np.testing.assert_array_equal(rollout, asked[-2])
        assert not asked[-1].is_ready()
        return 0.0

    begin = jax.block_until_ready(init_ahead(jnp.eye(600) / 600, remembered))
    after, _ = step_ahead(begin, 0, act=remembered, score=scored, learn=lambda state, *_: (state, None))
    np.testing.assert_array_equal(after.rollout, asked[-1])


def test_an_error_of_the_scorer_is_raised_as_it_is():
    def broken(rollout):
        raise ConnectionError("no answer from the reward server")

    with pytest.raises(ConnectionError, match="reward server"):
        step_ahead(start(), 0, act=act, score=broken, learn=learn)
