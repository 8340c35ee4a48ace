"""generation/refill.py: the rollouts of plain generation, for any number of slots, in fewer steps of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import VOCABULARY, assert_close_where, decoder, ragged_prompts, score

from rlhf_jax.generation import warpers
from rlhf_jax.generation.history import ends_with, repetition_penalty
from rlhf_jax.generation.refill import generate_queue
from rlhf_jax.generation.sampler import generate

R, PAD, END = 12, -1, 4
LENGTHS = (3, 7, 1, 5, 2, 6, 1, 4, 7)
N = len(LENGTHS)
KEYS = jax.random.split(jax.random.key(2), N)
STATIC = ("model", "length", "warp", "rules", "stop")

plain = jax.jit(generate, static_argnames=STATIC)
queued = jax.jit(generate_queue, static_argnames=(*STATIC, "slots", "chunk", "widths"))


@pytest.fixture(scope="module")
def llama():
    return decoder()


def ends(**knobs):
    return {"length": R, "end_token": END, "pad_token": PAD} | knobs


def compare(rollout, expected):
    np.testing.assert_array_equal(rollout.tokens, expected.tokens)
    np.testing.assert_array_equal(rollout.mask, expected.mask)
    np.testing.assert_array_equal(rollout.response_mask, expected.response_mask)
    np.testing.assert_allclose(rollout.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rollout.raw_log_probs, expected.raw_log_probs, rtol=1e-4, atol=1e-4)


def biased(logits):
    """Makes the end token likely enough for lengths to differ."""
    return warpers.logit_bias(logits, jnp.array([END]), 1.5)


@pytest.mark.parametrize("family", ["llama", "gpt", "windows", "experts"])
def test_equals_plain_generation(family):
    model, params = decoder(family)
    prompts = ragged_prompts(LENGTHS, garbage=VOCABULARY + 5)
    served = queued(model, params, *prompts, KEYS, slots=3, chunk=4, warp=biased, **ends())
    lengths = served.rollout.response_mask.sum(axis=1)
    assert lengths.min() < R
    assert len(set(lengths.tolist())) > 2
    compare(served.rollout, plain(model, params, *prompts, KEYS, warp=biased, **ends()))


def schedule(lengths, slots):
    """Turns until all rows are done, if the first free slot takes the next prompt."""
    clocks = np.zeros(slots, int)
    for length in lengths:
        clocks[np.argmin(clocks)] += length
    return clocks.max()


@pytest.mark.parametrize(("slots", "chunk"), [(1, 32), (2, 1), (5, 3), (N + 3, 4)])
def test_slots_and_chunks_change_the_work_alone(llama, slots, chunk):
    prompts = ragged_prompts(LENGTHS)
    served = queued(*llama, *prompts, KEYS, slots=slots, chunk=chunk, warp=biased, **ends())
    compare(served.rollout, plain(*llama, *prompts, KEYS, warp=biased, **ends()))
    lengths = np.asarray(served.rollout.response_mask.sum(axis=1))
    turns = schedule(lengths, slots)
    assert served.turns == turns
    size = min(chunk, max(LENGTHS) - 1)
    assert served.chunks == sum(-(-(length - 1) // size) for length in LENGTHS)
    np.testing.assert_allclose(served.useful_share(slots), lengths.sum() / (turns * slots), rtol=1e-6)


def test_sampler_equals_scorer(llama):
    model, params = llama
    rollout = queued(model, params, *ragged_prompts(LENGTHS), KEYS, slots=3, warp=biased, **ends()).rollout
    assert_close_where(rollout.response_mask, rollout.raw_log_probs, score(model, params, rollout).log_probs)


def test_rules_and_stops_see_each_row_as_in_plain_generation(llama):
    rules = lambda logits, history: repetition_penalty(logits, history.counts, 2.0)
    stop = lambda history: ends_with(history.tokens, history.response_mask, ((7,), (11,)))
    prompts, knobs = ragged_prompts(LENGTHS), ends(rules=rules, stop=stop)
    served = queued(*llama, *prompts, KEYS, slots=2, **knobs)
    compare(served.rollout, plain(*llama, *prompts, KEYS, **knobs))
    assert served.rollout.response_mask.sum(axis=1).min() < R


def test_prompts_of_one_token(llama):
    prompts = ragged_prompts((1,) * N)
    served = queued(*llama, *prompts, KEYS, slots=4, **ends())
    compare(served.rollout, plain(*llama, *prompts, KEYS, **ends()))
    assert served.chunks == 0


def written_in_the_prompt(history):
    """Stops a row after as many tokens as its first two prompt tokens say, as digits."""
    first = jnp.argmax(history.mask, axis=1)
    digit = lambda i: jnp.take_along_axis(history.tokens, (first + i)[:, None], axis=1)[:, 0]
    return jnp.sum(history.response_mask, axis=1) >= digit(0) * VOCABULARY + digit(1)


def test_a_heavy_tailed_queue_keeps_the_slots_busy():
    model, params = decoder(num_layers=1, max_length=128)
    slots, longest = 8, 60
    lengths = np.random.default_rng(0).pareto(1.2, 64) * 4 + 2  # most are short, few very long
    lengths = np.minimum(lengths.astype(int), longest)
    prompts = jnp.asarray(np.stack([lengths // VOCABULARY, lengths % VOCABULARY], axis=1), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 64)
    knobs = {"length": longest, "end_token": VOCABULARY, "pad_token": 0, "stop": written_in_the_prompt}
    served = queued(model, params, prompts, prompts >= 0, keys, slots=slots, **knobs)
    np.testing.assert_array_equal(served.rollout.response_mask.sum(axis=1), lengths)
    assert served.turns == schedule(lengths, slots)
    batches = lengths.reshape(-1, slots).max(axis=1).sum()  # a batch waits for its longest row
    assert batches > 1.7 * served.turns


def test_widths_change_the_slots_that_attention_reads_alone(llama):
    model, params = llama
    longest, slots = 50, 3
    lengths = [2, 49, 3, 20, 3, 2, 40, 5, 2, 3, 2, 4]  # the cache fills, empties and fills again
    prompts = jnp.asarray([(length // VOCABULARY, length % VOCABULARY) for length in lengths], jnp.int32)
    keys = jax.random.split(jax.random.key(0), len(lengths))
    knobs = {"length": longest, "end_token": VOCABULARY, "pad_token": 0, "stop": written_in_the_prompt}
    serve = lambda widths: queued(model, params, prompts, prompts >= 0, keys, slots=slots, widths=widths, **knobs)
    whole, parts = serve(1), serve(4)
    np.testing.assert_array_equal(parts.rollout.response_mask.sum(axis=1), lengths)
    assert parts.turns == whole.turns
    compare(parts.rollout, whole.rollout)


def test_mistakes_are_named(llama):
    prompts = ragged_prompts(LENGTHS)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        queued(*llama, *prompts, KEYS, slots=0, **ends())
    with pytest.raises(ValueError, match=r"keys must be one per prompt, shape \(9,\), got \(2,\)"):
        queued(*llama, *prompts, KEYS[:2], slots=2, **ends())


def test_devices_serve_their_own_queues(llama):
    model, params = llama
    prompts = ragged_prompts(LENGTHS[:8])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.sharding.PartitionSpec("data")
    program = functools.partial(generate_queue, model, slots=2, warp=biased, **ends())
    serve = jax.shard_map(
        lambda *args: program(*args).rollout,
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    expected = plain(model, params, *prompts, KEYS[:8], warp=biased, **ends())
    compare(jax.jit(serve)(params, *prompts, KEYS[:8]), expected)
