"""Beam search: the likeliest continuations instead of sampled ones, for translation and other narrow tasks.

One compiled loop over a fixed cache, as in `rlhf_jax.generation.sampler`. Every prompt keeps K unfinished
continuations and the K best finished ones; the loop ends when no unfinished one can still enter the latter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.generation.caching import Prefill, grow, prefill, repeat_rows
from rlhf_jax.generation.drawing import Rules
from rlhf_jax.generation.history import History, init_history, update_history
from rlhf_jax.models.transformer import Cache, Transformer, init_cache

__all__ = ["Beams", "beam_search", "best_of_many"]


class Beams(NamedTuple):
    """The best continuations of every prompt, best first."""

    tokens: Array  # [B, K, R] int32
    mask: Array  # [B, K, R] bool, tokens up to and including the end token; none where fewer than K were found
    scores: Array  # [B, K] float32, log-probability over length^length_penalty; -inf where none was found
    log_probs: Array  # [B, K] float32, log-probability of the whole continuation


def best_of_many(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest entries of every row and where they are, largest first, as `jax.lax.top_k` but without sorting all.

    The k largest lie in the k blocks with the largest maxima. With blocks of √(N / k) entries the two sorts are short.

    Args:
      x: [B, N].
      k: how many, 1 <= k <= N.
    Returns:
      ([B, k] values, [B, k] int32 indices). Of equal values the earlier one comes first.

    >>> values, indices = best_of_many(jnp.array([[1.0, 5.0, 3.0, 5.0]]), 3)
    >>> values.tolist(), indices.tolist()
    ([[5.0, 5.0, 3.0]], [[1, 3, 2]])
    """
    rows, count = x.shape
    size = max(1, int((count / k) ** 0.5))
    blocks = -(-count // size)
    if blocks <= 2 * k:
        return jax.lax.top_k(x, k)
    padded = jnp.pad(x, ((0, 0), (0, blocks * size - count)), constant_values=-jnp.inf).reshape(rows, blocks, size)
    _, chosen = jax.lax.top_k(jnp.max(padded, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)
    inside = jnp.take_along_axis(padded, chosen[..., None], axis=1).reshape(rows, k * size)
    values, where = jax.lax.top_k(inside, k)
    index = jnp.take_along_axis(chosen, where // size, axis=-1) * size + where % size
    return values, jnp.minimum(index, count - 1).astype(jnp.int32)


class _Finished(NamedTuple):
    scores: Array  # [B, K]
    log_probs: Array  # [B, K]
    lengths: Array  # [B, K] int32
    tokens: Array  # [B, K, R]


class _Turn(NamedTuple):
    step: Array  # [] tokens written
    token: Array  # [B · K] the last token, not yet in the cache
    log_probs: Array  # [B, K] of the unfinished continuations; -inf where there is none
    tokens: Array  # [B, K, R]
    cache: Cache
    history: History | None
    finished: _Finished


def _rows(tree: Any, index: Array) -> Any:
    """Takes [B, K, ...] entries index [B, M] of every prompt."""
    take = lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
    return jax.tree.map(take, tree)


def beam_search(
    model: Transformer,
    params: dict,
    prompts: Array,
    prompt_mask: Array,
    *,
    beams: int,
    length: int,
    end_token: int,
    pad_token: int,
    length_penalty: ArrayLike = 1.0,
    rules: Rules | None = None,
    prefilled: Prefill | None = None,
) -> Beams:
    """Searches the continuations with the largest Σ log p / length^length_penalty. Jit the caller.

    A continuation ends with the end token, or after `length` tokens. With beams >= V^(length - 1) nothing is ever
    dropped and the search is exact; beams = 1 and length_penalty = 0 is greedy decoding unless ending is better.

    Args:
      model: the decoder.
      params: its parameters.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool; the last slot of every row must be a real token.
      beams: K, static.
      length: R, most tokens to generate.
      end_token: ends a continuation and counts as one of its tokens.
      pad_token: fills the slots behind the end.
      length_penalty: α; 0 compares log-probabilities, 1 their means, more prefers longer continuations.
      rules: (logits [B · K, V], `History`) -> logits: penalties and bans that depend on what was written.
      prefilled: what `caching.prefill` returned for these prompts and parameters; None reads them here.
    Returns:
      `Beams`.
    Raises:
      ValueError: beams or length below 1.
    Reference: Graves 2012, https://arxiv.org/abs/1211.3711; length normalisation as in Wu et al. 2016, section 7,
      https://arxiv.org/abs/1609.08144, with length^α in place of its ((5 + length) / 6)^α
    """
    for name, value in {"beams": beams, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    batch, prompt_length = prompts.shape
    vocab_size, capacity = model.config.vocab_size, prompt_length + length
    read = prefilled if prefilled is not None else prefill(model, params, prompts, prompt_mask)
    prompts, prompt_mask, read = repeat_rows((prompts, prompt_mask, read), beams)
    rows = batch * beams
    cache = init_cache(model.config, rows, capacity) if read is None else grow(model, read.cache, capacity)
    real = jnp.ones((rows, 1), bool)
    score = lambda log_probs, lengths: log_probs / jnp.maximum(lengths, 1).astype(jnp.float32) ** length_penalty

    def best_finished(*pools: _Finished) -> _Finished:
        joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *pools)
        return _rows(joined, jax.lax.top_k(joined.scores, beams)[1])

    def turn(state: _Turn) -> _Turn:
        out = model.apply({"params": params}, state.token[:, None], real, cache=state.cache)
        logits = model.apply({"params": params}, out.hidden[:, 0], method="logits")
        if rules is not None:
            logits = rules(logits, state.history)  # type: ignore[arg-type]
        extended = state.log_probs[..., None] + jax.nn.log_softmax(logits).reshape(batch, beams, vocab_size)
        # Of 2K candidates at most K end, one for each beam, so that K remain to go on.
        count = min(2 * beams, beams * vocab_size)
        log_probs, index = best_of_many(extended.reshape(batch, beams * vocab_size), count)
        parent, token = index // vocab_size, index % vocab_size
        tokens = _rows(state.tokens, parent).at[:, :, state.step].set(token)
        ends = token == end_token

        lengths = jnp.full(log_probs.shape, state.step + 1)
        ended = jnp.where(ends, log_probs, -jnp.inf)
        finished = best_finished(state.finished, _Finished(score(ended, lengths), ended, lengths, tokens))
        going, place = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), beams)
        tokens, token, parent = _rows((tokens, token, parent), place)

        source = (jnp.arange(batch)[:, None] * beams + parent).reshape(rows)
        move = lambda x: x if x.ndim == 0 else x[source]
        token = token.reshape(rows)
        history = None
        if state.history is not None:
            history = update_history(jax.tree.map(move, state.history), token, real[:, 0])
        return _Turn(state.step + 1, token, going, tokens, jax.tree.map(move, out.cache), history, finished)

    def goes_on(state: _Turn) -> Array:
        # Log-probabilities only fall, so a continuation is at best as good as now, at the shortest or longest length.
        best = jnp.max(state.log_probs, axis=-1)
        hope = jnp.maximum(score(best, state.step + 1), score(best, jnp.asarray(length)))
        return (state.step < length) & jnp.any(hope > jnp.min(state.finished.scores, axis=-1))

    none = jnp.full((batch, beams), -jnp.inf)
    blank = jnp.full((batch, beams, length), pad_token, jnp.int32)
    first = jnp.arange(beams) == 0  # at the start all beams of a prompt are the same
    state = _Turn(
        step=jnp.zeros((), jnp.int32),
        token=prompts[:, -1],
        log_probs=jnp.broadcast_to(jnp.where(first, 0.0, -jnp.inf)[None], (batch, beams)),
        tokens=blank,
        cache=cache,
        history=None if rules is None else init_history(prompts, prompt_mask, length=length, vocab_size=vocab_size),
        finished=_Finished(none, none, jnp.zeros((batch, beams), jnp.int32), blank),
    )
    state = jax.lax.while_loop(goes_on, turn, state)
    cut = jnp.where(state.step == length, state.log_probs, -jnp.inf)
    lengths = jnp.full(cut.shape, length)
    best = best_finished(state.finished, _Finished(score(cut, lengths), cut, lengths, state.tokens))
    mask = (jnp.arange(length)[None, None] < best.lengths[..., None]) & jnp.isfinite(best.scores)[..., None]
    return Beams(jnp.where(mask, best.tokens, pad_token), mask, best.scores, best.log_probs)
