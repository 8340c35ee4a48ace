"""Every algorithm reaches the exact answer of its problem, from a start that is far from it."""

import jax
import jax.numpy as jnp
import pytest
from decision_probes import regret
from optima import BIASED, PROBES
from problem import HUMAN_OPTIMUM, LOG_REFERENCE, LOG_TEACHER, OPTIMUM, REWARDS, UNIFORM_OPTIMUM, minimise

from rlhf_jax.testing import enumerable


@pytest.mark.parametrize("probe", PROBES, ids=[f"{p.family}: {p.name}" for p in PROBES])
def test_reaches_the_exact_answer(probe):
    assert float(probe.run()) < probe.tolerance


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
