"""Scripted teachers: returns against loops, every imperfection by its frequency, answers as pairs, late signals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.feedback import teachers

N = 4000


def test_segment_returns_are_those_of_a_loop_over_the_valid_steps():
    rng = np.random.default_rng(0)
    rewards, mask = rng.normal(size=(6, 9)), rng.random((6, 9)) < 0.7
    mask[0] = False
    for myopia in (1.0, 0.9, 0.0):
        wanted = [sum(r * myopia**k for k, r in enumerate(row[m][::-1])) for row, m in zip(rewards, mask, strict=True)]
        garbage = jnp.where(mask, rewards, jnp.nan)
        found = jax.jit(teachers.segment_returns)(garbage, jnp.asarray(mask), myopia=myopia)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def first_wins(key, difference, **knobs):
    first = jnp.full(N, difference)
    return teachers.compare(first, jnp.zeros(N), key, **knobs).first_wins


@pytest.mark.parametrize(
    ("difference", "knobs", "wanted"),
    [
        (0.1, {}, 1.0),
        (-0.1, {}, 0.0),
        (0.0, {}, 0.5),  # a coin toss, not NaN
        (1.0, {"rationality": 0.0}, 0.5),
        (1.0, {"rationality": 2.0}, 1 / (1 + np.exp(-2))),
        (1.0, {"mistakes": 0.1}, 0.9),
        (1.0, {"mistakes": 1.0}, 0.0),
        (1.0, {"mistakes": 1.0, "equal_within": 2.0}, 0.5),
    ],
)
def test_the_first_wins_as_often_as_the_formula_says(key, difference, knobs, wanted):
    found = first_wins(key, difference, **knobs)
    spread = 4 * np.sqrt(wanted * (1 - wanted) / N)  # four standard errors
    assert abs(float(found.mean()) - wanted) <= spread + 1e-6
    assert bool(jnp.all((found == 0.5) == ("equal_within" in knobs)))


def test_equal_is_strict_and_skipped_questions_are_those_of_two_poor_segments(key):
    answers = teachers.compare(
        jnp.array([1.0, 3.0, 1.0]), jnp.array([0.5, 1.0, 2.0]), key, equal_within=0.5, skip_below=2.0
    )
    assert answers.first_wins.tolist() == [1.0, 1.0, 0.0]
    assert answers.given.tolist() == [False, True, True]


def test_knobs_are_traced_and_may_be_swept(key):
    sweep = jax.vmap(lambda mistakes: first_wins(key, 1.0, mistakes=mistakes).mean())(jnp.array([0.0, 1.0]))
    assert sweep.tolist() == [1.0, 0.0]


def test_the_threshold_is_a_share_of_the_mean_segment():
    found = teachers.return_threshold(0.1, jnp.array(300.0), segment=50, episode=500)
    assert float(found) == pytest.approx(0.1 * 300 * 50 / 500)


def test_pairs_carry_each_answer_once_and_nothing_of_a_skipped_question():
    answers = teachers.Answers(jnp.array([1.0, 0.0, 0.5, 1.0]), jnp.array([True, True, True, False]))
    batch = teachers.preference_batch({"x": jnp.arange(4)}, {"x": jnp.arange(4) + 10}, answers)
    votes = {
        (int(a), int(b)): float(w)
        for a, b, w in zip(batch.chosen["x"], batch.rejected["x"], batch.weight, strict=True)
        if w > 0
    }
    assert votes == {(0, 10): 1.0, (11, 1): 1.0, (2, 12): 0.5, (12, 2): 0.5}


def test_signals_come_after_their_steps_within_the_reaction_time(key):
    judgements = jnp.sign(jax.random.normal(key, (8, 200)))
    signals = teachers.delayed_signals(judgements, key, frequency=0.3, step_seconds=0.5, fastest=0.2, slowest=0.6)
    delays = signals.times - (jnp.arange(200) + 1)[None] * 0.5
    assert float(delays.min()) >= 0.2 - 1e-4
    assert float(delays.max()) <= 0.6 + 1e-4
    assert abs(float(signals.given.mean()) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1600)
    assert bool(jnp.all(signals.values == jnp.where(signals.given, judgements, 0.0)))


def test_integer_returns_and_masks_that_are_no_masks_are_refused(key):
    with pytest.raises(TypeError):
        teachers.compare(jnp.array([1]), jnp.array([2]), key)
    with pytest.raises(TypeError, match="mask must be bool"):
        teachers.segment_returns(jnp.ones(2), jnp.ones(2))
    with pytest.raises(AssertionError):
        teachers.compare(jnp.ones(2), jnp.ones(3), key)
