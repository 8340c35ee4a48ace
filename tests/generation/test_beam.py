"""generation/beam.py: exact against all continuations, narrow beams against plain Python, rules, padding."""

import functools
import itertools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from small_decoders import decoder, ragged_prompts

from rlhf_jax.generation.beam import beam_search, best_of_many
from rlhf_jax.generation.caching import prefill
from rlhf_jax.generation.history import no_repeated_ngram
from rlhf_jax.generation.sampler import generate, greedy

V, R, END, PAD = 4, 4, 2, -1
LENGTHS = (3, 1, 5)

search = jax.jit(
    functools.partial(beam_search, end_token=END, pad_token=PAD),
    static_argnames=("model", "beams", "length", "rules"),
)


@pytest.fixture(scope="module")
def small():
    return decoder(vocab_size=V)


@pytest.fixture(scope="module")
def prompts():
    tokens, mask = ragged_prompts(LENGTHS)
    return tokens % V, mask


@pytest.fixture(scope="module")
def next_log_probs(small, prompts):
    """Per prompt: every prefix of at most R - 1 tokens -> log-probabilities of the next token, by training passes."""
    model, params = small
    continuations = jnp.array(list(itertools.product(range(V), repeat=R)), jnp.int32)

    @jax.jit
    def logits(prompt):
        tokens = jnp.concatenate([jnp.tile(prompt[None], (len(continuations), 1)), continuations], axis=1)
        hidden = model.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool)).hidden
        return jax.nn.log_softmax(model.apply({"params": params}, hidden[:, -R - 1 : -1], method="logits"))

    tables = []
    for tokens, length in zip(prompts[0], LENGTHS, strict=True):
        values = np.asarray(logits(tokens[-length:]), np.float64)
        rows = continuations.tolist()
        tables.append({tuple(row[:t]): values[i, t] for i, row in enumerate(rows) for t in range(R)})
    return tables


def log_prob(table, tokens):
    return sum(table[tokens[:t]][tokens[t]] for t in range(len(tokens)))


def every_continuation():
    for length in range(1, R + 1):
        for tokens in itertools.product(range(V), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == R):
                yield tokens


def plain_beam_search(table, beams, alpha):
    """The same search with lists: [(score, tokens)], best first."""
    live, finished = [(0.0, ())], []
    for step in range(1, R + 1):
        candidates = sorted(((p + table[x][v], (*x, v)) for p, x in live for v in range(V)), reverse=True)[: 2 * beams]
        finished += [(p / step**alpha, x) for p, x in candidates if x[-1] == END]
        finished = sorted(finished, reverse=True)[:beams]
        live = [(p, x) for p, x in candidates if x[-1] != END][:beams]
    finished += [(p / R**alpha, x) for p, x in live]
    return sorted(finished, reverse=True)[:beams]


