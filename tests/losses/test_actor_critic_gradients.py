"""Gradients of policy, value, Q-learning and feedback losses against central differences in float64; bad inputs."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from rlhf_jax.losses import (
    categorical_value,
    covariance_policy,
    feedback,
    gated_policy,
    importance,
    offline_q_learning,
    policy,
    q_learning,
    regression_policy,
    sequence_policy,
    tamer,
    value,
)

rng = np.random.default_rng(11)
B, T, A, F = 4, 5, 3, 2
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
LOG_PROBS = -rng.gamma(2.0, 0.5, (B, T)) - 0.01
ARRAYS = {
    "log_probs": LOG_PROBS,
    "old": LOG_PROBS + rng.uniform(-0.3, 0.0, (B, T)),
    "advantages": rng.normal(size=(B, T)),
    "row": rng.normal(size=B),
    "entropies": rng.random(B),
    "values": rng.normal(size=(B, T)),
    "other": rng.normal(size=(B, T)),
    "returns": rng.normal(size=(B, T)),
    "weights": rng.random((B, T)) + 0.1,
    "discounts": np.where(rng.random((B, T)) < 0.3, 0.0, 0.9),
    "q": rng.normal(size=(B, T, A)),
    "next_q": rng.normal(size=(B, T, A)),
    "policy": rng.dirichlet(np.ones(A), (B, T)),
    "actions": rng.integers(0, A, (B, T)),
    "support": np.array([-1.0, 0.0, 2.0]),
    "labels": rng.integers(-3, 4, (B, T, A)).astype(float),
    "credit": rng.dirichlet(np.ones(T), (B, F)),
    "signals": rng.normal(size=(B, F)),
    "mask": MASK,
}
KEY = jax.random.key(3)
PPO, TOKENS, ROWS = "*log_probs old advantages", "*log_probs old advantages mask", "*log_probs old row mask"
STEP = "*q actions returns discounts next_q"
clip_cov = lambda *x: covariance_policy.clip_cov(*x, KEY, covariance_low=0.1)
CASES = {  # a star marks the arguments through which the gradient flows
    "reinforce": (policy.reinforce, "*log_probs advantages"),
    "a2c": (policy.a2c, "*log_probs returns values"),
    "surrogate": (policy.surrogate, PPO),
    "clipped_surrogate": (policy.clipped_surrogate, PPO),
    "dual_clip_surrogate": (policy.dual_clip_surrogate, PPO),
    "two_sided_surrogate": (policy.two_sided_surrogate, PPO),
    "entropy_bonus": (policy.entropy_bonus, "*entropies"),
    "sapo": (gated_policy.sapo, PPO),
    "dppo_tv": (gated_policy.dppo_tv, PPO),
    "dppo_kl": (gated_policy.dppo_kl, PPO),
    "gspo": (lambda *x: sequence_policy.gspo(*x, clip_low=0.1, clip_high=0.1), ROWS),
    "luspo": (lambda *x: sequence_policy.luspo(*x, clip_low=0.1, clip_high=0.1), ROWS),
    "gmpo": (lambda *x: sequence_policy.gmpo(*x, clip_low=0.1, clip_high=0.1), ROWS),
    "clip_cov": (clip_cov, TOKENS),
    "kl_cov": (covariance_policy.kl_cov, TOKENS),
    "weighted_log_likelihood": (regression_policy.weighted_log_likelihood, "*log_probs weights"),
    "dro": (regression_policy.dro, "*log_probs *values returns"),
    "effective_sample_share": (importance.effective_sample_share, "*weights mask"),
    "squared_error": (value.squared_error, "*values returns"),
    "clipped_squared_error": (value.clipped_squared_error, "*values other returns"),
    "huber": (value.huber, "*values returns"),
    "expectile_error": (value.expectile_error, "*values returns"),
    "quantile_huber": (value.quantile_huber, "*values returns"),
    "cross_entropy": (categorical_value.cross_entropy, "*q policy"),
    "mean": (categorical_value.mean, "*q *support"),
    "action_values": (q_learning.action_values, "*q actions"),
    "q_learning": (q_learning.q_learning, STEP),
    "double_q_learning": (q_learning.double_q_learning, STEP + " next_q"),
    "sarsa": (q_learning.sarsa, STEP + " actions"),
    "expected_sarsa": (q_learning.expected_sarsa, STEP + " policy"),
    "conservative_penalty": (offline_q_learning.conservative_penalty, "*q actions"),
    "ilql": (offline_q_learning.ilql, "*q *values other next_q actions returns discounts"),
    "ilql_logits": (offline_q_learning.ilql_logits, "*q *next_q *values"),
    "coach": (feedback.coach, "*log_probs advantages"),
    "deep_coach": (feedback.deep_coach, "*log_probs old mask row *entropies"),
    "shape_policy": (lambda *x: feedback.shape_policy(*x, consistency=0.8), "*q labels"),
    "tamer": (tamer.tamer, "*values credit mask signals"),
    "deep_tamer": (tamer.deep_tamer, "*values credit mask signals"),
}


def total(function, *arrays):
    """A scalar with a different weight on every output."""
    leaves = [x for x in jax.tree.leaves(function(*arrays)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in leaves)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_central_differences(name):
    function, words = CASES[name]
    arrays = [ARRAYS[word.lstrip("*")] for word in words.split()]
    live = [i for i, word in enumerate(words.split()) if word.startswith("*")]
    with jax.enable_x64(True):
        fixed = [jnp.asarray(x) for x in arrays]

        def chosen(*values):
            replaced = list(fixed)
            for i, x in zip(live, values, strict=True):
                replaced[i] = x
            return total(function, *replaced)

        values = [fixed[i] for i in live]
        assert chosen(*values).dtype == jnp.float64
        jax.test_util.check_grads(jax.jit(chosen), values, order=1, modes=["rev"], rtol=1e-5, atol=1e-6, eps=1e-6)


STOPPED_ALSO = {  # targets and weights: nothing flows
    "human_returns": (feedback.human_returns, "advantages mask"),
    "advise_log_probs": (lambda x: feedback.advise_log_probs(x, consistency=0.8), "labels"),
    "two_hot": (lambda x: categorical_value.two_hot(x, jnp.array([-1.0, 0.0, 2.0])), "values"),
    "hl_gauss": (lambda x: categorical_value.hl_gauss(x, jnp.array([-1.0, 0.0, 2.0])), "values"),
    "project": (lambda *x: categorical_value.project(*x, jnp.array([-1.0, 0.0, 2.0])), "policy q"),
    "bootstrapped_target": (q_learning.bootstrapped_target, "returns discounts values"),
    "truncated_weights": (importance.truncated_weights, "log_probs old"),
    "masked_weights": (importance.masked_weights, "log_probs old"),
    "sequence_truncated_weights": (importance.sequence_truncated_weights, "log_probs old mask"),
    "sequence_masked_weights": (importance.sequence_masked_weights, "log_probs old mask"),
    "awr_weights": (regression_policy.awr_weights, "advantages"),
    "awac_weights": (regression_policy.awac_weights, "advantages mask"),
    "token_covariances": (covariance_policy.token_covariances, "log_probs advantages mask"),
    # straight-through: the gradient is not the derivative of the value, but it flows or not all the same
    "cispo": (gated_policy.cispo, PPO),
    "gspo_token": (lambda *x: sequence_policy.gspo_token(*x, clip_low=0.1, clip_high=0.1), TOKENS),
    "vespo": (sequence_policy.vespo, ROWS),
}


@pytest.mark.parametrize("name", [*CASES, *STOPPED_ALSO])
def test_only_starred_arguments_have_a_gradient(name):
    function, words = {**CASES, **STOPPED_ALSO}[name]
    words = words.split()
    arrays = [ARRAYS[word.lstrip("*")] for word in words]
    arrays = [jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else None) for x in arrays]
    floats = tuple(i for i, x in enumerate(arrays) if x.dtype == jnp.float32)
    gradients = jax.grad(lambda *x: total(function, *x), argnums=floats)(*arrays)
    for i, gradient in zip(floats, gradients, strict=True):
        assert np.isfinite(gradient).all(), words[i]
        assert bool(np.any(gradient)) == words[i].startswith("*"), words[i]


@pytest.mark.parametrize("name", CASES)
def test_integers_for_floats_floats_for_masks_and_unequal_shapes_are_refused(name):
    function, words = CASES[name]
    names = [word.lstrip("*") for word in words.split()]
    arrays = [jnp.asarray(ARRAYS[n], None if n in ("actions", "mask") else jnp.float32) for n in names]
    for i, argument in enumerate(names):
        if argument == "mask":
            with pytest.raises(TypeError, match="mask must be bool"):
                function(*arrays[:i], arrays[i].astype(jnp.float32), *arrays[i + 1 :])
        elif argument != "actions":
            with pytest.raises(TypeError, match="must be floating, got dtype int32"):
                function(*arrays[:i], arrays[i].astype(jnp.int32), *arrays[i + 1 :])
        if len(arrays) > 1 and argument != "support" and "support" not in names:
            with pytest.raises((AssertionError, ValueError)):
                function(*arrays[:i], arrays[i][:2], *arrays[i + 1 :])
