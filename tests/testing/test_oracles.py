"""The oracles against answers worked by hand and identities of the mathematics: they owe nothing to the library."""

import math

import numpy as np
import pytest

from rlhf_jax.testing import oracles

NAN = math.nan
X, MASK = [[1.0, 2.0], [6.0, NAN], [NAN, NAN]], [[True, True], [True, False], [False, False]]
P, Q = np.log([0.5, 0.5]), np.log([0.25, 0.75])

BY_HAND = [
    (oracles.masked_sum(X, MASK), 9.0),
    (oracles.masked_mean(X, MASK), 3.0),
    (oracles.masked_mean([NAN], [False]), 0.0),
    (oracles.masked_variance(X, MASK), 14 / 3),  # (4 + 1 + 9) / 3
    (oracles.masked_variance(X, MASK, ddof=1), 7.0),
    (oracles.masked_variance([4.0], [True], ddof=1), 0.0),
    (oracles.token_mean(X, MASK), 3.0),
    (oracles.sequence_mean(X, MASK), 3.75),  # (1.5 + 6) / 2
    (oracles.sequence_sum(X, MASK), 4.5),
    (oracles.sequence_mean([[NAN]], [[False]]), 0.0),
    (oracles.sequence_sum([[NAN]], [[False]]), 0.0),
    (oracles.whiten([[1.0, 3.0, NAN]], [[True, True, False]], epsilon=0.0), [[-1.0, 1.0, 0.0]]),
    (oracles.whiten([[1.0, 3.0]], [[True, True]], shift_mean=False, epsilon=0.0), [[1.0, 3.0]]),
    (oracles.whiten([[1.0, 3.0]], [[True, True]], ddof=1, epsilon=2.0), [[-0.5, 0.5]]),
    (oracles.log_softmax([1000.0, 1000.0]), np.log([0.5, 0.5])),
    (oracles.token_log_probs([[0.0, math.log(3)]], [1]), [math.log(0.75)]),
    (oracles.token_log_probs([[0.0, math.log(9)]], [1], temperature=2.0), [math.log(0.75)]),
    (oracles.entropy([7.0] * 4), math.log(4)),
    (oracles.cross_entropy(P, Q), math.log(4) - math.log(3) / 2),
    (oracles.kl_divergence(P, Q), math.log(2) - math.log(3) / 2),
    (oracles.jensen_shannon([0.0, -800.0], [-800.0, 0.0]), math.log(2)),  # disjoint
    (oracles.k1(-1.0, -2.0), 1.0),
    (oracles.k2(-1.0, -3.0), 2.0),
    (oracles.k3(-1.0, -1.0 - math.log(2)), 0.5 - 1 + math.log(2)),
    (oracles.discounted_returns([1.0, NAN, 2.0], [True, False, True], discount=0.5, bootstrap_value=8.0), [4, 0, 6]),
    (oracles.gae([1.0, 2.0], [0.5, 1.0], [True, True], discount=0.5, lambda_=0.5, bootstrap_value=4.0), [1.75, 3.0]),
    (oracles.gae([1.0, NAN, 2.0], [0.5, NAN, 1.0], [True, False, True], lambda_=1.0), [2.5, 0.0, 1.0]),
    (oracles.lambda_returns([1.0, 2.0], [0.5, 1.0], [True, True], lambda_=0.0, bootstrap_value=4.0), [2.0, 6.0]),
    (oracles.vtrace([0.0, 5.0], [1.0, 2.0], [0.5, 1.0], [True, True], discount=0.5, bootstrap_value=8.0), [4.0, 6.0]),
    (oracles.vtrace([-800.0, 0.0], [1.0, 2.0], [0.5, 1.0], [True, True]), [0.5, 2.0]),
    (oracles.group_relative([1.0, 3.0, 5.0, 5.0], group=2, epsilon=1e-12), [-1.0, 1.0, 0.0, 0.0]),
    (oracles.group_relative([0.0, 2.0], group=2, ddof=1, epsilon=0.0), [-(2**-0.5), 2**-0.5]),
    (oracles.leave_one_out([1.0, 3.0, 8.0], group=3), [-4.5, -1.5, 6.0]),
    (oracles.log_sigmoid(-1000.0), -1000.0),
    (oracles.log_sigmoid(1000.0), 0.0),
    (oracles.clipped_surrogate(math.log(2), 0.0, 3.0), -3.6),
    (oracles.clipped_surrogate(math.log(2), 0.0, -3.0), 6.0),
    (oracles.clipped_surrogate(math.log(0.5), 0.0, -3.0, clip=0.1), 2.7),
    (oracles.dpo(3.0, 3.0), math.log(2)),
    (oracles.dpo(2.0, 1.0, beta=2.0), math.log1p(math.exp(-2))),
    (oracles.ipo(7.0, 1.0), 1.0),
    (oracles.bradley_terry(2.0, 1.0, margin=1.0), math.log(2)),
]


@pytest.mark.parametrize("index", range(len(BY_HAND)))
def test_by_hand(index):
    actual, expected = BY_HAND[index]
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-12)


def test_identities_between_oracles():
    rng = np.random.default_rng(0)
    logits, other = rng.normal(size=5), rng.normal(size=5)
    gap = oracles.cross_entropy(logits, other) - oracles.entropy(logits)
    np.testing.assert_allclose(gap, oracles.kl_divergence(logits, other))
    assert oracles.kl_divergence(logits, other + 3.0) == pytest.approx(oracles.kl_divergence(logits, other))
    swapped = oracles.jensen_shannon(other, logits, weight=0.7)
    np.testing.assert_allclose(oracles.jensen_shannon(logits, other, weight=0.3), swapped)
    rewards, values, mask = rng.normal(size=6), rng.normal(size=6), rng.random(6) < 0.7
    knobs = {"discount": 0.9, "lambda_": 0.6, "bootstrap_value": 0.4}
    returns = oracles.lambda_returns(rewards, values, mask, **knobs)
    np.testing.assert_allclose(oracles.gae(rewards, values, mask, **knobs), np.where(mask, returns - values, 0.0))
    plain = oracles.discounted_returns(rewards, mask, discount=0.9, bootstrap_value=0.4)
    np.testing.assert_allclose(oracles.lambda_returns(rewards, values, mask, **{**knobs, "lambda_": 1.0}), plain)
    on_policy = oracles.vtrace(np.zeros(6), rewards, values, mask, discount=0.9, bootstrap_value=0.4)
    np.testing.assert_allclose(on_policy, plain, atol=1e-12)