def found(beams, row):
    for k in range(beams.scores.shape[1]):
        mask = np.asarray(beams.mask[row, k])
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (np.asarray(beams.tokens[row, k])[~mask] == PAD).all()
        yield float(beams.scores[row, k]), tuple(np.asarray(beams.tokens[row, k])[mask].tolist())


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5, -1.0])
def test_wide_beams_find_the_best_of_all_continuations(small, prompts, next_log_probs, alpha):
    wide = V ** (R - 1)
    beams = search(*small, *prompts, beams=wide, length=R, length_penalty=alpha)
    for row, table in enumerate(next_log_probs):
        best = sorted(((log_prob(table, x) / len(x) ** alpha, x) for x in every_continuation()), reverse=True)[:wide]
        scores, tokens = zip(*found(beams, row), strict=True)
        np.testing.assert_allclose(scores, [score for score, _ in best], rtol=1e-4)
        assert tokens[:10] == tuple(x for _, x in best[:10])
        np.testing.assert_allclose(beams.log_probs[row], [log_prob(table, x) for x in tokens], rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_narrow_beams_equal_plain_python(small, prompts, next_log_probs, beams):
    for alpha in (0.0, 1.0, -0.5):
        result = search(*small, *prompts, beams=beams, length=R, length_penalty=alpha)
        for row, table in enumerate(next_log_probs):
            expected = plain_beam_search(table, beams, alpha)
            actual = list(found(result, row))
            assert [x for _, x in actual] == [x for _, x in expected]
            np.testing.assert_allclose([s for s, _ in actual], [s for s, _ in expected], rtol=1e-4)


def test_one_beam_is_greedy_decoding(small, prompts):
    model, params = small
    ends = {"length": R, "pad_token": PAD}
    beams = jax.jit(functools.partial(beam_search, model, beams=1, length_penalty=0.0, end_token=V, **ends))
    sampler = jax.jit(functools.partial(generate, model, choose=greedy, end_token=V, **ends))
    best, rollout = (
        beams(params, *prompts),
        sampler(params, *prompts, jax.random.split(jax.random.key(0), len(LENGTHS))),
    )
    np.testing.assert_array_equal(best.tokens[:, 0], rollout.responses)
    np.testing.assert_allclose(best.log_probs[:, 0], rollout.log_probs.sum(axis=1), rtol=1e-4)


def test_padding_and_prompts_read_before_change_nothing(small, prompts):
    model, params = small
    tokens, mask = prompts
    expected = search(model, params, tokens, mask, beams=2, length=R)
    wider = [jnp.pad(x, ((0, 0), (2, 0))) for x in prompts]
    read = jax.jit(functools.partial(prefill, model))(params, tokens, mask)
    for other in (
        search(model, params, *wider, beams=2, length=R),
        search(model, params, tokens, mask, beams=2, length=R, prefilled=read),
    ):
        np.testing.assert_array_equal(other.tokens, expected.tokens)
        np.testing.assert_allclose(other.scores, expected.scores, rtol=1e-4)


def test_rules_hold_along_every_beam(small, prompts):
    rules = lambda logits, history: no_repeated_ngram(logits, history.tokens, history.mask, 2)
    beams = search(*small, *prompts, beams=3, length=R, rules=rules)
    free = search(*small, *prompts, beams=3, length=R)
    assert not np.array_equal(free.tokens, beams.tokens)
    for row, length in enumerate(LENGTHS):
        for score, tokens in found(beams, row):
            if np.isfinite(score):
                text = (*np.asarray(prompts[0][row, -length:]).tolist(), *tokens)
                new = [text[i : i + 2] for i in range(length - 1, len(text) - 1)]
                old = {text[i : i + 2] for i in range(length - 1)}
                assert len(set(new)) == len(new)
                assert not old & set(new)


def test_fewer_continuations_than_beams_leave_empty_places(small, prompts):
    beams = search(*small, *prompts, beams=V + 2, length=1)
    assert np.isfinite(beams.scores).sum(axis=1).tolist() == [V] * len(LENGTHS)
    np.testing.assert_array_equal(beams.mask.any(axis=-1), np.isfinite(beams.scores))
    np.testing.assert_allclose(np.exp(beams.log_probs).sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "name"), [({"beams": 0, "length": 2}, "beams"), ({"beams": 1, "length": 0}, "length")]
)
def test_mistakes_are_named(small, prompts, knobs, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        search(*small, *prompts, **knobs)


@given(
    x=hnp.arrays(np.float32, (2, 300), elements=st.one_of(st.integers(-9, 9), st.just(-np.inf))),
    k=st.sampled_from([1, 3, 8]),
)
def test_best_of_many_equals_a_full_sort(x, k):
    values, indices = jax.jit(best_of_many, static_argnums=1)(x, k)
    expected, where = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(indices), axis=1), expected)
    for row, order, sorted_order in zip(values, indices, where, strict=True):
        assert len(set(order.tolist())) == k
        inner = np.asarray(row) > np.asarray(row)[-1]  # ties at the edge may be other entries
        np.testing.assert_array_equal(np.asarray(order)[inner], np.asarray(sorted_order)[inner])
