"""The pooled reward model: what it pools, that it learns an order it can see, and what pairs of weight 0 do not do."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.recipes import pooled_reward
from rlhf_jax.types import PreferenceBatch


def test_states_outside_an_answer_do_not_count():
    states = jnp.array([[[1.0, 2.0], [3.0, 6.0], [jnp.nan, jnp.inf]]])
    mask = jnp.array([[True, True, False]])
    assert pooled_reward.pooled(states, mask).tolist() == [[2.0, 4.0]]


def test_an_order_is_learnt_from_pairs_that_weigh_something():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 400, 16)).astype(np.float32)
    first = (one[:, :1] > other[:, :1]) == (np.arange(400) < 300)[:, None]  # the last 100 are turned round
    chosen, rejected = np.where(first, one, other), np.where(first, other, one)
    weight = jnp.asarray(np.arange(400) < 300, jnp.float32)
    scorer = jax.jit(pooled_reward.fit, static_argnames="updates")(
        PreferenceBatch(jnp.asarray(chosen), jnp.asarray(rejected), weight)
    )
    fresh = rng.normal(size=(2, 500, 16)).astype(np.float32)
    better = fresh[0][:, :1] > fresh[1][:, :1]
    pairs = PreferenceBatch(np.where(better, *fresh), np.where(better, *fresh[::-1]), jnp.ones(500))
    assert float(pooled_reward.accuracy(scorer, pairs)) > 0.85
    turned, weak = np.arange(500)[:, None] >= 250, jnp.where(jnp.arange(500) < 250, 1.0, 0.5)
    chosen_there = np.where(turned, pairs.rejected, pairs.chosen)
    half = PreferenceBatch(chosen_there, np.where(turned, pairs.chosen, pairs.rejected), weak)
    counted = PreferenceBatch(pairs.chosen[:250], pairs.rejected[:250], jnp.ones(250))
    assert float(pooled_reward.accuracy(scorer, half)) == float(pooled_reward.accuracy(scorer, counted))
    scores = pooled_reward.score(scorer, jnp.concatenate([jnp.asarray(chosen[:300]), jnp.asarray(rejected[:300])]))
    np.testing.assert_allclose(scores.mean(), 0.0, atol=1e-5)


def test_what_two_answers_share_hardly_counts_and_the_unit_is_log_odds():
    rng = np.random.default_rng(1)
    shared = np.pad(rng.normal(size=(4000, 3)).astype(np.float32), ((0, 0), (0, 1)))
    better = shared + np.array([0.0, 0.0, 0.0, 0.1], np.float32)
    wins = rng.random(4000) < 0.8
    pairs = PreferenceBatch(
        *(jnp.asarray(np.where(wins[:, None] == order, better, shared)) for order in (True, False)), jnp.ones(4000)
    )
    scorer = jax.jit(pooled_reward.fit)(pairs)
    assert float(jnp.max(jnp.abs(scorer["kernel"][:3]))) < 0.01 * float(scorer["kernel"][3])
    gap = pooled_reward.score(scorer, jnp.asarray(better[:1])) - pooled_reward.score(scorer, jnp.asarray(shared[:1]))
    np.testing.assert_allclose(gap, np.log(0.8 / 0.2), rtol=0.2)
