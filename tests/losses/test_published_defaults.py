"""The defaults of policy, value and feedback losses are the published numbers that their docstrings name."""

import inspect

import pytest

from rlhf_jax.losses import (
    categorical_value,
    covariance_policy,
    feedback,
    gated_policy,
    importance,
    offline_q_learning,
    policy,
    regression_policy,
    sequence_policy,
    tamer,
    value,
)

DEFAULTS = {
    policy.clipped_surrogate: {"clip_low": 0.2, "clip_high": 0.2},
    policy.dual_clip_surrogate: {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    policy.two_sided_surrogate: {"clip_low": 0.2, "clip_high": 0.2, "delta": 4.0},
    policy.entropy_bonus: {"coefficient": 0.01},
    gated_policy.cispo: {"clip_low": 1.0, "clip_high": 4.0},
    gated_policy.sapo: {"positive_temperature": 1.0, "negative_temperature": 1.05},
    gated_policy.dppo_tv: {"threshold_low": 0.15, "threshold_high": 0.15},
    gated_policy.dppo_kl: {"threshold_low": 0.05, "threshold_high": 0.05},
    sequence_policy.gspo: {"clip_low": 3e-4, "clip_high": 4e-4},
    sequence_policy.gspo_token: {"clip_low": 3e-4, "clip_high": 4e-4},
    sequence_policy.luspo: {"clip_low": 2e-3, "clip_high": 2.5e-3},
    sequence_policy.gmpo: {"clip_low": 0.4, "clip_high": 0.4},
    sequence_policy.vespo: {
        "positive_power": 2.0, "positive_decay": 3.0, "negative_power": 3.0, "negative_decay": 2.0},
    covariance_policy.clip_cov: {
        "clip_low": 0.2, "clip_high": 0.2, "fraction": 2e-4, "covariance_low": 1.0, "covariance_high": 5.0},
    covariance_policy.kl_cov: {"fraction": 2e-4, "coefficient": 1.0},
    regression_policy.awr_weights: {"temperature": 1.0, "max_weight": 20.0},
    regression_policy.awac_weights: {"temperature": 1.0},
    regression_policy.mpo_temperature_loss: {"epsilon": 0.1},
    regression_policy.vmpo_temperature_loss: {"epsilon": 0.1},
    regression_policy.dro: {"temperature": 1.0},
    importance.truncated_weights: {"cap": 2.0},
    importance.masked_weights: {"low": 0.5, "high": 5.0},
    importance.sequence_truncated_weights: {"cap": 2.0},
    importance.sequence_masked_weights: {"low": 0.5, "high": 5.0},
    value.clipped_squared_error: {"clip": 0.2},
    value.huber: {"delta": 1.0},
    value.expectile_error: {"expectile": 0.7},
    value.quantile_huber: {"kappa": 1.0},
    categorical_value.hl_gauss: {"smoothing": 0.75},
    offline_q_learning.ilql: {"expectile": 0.7},
    offline_q_learning.ilql_logits: {"beta": 1.0},
    feedback.update_eligibility: {"decay": 0.95, "restart": False},
    feedback.deep_coach: {"decay": 0.35, "entropy_coefficient": 1.5},
    feedback.human_returns: {"discount": 0.99},
    tamer.uniform_delay: {"low": 0.2, "high": 0.6},
    tamer.gamma_delay: {"shape": 2.0, "scale": 0.28},
    tamer.delay_credit: {"distribution": tamer.uniform_delay},
}  # fmt: skip


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda f: f.__name__)
def test_defaults_are_the_published_numbers(function):
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name != "axis_name"
    }
    assert found == DEFAULTS[function]
