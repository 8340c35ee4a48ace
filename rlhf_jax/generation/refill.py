"""Continuous batching inside one compiled program: a slot whose row has ended takes the next prompt from a queue.

A batch that is generated together lasts as long as its longest response. Here N prompts share a few slots; every slot
reads its next prompt as soon as it is free, so the model seldom runs on rows that have ended. Rows differ in how much
of their cache is filled (`caching.read_rows`), and a prompt is read in chunks, of which padding takes at most one.
Attention costs what it could see, so the steps run on as much of the cache as the fullest row needs, in a few widths.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.generation.caching import narrow, read_rows, rows_of, widen
from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.drawing import Choose, Draw, Rules, Stop, Warp, draw
from rlhf_jax.generation.history import History, init_history, update_history
from rlhf_jax.models.transformer import Cache, Transformer, init_cache
from rlhf_jax.types import Rollout

__all__ = ["Served", "generate_queue"]

_NARROW = 16  # a narrower part is taken if it has this many slots to spare, after at least as many turns


class Served(NamedTuple):
    """The responses to a queue of prompts, and what the model did for them."""

    rollout: Rollout  # N rows in the order of the prompts
    turns: Array  # [] int32, decoding steps; each runs the model on one token of every slot
    chunks: Array  # [] int32, chunks of prompts that were read

    def useful_share(self, slots: int) -> Array:
        """Generated tokens per token that a decoding step was run on; [] in (0, 1]."""
        return jnp.sum(self.rollout.response_mask) / (self.turns * slots)


class _Queue(NamedTuple):
    """What does not change: the prompts, and how they are read and answered."""

    model: Transformer
    params: dict
    prompts: Array  # [N, P]
    mask: Array  # [N, P]
    keys: Array  # [N]
    heads: Array  # [N, H] the prompts without their last token, left-padded to whole chunks
    head_masks: Array  # [N, H]
    chunk: int
    length: int

    @property
    def count(self) -> int:
        return len(self.prompts)

    def histories(self, prompts: Array, mask: Array) -> History:
        return init_history(prompts, mask, length=self.length, vocab_size=self.model.config.vocab_size)


class _Slots(NamedTuple):
    turns: Array  # []
    chunks: Array  # []
    waiting: Array  # [] the first prompt that no slot has taken yet
    prompt: Array  # [B] the prompt that each slot works on; N if none
    written: Array  # [B] response tokens
    token: Array  # [B] the last token, not yet in the cache
    cache: Cache  # one per slot
    history: History | None
    tokens: Array  # [N, R]
    lengths: Array  # [N]
    log_probs: Array  # [N, R]
    raw_log_probs: Array  # [N, R]


def generate_queue(
    model: Transformer,
    params: dict,
    prompts: Array,
    prompt_mask: Array,
    keys: Array,
    *,
    slots: int,
    length: int,
    end_token: int,
    pad_token: int,
    warp: Warp | None = None,
    choose: Choose = categorical,
    rules: Rules | None = None,
    stop: Stop | None = None,
    chunk: int = 32,
    widths: int = 3,
) -> Served:
    """Continues every prompt of a queue by up to `length` tokens. Jit the caller; the result is that of `generate`.

    Args:
      model: the decoder.
      params: its parameters.
      prompts: [N, P] int32, left-padded, served in this order.
      prompt_mask: [N, P] bool; the last slot of every row must be a real token.
      keys: [N] typed keys, one per prompt, consumed. A response depends neither on its neighbours nor on its slot.
      slots: B, rows that are generated at a time.
      length: R, most tokens per response.
      end_token: ends a row; it is part of the response.
      pad_token: fills the places behind the end.
      warp: as in `generate`.
      choose: as in `generate`.
      rules: as in `generate`.
      stop: as in `generate`.
      chunk: tokens of a prompt that are read at a time; a prompt of n tokens costs ⌈(n - 1) / chunk⌉ of them.
      widths: parts of the cache that steps can run on, evenly spaced up to all of it; each is compiled by itself.
    Returns:
      `Served`; tokens and masks equal `generate` on all N prompts with the same keys, log-probs up to rounding.
    Raises:
      ValueError: slots, length, chunk or widths below 1, or a number of keys that is not N.
    """
    for name, value in {"slots": slots, "length": length, "chunk": chunk, "widths": widths}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    count, prompt_length = prompts.shape
    if keys.shape != (count,):
        raise ValueError(f"keys must be one per prompt, shape ({count},), got {keys.shape}")
    chunk = min(chunk, max(prompt_length - 1, 1))
    room = max(-(-(prompt_length - 1) // chunk), 1) * chunk  # slots for a prompt without its last token
    whole = lambda x: jnp.pad(x[:, :-1], ((0, 0), (room - prompt_length + 1, 0)))
    queue = _Queue(
        model, params, prompts, prompt_mask, keys, whole(prompts), whole(prompt_mask), chunk=chunk, length=length
    )

    def turn(state: _Slots) -> _Slots:
        free = lambda state: (state.waiting < count) & jnp.any(state.prompt == count)
        state = jax.lax.while_loop(free, functools.partial(_take_next, queue), state)
        busy = state.prompt < count
        out = read_rows(model, params, state.token[:, None], busy[:, None], state.cache)
        logits = model.apply({"params": params}, out.hidden[:, 0], method="logits")
        step_keys = jax.vmap(jax.random.fold_in)(keys[jnp.minimum(state.prompt, count - 1)], state.written)
        drawn = draw(step_keys, logits, history=state.history, rules=rules, warp=warp, choose=choose)
        history = None if state.history is None else update_history(state.history, drawn.token, busy)
        ended = (drawn.token == end_token) | (state.written + 1 == length)
        if stop is not None:
            ended = ended | stop(history)  # type: ignore[arg-type]
        return _written(state._replace(cache=out.cache, history=history), drawn, ended)

    remembers = rules is not None or stop is not None
    state = _blank(queue, slots, room + length, pad_token=pad_token, remembers=remembers)
    state = _in_parts(turn, state, least=room, widths=widths)
    response_mask = jnp.arange(length)[None] < state.lengths[:, None]
    rollout = Rollout(
        tokens=jnp.concatenate([prompts, state.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, response_mask], axis=1),
        response_mask=response_mask,
        log_probs=state.log_probs,
        raw_log_probs=state.raw_log_probs,
    )
    return Served(rollout, state.turns, state.chunks)


def _blank(queue: _Queue, slots: int, capacity: int, *, pad_token: int, remembers: bool) -> _Slots:
    """Free slots, and no response yet."""
    count, prompt_length = queue.prompts.shape
    none, nothing = jnp.zeros((), jnp.int32), jnp.zeros((slots,), jnp.int32)
    prompt = jnp.zeros((slots, prompt_length), jnp.int32)
    return _Slots(
        turns=none,
        chunks=none,
        waiting=none,
        prompt=jnp.full((slots,), count, jnp.int32),
        written=nothing,
        token=nothing,
        cache=rows_of(init_cache(queue.model.config, slots, capacity)),
        history=queue.histories(prompt, prompt > 0) if remembers else None,
        tokens=jnp.full((count, queue.length), pad_token, jnp.int32),
        lengths=jnp.zeros((count,), jnp.int32),
        log_probs=jnp.zeros((count, queue.length)),
        raw_log_probs=jnp.zeros((count, queue.length)),
    )


def _read(queue: _Queue, index: Array, capacity: int) -> tuple[Cache, Array]:
    """The cache of one prompt without its last token, and the number of chunks that were read."""
    needed = -(-jnp.sum(queue.head_masks[index]) // queue.chunk)

    def read_chunk(i: Array, cache: Cache) -> Cache:
        start = queue.heads.shape[1] - (needed - i) * queue.chunk
        part = lambda x: jax.lax.dynamic_slice(x, (index, start), (1, queue.chunk))
        tokens, mask = part(queue.heads), part(queue.head_masks)
        return queue.model.apply({"params": queue.params}, tokens, mask, cache=cache).cache

    return jax.lax.fori_loop(0, needed, read_chunk, init_cache(queue.model.config, 1, capacity)), needed


def _take_next(queue: _Queue, state: _Slots) -> _Slots:
    """The first free slot takes the prompt that waits."""
    slot, index = jnp.argmax(state.prompt == queue.count), state.waiting
    cache, chunks = _read(queue, index, state.cache.capacity)
    put = lambda all_slots, one: jax.lax.dynamic_update_index_in_dim(all_slots, one, slot, 0)
    history = None
    if state.history is not None:
        row = lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1)
        new = queue.histories(row(queue.prompts), row(queue.mask))
        history = jax.tree.map(lambda x, y: put(x, y[0]), state.history, new)
    return state._replace(
        chunks=state.chunks + chunks,
        waiting=index + 1,
        prompt=state.prompt.at[slot].set(index),
        written=state.written.at[slot].set(0),
        token=state.token.at[slot].set(queue.prompts[index, -1]),
        cache=jax.tree.map(put, state.cache, cache),
        history=history,
    )


def _written(state: _Slots, drawn: Draw, ended: Array) -> _Slots:
    """Every busy slot has one token more; those that have ended are free."""
    count, written = len(state.tokens), state.written + 1
    write = lambda buffer, x: buffer.at[state.prompt, state.written].set(x, mode="drop")
    return state._replace(
        turns=state.turns + 1,
        prompt=jnp.where(ended, count, state.prompt),
        written=written,
        token=drawn.token,
        tokens=write(state.tokens, drawn.token),
        lengths=state.lengths.at[state.prompt].set(written, mode="drop"),
        log_probs=write(state.log_probs, drawn.log_prob),
        raw_log_probs=write(state.raw_log_probs, drawn.raw_log_prob),
    )


def _in_parts(turn: Callable[[_Slots], _Slots], state: _Slots, *, least: int, widths: int) -> _Slots:
    """Turns until every prompt is answered, each on as much of the cache as the fullest row needs, at least `least`."""
    count, capacity = len(state.tokens), state.cache.capacity
    sizes = [size for i in range(1, widths) if (size := capacity * i // widths) >= least + _NARROW] + [capacity]
    unfinished = lambda state: (state.waiting < count) | jnp.any(state.prompt < count)
    fullest = lambda state: jnp.max(jnp.where(state.prompt < count, state.cache.length, 0))
    place = lambda state: jnp.sum(fullest(state) + _NARROW > jnp.array(sizes[:-1], jnp.int32))

    def on_part(number: int) -> Callable[[_Slots], _Slots]:
        """Turns on the first slots of the cache, until a row needs more or, after some, all could do with fewer."""

        def goes_on(part: _Slots, began: Array) -> Array:
            stays = (part.turns < began + _NARROW) | (place(part) >= number)
            return unfinished(part) & (fullest(part) < sizes[number]) & stays

        def turns(state: _Slots) -> _Slots:
            part = state._replace(cache=narrow(state.cache, sizes[number]))
            part = jax.lax.while_loop(lambda part: goes_on(part, state.turns), turn, part)
            return part._replace(cache=widen(state.cache, part.cache))

        return turns

    parts = [on_part(number) for number in range(len(sizes))]
    return jax.lax.while_loop(unfinished, lambda state: jax.lax.switch(place(state), parts, state), state)
