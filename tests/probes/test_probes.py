"""Every algorithm reaches the exact answer of its problem, from a start that is far from it."""

import ast
import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest
from decision_probes import regret
from optima import BIASED, PROBES
from problem import HUMAN_OPTIMUM, LOG_REFERENCE, LOG_TEACHER, OPTIMUM, REWARDS, UNIFORM_OPTIMUM, minimise

from rlhf_jax import (
    advantages,
    constraints,
    group_advantages,
    kl,
    losses,
    pass_at_k,
    returns,
    token_advantages,
)
from rlhf_jax.testing import enumerable


@pytest.mark.parametrize("probe", PROBES, ids=[f"{p.family}: {p.name}" for p in PROBES])
def test_reaches_the_exact_answer(probe):
    assert float(probe.run()) < probe.tolerance


NO_OPTIMUM = {
    "anchors and moments, taken as known by the losses that they belong to": """unpaired_preference.kto_reference_point
        unpaired_preference.init_reward_shift unpaired_preference.update_reward_shift returns.at_next_valid""",
    "importance weights of another distribution of prompts": "unpaired_preference.density_ratio_weights",
    "run by rlhf_jax.algorithms.unpaired_preference": "unpaired_preference.kto",
    "parts of losses that have a probe": """divergence_preference.forward_kl_scores
        divergence_preference.jensen_shannon_scores divergence_preference.alpha_divergence_scores
        human_distillation.human_teacher_logits q_learning.action_values q_learning.q_learning_target
        q_learning.double_q_target q_learning.sarsa_target q_learning.expected_sarsa_target
        online_preference.order_pairs reference_free_preference.odds_ratio
        covariance_policy.token_covariances returns.backward_recursion""",
    "other inputs of a loss that has a probe": """feedback.shift_feedback tamer.uniform_delay tamer.gamma_delay
        rating.init_cut_parameters rating.ordered_cut_points""",
    "measurements": "preference.accuracy importance.effective_sample_share",
    "the same numbers from hidden states": """head_divergences.head_forward_kl head_divergences.head_reverse_kl
        head_divergences.head_generalised_jsd head_divergences.head_total_variation""",
    "controllers that do nothing": "kl.init_fixed_kl kl.update_fixed_kl",
}
"""Functions that no probe runs, and why."""


def test_every_equation_is_run_to_its_optimum():
    """Every public function of losses, advantages, KL and constraints stands in a probe or in the list above."""
    read = "\n".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("*_probes.py"))
    run = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(read))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    modules = [advantages, constraints, group_advantages, kl, pass_at_k, returns, token_advantages]
    modules += [getattr(losses, name) for name in losses.__all__]
    public = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    excused = {name for names in NO_OPTIMUM.values() for name in names.split()}
    assert public - run == excused


@pytest.mark.parametrize("name", BIASED)
def test_other_objectives_have_other_optima(name):
    assert float(BIASED[name]()) > 0.05


def test_every_start_is_far_from_its_answer():
    for optimum in (OPTIMUM, HUMAN_OPTIMUM, LOG_TEACHER, UNIFORM_OPTIMUM):
        assert float(enumerable.total_variation(LOG_REFERENCE, optimum)) > 0.2
    assert float(regret(jnp.zeros((3, 2)))) > 0.2
    assert float(jnp.max(jnp.abs(REWARDS - REWARDS.mean()))) > 0.5


def test_the_loop_itself_finds_a_minimum():
    found = minimise(lambda x, old, key, step: jnp.sum((x - jnp.arange(3.0)) ** 2), jnp.zeros(3))
    assert float(jnp.max(jnp.abs(found - jnp.arange(3.0)))) < 1e-3
    random = minimise(lambda x, old, key, step: jnp.sum(x * jax.random.normal(key, (3,))), jnp.zeros(3), steps=50)
    assert float(jnp.max(jnp.abs(random))) > 0  # every step has a key of its own
