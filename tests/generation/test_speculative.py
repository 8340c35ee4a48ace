"""generation/speculative.py: exactly the model's distribution (chi-square over all sequences), whatever the draft."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_decoders import assert_close_where, decoder, ragged_prompts, random_params, score

from rlhf_jax.generation import warpers
from rlhf_jax.generation.sampler import generate, greedy
from rlhf_jax.generation.speculative import judge, speculate
from rlhf_jax.logprobs import token_log_probs

V, R, END, PAD, AHEAD = 4, 3, 2, -1, 2
ROWS = 6000
SIGNIFICANCE = 1e-3  # of each chi-square test; keys are fixed

run = jax.jit(
    functools.partial(speculate, pad_token=PAD), static_argnames=("model", "draft", "ahead", "length", "warp")
)


@pytest.fixture(scope="module")
def pair():
    """(model, params, draft, its params): different depths, the same vocabulary."""
    model, params = decoder(vocab_size=V)
    draft = decoder(vocab_size=V, num_layers=1)[0]
    return model, params, draft, random_params(draft.config, seed=1)


def warped(logits):
    return warpers.top_k(warpers.temperature(logits, 0.6), 3)


def sequence_probs(model, params, prompt, warp):
    """Exact probability of every response, from training passes over all continuations."""
    continuations = jnp.array(list(itertools.product(range(V), repeat=R)), jnp.int32)
    tokens = jnp.concatenate([jnp.tile(prompt[None], (len(continuations), 1)), continuations], axis=1)
    hidden = model.apply({"params": params}, tokens, tokens >= 0).hidden[:, -R - 1 : -1]
    logits = model.apply({"params": params}, hidden, method="logits")
    probs = np.asarray(jax.nn.softmax(logits if warp is None else warp(logits)), np.float64)
    exact = {}
    for row, p in zip(continuations.tolist(), probs, strict=True):
        cut = row.index(END) + 1 if END in row else R
        exact[tuple(row[:cut])] = np.prod([p[t, row[t]] for t in range(cut)])
    return exact


def p_value(rollout, exact):
    """Of the observed responses; rare ones are put together."""
    lengths = np.asarray(rollout.response_mask.sum(axis=1))
    rows = [tuple(x[:n]) for x, n in zip(np.asarray(rollout.responses).tolist(), lengths, strict=True)]
    possible = [x for x, p in exact.items() if p > 0]
    assert set(rows) <= set(possible)
    counts = np.array([rows.count(x) for x in possible], float)
    due = np.array([exact[x] for x in possible]) * len(rows)
    often = due >= 10
    fold = lambda x: np.append(x[often], x[~often].sum()) if (~often).any() else x
    return stats.chisquare(fold(counts), fold(due) * counts.sum() / due.sum()).pvalue


@pytest.mark.parametrize("warp", [None, warped], ids=["raw", "warped"])
def test_responses_are_distributed_as_the_models_own(pair, warp, key):
    model, params, draft, draft_params = pair
    prompt = jnp.array([1, 3], jnp.int32)
    prompts = jnp.tile(prompt[None], (ROWS, 1))
    said = run(
        *pair, prompts, prompts >= 0, jax.random.split(key, ROWS), ahead=AHEAD, length=R, end_token=END, warp=warp
    )
    assert p_value(said.rollout, sequence_probs(model, params, prompt, warp)) > SIGNIFICANCE
    assert p_value(said.rollout, sequence_probs(draft, draft_params, prompt, None)) < 1e-12  # the test has power
    assert 0.1 < said.acceptance(AHEAD) < 0.95


def test_sampler_equals_scorer(pair):
    model, params = pair[:2]
    tokens, mask = ragged_prompts()
    said = run(
        *pair, tokens % V, mask, jax.random.split(jax.random.key(3), 4), ahead=3, length=9, end_token=V, warp=warped
    )
    training = score(model, params, said.rollout)
    assert_close_where(said.rollout.response_mask, said.rollout.raw_log_probs, training.log_probs)
    expected = token_log_probs(warped(training.logits), said.rollout.responses)
    assert_close_where(said.rollout.response_mask, said.rollout.log_probs, expected)


def test_greedy_speculation_is_greedy_decoding(pair):
    model, params = pair[:2]
    tokens, mask = ragged_prompts()
    keys = jax.random.split(jax.random.key(3), 4)
    best = lambda logits: warpers.top_k(logits, 1)
    said = run(*pair, tokens % V, mask, keys, ahead=3, length=9, end_token=END, warp=best)
    plain = jax.jit(functools.partial(generate, model, length=9, end_token=END, pad_token=PAD, choose=greedy))
    expected = plain(params, tokens % V, mask, keys)
    np.testing.assert_array_equal(said.rollout.tokens, expected.tokens)
    np.testing.assert_array_equal(said.rollout.mask, expected.mask)


def test_a_perfect_draft_is_always_right(pair):
    model, params = pair[:2]
    tokens, mask = ragged_prompts()
    keys = jax.random.split(jax.random.key(4), 4)
    said = run(model, params, model, params, tokens % V, mask, keys, ahead=3, length=8, end_token=V)
    assert said.rounds.tolist() == [2] * 4  # 3 proposals and one token more, twice
    assert said.accepted.tolist() == [6] * 4


def test_a_row_depends_on_nothing_but_itself(pair):
    tokens, mask = ragged_prompts()
    keys = jax.random.split(jax.random.key(5), 4)
    program = functools.partial(run, *pair, ahead=3, length=9, end_token=END)
    together = program(tokens % V, mask, keys)
    alone = program(tokens[1:2] % V, mask[1:2], keys[1:2])
    np.testing.assert_array_equal(alone.rollout.responses[0], together.rollout.responses[1])
    assert alone.rounds[0] == together.rounds[1]


def test_vmapped_runs_equal_each_alone(pair):
    tokens, mask = ragged_prompts()
    keys = jax.random.split(jax.random.key(6), (3, 4))
    program = lambda keys, end: speculate(*pair, tokens % V, mask, keys, ahead=2, length=9, end_token=end, pad_token=0)
    ends = jnp.array([V, 1, 2])
    together, alone = jax.jit(jax.vmap(program))(keys, ends), jax.jit(program)
    assert len(set(together.rounds.max(axis=1).tolist())) > 1  # runs of different lengths
    for index in range(3):
        one, same = alone(keys[index], ends[index]), jax.tree.map(lambda x, index=index: x[index], together)
        np.testing.assert_array_equal(one.rollout.responses, same.rollout.responses)
        np.testing.assert_array_equal(one.rounds, same.rounds)
    loop = next(e for e in jax.make_jaxpr(jax.vmap(program))(keys, ends).eqns if e.primitive.name == "while")
    assert [x.aval.shape for x in loop.outvars if x.aval.dtype == jnp.int32 and x.aval.ndim < 2] == [()]  # the round


def test_judge_on_distributions_that_do_not_overlap(key):
    keys = jax.random.split(key, 50)
    log_q = jnp.broadcast_to(jnp.log(jnp.array([1.0, 0.0])), (50, 1, 2))
    log_p = jnp.broadcast_to(jnp.log(jnp.array([0.0, 1.0])), (50, 2, 2))
    verdict = judge(keys, jnp.zeros((50, 1), jnp.int32), log_q, log_p)
    assert not verdict.accepted.any()
    assert (verdict.token == 1).all()


def test_mistakes_are_named(pair):
    tokens, mask = ragged_prompts()
    keys = jax.random.split(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        run(*pair, tokens, mask, keys, ahead=0, length=2, end_token=END)
    other, weights = decoder(vocab_size=V + 1)
    with pytest.raises(ValueError, match="must share a vocabulary, got 4 and 5 tokens"):
        run(*pair[:2], other, weights, tokens, mask, keys, ahead=1, length=2, end_token=END)
