"""Generation as one program: prefill the prompt, then one token per turn of a compiled loop over a fixed cache."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.generation.categorical import categorical
from rlhf_jax.models.transformer import Cache, Transformer, init_cache
from rlhf_jax.types import Rollout

__all__ = ["generate", "greedy"]

Warp = Callable[[Array], Array]
Choose = Callable[[Array, Array], Array]


def greedy(keys: Array, logits: Array) -> Array:
    """The most likely token of each row; the keys are not used. keys [B], logits [B, V] -> [B] int32."""
    del keys
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


class _Turn(NamedTuple):
    step: Array  # [] response tokens written
    token: Array  # [B] the last token, not yet in the cache
    alive: Array  # [B] bool, rows that have not ended
    fed: Array  # [B] bool, whether `token` is a real token
    cache: Cache
    tokens: Array  # [B, R]
    mask: Array  # [B, R]
    log_probs: Array  # [B, R]
    raw_log_probs: Array  # [B, R]
    hidden: Array | None  # [B, P + R, D]


def _log_prob(logits: Array, token: Array) -> Array:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def generate(
    model: Transformer,
    params: dict,
    prompts: Array,
    prompt_mask: Array,
    keys: Array,
    *,
    length: int,
    end_token: int,
    pad_token: int,
    warp: Warp | None = None,
    choose: Choose = categorical,
    tap: int | None = None,
) -> Rollout:
    """Continues every prompt by up to `length` tokens. Jit the caller; one compilation per (B, P, length).

    Args:
      model: the decoder.
      params: its parameters.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool; the last slot of every row must be a real token.
      keys: [B] typed keys, one per row, consumed. A row's sample does not depend on its neighbours.
      length: R, most tokens to generate. The loop stops early once every row has ended.
      end_token: ends a row; it is part of the response, and what follows it is not.
      pad_token: fills the slots behind the end. Masks decide what counts, never this id.
      warp: logits [B, V] -> logits [B, V] of the distribution to sample from; None samples from the model itself.
      choose: draws tokens [B] from (keys [B], logits [B, V]): `categorical` or `greedy`.
      tap: also returns every slot's activations entering this layer, for heads that share the trunk.
    Returns:
      `Rollout`. Its log-probs equal those of a training forward pass over the same tokens, under any padding.
    """
    rows, prompt_length = prompts.shape
    call = lambda tokens, mask, cache, **kw: model.apply({"params": params}, tokens, mask, cache=cache, tap=tap, **kw)
    cache = init_cache(model.config, rows, prompt_length + length)
    hidden = None if tap is None else jnp.zeros((rows, prompt_length + length, model.config.width))
    if prompt_length > 1:
        prefill = call(prompts[:, :-1], prompt_mask[:, :-1], cache)
        cache = prefill.cache
        if hidden is not None:
            hidden = jax.lax.dynamic_update_slice_in_dim(hidden, prefill.tap, 0, axis=1)

    def keep(hidden: Array | None, tapped: Array | None, slot: Array) -> Array | None:
        if hidden is None or tapped is None:
            return None
        return jax.lax.dynamic_update_slice_in_dim(hidden, tapped, slot, axis=1)

    def turn(state: _Turn) -> _Turn:
        out = call(state.token[:, None], state.fed[:, None], state.cache)
        logits = model.apply({"params": params}, out.hidden[:, 0], method="logits")
        warped = logits if warp is None else warp(logits)
        token = choose(jax.vmap(jax.random.fold_in, (0, None))(keys, state.step), warped)
        token = jnp.where(state.alive, token, pad_token)
        raw = _log_prob(logits, token)
        write = lambda buffer, column: jax.lax.dynamic_update_slice_in_dim(
            buffer, jnp.where(state.alive, column, jnp.zeros((), buffer.dtype))[:, None], state.step, axis=1
        )
        return _Turn(
            step=state.step + 1,
            token=token,
            alive=state.alive & (token != end_token),
            fed=state.alive,
            cache=out.cache,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
            mask=write(state.mask, state.alive),
            log_probs=write(state.log_probs, raw if warp is None else _log_prob(warped, token)),
            raw_log_probs=write(state.raw_log_probs, raw),
            hidden=keep(state.hidden, out.tap, state.cache.length),
        )

    empty = jnp.zeros((rows, length))
    everyone = jnp.ones((rows,), bool)
    state = _Turn(
        step=jnp.zeros((), jnp.int32),
        token=prompts[:, -1],
        alive=everyone,
        fed=everyone,
        cache=cache,
        tokens=jnp.full((rows, length), pad_token, jnp.int32),
        mask=jnp.zeros((rows, length), bool),
        log_probs=empty,
        raw_log_probs=empty,
        hidden=hidden,
    )
    state = jax.lax.while_loop(lambda s: (s.step < length) & jnp.any(s.alive), turn, state)
    if tap is not None:  # the last token has been sampled but not yet been read by the trunk
        last = call(state.token[:, None], state.fed[:, None], state.cache, last=tap)
        state = state._replace(hidden=keep(state.hidden, last.hidden, state.cache.length))
    return Rollout(
        tokens=jnp.concatenate([prompts, state.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, state.mask], axis=1),
        response_mask=state.mask,
        log_probs=state.log_probs,
        raw_log_probs=state.raw_log_probs,
        trunk=state.hidden,
    )
