"""A check that cannot fail is worthless: good losses pass all of the contract, each broken one fails its check."""

import functools

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import masking
from rlhf_jax.testing import CHECKS, Case, NotApplicable, check_contract
from rlhf_jax.testing.subject import examine

CASE = Case("BT:log_prob BT:log_prob BT BT:mask ->", knobs={"clip": 0.2}, stopped=("old_log_probs", "advantages"))


def clipped(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    """Unreduced clipped surrogate, clean."""
    log_probs, old_log_probs, advantages = masking.zero_outside(mask, log_probs, old_log_probs, advantages)
    ratio = jnp.exp(
        log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32)) - jax.lax.stop_gradient(old_log_probs)
    )
    advantages = jax.lax.stop_gradient(advantages)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


def good(log_probs, old_log_probs, advantages, mask, *, clip=0.2, axis_name=None):
    loss = clipped(log_probs, old_log_probs, advantages, mask, clip=clip)
    return masking.token_mean(loss, mask, axis_name=axis_name)


def multiplies_by_the_mask(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    ratio = jnp.exp(log_probs - jax.lax.stop_gradient(old_log_probs)) * jax.lax.stop_gradient(advantages)
    return jnp.sum(ratio * mask) / jnp.sum(mask)


def where_after_exp(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    ratio = jnp.exp(log_probs - jax.lax.stop_gradient(old_log_probs)) * jax.lax.stop_gradient(advantages)
    return masking.token_mean(jnp.where(mask, ratio, 0.0), mask)


def averages_slots(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    return jnp.mean(jnp.where(mask, clipped(log_probs, old_log_probs, advantages, mask, clip=clip), 0.0))


def weighs_by_slot(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    loss = clipped(log_probs, old_log_probs, advantages, mask, clip=clip)
    return masking.token_mean(loss * jnp.arange(mask.shape[-1], dtype=jnp.float32)[None, :], mask)


def averages_averages(log_probs, old_log_probs, advantages, mask, *, clip=0.2, axis_name=None):
    mean = good(log_probs, old_log_probs, advantages, mask, clip=clip)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def averages_micro_batches(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    return masking.Totals(good(log_probs, old_log_probs, advantages, mask, clip=clip), jnp.ones(()))


def good_totals(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    return masking.token_totals(clipped(log_probs, old_log_probs, advantages, mask, clip=clip), mask)


def centres_over_the_batch(x, *, scale=1.0):
    return scale * (x - jnp.mean(x))


def means_of_each_device(x, *, axis_name=None):
    return x - jnp.mean(x)


def float_on_a_knob(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    return good(log_probs, old_log_probs, advantages, mask, clip=float(clip))


def branches_on_a_knob(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    return good(log_probs, old_log_probs, advantages, mask, clip=clip if clip > 0 else 0.2)


def weighs_by_row(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    rows = jnp.arange(mask.shape[0], dtype=jnp.float32)[:, None]
    return masking.token_mean(clipped(log_probs, old_log_probs, advantages, mask, clip=clip) * rows, mask)


def divides_by_zero_tokens(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    loss = clipped(log_probs, old_log_probs, advantages, mask, clip=clip)
    return masking.masked_sum(loss, mask) / jnp.sum(mask)


def sigmoid_then_log(margin, *, beta=0.1):
    return -jnp.log(1 / (1 + jnp.exp(-10 * beta * margin)))


def root_at_zero(x, *, scale=1.0):
    return scale * jnp.sqrt(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))


def computes_in_bfloat16(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    ratio = jnp.exp(jnp.where(mask, log_probs - old_log_probs, jnp.zeros((), log_probs.dtype)))
    return masking.token_mean(ratio * jnp.where(mask, advantages, jnp.zeros((), advantages.dtype)), mask)


def returns_bfloat16(x, *, scale=1.0):
    return scale * x


def narrows_float64(x, *, scale=1.0):
    return scale * x.astype(jnp.float32)


def learns_the_old_policy(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    loss = jnp.exp(jnp.where(mask, log_probs - old_log_probs, 0.0)) * jax.lax.stop_gradient(
        jnp.where(mask, advantages, 0)
    )
    return masking.token_mean(loss, mask)


def learns_nothing(log_probs, old_log_probs, advantages, mask, *, clip=0.2):
    return good(jax.lax.stop_gradient(log_probs), old_log_probs, advantages, mask, clip=clip)


def sees_whether_it_is_traced(x, *, scale=1.0):
    return 2 * scale * x if isinstance(x, jax.core.Tracer) else scale * x


@jax.custom_jvp
def teaches_padding(x, mask):
    """The sum of what counts, with a gradient that pretends that all of x counts."""
    return masking.masked_sum(x, mask)


teaches_padding.defjvp(lambda primals, tangents: (teaches_padding(*primals), jnp.sum(tangents[0], dtype=jnp.float32)))


def drops_the_first(x, *, scale=1.0):
    return scale * x[1:]


class TracesTwice:
    """Depends on a count that survives calls, as an impure loss does."""

    __name__ = "traces_twice"
    calls = 0

    def __call__(self, x, *, scale=1.0):
        self.calls += 1
        return x * scale * self.calls


TOTALS = Case(CASE.spec + " :total :total", knobs=CASE.knobs, stopped=CASE.stopped)
ROWS = Case("B -> B", knobs={"scale": 1.0})

BROKEN = [
    ("jit", sees_whether_it_is_traced, ROWS, "eager and jit differ"),
    ("jit", TracesTwice(), ROWS, "eager and jit differ"),
    ("jit", good, Case(CASE.spec + " B", knobs=CASE.knobs), "a result of shape"),
    ("jit", good, TOTALS, "1 results, specified are 2"),
    ("jit", drops_the_first, ROWS, r"a result of shape \(7,\), specified is \[B\]"),
    ("jit", drops_the_first, Case("D -> D", knobs=ROWS.knobs), r"a result of shape \(2,\), specified is \(3,\)"),
    ("knobs", float_on_a_knob, CASE, "a traced value is turned into a Python number"),
    ("knobs", branches_on_a_knob, CASE, "a traced value is turned into a Python number"),
    ("garbage", multiplies_by_the_mask, CASE, "nan in padding changes"),
    ("garbage", where_after_exp, CASE, "changes the gradient of log_probs"),
    ("garbage", lambda x, mask: teaches_padding(x, mask), Case("BT BT:mask ->"), "a gradient where the mask hides it"),
    ("padding", averages_slots, CASE, "three more slots of padding"),
    ("padding", weighs_by_slot, CASE, "padding on the left"),
    ("permutation", weighs_by_row, CASE, "order of the rows"),
    ("extremes", divides_by_zero_tokens, CASE, "not finite for an empty mask"),
    ("extremes", sigmoid_then_log, Case("B -> B", knobs={"beta": 1.0}), "not finite for margin = "),
    ("extremes", root_at_zero, ROWS, "gradient of x not finite for all reals equal"),
    ("dtypes", computes_in_bfloat16, CASE, "not computed in float32"),
    ("dtypes", returns_bfloat16, ROWS, "bfloat16 inputs give bfloat16"),
    ("dtypes", narrows_float64, ROWS, "float64 inputs give float32"),
    ("stopped", learns_the_old_policy, CASE, "a gradient flows to old_log_probs"),
    ("stopped", learns_nothing, CASE, "no gradient reaches log_probs"),
    ("devices", averages_averages, CASE, "four devices differ from one"),
    ("devices", means_of_each_device, Case("B -> B"), "four devices differ from one"),
    ("micro_batches", averages_micro_batches, TOTALS, "two micro-batches differ from one batch"),
    ("micro_batches", centres_over_the_batch, ROWS, "two micro-batches differ from one batch"),
]


def test_every_check_has_a_loss_that_breaks_it():
    assert {name for name, *_ in BROKEN} == {*CHECKS}


@pytest.mark.parametrize(("function", "case"), [(good, CASE), (good_totals, TOTALS)])
def test_a_good_loss_passes_the_whole_contract(function, case):
    report = check_contract(function, case)
    assert report.keys() == CHECKS.keys()
    left_out = {name for name, outcome in report.items() if outcome != "passed"}
    assert left_out == ({"micro_batches"} if function is good else {"devices"})


@pytest.mark.parametrize(
    ("check", "function", "case", "words"), BROKEN, ids=[f"{b[0]}-{getattr(b[1], '__name__', 0)}" for b in BROKEN]
)
def test_a_broken_loss_fails_in_words(check, function, case, words):
    with pytest.raises(AssertionError, match=words):
        CHECKS[check](function, case)


def test_a_loss_that_breaks_one_promise_fails_the_contract():
    with pytest.raises(AssertionError, match="nan in padding changes"):
        check_contract(multiplies_by_the_mask, CASE)


def test_a_check_is_never_left_out_in_silence():
    scalar = Case("BT:log_prob BT:log_prob BT BT:mask ->")
    with pytest.raises(NotApplicable, match="no knobs"):
        CHECKS["knobs"](averages_slots, scalar)
    with pytest.raises(NotApplicable, match="axis_name"):
        CHECKS["devices"](averages_slots, scalar)
    report = check_contract(root_at_zero, Case("B -> B", skip={"extremes": "its slope at 0 is undefined"}))
    assert report["extremes"] == "its slope at 0 is undefined"
    with pytest.raises(ValueError, match="skip names"):
        check_contract(good, Case(CASE.spec, skip={"extreme": "no such check"}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Case("BT BT"), "one arrow"),
        (lambda: Case("BT:logprob ->"), "unknown domain 'logprob'"),
        (lambda: CHECKS["jit"](lambda x: x, Case("B B -> B")), "has 2 arguments"),
        (lambda: CHECKS["stopped"](lambda x: x, Case("B -> B", stopped=("y",))), "stopped names"),
    ],
)
def test_a_wrong_case_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def beside_the_group(rewards, *, group):
    groups = rewards.reshape(-1, group).astype(jnp.promote_types(rewards.dtype, jnp.float32))
    return (groups - jnp.mean(groups, axis=-1, keepdims=True)).reshape(-1), jnp.mean(groups, axis=-1)


def test_partials_and_groups_are_cases_too():
    pairs = functools.partial(beside_the_group, group=2)
    report = check_contract(pairs, Case("B -> B N", rows_together=2))
    assert report["permutation"] == report["micro_batches"] == "passed"
    with pytest.raises(AssertionError, match="order of the rows"):
        CHECKS["permutation"](lambda rewards: pairs(rewards)[0], Case("B -> B"))


def test_a_second_compilation_is_counted():
    case = Case("B -> B", knobs={"scale": 1.0})
    CHECKS["knobs"](centres_over_the_batch, case)
    subject = examine(centres_over_the_batch, case)
    subject.run(subject.cast(jnp.bfloat16))
    with pytest.raises(AssertionError, match="compiled 2 times while only knobs changed"):
        CHECKS["knobs"](centres_over_the_batch, case)


def test_without_four_devices_the_check_says_so(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "1 devices; set XLA_FLAGS" in check_contract(good, CASE)["devices"]


def test_rows_that_do_not_spread_over_devices_are_an_error_of_the_case():
    with pytest.raises(ValueError, match="6 blocks of rows do not spread over 4 devices"):
        CHECKS["devices"](good, Case(CASE.spec, sizes={"B": 6}))
