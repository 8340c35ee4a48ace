"""Importance weights against loops over ragged rows."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import importance

rng = np.random.default_rng(4)
MASK = np.array(list(itertools.product([False, True], repeat=4)) * 3)
B, T = MASK.shape
SAMPLER = np.where(MASK, -rng.exponential(size=(B, T)), np.nan).astype(np.float32)
TRAINER = np.where(MASK, SAMPLER + rng.normal(0, 0.7, (B, T)), np.nan).astype(np.float32)
ADVANTAGES = rng.normal(size=B).astype(np.float32)


def row_log_ratios():
    for trainer, sampler, kept in zip(TRAINER, SAMPLER, MASK, strict=True):
        yield [float(x) - float(y) for x, y in zip(trainer[kept], sampler[kept], strict=True)]


def mean(x):
    return sum(x) / len(x) if x else 0.0


def band(w, low, high):
    return w if low <= w <= high else 0.0


ROWS = {
    "truncated": (
        lambda: importance.sequence_truncated_weights(TRAINER, SAMPLER, MASK, cap=1.5),
        lambda x, a: min(math.exp(sum(x)), 1.5)),
    "masked": (
        lambda: importance.sequence_masked_weights(TRAINER, SAMPLER, MASK, low=0.6, high=2.0),
        lambda x, a: band(math.exp(sum(x)), 0.6, 2.0)),
    "mean": (
        lambda: importance.sequence_mean_mask(TRAINER, SAMPLER, MASK, low=0.8, high=1.3),
        lambda x, a: 0.8 <= math.exp(mean(x)) <= 1.3),
    "off-policy": (
        lambda: importance.off_policy_sequence_mask(TRAINER, SAMPLER, ADVANTAGES, MASK, threshold=0.1),
        lambda x, a: a >= 0 or -mean(x) <= 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_weights_of_sequences_equal_loops(name):
    function, oracle = ROWS[name]
    expected = [oracle(x, float(a)) for x, a in zip(row_log_ratios(), ADVANTAGES, strict=True)]
    np.testing.assert_allclose(function(), expected, rtol=1e-5)
    assert sum(map(bool, expected)) > 5
    assert len({bool(x) for x in expected}) == 2 or name == "truncated"


def test_rows_may_have_any_leading_axes():
    function = lambda *arrays: importance.sequence_truncated_weights(*arrays, cap=1.5)
    expected = np.asarray(function(TRAINER, SAMPLER, MASK)).reshape(4, -1)
    found = function(*(x.reshape(4, -1, T) for x in (TRAINER, SAMPLER, MASK)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weights_of_tokens_equal_loops():
    trainer, sampler = TRAINER[MASK], SAMPLER[MASK]
    ratios = [math.exp(float(x) - float(y)) for x, y in zip(trainer, sampler, strict=True)]
    np.testing.assert_allclose(
        importance.truncated_weights(trainer, sampler, cap=1.5), [min(r, 1.5) for r in ratios], rtol=1e-5
    )
    np.testing.assert_allclose(
        importance.masked_weights(trainer, sampler, low=0.6, high=2.0), [band(r, 0.6, 2.0) for r in ratios], rtol=1e-5
    )


def test_a_sequence_of_one_token_has_the_weight_of_the_token():
    trainer, sampler, mask = TRAINER[-1], SAMPLER[-1], jnp.ones((T, 1), bool)
    np.testing.assert_allclose(
        importance.sequence_truncated_weights(trainer[:, None], sampler[:, None], mask),
        importance.truncated_weights(trainer, sampler),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        importance.sequence_masked_weights(trainer[:, None], sampler[:, None], mask),
        importance.masked_weights(trainer, sampler),
        rtol=1e-6,
    )


def test_open_bounds_give_plain_importance_sampling_and_agreement_gives_one():
    trainer, sampler = TRAINER[MASK], SAMPLER[MASK]
    plain = np.exp(trainer - sampler)
    np.testing.assert_allclose(importance.truncated_weights(trainer, sampler, cap=jnp.inf), plain, rtol=1e-6)
    np.testing.assert_allclose(importance.masked_weights(trainer, sampler, low=0.0, high=jnp.inf), plain, rtol=1e-6)
    for weights in (
        importance.truncated_weights(trainer, trainer),
        importance.masked_weights(trainer, trainer),
        importance.sequence_truncated_weights(TRAINER, TRAINER, MASK),
        importance.sequence_masked_weights(TRAINER, TRAINER, MASK),
    ):
        assert (np.asarray(weights) == 1).all()


def test_the_bounds_themselves_are_kept():
    x = jnp.array([-1.0])
    assert importance.masked_weights(x, x, low=1.0, high=1.0).tolist() == [1.0]
    assert importance.sequence_mean_mask(x, x, jnp.array([True]), low=1.0, high=1.0)
    assert importance.off_policy_sequence_mask(x, x, jnp.array(-1.0), jnp.array([True]), threshold=0.0)


def test_expected_weight_of_samples_is_one():
    """Σ μ·(π/μ) = 1: the weights change the measure from the sampler's to the trainer's."""
    sampler, trainer = np.log(rng.dirichlet(np.ones(9))), np.log(rng.dirichlet(np.ones(9)))
    weights = importance.truncated_weights(jnp.asarray(trainer), jnp.asarray(sampler), cap=jnp.inf)
    np.testing.assert_allclose(np.sum(np.exp(sampler) * np.asarray(weights)), 1.0, rtol=1e-5)


def test_ratios_beyond_all_bounds_are_finite():
    trainer, sampler = jnp.array([0.0, -300.0]), jnp.array([-300.0, 0.0])
    assert importance.truncated_weights(trainer, sampler).tolist() == pytest.approx([2.0, 0.0])
    assert importance.masked_weights(trainer, sampler).tolist() == [0.0, 0.0]


def test_effective_sample_share():
    weights = rng.random((B, T)).astype(np.float32)
    inside = weights[MASK].astype(np.float64)
    expected = inside.sum() ** 2 / (inside.size * (inside**2).sum())
    found = importance.effective_sample_share(np.where(MASK, weights, np.nan), MASK)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    one_of_four = importance.effective_sample_share(jnp.array([3.0, 0, 0, 0]), jnp.ones(4, bool))
    np.testing.assert_allclose(one_of_four, 0.25)
    np.testing.assert_allclose(importance.effective_sample_share(jnp.full(4, 0.3), jnp.ones(4, bool)), 1.0, rtol=1e-6)
    assert importance.effective_sample_share(jnp.zeros(4), jnp.ones(4, bool)) == 0.0
    shards = (weights.reshape(4, -1, T), MASK.reshape(4, -1, T))
    share = lambda w, m: importance.effective_sample_share(w, m, axis_name="data")
    np.testing.assert_allclose(jax.pmap(share, axis_name="data")(*shards), [expected] * 4, rtol=1e-5)


def test_advantages_must_be_one_per_sequence():
    with pytest.raises(ValueError, match="one value per sequence"):
        importance.off_policy_sequence_mask(TRAINER, SAMPLER, TRAINER, MASK, threshold=0.1)
