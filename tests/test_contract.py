"""The contract table: every public function of the core, in one row each, keeps every promise of the library.

A row is a function and what it takes and returns in shape letters (`rlhf_jax.testing.Case`); numeric knobs are found by
the signature and swept. Whoever adds a function adds a row, or a reason.
"""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import (
    advantages,
    constraints,
    ensembles,
    group_advantages,
    kl,
    logprobs,
    losses,
    masking,
    pass_at_k,
    returns,
    reward_scales,
    rewards,
    teacher_chunks,
    token_advantages,
)
from rlhf_jax.losses import (
    anchored_preference,
    categorical_value,
    covariance_policy,
    distillation,
    distributional_preference,
    divergence_preference,
    feedback,
    gated_policy,
    head_divergences,
    human_distillation,
    importance,
    offline_q_learning,
    online_preference,
    policy,
    preference,
    preference_inputs,
    q_learning,
    ranking,
    rating,
    reference_free_preference,
    regression_policy,
    reward_model,
    sampled_distillation,
    sequence_policy,
    supervised,
    tamer,
    unpaired_preference,
    value,
)
from rlhf_jax.testing import Case, check_contract

ROWS = {}
EXEMPT = {
    masking.init_moments: "takes nothing",
    masking.mean_of_totals: "in every mean of the table",
    masking.sum_totals: "in every mean of the table",
    masking.merge_moments: "in update_moments",
    unpaired_preference.init_reward_shift: "takes nothing",
    rating.init_cut_parameters: "takes no array",
    kl.init_fixed_kl: "wraps a number",
    kl.init_adaptive_kl: "wraps a number",
    constraints.init_lagrange: "wraps a number",
    constraints.init_pid_lagrange: "wraps a number",
    feedback.init_eligibility: "a state shaped like parameters of any kind, without rows",
    feedback.update_eligibility: "a state shaped like parameters of any kind, without rows",
    feedback.eligibility_gradient: "a state shaped like parameters of any kind, without rows",
}

SELECTS = {"dtypes": "selects and moves values, computes none"}
STATE = {"dtypes": "a state that starts in float32 stays float32"}


def _is_number(annotation):
    return "complex" in str(annotation) and "Callable" not in str(annotation)


