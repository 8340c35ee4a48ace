"""rewards.py, reward_scales.py and ensembles.py against loops over rows, and their promises about missing rewards."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rlhf_jax import advantages, ensembles, kl, masking, reward_scales, rewards

ROWS, TOKENS = 4, 6
SCORES = hnp.arrays(np.float32, (ROWS,), elements=st.floats(-9, 9, width=32))
TABLE = hnp.arrays(np.float32, (ROWS, TOKENS), elements=st.floats(-9, 9, width=32))
MASK = hnp.arrays(np.bool_, (ROWS, TOKENS))
RAGGED = np.arange(TOKENS) < np.array([0, 1, 4, TOKENS])[:, None]  # an empty row, one token, a full row


# --- where a score lands ----------------------------------------------------------------------------------------------

# name: (function of scores and mask, slot of a row from its mask or None)
PLACEMENTS = {
    "score_at_last_token": (
        rewards.score_at_last_token,
        lambda row: max(np.flatnonzero(row)) if row.any() else None,
    ),
    "score_after_last_token": (
        rewards.score_after_last_token,
        lambda row: min(max(np.flatnonzero(row)) + 1, TOKENS - 1) if row.any() else None,
    ),
    "score_at_slot": (rewards.score_at_slot, lambda row: TOKENS - 1),
    "score_at_slot 2": (lambda s, m: rewards.score_at_slot(s, m, slot=2), lambda row: 2),
    "score_at_slot -5": (lambda s, m: rewards.score_at_slot(s, m, slot=-5), lambda row: 1),
}
COMPILED = {name: jax.jit(row[0]) for name, row in PLACEMENTS.items()}


@pytest.mark.parametrize("name", PLACEMENTS)
@given(scores=SCORES, mask=MASK)
def test_scores_land_on_their_slot_and_nowhere_else(name, scores, mask):
    expected = np.zeros((ROWS, TOKENS), np.float32)
    for b in range(ROWS):
        slot = PLACEMENTS[name][1](mask[b])
        if slot is not None:
            expected[b, slot] = scores[b]
    np.testing.assert_array_equal(COMPILED[name](scores, mask), expected)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements_refuse_integers_keep_nan_and_other_axes(name):
    place = PLACEMENTS[name][0]
    scores = jnp.array([0.7, 1.0, jnp.nan, -2.0])
    got = place(scores, RAGGED)
    assert got.dtype == jnp.float32
    assert np.isnan(got).sum() == 1
    assert np.isnan(got[2]).sum() == 1
    np.testing.assert_array_equal(place(scores[3], RAGGED[3]), got[3])
    np.testing.assert_array_equal(place(scores.reshape(2, 2), RAGGED.reshape(2, 2, TOKENS)), got.reshape(2, 2, TOKENS))
    assert place(jnp.ones(ROWS, jnp.bfloat16), RAGGED).dtype == jnp.float32
    with jax.enable_x64():
        assert place(jnp.ones(ROWS, jnp.float64), RAGGED).dtype == jnp.float64
    gradient = jax.grad(lambda s: jnp.sum(place(s, RAGGED) * jnp.arange(1.0, 7.0)[None]))(jnp.ones(ROWS))
    np.testing.assert_array_equal(gradient, place(jnp.ones(ROWS), RAGGED) @ jnp.arange(1.0, 7.0))
    with pytest.raises(TypeError, match="scores must be floating point, got dtype int32"):
        place(jnp.array([1, 2, 3, 4]), RAGGED)
    with pytest.raises(TypeError, match="scores must be floating point, got dtype bool"):
        place(jnp.ones(ROWS, bool), RAGGED)
    with pytest.raises(TypeError, match="mask must be bool"):
        place(scores, jnp.asarray(RAGGED, jnp.float32))
    with pytest.raises(AssertionError):
        place(scores[:2], RAGGED)


def test_slots_out_of_range_are_refused():
    for slot in (TOKENS, -TOKENS - 1, 1.0, True):
        with pytest.raises(ValueError, match=r"slot must be an int in \[-6, 6\)"):
            rewards.score_at_slot(jnp.zeros(ROWS), RAGGED, slot=slot)
    assert float(rewards.score_at_slot(jnp.ones(ROWS), RAGGED, slot=-TOKENS)[0, 0]) == 1.0


def test_state_mask_adds_the_slot_after_the_last_token_and_lets_credit_through():
    got = np.asarray(jax.jit(rewards.state_mask)(RAGGED))
    np.testing.assert_array_equal(got.sum(1), [0, 2, 5, 6])
    np.testing.assert_array_equal(got[1], [True, True, False, False, False, False])
    hole = jnp.array([False, True, False, True, False, False])
    assert rewards.state_mask(hole).tolist() == [False, True, False, True, True, False]
    with pytest.raises(TypeError, match="mask must be bool"):
        rewards.state_mask(jnp.ones(3))
    token_rewards = rewards.score_after_last_token(jnp.ones(ROWS), RAGGED)
    seen = advantages.gae(token_rewards, jnp.zeros_like(token_rewards), rewards.state_mask(RAGGED), gae_lambda=0.5)
    np.testing.assert_allclose(seen.advantages[2, :5], [0.0625, 0.125, 0.25, 0.5, 1.0])
    lost = advantages.gae(token_rewards, jnp.zeros_like(token_rewards), RAGGED)
    assert not lost.advantages[2].any()


# --- KL-shaped rewards ------------------------------------------------------------------------------------------------

kl_shaped_rewards = jax.jit(rewards.kl_shaped_rewards)


@given(placed=TABLE, log_probs=TABLE, reference=TABLE, mask=MASK, beta=st.floats(0, 2))
def test_kl_shaped_rewards_equal_a_loop(placed, log_probs, reference, mask, beta):
    dirty = np.where(mask, log_probs, np.nan), np.where(mask, reference, -np.inf)
    got = kl_shaped_rewards(placed, *dirty, mask, beta=beta)
    expected = placed.astype(np.float64)
    for b, t in np.argwhere(mask):
        expected[b, t] -= beta * (float(log_probs[b, t]) - float(reference[b, t]))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_kl_shaped_rewards_sum_are_constants_and_refuse_mistakes():
    rng = np.random.default_rng(0)
    log_probs, reference = rng.normal(size=(2, ROWS, TOKENS)).astype(np.float32)
    scores = jnp.array([1.0, 2.0, 3.0, 4.0])
    placed = rewards.score_at_last_token(scores, RAGGED)
    got = rewards.kl_shaped_rewards(placed, log_probs, reference, RAGGED, beta=0.3)
    ratios = masking.masked_sum(kl.k1(log_probs, reference), RAGGED, axis=-1)
    np.testing.assert_allclose(got.sum(-1), np.where(RAGGED.any(1), scores, 0) - 0.3 * ratios, rtol=1e-5)
    np.testing.assert_array_equal(rewards.kl_shaped_rewards(placed, log_probs, reference, RAGGED, beta=0.0), placed)
    default = rewards.kl_shaped_rewards(placed, log_probs, reference, RAGGED)
    np.testing.assert_array_equal(default, rewards.kl_shaped_rewards(placed, log_probs, reference, RAGGED, beta=0.05))
    after = rewards.score_after_last_token(scores, RAGGED)  # lands outside the mask and stays
    assert float(rewards.kl_shaped_rewards(after, log_probs, reference, RAGGED)[1, 1]) == 2.0
    total = lambda p, q: jnp.sum(rewards.kl_shaped_rewards(placed, p, q, RAGGED))
    assert not any(g.any() for g in jax.grad(total, (0, 1))(log_probs, reference))
    swept = jax.vmap(lambda b: rewards.kl_shaped_rewards(placed, log_probs, reference, RAGGED, beta=b))
    np.testing.assert_allclose(swept(jnp.array([0.0, 0.3])), jnp.stack([placed, got]), rtol=1e-6)
    with pytest.raises(TypeError, match="score_rewards must be floating point"):
        rewards.kl_shaped_rewards(placed.astype(int), log_probs, reference, RAGGED)
    with pytest.raises(TypeError, match="mask must be bool"):
        rewards.kl_shaped_rewards(placed, log_probs, reference, RAGGED * 1.0)
    for wrong in (
        (placed[:2], log_probs, reference),
        (placed, log_probs[:2], reference),
        (placed, log_probs, placed[0]),
    ):
        with pytest.raises(AssertionError):
            rewards.kl_shaped_rewards(*wrong, RAGGED)


# --- ends and lengths -------------------------------------------------------------------------------------------------


@given(tokens=hnp.arrays(np.int32, (ROWS, TOKENS), elements=st.integers(0, 4)), mask=MASK)
def test_has_eos_looks_at_valid_tokens_alone(tokens, mask):
    for eos in (2, np.array([0, 3])):
        ids = set(np.atleast_1d(eos).tolist())
        expected = [any(int(t) in ids for t in row[kept]) for row, kept in zip(tokens, mask, strict=True)]
        np.testing.assert_array_equal(rewards.has_eos(tokens, mask, eos=eos), expected)


def test_missing_eos_is_replaced_or_paid_for():
    scores, ended = jnp.array([0.5, 9.0, jnp.nan, jnp.nan]), jnp.array([True, False, False, True])
    np.testing.assert_array_equal(rewards.replace_missing_eos(scores, ended), [0.5, -1.0, -1.0, np.nan])
    np.testing.assert_array_equal(rewards.replace_missing_eos(scores, ended, value=-3.0), [0.5, -3.0, -3.0, np.nan])
    np.testing.assert_array_equal(rewards.subtract_missing_eos(scores, ended), [0.5, 8.0, np.nan, np.nan])
    np.testing.assert_array_equal(rewards.subtract_missing_eos(scores, ended, penalty=0.0), scores)
    swept = jax.jit(jax.vmap(lambda k: rewards.subtract_missing_eos(scores[:2], ended[:2], penalty=k)))
    np.testing.assert_array_equal(swept(jnp.array([1.0, 2.0])), [[0.5, 8.0], [0.5, 7.0]])
    for rule in (rewards.replace_missing_eos, rewards.subtract_missing_eos):
        with pytest.raises(TypeError, match="scores must be floating point"):
            rule(jnp.array([1]), jnp.array([True]))
        with pytest.raises(TypeError, match="ended must be bool"):
            rule(scores, ended * 1)
        with pytest.raises(AssertionError):
            rule(scores, ended[:2])
    with pytest.raises(TypeError, match="mask must be bool"):
        rewards.has_eos(jnp.zeros((2, 3), int), jnp.ones((2, 3)), eos=1)
    with pytest.raises(AssertionError):
        rewards.has_eos(jnp.zeros((2, 3), int), jnp.ones((2, 4), bool), eos=1)


overlong_penalty = jax.jit(rewards.overlong_penalty)


@given(
    lengths=hnp.arrays(np.int32, (5,), elements=st.integers(0, 40)), limit=st.integers(1, 40), buffer=st.integers(0, 40)
)
def test_overlong_penalty_equals_its_three_cases(lengths, limit, buffer):
    expected = []
    for length in lengths.tolist():
        if length <= limit - buffer:
            expected.append(0.0)
        elif length <= limit:
            expected.append(((limit - buffer) - length) / buffer)
        else:
            expected.append(-1.0)
    np.testing.assert_allclose(overlong_penalty(lengths, max_length=limit, buffer=buffer), expected, rtol=1e-5)


def test_overlong_penalty_is_float_and_clip_keeps_missing_rewards():
    assert rewards.overlong_penalty(jnp.array([3]), max_length=10, buffer=4).dtype == jnp.float32
    clipped = rewards.clip_rewards(jnp.array([-50.0, 3.0, 50.0, jnp.nan, jnp.inf]))
    np.testing.assert_array_equal(clipped, [-10.0, 3.0, 10.0, np.nan, 10.0])
    np.testing.assert_array_equal(rewards.clip_rewards(jnp.array([-5.0, 5.0]), low=-1.0, high=2.0), [-1.0, 2.0])
    with pytest.raises(TypeError, match="rewards must be floating point"):
        rewards.clip_rewards(jnp.array([3]))


# --- scales -----------------------------------------------------------------------------------------------------------


@given(scores=hnp.arrays(np.float32, (7,), elements=st.floats(-50, 50, width=32)), mask=hnp.arrays(np.bool_, (7,)))
def test_reference_scale_gives_the_wanted_mean_and_spread(scores, mask):
    kept = scores[mask].astype(np.float64)
    dirty = np.where(mask, scores, np.nan)
    scale = reward_scales.reference_scale(dirty, mask, mean=2.0, std=3.0)
    scaled = np.asarray(reward_scales.apply_scale(jnp.asarray(scores), scale), np.float64)[mask]
    shift = reward_scales.reference_shift(dirty, mask, mean=2.0)
    shifted = np.asarray(reward_scales.apply_scale(jnp.asarray(scores), shift), np.float64)[mask]
    if kept.size:
        np.testing.assert_allclose(shifted.mean(), 2.0, atol=1e-3)
        np.testing.assert_allclose(shifted - shifted.mean(), kept - kept.mean(), rtol=1e-3, atol=1e-3)
    if kept.size and kept.std() > 1e-2:
        np.testing.assert_allclose(scaled.mean(), 2.0, atol=1e-2)
        np.testing.assert_allclose(scaled.std(), 3.0, rtol=1e-2)
    assert float(shift.gain) == 1.0
    if not kept.size:
        assert (float(scale.gain), float(scale.bias), float(shift.bias)) == (1.0, 2.0, 2.0)


def test_reference_scale_of_equal_scores_devices_and_stops():
    everyone = jnp.ones(3, bool)
    scale = reward_scales.reference_scale(jnp.full(3, 0.5), everyone)
    assert (float(scale.gain), float(scale.bias)) == (1.0, -0.5)
    unbiased = reward_scales.reference_scale(jnp.array([1.0, 5.0]), everyone[:2], ddof=1)
    np.testing.assert_allclose(unbiased.gain, 1 / math.sqrt(8), rtol=1e-6)
    scores = jnp.asarray(np.random.default_rng(1).normal(size=8).astype(np.float32))
    mask = jnp.arange(8) != 3
    for function in (reward_scales.reference_scale, reward_scales.reference_shift):
        sharded = jax.pmap(lambda s, m, f=function: f(s, m, axis_name="data"), axis_name="data")
        got = sharded(scores.reshape(4, 2), mask.reshape(4, 2))
        for part, whole in zip(got, function(scores, mask), strict=True):
            np.testing.assert_allclose(part, [whole] * 4, rtol=1e-5, atol=1e-6)
        assert not jax.grad(lambda s, f=function: f(s, mask).bias + f(s, mask).gain)(scores).any()
        with pytest.raises(TypeError, match="scores must be floating point"):
            function(jnp.arange(3), everyone)
        with pytest.raises(TypeError, match="mask must be bool"):
            function(scores, mask * 1.0)
    with pytest.raises(TypeError, match="rewards must be floating point"):
        reward_scales.apply_scale(jnp.arange(3), scale)


@given(parts=st.lists(hnp.arrays(np.float32, (3,), elements=st.floats(-9, 9, width=32)), max_size=3))
def test_running_scales_follow_everything_seen(parts):
    moments = masking.init_moments()
    for part in parts:
        moments = masking.update_moments(moments, part, np.ones(3, bool))
    seen = np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)
    new = jnp.array([0.5, -4.0, jnp.nan])
    for ddof in (0, 1):
        spread = math.sqrt(seen.var(ddof=ddof) + 1e-4) if seen.size and seen.std() > 0 else 1.0
        if seen.any() and seen.std() < 0.05:  # in float32 the variance of a constant may be a rounding error
            continue  # rounding decides whether such values are all equal
        centre = seen.mean() if seen.size else 0.0
        only = reward_scales.scale_only(new, moments, ddof=ddof, epsilon=1e-4)
        both = reward_scales.centre_and_scale(new, moments, ddof=ddof, epsilon=1e-4)
        np.testing.assert_allclose(only, np.asarray(new) / spread, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(both, (np.asarray(new) - centre) / spread, rtol=1e-2, atol=1e-3)


def test_running_scales_do_not_differentiate_the_moments_and_refuse_integers():
    seen = masking.update_moments(masking.init_moments(), jnp.array([1.0, 5.0]), jnp.array([True, True]))
    for function in (reward_scales.scale_only, reward_scales.centre_and_scale):
        total = lambda m, f=function: jnp.sum(f(jnp.array([3.0]), m))
        assert not any(g.any() for g in jax.grad(total)(seen))
        with pytest.raises(TypeError, match="rewards must be floating point"):
            function(jnp.arange(3), seen)


# --- several rewards --------------------------------------------------------------------------------------------------

MIXTURE = hnp.arrays(np.float32, (5, 3), elements=st.one_of(st.floats(-9, 9, width=32), st.just(math.nan)))
WEIGHTS = np.float32([0.5, 2.0, 0.25])
SUMS = {
    "weighted_sum_of_present": reward_scales.weighted_sum_of_present,
    "weighted_mean_of_present": reward_scales.weighted_mean_of_present,
    "normalised_sum_of_present": lambda r, weights=1.0: reward_scales.normalised_sum_of_present(
        r, weights=weights, epsilon=1e-2
    ),
}
COMPILED_SUMS = {name: jax.jit(function) for name, function in SUMS.items()}


def mixture_loop(name, table, weights):
    out = []
    columns = [[v for v in column if not math.isnan(v)] for column in table.T.astype(np.float64)]
    for row in table.astype(np.float64):
        there = [(w, r, column) for w, r, column in zip(weights, row, columns, strict=True) if not math.isnan(r)]
        if not there:
            out.append(math.nan)
        elif name == "weighted_sum_of_present":
            out.append(sum(w * r for w, r, _ in there))
        elif name == "weighted_mean_of_present":
            out.append(sum(w * r for w, r, _ in there) / sum(w for w, _, _ in there))
        else:
            out.append(sum(w * (r - np.mean(c)) / math.sqrt(np.var(c) + 1e-2) for w, r, c in there))
    return out


@pytest.mark.parametrize("name", SUMS)
@given(table=MIXTURE)
def test_mixtures_leave_missing_rewards_out(name, table):
    got = COMPILED_SUMS[name](table, weights=WEIGHTS)
    np.testing.assert_allclose(got, mixture_loop(name, table, WEIGHTS), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(COMPILED_SUMS[name](table), mixture_loop(name, table, np.ones(3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SUMS)
def test_mixtures_have_finite_gradients_sweep_and_refuse_mistakes(name):
    table = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    table[1, 2] = table[3, :] = np.nan
    gradient = jax.jit(jax.grad(lambda t: jnp.nansum(SUMS[name](t, weights=WEIGHTS))))(table)
    assert np.isfinite(gradient).all()
    assert not gradient[np.isnan(table)].any()
    weights = jnp.stack([WEIGHTS, WEIGHTS[::-1]])
    swept = jax.jit(jax.vmap(lambda w: SUMS[name](table, weights=w)))(weights)
    np.testing.assert_allclose(swept, [SUMS[name](table, weights=w) for w in weights], rtol=1e-5, atol=1e-6)
    with jax.enable_x64():
        check_grads(
            jax.jit(lambda t: SUMS[name](t, weights=WEIGHTS)), (jnp.asarray(table[:1], jnp.float64),), 1, ["rev"]
        )
    with pytest.raises(TypeError, match="rewards must be floating point"):
        SUMS[name](jnp.zeros((5, 3), int))
    with pytest.raises(ValueError, match=r"weights must be one number or have shape \(3,\)"):
        SUMS[name](table, weights=jnp.ones(2))


def test_limits_of_mixtures():
    table = np.random.default_rng(3).normal(size=(6, 2)).astype(np.float32)
    share = np.float32([0.25, 0.75])
    np.testing.assert_allclose(
        reward_scales.weighted_mean_of_present(table, weights=share),
        reward_scales.weighted_sum_of_present(table, weights=share),
        rtol=1e-5,
    )
    assert np.isnan(reward_scales.weighted_mean_of_present(jnp.ones((1, 2)), weights=0.0)).all()
    exact = lambda t: reward_scales.normalised_sum_of_present(t, epsilon=0.0)
    np.testing.assert_allclose(exact(table * np.float32([1, 1e3])), exact(table), rtol=1e-3, atol=1e-5)
    sharded = jax.pmap(lambda t: reward_scales.normalised_sum_of_present(t, ddof=1, axis_name="data"), axis_name="data")
    eight = np.random.default_rng(4).normal(size=(8, 2)).astype(np.float32)
    np.testing.assert_allclose(
        sharded(eight.reshape(4, 2, 2)).reshape(8),
        reward_scales.normalised_sum_of_present(eight, ddof=1),
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(AssertionError):
        reward_scales.normalised_sum_of_present(jnp.ones((2, 3, 4)))


# --- ensembles --------------------------------------------------------------------------------------------------------

MEMBERS = hnp.arrays(np.float32, (3, 4), elements=st.floats(-9, 9, width=32))
ENSEMBLES = {
    "mean": (ensembles.mean, lambda m: m.mean()),
    "minimum": (ensembles.minimum, lambda m: m.min()),
    "mean_minus_variance": (ensembles.mean_minus_variance, lambda m: m.mean() - 0.1 * m.var()),
    "mean_minus_variance 2": (
        lambda r: ensembles.mean_minus_variance(r, penalty=2.0, ddof=1),
        lambda m: m.mean() - 2.0 * m.var(ddof=1),
    ),
    "mean_minus_std": (ensembles.mean_minus_std, lambda m: m.mean() - m.std()),
    "mean_minus_std 2": (
        lambda r: ensembles.mean_minus_std(r, k=2.0, ddof=1),
        lambda m: m.mean() - 2.0 * m.std(ddof=1),
    ),
}
COMPILED_ENSEMBLES = {name: jax.jit(row[0]) for name, row in ENSEMBLES.items()}


@pytest.mark.parametrize("name", ENSEMBLES)
@given(members=MEMBERS)
def test_ensembles_equal_numpy(name, members):
    expected = [ENSEMBLES[name][1](column.astype(np.float64)) for column in members.T]
    np.testing.assert_allclose(COMPILED_ENSEMBLES[name](members), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensembles_of_one_of_equals_of_missing_and_their_gradients(name):
    combine = ENSEMBLES[name][0]
    single = jnp.array([[0.3, -2.0]])
    np.testing.assert_array_equal(combine(single), single[0])
    agreed = jnp.full((3, 1), 0.1)
    np.testing.assert_allclose(combine(agreed), [0.1], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda m: combine(m).sum())(agreed), jnp.full((3, 1), 1 / 3), rtol=1e-5)
    assert np.isnan(combine(jnp.array([[1.0, 2.0], [jnp.nan, 3.0]]))).tolist() == [True, False]
    assert combine(single.astype(jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64():
        members = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4)))
        check_grads(jax.jit(combine), (members,), 1, ["rev"])
    with pytest.raises(TypeError, match="rewards must be floating point"):
        combine(jnp.ones((2, 2), int))


def test_limits_of_ensembles():
    members = np.random.default_rng(6).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_array_equal(ensembles.mean_minus_std(members, k=0.0), ensembles.mean(members))
    np.testing.assert_array_equal(ensembles.mean_minus_variance(members, penalty=0.0), ensembles.mean(members))
    np.testing.assert_allclose(ensembles.mean_minus_std(members[:2]), ensembles.minimum(members[:2]), rtol=1e-4)
    assert (ensembles.mean_minus_std(members, k=-1.0) > ensembles.mean(members)).all()
    swept = jax.vmap(lambda k: ensembles.mean_minus_std(members, k=k))(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(swept[1], ensembles.mean_minus_std(members), rtol=1e-6)
