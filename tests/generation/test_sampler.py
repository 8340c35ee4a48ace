"""generation/sampler.py: sampler = scorer, rows that do not see each other, ends, early exit, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Rows
from small_decoders import FAMILIES, LENGTHS, VOCABULARY, assert_close_where, decoder, ragged_prompts, score

from rlhf_jax.generation import warpers
from rlhf_jax.generation.caching import prefill
from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.history import (
    ends_with,
    init_history,
    minimum_length,
    no_repeated_ngram,
    occurrence_penalty,
    repetition_penalty,
    token_counts,
)
from rlhf_jax.generation.sampler import generate, greedy
from rlhf_jax.logprobs import head_log_probs, response_states, token_log_probs
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import output_table
from rlhf_jax.training.sharding import make_mesh, shard_batch

END, PAD, R = 4, 0, 9
KEYS = jax.random.split(jax.random.key(1), len(LENGTHS))


def warped(logits):
    return warpers.top_p(warpers.temperature(logits, 0.7), 0.8)


STATIC = ("model", "length", "warp", "choose", "tap", "keep_hidden", "rules", "stop", "samples")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(model, params, prompts, mask, keys, *, length=R, end_token=END, pad_token=PAD, **knobs):
    ends = {"length": length, "end_token": end_token, "pad_token": pad_token}
    return generate(model, params, prompts, mask, keys, **ends, **knobs)


@pytest.fixture(scope="module")
def llama():
    return decoder()


def ends_some_rows(responses):
    """A token that occurs early in some rows and never in others."""
    rows = [set(row.tolist()) for row in np.asarray(responses)]
    early = set(np.asarray(responses)[:, 1:5].ravel().tolist())
    return next(token for token in sorted(early) if not all(token in row for row in rows))


@pytest.mark.parametrize(("family", "warp"), [("llama", None), *((family, warped) for family in FAMILIES)])
def test_sampler_equals_scorer(family, warp):
    model, params = decoder(family)
    program = functools.partial(run, model, params, *ragged_prompts(garbage=VOCABULARY + 7), KEYS, warp=warp, tap=1)
    end = ends_some_rows(program(end_token=VOCABULARY).responses)
    rollout = program(end_token=end)
    lengths = rollout.response_mask.sum(axis=1)
    assert lengths.min() < R == lengths.max()
    training = score(model, params, rollout)
    assert_close_where(rollout.response_mask, rollout.raw_log_probs, training.log_probs)
    expected = training.log_probs if warp is None else token_log_probs(warp(training.logits), rollout.responses)
    assert_close_where(rollout.response_mask, rollout.log_probs, expected)
    assert_close_where(rollout.mask, rollout.trunk, training.tap)
    assert not np.asarray(rollout.log_probs)[~np.asarray(rollout.response_mask)].any()


def test_sampler_equals_the_chunked_head_that_losses_use(llama):
    model, params = llama
    rollout = run(model, params, *ragged_prompts(), KEYS, keep_hidden=True)
    hidden = response_states(
        model.apply({"params": params}, rollout.tokens, rollout.mask).hidden, prompt_length=rollout.prompt_length
    )
    assert_close_where(rollout.response_mask, rollout.hidden, hidden)
    assert_close_where(
        rollout.response_mask, rollout.log_probs, head_log_probs(hidden, output_table(params), rollout.responses)
    )


def test_tap_is_complete_when_every_row_ended_early(llama):
    model, params = llama
    ends_third = lambda keys, logits: jnp.full(logits.shape[:1], 9, jnp.int32)
    rollout = run(model, params, *ragged_prompts(), KEYS, choose=ends_third, end_token=9, tap=1)
    assert rollout.response_mask.sum(axis=1).tolist() == [1] * len(LENGTHS)
    assert_close_where(rollout.mask, rollout.trunk, score(model, params, rollout).tap)


def test_tapped_rollout_equals_the_untapped_one(llama):
    model, params = llama
    plain, tapped = (run(model, params, *ragged_prompts(), KEYS, tap=tap) for tap in (None, 2))
    assert plain.trunk is None
    assert plain.hidden is None
    np.testing.assert_array_equal(plain.tokens, tapped.tokens)
    np.testing.assert_allclose(plain.log_probs, tapped.log_probs, rtol=1e-5, atol=1e-5)


def test_a_row_depends_on_nothing_but_itself(llama):
    model, params = llama
    prompts = ragged_prompts()
    together = run(model, params, *prompts, KEYS)
    wider = run(model, params, *ragged_prompts(width=11, garbage=-3), KEYS)
    order = jnp.array([2, 0, 3, 1])
    shuffled = run(model, params, prompts.tokens[order], prompts.mask[order], KEYS[order])
    for i, length in enumerate(LENGTHS):
        alone = run(
            model, params, prompts.tokens[i : i + 1, -length:], prompts.mask[i : i + 1, -length:], KEYS[i : i + 1]
        )
        place = order.tolist().index(i)
        for other, row in ((alone, 0), (wider, i), (shuffled, place)):
            np.testing.assert_array_equal(other.responses[row], together.responses[i])
            np.testing.assert_array_equal(other.response_mask[row], together.response_mask[i])
            np.testing.assert_allclose(other.log_probs[row], together.log_probs[i], rtol=1e-4, atol=1e-4)


def test_a_shorter_rollout_is_the_beginning_of_a_longer_one(llama):
    model, params = llama
    short, long = (run(model, params, *ragged_prompts(), KEYS, length=n) for n in (4, R))
    np.testing.assert_array_equal(short.responses, long.responses[:, :4])


def test_different_keys_give_different_rows(llama):
    model, params = llama
    prompts = ragged_prompts()
    same = [jnp.broadcast_to(x[1], x.shape) for x in prompts]
    responses = {tuple(row.tolist()) for row in run(model, params, *same, KEYS).responses}
    assert len(responses) == len(LENGTHS)
    repeated = run(model, params, *same, jnp.broadcast_to(KEYS[0], KEYS.shape)).responses
    assert len({tuple(row.tolist()) for row in repeated}) == 1


def test_the_end_token_counts_and_what_follows_does_not(llama):
    model, params = llama
    free = run(model, params, *ragged_prompts(), KEYS, end_token=VOCABULARY)
    end = ends_some_rows(free.responses)
    rollout = run(model, params, *ragged_prompts(), KEYS, end_token=end, pad_token=VOCABULARY + 3)
    np.testing.assert_array_equal(rollout.mask[:, -R:], rollout.response_mask)
    for tokens, mask in zip(np.asarray(rollout.responses), np.asarray(rollout.response_mask), strict=True):
        ends = np.flatnonzero(tokens == end)
        assert len(ends) <= 1
        real = ends[0] + 1 if len(ends) else R
        np.testing.assert_array_equal(mask, np.arange(R) < real)
        np.testing.assert_array_equal(tokens[real:], VOCABULARY + 3)
    others = run(
        model, params, *ragged_prompts(), KEYS, end_token=end, pad_token=end
    )  # the pad may be the end token itself
    np.testing.assert_array_equal(others.response_mask, rollout.response_mask)


def count_turns(llama, choose, **knobs):
    """(turns of the loop, rollout)"""
    turns = []

    def counted(keys, logits):
        jax.debug.callback(lambda: turns.append(1))
        return choose(keys, logits)

    rollout = jax.block_until_ready(run(*llama, *ragged_prompts(), KEYS, choose=counted, **knobs))
    jax.effects_barrier()
    return len(turns), rollout


def test_the_loop_stops_once_every_row_has_ended(llama):
    turns, rollout = count_turns(llama, lambda keys, logits: jnp.full(logits.shape[:1], END, jnp.int32))
    assert turns == 1
    assert rollout.response_mask.sum() == len(LENGTHS)
    assert np.isfinite(rollout.log_probs).all()
    assert count_turns(llama, greedy, end_token=VOCABULARY)[0] == R  # an end that never comes


def test_vmapped_runs_equal_each_alone_and_are_at_one_place(llama):
    """A run that ends at once, beside runs that go on."""
    model, params = llama

    def run_of(at_once, keys):
        choose = lambda keys, logits: jnp.where(at_once, END, categorical(keys, logits))
        ends = {"length": R, "end_token": END, "pad_token": PAD}
        return generate(model, params, *ragged_prompts(), keys, **ends, choose=choose, tap=1, keep_hidden=True)

    every = jnp.array([True, False, False]), jax.random.split(jax.random.key(7), (3, len(LENGTHS)))
    together, alone = jax.jit(jax.vmap(run_of))(*every), jax.jit(run_of)
    assert together.response_mask.sum(axis=(1, 2)).tolist()[0] == len(LENGTHS) < together.response_mask[1:].sum()
    for index in range(3):
        one = alone(*(x[index] for x in every))
        same = jax.tree.map(lambda x, index=index: x[index], together)
        np.testing.assert_array_equal(one.tokens, same.tokens)
        np.testing.assert_array_equal(one.mask, same.mask)
        for mask, name in ((one.response_mask, "log_probs"), (one.response_mask, "hidden"), (one.mask, "trunk")):
            assert_close_where(mask, getattr(one, name), getattr(same, name))
    loop = next(e for e in jax.make_jaxpr(jax.vmap(run_of))(*every).eqns if e.primitive.name == "while")
    places = [x.aval.shape for x in loop.outvars if x.aval.dtype == jnp.int32 and x.aval.ndim < 2]
    assert places == [(), ()]  # the turn and the cache's length, one for all runs


@pytest.mark.parametrize("length", [1, 3])
def test_prompts_of_one_token(llama, length):
    model, params = llama
    prompts = ragged_prompts((1, 1, 1, 1))
    rollout = run(model, params, *prompts, KEYS, length=length, tap=1)
    training = score(model, params, rollout)
    assert_close_where(rollout.response_mask, rollout.log_probs, training.log_probs)
    assert_close_where(rollout.mask, rollout.trunk, training.tap)


def test_greedy_takes_the_best_token_of_the_training_forward_pass(llama):
    model, params = llama
    prompts = ragged_prompts()
    rollout = run(model, params, *prompts, KEYS, choose=greedy, end_token=VOCABULARY, length=5)
    logits = score(model, params, rollout).logits
    np.testing.assert_array_equal(rollout.responses, np.argmax(logits, axis=-1))


# --- rules, stops, groups, prefill ------------------------------------------------------------------------------------


def ruled(logits, history):
    logits = repetition_penalty(logits, history.counts, 1.5)
    logits = occurrence_penalty(logits, history.response_counts, presence=0.5, frequency=0.25)
    logits = no_repeated_ngram(logits, history.tokens, history.mask, 2)
    return minimum_length(logits, history.response_mask, END, 3)


def test_rules_see_exactly_what_was_written(llama):
    model, params = llama
    prompts = ragged_prompts()
    rollout = run(model, params, *prompts, KEYS, rules=ruled, warp=warped)
    logits = score(model, params, rollout).logits
    free = run(model, params, *prompts, KEYS, warp=warped)
    assert not np.array_equal(free.tokens, rollout.tokens)
    for row, length in enumerate(LENGTHS):
        for t in range(int(rollout.response_mask[row].sum())):
            written = rollout.tokens[row : row + 1, prompts.tokens.shape[1] - length :][:, : length + t]
            real = jnp.ones(written.shape, bool)
            fresh = init_history(written[:, :length], real[:, :length], length=t, vocab_size=VOCABULARY)
            history = fresh._replace(
                tokens=written,
                mask=real,
                response_mask=real.at[:, :length].set(False),
                counts=token_counts(written, real, VOCABULARY),
                response_counts=token_counts(written[:, length:], real[:, length:], VOCABULARY),
            )
            expected = token_log_probs(warped(ruled(logits[row, t][None], history)), rollout.responses[row, t][None])
            np.testing.assert_allclose(rollout.log_probs[row, t], expected[0], rtol=1e-4, atol=1e-4)
    assert rollout.response_mask.sum(axis=1).min() > 3


def test_stop_sequences_end_rows_as_the_end_token_does(llama):
    model, params = llama
    prompts = ragged_prompts()
    free = np.asarray(run(model, params, *prompts, KEYS, end_token=VOCABULARY).responses)
    pair, single = tuple(free[1, 2:4].tolist()), (int(free[2, 5]),)
    stop = lambda history: ends_with(history.tokens, history.response_mask, (pair, single))
    rollout = run(model, params, *prompts, KEYS, end_token=VOCABULARY, stop=stop)
    lengths = []
    for row in free:
        ends = [t + 1 for t in range(R) if row[t] == single[0] or (t and tuple(row[t - 1 : t + 1]) == pair)]
        lengths.append(min([*ends, R]))
    assert min(lengths) < R
    np.testing.assert_array_equal(rollout.response_mask, np.arange(R) < np.array(lengths)[:, None])
    np.testing.assert_array_equal(rollout.responses, np.where(rollout.response_mask, free, PAD))


def test_samples_of_a_prompt_equal_the_prompt_repeated(llama):
    model, params = llama
    prompts = ragged_prompts()
    keys = jax.random.split(jax.random.key(5), 3 * len(LENGTHS))
    group = run(model, params, *prompts, keys, samples=3, tap=1)
    repeated = run(model, params, *(jnp.repeat(x, 3, axis=0) for x in prompts), keys, tap=1)
    np.testing.assert_array_equal(group.tokens, repeated.tokens)
    np.testing.assert_array_equal(group.mask, repeated.mask)
    np.testing.assert_allclose(group.log_probs, repeated.log_probs, rtol=1e-5, atol=1e-5)
    assert_close_where(group.mask, group.trunk, repeated.trunk)


def test_prompts_read_before_give_the_same_rollout(llama):
    model, params = llama
    prompts = ragged_prompts()
    read = jax.jit(functools.partial(prefill, model, tap=1))(params, *prompts)
    rollout, expected = (run(model, params, *prompts, KEYS, tap=1, prefilled=x) for x in (read, None))
    np.testing.assert_array_equal(rollout.tokens, expected.tokens)
    assert_close_where(rollout.mask, rollout.trunk, expected.trunk)
    assert prefill(model, params, prompts.tokens[:, -1:], prompts.mask[:, -1:]) is None


def test_values_of_a_critic_on_the_trunk_need_no_second_pass(llama):
    model, params = llama
    rollout = run(model, params, *ragged_prompts(), KEYS, tap=1)
    critic = ScalarHead()
    weights = critic.init(jax.random.key(3), rollout.trunk)
    states = [
        response_states(x, prompt_length=rollout.prompt_length) for x in (rollout.trunk, score(*llama, rollout).tap)
    ]
    assert_close_where(rollout.response_mask, *(critic.apply(weights, x) for x in states))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"samples": 2}, r"keys must be one per row, shape \(8,\), got \(4,\)"),
    ],
)
def test_mistakes_are_named(llama, knobs, message):
    with pytest.raises(ValueError, match=message):
        run(*llama, *ragged_prompts(), KEYS, **knobs)


def test_a_prefill_of_other_prompts_is_refused(llama):
    read = prefill(*llama, *ragged_prompts())
    with pytest.raises(ValueError, match=r"prefilled must hold \[B, P - 1\] = \(4, 8\) slots"):
        run(*llama, *ragged_prompts(width=9), KEYS, prefilled=read)


# --- devices ----------------------------------------------------------------------------------------------------------


@functools.cache
def two_devices():
    return make_mesh(devices=jax.devices()[:2])


def test_rows_on_several_devices_equal_one_device(llama):
    model, params = llama
    prompts = ragged_prompts()
    one = run(model, params, *prompts, KEYS)
    split = run(model, params, *shard_batch((*prompts, KEYS), two_devices()))
    np.testing.assert_array_equal(one.tokens, split.tokens)
    np.testing.assert_allclose(one.log_probs, split.log_probs, rtol=1e-5, atol=1e-5)


def test_devices_may_stop_independently(llama):
    model, params = llama
    prompts = ragged_prompts()
    rows = Rows("data")
    program = jax.shard_map(
        lambda *args: generate(model, *args, length=R, end_token=END, pad_token=PAD),
        mesh=two_devices(),
        in_specs=(Rows(), rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    one, split = run(model, params, *prompts, KEYS), jax.jit(program)(params, *prompts, KEYS)
    np.testing.assert_array_equal(one.tokens, split.tokens)
    np.testing.assert_allclose(one.log_probs, split.log_probs, rtol=1e-5, atol=1e-5)