def knobs_of(function):
    """Numeric keyword arguments of a function, the traced kind, with their defaults."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and _is_number(parameter.annotation):
            found[name] = parameter.default
    return found


def row(function, spec, stopped="", knobs=None, through=None, **options):
    """Adds a row; knobs are tried around their defaults unless values are given.

    `through` is what is run instead, where the function's own result does not fit under its mask.
    """
    tried = {}
    for name, default in knobs_of(function).items():
        if name in options.get("static", {}):
            continue
        if name in (knobs or {}):
            tried[name] = knobs[name]
        elif isinstance(default, float | int):
            tried[name] = (0.7 * default, default, 1.2 * default) if default else (0.0, 0.3)
        else:
            raise ValueError(f"{function.__name__} has no default for {name}: give values to try")
    case = Case(spec, knobs=tried, stopped=tuple(stopped.split()), **options)
    ROWS.setdefault(function, []).append((through or function, case))


# --- masking ----------------------------------------------------------------------------------------------------------

for mean in (
    masking.masked_sum,
    masking.masked_mean,
    masking.masked_variance,
    masking.token_mean,
    masking.sequence_mean,
    masking.sequence_mean_counting_empty,
    masking.sequence_sum,
):
    row(mean, "BT BT:mask ->")
row(masking.fixed_length_mean, "BT BT:mask ->", knobs={"length": 7.0})
LINES = {"devices": "a statistic of each row is not summed over devices"}
row(masking.masked_mean, "BT BT:mask -> B", static={"axis": -1}, skip=LINES)
row(masking.masked_variance, "BT BT:mask -> B", static={"axis": -1}, skip=LINES)
for totals in (
    masking.token_totals,
    masking.sequence_mean_totals,
    masking.sequence_mean_counting_empty_totals,
    masking.sequence_sum_totals,
):
    row(totals, "BT BT:mask -> :total :total")
row(masking.fixed_length_totals, "BT BT:mask -> :total :total", knobs={"length": 7.0})
row(masking.whiten, "BT BT:mask -> BT", knobs={"epsilon": (1e-3, 1e-2, 0.1)})
row(masking.whiten, "BT BT:mask -> BT", knobs={"epsilon": (1e-2,)}, static={"shift_mean": False})
row(masking.zero_outside, "BT:mask BT -> BT", skip=SELECTS)
row(masking.update_moments, "_ BT BT:mask -> :real :real :real", fixed={"moments": masking.init_moments()}, skip=STATE)

# --- logprobs and kl --------------------------------------------------------------------------------------------------

FEWER = {"padding": "the result has other slots than the mask"}
for statistic in (logprobs.entropy, logprobs.sum_of_squared_probs, logprobs.log_normaliser):
    row(statistic, "BTV -> BT")
row(logprobs.token_log_probs, "BTV BT:token -> BT")
row(logprobs.shifted_log_probs, "BTV BT:token -> BS", sizes={"S": 7}, skip=FEWER)
CAPS = {"soft_cap": (2.0, 30.0)}
row(logprobs.head_log_probs, "BTD VD BT:token -> BT", static={"chunk": 2, "soft_cap": None})
row(logprobs.head_log_probs, "BTD DV BT:token -> BT", static={"chunk": 3, "vocabulary_axis": 1}, knobs=CAPS)
row(logprobs.head_statistics, "BTD VD BT:token -> BT BT BT BT", static={"chunk": 2}, knobs=CAPS)
row(logprobs.predictions, "BTD BT:token -> BSD BS", sizes={"S": 7}, skip=FEWER | SELECTS)
row(logprobs.response_states, "BTD -> BSD", sizes={"S": 6}, static={"prompt_length": 2}, skip=FEWER | SELECTS)

for estimate in (kl.k1, kl.k2, kl.k1_with_k2_gradient):
    row(estimate, "BT:log_prob BT:log_prob -> BT", "reference_log_probs", knobs={"clamp": (1.0, 10.0)})
for estimate in (kl.k3, kl.k3_with_k2_gradient):
    row(
        estimate,
        "BT:log_prob BT:log_prob -> BT",
        "reference_log_probs",
        knobs={"clamp": (1.0, 10.0), "value_clamp": (1.0, 10.0)},
    )
row(kl.full_kl, "BTV BTV -> BT", "reference_logits")
row(kl.update_fixed_kl, "_ :positive -> :real", "kl", fixed={"state": kl.init_fixed_kl()}, skip=STATE)
row(
    kl.update_adaptive_kl,
    "_ :positive -> :real",
    "kl",
    fixed={"state": kl.init_adaptive_kl()},
    knobs={"batch_size": 8.0},
    skip=STATE,
)

# --- rewards ----------------------------------------------------------------------------------------------------------

row(rewards.check_rewards, "B -> B")
row(rewards.clip_rewards, "B -> B", knobs={"low": (-2.0, -1.0), "high": (1.0, 1.5)})
row(rewards.has_eos, "BT:token BT:mask -> B", knobs={"eos": (1.0, 2.0)})
row(rewards.kl_shaped_rewards, "BT BT:log_prob BT:log_prob BT:mask -> BT", "log_probs reference_log_probs")
row(rewards.overlong_penalty, "B:length -> B", knobs={"max_length": (7.0, 9.0), "buffer": (0.0, 3.0)})
row(rewards.replace_missing_eos, "B B:flag -> B")
row(rewards.subtract_missing_eos, "B B:flag -> B")
row(rewards.score_at_last_token, "B BT:mask -> BT")
row(
    rewards.score_after_last_token,
    "B BT:mask -> B",
    through=lambda scores, mask: masking.masked_sum(
        rewards.score_after_last_token(scores, mask), rewards.state_mask(mask), axis=-1
    ),
)
row(rewards.score_at_slot, "B BT:mask -> BT", static={"slot": 0}, skip={"padding": "the slot stays, tokens move"})
row(rewards.state_mask, "BT:mask -> BT")

row(reward_scales.apply_scale, "B _ -> B", fixed={"scale": reward_scales.Scale(np.float32(2), np.float32(1))})
MOMENTS = masking.Moments(np.float32(4), np.float32(1), np.float32(8))
for scaling in (reward_scales.centre_and_scale, reward_scales.scale_only):
    row(scaling, "B _ -> B", fixed={"moments": MOMENTS}, knobs={"epsilon": (1e-3,)})
row(reward_scales.reference_scale, "B B:mask -> :real :real", "scores")
row(reward_scales.reference_shift, "B B:mask -> :real :real", "scores")
row(reward_scales.weighted_sum_of_present, "BK -> B", sizes={"K": 3})
row(reward_scales.weighted_mean_of_present, "BK -> B", sizes={"K": 3})
row(reward_scales.normalised_sum_of_present, "BK -> B", sizes={"K": 3}, knobs={"epsilon": (1e-3,)})

for combine in (ensembles.mean, ensembles.mean_minus_std, ensembles.mean_minus_variance, ensembles.minimum):
    row(combine, "EX -> X", sizes={"E": 3, "X": 8})

row(constraints.penalised_rewards, "BT BT :positive -> BT", "multiplier")
row(constraints.constrained_advantages, "BT BT :positive -> BT", "multiplier")
row(
    constraints.update_lagrange,
    "_ :positive -> :real",
    fixed={"state": constraints.init_lagrange(1.0)},
    knobs={"limit": 0.5},
    skip=STATE,
)
row(
    constraints.update_pid_lagrange,
    "_ :positive -> :real :real :real :real",
    fixed={"state": constraints.init_pid_lagrange(1.0)},
    knobs={"limit": 0.5},
    skip=STATE,
)

# --- returns and advantages -------------------------------------------------------------------------------------------

row(returns.at_next_valid, "BT BT:mask B -> BT", skip=SELECTS)
row(
    returns.backward_recursion,
    "BT BT:unit BT:mask B -> BT",
    skip={"dtypes": "a step inside the other functions, which hand it float32"},
)
row(returns.discounted_returns, "BT BT:mask -> BT")
row(returns.lambda_returns, "BT BT BT:mask -> BT")
row(returns.n_step_returns, "BT BT BT:mask -> BT", static={"n": 2})
row(advantages.gae, "BT BT BT:mask -> BT BT")
row(advantages.gae_through_holes, "BT BT BT:mask -> BT BT")
row(advantages.gae_with_truncation, "BT BT BT BT:flag BT:flag BT:mask -> BT BT")
row(advantages.vtrace, "BT:log_prob BT:log_prob BT BT BT:mask -> BT BT BT", "log_probs behaviour_log_probs")

PAIRS = {"static": {"group": 2}, "rows_together": 2}
for grouped in (
    group_advantages.group_centred,
    group_advantages.group_relative,
    group_advantages.group_relative_batch_std,
    group_advantages.leave_one_out,
    group_advantages.gpg,
):
    row(grouped, "B B:mask -> B", **PAIRS)
row(group_advantages.gdpo, "BK BK:mask -> B", sizes={"K": 3}, **PAIRS)
row(group_advantages.optimal_reward_baseline, "B B:length B:mask -> B", **PAIRS)
row(group_advantages.remax, "B B -> B")
row(group_advantages.to_tokens, "B BT:mask -> BT", skip=SELECTS)
row(pass_at_k.best_of_group_advantage, "B B:mask -> B", **PAIRS)
row(pass_at_k.pass_at_k, "B:length _ -> B", fixed={"samples": np.float32(9)}, static={"k": 3})
row(pass_at_k.pass_at_k_advantage, "B:flag B:mask -> B", static={"group": 2, "k": 2}, rows_together=2)
row(
    token_advantages.optimal_token_baseline,
    "BT BT:log_prob BT:unit BT:mask -> BT BT",
    "log_probs squared_probabilities",
    **PAIRS,
)
row(token_advantages.reinforce_plus_plus, "BT BT:mask -> BT BT", knobs={"epsilon": (1e-3,)})
row(token_advantages.reinforce_plus_plus_baseline, "B BT:mask -> BT", knobs={"epsilon": (1e-3,)}, **PAIRS)

# --- policy losses ----------------------------------------------------------------------------------------------------

TOKENS, SEQUENCES = "BT:log_prob BT:log_prob BT", "BT:log_prob BT:log_prob B"
OLD = "old_log_probs advantages"
row(policy.reinforce, "BT:log_prob BT -> BT", "advantages")
row(policy.a2c, "BT:log_prob BT BT -> BT", "returns values")
row(policy.surrogate, TOKENS + " -> BT", OLD)
row(policy.entropy_bonus, "BT:positive -> BT")
for clipped in (
    policy.clipped_surrogate,
    policy.dual_clip_surrogate,
    policy.two_sided_surrogate,
    gated_policy.cispo,
    gated_policy.dppo_kl,
    gated_policy.dppo_tv,
):
    row(clipped, TOKENS + " -> BT BT", OLD)
row(gated_policy.sapo, TOKENS + " -> BT", OLD)
row(covariance_policy.kl_cov, TOKENS + " BT:mask -> BT", OLD)
row(covariance_policy.token_covariances, "BT:log_prob BT BT:mask -> BT", "log_probs advantages")
row(
    covariance_policy.clip_cov,
    TOKENS + " BT:mask _ -> BT BT",
    OLD,
    fixed={"key": jax.random.key(0)},
    knobs={"covariance_low": (0.1,), "fraction": (0.1,)},
    skip={"permutation": "draws by slot", "padding": "draws by slot"},
)
row(sequence_policy.gspo, SEQUENCES + " BT:mask -> B B", OLD)
row(sequence_policy.luspo, SEQUENCES + " BT:mask -> B B", OLD)
row(sequence_policy.gmpo, SEQUENCES + " BT:mask -> B BT", OLD)
row(sequence_policy.vespo, SEQUENCES + " BT:mask -> BT", OLD)
row(sequence_policy.gspo_token, TOKENS + " BT:mask -> BT BT", OLD)

row(importance.truncated_weights, "BT:log_prob BT:log_prob -> BT", "trainer_log_probs sampler_log_probs")
row(importance.masked_weights, "BT:log_prob BT:log_prob -> BT", "trainer_log_probs sampler_log_probs")
for weights in (importance.sequence_truncated_weights, importance.sequence_masked_weights):
    row(weights, "BT:log_prob BT:log_prob BT:mask -> B", "trainer_log_probs sampler_log_probs")
row(
    importance.sequence_mean_mask,
    "BT:log_prob BT:log_prob BT:mask -> B",
    "trainer_log_probs sampler_log_probs",
    knobs={"low": (0.9,), "high": (1.1,)},
)
row(
    importance.off_policy_sequence_mask,
    "BT:log_prob BT:log_prob B BT:mask -> B",
    "trainer_log_probs sampler_log_probs advantages",
    knobs={"threshold": (0.1,)},
)
row(importance.effective_sample_share, "BT:positive BT:mask ->")

row(regression_policy.awr_weights, "BT -> BT", "advantages")
row(regression_policy.awac_weights, "BT BT:mask -> BT", "advantages")
row(regression_policy.better_half, "BT BT:mask -> BT", "advantages")
row(regression_policy.dro, "B B B -> B", "rewards")
row(regression_policy.kl_constraint, ":positive B:positive -> B", knobs={"epsilon": (0.1,)})
row(regression_policy.mpo_weights, "BK BK:mask -> BK", "q_values", sizes={"K": 4}, knobs={"temperature": 1.0})
row(regression_policy.mpo_temperature_loss, ":positive BK BK:mask -> B", "q_values", sizes={"K": 4})
row(regression_policy.vmpo_weights, "BT BT:mask -> BT", "advantages", knobs={"temperature": 1.0})
row(regression_policy.vmpo_temperature_loss, ":positive BT BT:mask ->", "advantages")
row(regression_policy.weighted_log_likelihood, "BT:log_prob BT -> BT", "weights")

# --- value losses -----------------------------------------------------------------------------------------------------

row(value.squared_error, "BT BT -> BT", "returns")
row(value.huber, "BT BT -> BT", "returns")
row(value.expectile_error, "BT BT -> BT", "returns")
row(value.clipped_squared_error, "BT BT BT -> BT", "old_values returns")
row(value.quantile_huber, "BTK BTM -> BT", "targets", sizes={"K": 4, "M": 3})


def increasing(rng, shape):
    return np.sort(rng.normal(size=shape))


SORTED = {"draws": {"support": increasing, "edges": increasing, "cut_points": increasing}}
row(categorical_value.cross_entropy, "BTV BTV:unit -> BT", "probabilities")
row(categorical_value.mean, "BTV V -> BT", **SORTED)
row(categorical_value.two_hot, "BT V -> BTV", "values", **SORTED)
row(categorical_value.hl_gauss, "BT V -> BTU", "values", sizes={"U": 4}, **SORTED)
row(categorical_value.project, "BTK:unit BTK V -> BTV", "probabilities locations", sizes={"K": 4}, **SORTED)

STEP = "BTV BT:token BT BT:unit BTV"
row(q_learning.action_values, "BTV BT:token -> BT", skip=SELECTS)
row(q_learning.bootstrapped_target, "BT BT:unit BT -> BT", "rewards discounts next_values")
row(q_learning.q_learning, STEP + " -> BT", "rewards discounts next_q_values")
row(q_learning.q_learning_target, "BT BT:unit BTV -> BT", "rewards discounts next_q_values")
row(q_learning.double_q_learning, STEP + " BTV -> BT", "rewards discounts next_q_values selector_q_values")
row(q_learning.double_q_target, "BT BT:unit BTV BTV -> BT", "rewards discounts next_q_values selector_q_values")
row(q_learning.sarsa, STEP + " BT:token -> BT", "rewards discounts next_q_values")
row(q_learning.sarsa_target, "BT BT:unit BTV BT:token -> BT", "rewards discounts next_q_values")
row(q_learning.expected_sarsa, STEP + " BTV:unit -> BT", "rewards discounts next_q_values next_policy")
row(q_learning.expected_sarsa_target, "BT BT:unit BTV BTV:unit -> BT", "rewards discounts next_q_values next_policy")
row(offline_q_learning.conservative_penalty, "BTV BT:token -> BT")
row(
    offline_q_learning.ilql,
    "BTV BT BT BTV BT:token BT BT:unit -> BT BT BT",
    "next_values target_q_values rewards discounts",
)
row(offline_q_learning.ilql_logits, "BTV BTV BT -> BTV")

# --- preference losses ------------------------------------------------------------------------------------------------

for pair in (
    preference.dpo,
    preference.conservative_dpo,
    preference.discopop,
    preference.exo,
    preference.hinge,
    preference.ipo_sum,
    preference.robust_dpo,
    anchored_preference.apo_down,
    anchored_preference.apo_zero,
    anchored_preference.bco_pair,
    anchored_preference.nca,
    anchored_preference.sppo,
    divergence_preference.alpha_divergence_dpo,
    divergence_preference.forward_kl_dpo,
    divergence_preference.jensen_shannon_dpo,
):
    row(pair, "B B -> B")
row(preference.accuracy, "B B -> B", "chosen rejected")
for pair in (preference.dpo_mean, preference.ipo_mean):
    row(pair, "B B B:length B:length -> B")
for scores in (divergence_preference.forward_kl_scores, divergence_preference.jensen_shannon_scores):
    row(scores, "B -> B")
row(divergence_preference.alpha_divergence_scores, "B -> B")
row(distributional_preference.aot_paired, "B B B:mask -> B", "reference_margins")
row(distributional_preference.aot_unpaired, "B B B:mask -> B")
row(online_preference.online_dpo, "B B B:flag -> B")
row(online_preference.order_pairs, "B B B:flag -> B B", skip=SELECTS)
row(online_preference.xpo, "B B B:log_prob -> B")
row(online_preference.nash_md, "B:log_prob B:log_prob B:unit -> B", "reference_log_probs win_probabilities")
row(online_preference.geometric_mixture, "BV BV -> BV")
row(preference_inputs.length_desensitised_sum, "BT:log_prob BT:mask B:length -> B")
row(
    preference_inputs.wpo_weights,
    "BT:log_prob BT:unit BT:mask -> B",
    "log_probs squared_probability_sums",
    draws={"squared_probability_sums": lambda rng, shape: rng.uniform(0.1, 1.0, shape)},
)
for pair in (reference_free_preference.cpo, reference_free_preference.cpo_hinge):
    row(pair, "B:log_prob B:log_prob -> B")
for pair in (
    reference_free_preference.odds_ratio,
    reference_free_preference.orpo,
    reference_free_preference.simpo,
    reference_free_preference.alphapo,
):
    row(pair, "B:log_prob B:log_prob B:length B:length -> B")
row(reference_free_preference.tpo, "B:log_prob B:log_prob B:log_prob -> B")
row(reference_free_preference.tpo_length_controlled, "B:log_prob B:log_prob B:log_prob B:length B:length -> B")
row(unpaired_preference.kto, "B B:flag :real -> B", "reference_point")
row(unpaired_preference.bco, "B B:flag :real -> B", "reward_shift")
row(unpaired_preference.apo_zero_unpaired, "B B:flag -> B")
row(unpaired_preference.density_ratio_weights, "B:unit -> B", "desirable_probabilities")
row(unpaired_preference.kto_reference_point, "B B:mask ->", "log_ratios")
row(
    unpaired_preference.update_reward_shift,
    "_ B B:mask -> :real :real :real",
    "log_ratios",
    fixed={"moments": masking.init_moments()},
    skip=STATE,
)

# --- reward models ----------------------------------------------------------------------------------------------------

row(reward_model.bradley_terry, "B B -> B")
row(reward_model.soft_bradley_terry, "B B B:unit -> B", "first_win_probabilities")
row(reward_model.centring, "B B -> B")
row(reward_model.rao_kupper, "B B B:flag -> B", knobs={"theta": (1.5, 2.0)})
row(reward_model.rao_kupper_log_probs, "B B -> B B B", knobs={"theta": (1.5, 2.0)})
row(reward_model.davidson, "B B B:flag -> B", knobs={"nu": 0.5})
row(reward_model.davidson_log_probs, "B B -> B B B", knobs={"nu": 0.5})
row(ranking.plackett_luce, "BK BK:mask -> B", sizes={"K": 4})
row(
    ranking.list_choice,
    "BK B:token BK:mask -> B",
    sizes={"K": 4, "V": 3},
    draws={"mask": lambda rng, shape: np.arange(shape[1]) + np.zeros(shape) < 3},
    skip={"mask": "the choice of an empty slot is not a number"},
)
row(rating.ordered_cut_points, "C -> C", sizes={"C": 4})
row(rating.ordinal, "B B:token C -> B", sizes={"C": 4}, **SORTED)
row(rating.ordinal_log_probs, "B C -> BV", sizes={"C": 4}, **SORTED)
row(rating.rating_regression, "B B -> B", "ratings")
row(rating.process_rewards, "BT BT:unit BT:mask -> BT", "step_labels")

# --- supervised, distillation, human feedback -------------------------------------------------------------------------

row(supervised.negative_log_likelihood, "BT:log_prob -> BT")
row(supervised.dynamic_fine_tuning, "BT:log_prob -> BT")
row(supervised.smoothed_cross_entropy, "BTV BT:token -> BT")
row(supervised.z_loss, "BT -> BT")
row(distillation.hard_cross_entropy, "BTV BTV -> BT", "teacher_logits")
for divergence in (
    distillation.soft_cross_entropy,
    distillation.hinton_cross_entropy,
    distillation.forward_kl,
    distillation.reverse_kl,
    distillation.generalised_jsd,
    distillation.total_variation,
):
    row(divergence, "BTV BTV -> BT", "teacher_logits")
row(
    distillation.top_k_kl,
    "BTV BTK:token BTK:log_prob -> BT",
    "teacher_log_probs",
    sizes={"K": 2},
    draws={
        "teacher_indices": lambda rng, shape: rng.integers(0, 2, (*shape[:-1], 1)) + np.array([0, 2]),
        "teacher_log_probs": lambda rng, shape: np.log(rng.uniform(0.1, 0.4, shape)),
    },
)
row(distillation.kickstarting, "B B :positive -> B", static={"weight": lambda step: jnp.float32(0.5) * step})
HEADS, TEACHERS = "BTD VD BTE VE", "teacher_hidden teacher_table"
CAPS = CAPS | {"teacher_soft_cap": (1.0, 20.0)}
for divergence in (
    head_divergences.head_forward_kl,
    head_divergences.head_reverse_kl,
    head_divergences.head_generalised_jsd,
    head_divergences.head_total_variation,
):
    row(divergence, HEADS + " -> BT", TEACHERS, sizes={"E": 4}, static={"chunk": 2}, knobs=CAPS)
row(teacher_chunks.head_soft_cross_entropy, HEADS + " -> BT", TEACHERS, sizes={"E": 4}, static={"chunk": 2}, knobs=CAPS)
row(
    teacher_chunks.head_distillation,
    HEADS + " BT:token -> BT BT BT BT",
    TEACHERS,
    sizes={"E": 4},
    static={"chunk": 3},
    knobs=CAPS,
)
row(sampled_distillation.sampled_cross_entropy, "BT:log_prob BT:positive -> BT", "weights")
row(sampled_distillation.sampled_reverse_kl, "BT:log_prob BT:log_prob -> BT", "teacher_log_probs")
row(
    sampled_distillation.sampled_reverse_kl_advantages,
    "BT:log_prob BT:log_prob -> BT",
    "log_probs teacher_log_probs",
)
BETA = {"beta": 1.0}
row(human_distillation.human_teacher_logits, "BV BV -> BV", "teacher_logits rewards", knobs=BETA)
row(human_distillation.human_reweighted_cross_entropy, "BV BV BV -> B", "teacher_logits rewards", knobs=BETA)
row(human_distillation.human_weights, "B B:mask -> B", "rewards", knobs=BETA)
row(human_distillation.human_step_weights, "BT B BT:mask -> BT", "values rewards", knobs=BETA)
row(
    human_distillation.human_reverse_kl_rewards,
    "BT:log_prob BT:log_prob BT -> BT",
    "log_probs teacher_log_probs human_rewards",
    knobs=BETA,
)
row(human_distillation.reward_weighted_cross_entropy, "BT:log_prob BT:positive -> BT", "weights")
row(human_distillation.human_soft_targets, "BT:positive BT:log_prob BT:positive -> BT", "weights")

row(feedback.coach, "BT:log_prob BT -> BT", "feedback")
row(feedback.deep_coach, "BT:log_prob BT:log_prob BT:mask B B:positive -> B", "old_log_probs feedback")
row(feedback.human_returns, "BT BT:mask -> BT", "feedback")
row(feedback.shift_feedback, "BT BT:mask -> BT", static={"delay": 2}, skip=SELECTS)
row(feedback.advise_log_probs, "BV -> BV", "labels", knobs={"consistency": (0.5, 0.8)})
row(feedback.shape_policy, "BV BV -> BV", "labels", knobs={"consistency": (0.5, 0.8)})
row(tamer.uniform_delay, "B -> B", draws={"delay": lambda rng, shape: rng.uniform(0.1, 0.7, shape)})
row(tamer.gamma_delay, "B -> B")
row(tamer.tamer, "BT BFT:unit BT:mask BF -> BF", "credit feedback", sizes={"F": 3})
row(tamer.deep_tamer, "BT BFT:unit BT:mask BF -> BFT", "credit feedback", sizes={"F": 3})
row(
    tamer.delay_credit,
    "BF BT BT BT:mask -> BFT",
    "feedback_times starts ends",
    sizes={"F": 3},
    draws={
        "feedback_times": lambda rng, shape: rng.uniform(1.0, 3.0, shape),
        "starts": lambda rng, shape: np.arange(shape[1]) * 0.3 + np.zeros(shape),
        "ends": lambda rng, shape: np.arange(1, shape[1] + 1) * 0.3 + np.zeros(shape),
    },
)

# ----------------------------------------------------------------------------------------------------------------------

CASES = [
    pytest.param(run, case, id=f"{function.__module__.removeprefix('rlhf_jax.')}.{function.__name__}")
    for function, cases in ROWS.items()
    for run, case in cases
]


@pytest.mark.parametrize(("function", "case"), CASES)
def test_contract(function, case):
    report = check_contract(function, case)
    assert report["jit"] == "passed"
    if case.knobs:
        assert report["knobs"] == "passed"
    if "axis_name" in inspect.signature(function).parameters and "devices" not in case.skip:
        assert report["devices"] == "passed"


CORE = """
    masking logprobs vocabulary_chunks teacher_chunks kl rewards reward_scales ensembles constraints returns advantages
    group_advantages token_advantages pass_at_k
