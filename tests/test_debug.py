"""debug.py: every check is silent on good values and speaks on bad ones, also under jit and vmap."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

from rlhf_jax import debug

T, F = True, False
MASK = jnp.array([[T, T, F], [T, F, F]])
NAN = jnp.nan
X = jnp.array([[-1.0, -2.0, NAN], [0.0, jnp.inf, -1e9]])

# check, good arguments, bad arguments, what is said
TABLE = [
    (debug.check_mask_not_empty, (MASK,), (jnp.zeros((2, 3), bool),), "the mask is all False"),
    (
        debug.check_mask_rows,
        (MASK,),
        (jnp.array([[T, T], [F, F], [F, T], [F, F]]),),
        "2 empty rows, .* row 1",
    ),
    (debug.check_responses_right_padded, (MASK,), (jnp.array([[T, T, F], [T, F, T]]),), "row 1 of the response mask"),
    (debug.check_responses_right_padded, (jnp.zeros((2, 3), bool),), (jnp.array([[F, T, T], [T, F, F]]),), "row 0 of"),
    (debug.check_prompts_left_padded, (~MASK,), (jnp.array([[F, T, T], [F, T, F]]),), "row 1 of the prompt mask"),
    (debug.check_finite, (X, MASK), (X, jnp.array([[T, T, F], [T, T, F]])), "x is not finite in 1 counted slots, .* 4"),
    (debug.check_rewards, (jnp.array([0.5, -1.0]),), (jnp.array([0.5, NAN]),), "rewards is not finite in 1 .* index 1"),
    (debug.check_rewards, (X, MASK), (jnp.array([jnp.inf]),), "rewards is not finite"),
    (
        debug.check_log_probs,
        (X, MASK),
        (jnp.array([[-1.0, 0.7, NAN], [0.0, NAN, NAN]]), MASK),
        "a log-prob is 0.[67]",
    ),
    (debug.check_log_probs, (X, jnp.zeros((2, 3), bool)), (X, ~MASK), "log_probs is not finite in 2 counted slots"),
    (debug.check_first_ratio, (X, jnp.where(MASK, X, 5.0), MASK), (X, X - 0.1 * MASK, MASK), "ratio is 1.105.*, not 1"),
    (
        lambda tokens, mask: debug.check_pad_is_not_eos(tokens, mask, eos=2),
        (jnp.array([[5, 2, 0], [2, 0, 0]]), MASK),
        (jnp.array([[5, 2, 2], [2, 0, 0]]), MASK),
        "padding holds the end token 2 in 1 slots",
    ),
    (
        lambda tokens, mask: debug.check_one_bos(tokens, mask, bos=1),
        (jnp.array([[1, 5, 1], [5, 1, 1]]), MASK),
        (jnp.array([[5, 1, 1], [1, 1, 1]]), jnp.ones((2, 3), bool)),
        "row 1 has the start token 1 3 times",
    ),
    (
        lambda rewards: debug.check_group_rewards_differ(rewards, group=2),
        (jnp.array([0.0, 1.0, 1.0, 0.0]),),
        (jnp.array([0.0, 1.0, 1.0, 1.0]),),
        "1 of 2 groups have all-equal rewards, the first is group 1",
    ),
]


@pytest.mark.parametrize("row", range(len(TABLE)))
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_checks_speak_only_of_bad_values(row, transform):
    check, good, bad, words = TABLE[row]
    checked = transform(checkify.checkify(check))
    error, _ = checked(*good)
    assert error.get() is None
    error, _ = checked(*bad)
    with pytest.raises(ValueError, match=words):
        error.throw()


def test_every_check_is_in_the_table():
    checked = " ".join(getattr(check, "__name__", "") for check, *_ in TABLE)
    assert {name for name in debug.__all__ if name not in checked} == {
        "check_pad_is_not_eos",
        "check_one_bos",
        "check_group_rewards_differ",
    }  # these three are called through a lambda


def test_a_tolerated_share_of_equal_groups():
    check = checkify.checkify(lambda r, share: debug.check_group_rewards_differ(r, group=2, share=share))
    rewards = jnp.array([0.0, 1.0, 1.0, 1.0])
    assert check(rewards, 0.5)[0].get() is None
    assert "1 of 2 groups" in check(rewards, 0.4)[0].get()


def test_the_tolerance_of_the_first_ratio_is_a_distance_of_ratios():
    check = checkify.checkify(lambda new, tolerance: debug.check_first_ratio(new, X, MASK, tolerance=tolerance))
    for sign in (1.0, -1.0):
        moved = X + jnp.log1p(sign * 0.01)
        assert check(moved, 0.011)[0].get() is None
        assert check(moved, 0.009)[0].get() is not None
    assert check(jnp.where(MASK, jnp.nan, X), 0.1)[0].get() is not None  # nan is no ratio of 1 either


def test_a_small_rounding_above_zero_is_no_wrong_log_prob():
    check = checkify.checkify(lambda x, tolerance: debug.check_log_probs(x, jnp.ones((2,), bool), tolerance=tolerance))
    assert check(jnp.array([1e-4, -1.0]), 1e-3)[0].get() is None
    assert check(jnp.array([1e-4, -1.0]), 0.0)[0].get() is not None


def test_static_mistakes_are_refused_at_trace_time():
    with pytest.raises(TypeError, match="mask must be bool"):
        debug.check_mask_rows(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="group must divide the batch, got group 2 and 3"):
        debug.check_group_rewards_differ(jnp.ones(3), group=2)
    with pytest.raises(AssertionError):
        debug.check_first_ratio(X, X[:1], MASK)


def test_without_checkify_they_raise_at_once():
    debug.check_mask_not_empty(MASK)
    with pytest.raises(ValueError, match="the mask is all False"):
        debug.check_mask_not_empty(jnp.zeros((1, 2), bool))