"""


def core_modules():
    for name in CORE.split():
        yield importlib.import_module(f"rlhf_jax.{name}")
    for module in pkgutil.iter_modules(losses.__path__, "rlhf_jax.losses."):
        if not module.name.rpartition(".")[-1].startswith("_"):
            yield importlib.import_module(module.name)


PUBLIC = {
    member: f"{module.__name__}.{name}"
    for module in core_modules()
    for name, member in vars(module).items()
    if name in module.__all__ and inspect.isfunction(member)
}


def test_every_public_function_has_a_row_or_a_reason():
    assert not [name for function, name in PUBLIC.items() if (function in ROWS) == (function in EXEMPT)]
    assert ROWS.keys() | EXEMPT.keys() == PUBLIC.keys()


def test_every_public_function_is_documented_with_an_example():
    assert not [name for function, name in PUBLIC.items() if ">>> " not in (inspect.getdoc(function) or "")]


def test_checks_are_left_out_for_known_reasons_only():
    """Most rows leave out nothing; those that do are few enough to read."""
    left_out = {}
    for function, cases in ROWS.items():
        for _, case in cases:
            for check, reason in case.skip.items():
                left_out.setdefault(check, {}).setdefault(reason, set()).add(function.__name__)
    assert left_out.keys() <= {"dtypes", "padding", "permutation", "devices", "mask"}
    assert left_out["permutation"] == {"draws by slot": {"clip_cov"}}
    assert left_out["mask"].keys() == {"the choice of an empty slot is not a number"}
    assert sum(len(functions) for reasons in left_out.values() for functions in reasons.values()) < len(ROWS) / 8
