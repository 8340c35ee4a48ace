"""Generation as one program: prefill the prompt, then one token per turn of a compiled loop over a fixed cache.

The cache lives inside the loop and is written in place. Rows are independent of each other, so a batch may be split
over devices in any way: under ``jit`` with sharded rows the devices agree at every turn whether anybody goes on, under
``shard_map`` each stops on its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.generation.caching import Prefill, anyone, grow, prefill, repeat_rows
from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.drawing import Choose, Rules, Stop, Warp, draw, greedy
from rlhf_jax.generation.history import History, init_history, update_history
from rlhf_jax.models.transformer import Cache, Transformer, init_cache
from rlhf_jax.types import Rollout

__all__ = ["generate", "greedy"]


class _Turn(NamedTuple):
    step: Array  # [] response tokens written
    token: Array  # [B] the last token, not yet in the cache
    alive: Array  # [B] bool, rows that have not ended
    fed: Array  # [B] bool, whether `token` is a real token
    cache: Cache
    history: History | None
    tokens: Array  # [B, R]
    mask: Array  # [B, R]
    log_probs: Array  # [B, R]
    raw_log_probs: Array  # [B, R]
    trunk: Array | None  # [B, P + R, D]
    hidden: Array | None  # [B, R, D]


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
    keep_hidden: bool = False,
    rules: Rules | None = None,
    stop: Stop | None = None,
    samples: int = 1,
    prefilled: Prefill | None = None,
) -> Rollout:
    """Continues every prompt by up to `length` tokens. Jit the caller; one compilation per (B, P, length).

    Args:
      model: the decoder.
      params: its parameters.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool; the last slot of every row must be a real token.
      keys: [B · samples] typed keys, one per row of the result, consumed. A row's sample does not depend on its
        neighbours.
      length: R, most tokens to generate. The loop stops early once every row has ended.
      end_token: ends a row; it is part of the response, and what follows it is not.
      pad_token: fills the slots behind the end. Masks decide what counts, never this id.
      warp: logits [B, V] -> logits [B, V] of the distribution to sample from; None samples from the model itself.
      choose: draws tokens [B] from (keys [B], logits [B, V]): `categorical` or `greedy`.
      tap: also returns every slot's activations entering this layer, for heads that share the trunk: a critic's values
        are ``critic(response_states(rollout.trunk, prompt_length=P))``, without another pass through the trunk.
      keep_hidden: also returns the final hidden states that the tokens were drawn from, as a distillation's teacher
        needs them; `logprobs.response_states` of a forward pass over the same tokens are the same.
      rules: (logits, `History`) -> logits, applied before `warp`: penalties and bans that depend on what was written.
      stop: `History` that ends with the new token -> [B] bool: ends a row as the end token does.
      samples: G, continuations of each prompt, which is read once. Rows g = 0 .. G-1 of prompt b are b · G + g.
      prefilled: what `caching.prefill` returned for these prompts, parameters and tap; None reads them here.
    Returns:
      `Rollout` of B · samples rows. Its log-probs equal those of a training forward pass over the same tokens, under
      any padding. With ``samples=G`` it equals a rollout of the prompts repeated G times.
    Raises:
      ValueError: length or samples below 1, a number of keys that is not B · samples, or a prefill of other prompts.
    """
    prompt_length = prompts.shape[1]
    _check(prompts, keys, length, samples, prefilled)
    read = prefilled if prefilled is not None else prefill(model, params, prompts, prompt_mask, tap=tap)
    prompts, prompt_mask, read = repeat_rows((prompts, prompt_mask, read), samples)
    rows, capacity = len(prompts), prompt_length + length
    call = lambda tokens, mask, cache, **kw: model.apply({"params": params}, tokens, mask, cache=cache, tap=tap, **kw)

    cache = init_cache(model.config, rows, capacity) if read is None else grow(model, read.cache, capacity)
    states = lambda slots: jnp.zeros((rows, slots, model.config.width))
    trunk = None if tap is None else states(capacity)

    def keep(kept: Array | None, states: Array | None, slot: ArrayLike) -> Array | None:
        if kept is None or states is None:
            return kept
        return jax.lax.dynamic_update_slice_in_dim(kept, states, slot, axis=1)

    if read is not None:
        trunk = keep(trunk, read.trunk, 0)

    def turn(state: _Turn) -> _Turn:
        out = call(state.token[:, None], state.fed[:, None], state.cache)
        logits = model.apply({"params": params}, out.hidden[:, 0], method="logits")
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        drawn = draw(step_keys, logits, history=state.history, rules=rules, warp=warp, choose=choose)
        token = jnp.where(state.alive, drawn.token, pad_token)
        history = None if state.history is None else update_history(state.history, token, state.alive)
        ended = token == end_token
        if stop is not None:
            ended = ended | stop(history)  # type: ignore[arg-type]
        write = lambda buffer, column: jax.lax.dynamic_update_slice_in_dim(
            buffer, jnp.where(state.alive, column, jnp.zeros((), buffer.dtype))[:, None], state.step, axis=1
        )
        return _Turn(
            step=state.step + 1,
            token=token,
            alive=state.alive & ~ended,
            fed=state.alive,
            cache=out.cache,
            history=history,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
            mask=write(state.mask, state.alive),
            log_probs=write(state.log_probs, drawn.log_prob),
            raw_log_probs=write(state.raw_log_probs, drawn.raw_log_prob),
            trunk=keep(state.trunk, out.tap, state.cache.length),
            hidden=keep(state.hidden, jnp.where(state.alive[:, None, None], out.hidden, 0), state.step),
        )

    remembers = rules is not None or stop is not None
    vocab_size = model.config.vocab_size
    empty = jnp.zeros((rows, length))
    everyone = jnp.ones((rows,), bool)
    state = _Turn(
        step=jnp.zeros((), jnp.int32),
        token=prompts[:, -1],
        alive=everyone,
        fed=everyone,
        cache=cache,
        history=init_history(prompts, prompt_mask, length=length, vocab_size=vocab_size) if remembers else None,
        tokens=jnp.full((rows, length), pad_token, jnp.int32),
        mask=jnp.zeros((rows, length), bool),
        log_probs=empty,
        raw_log_probs=empty,
        trunk=trunk,
        hidden=states(length) if keep_hidden else None,
    )
    state = jax.lax.while_loop(lambda s: (s.step < length) & anyone(s.alive), turn, state)
    if tap is not None:  # the last token has been sampled but not yet been read by the trunk
        last = call(state.token[:, None], state.fed[:, None], state.cache, last=tap)
        state = state._replace(trunk=keep(state.trunk, last.hidden, state.cache.length))
    return Rollout(
        tokens=jnp.concatenate([prompts, state.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, state.mask], axis=1),
        response_mask=state.mask,
        log_probs=state.log_probs,
        raw_log_probs=state.raw_log_probs,
        trunk=state.trunk,
        hidden=state.hidden,
    )


def _check(prompts: Array, keys: Array, length: int, samples: int, prefilled: Prefill | None) -> None:
    rows, prompt_length = prompts.shape
    for name, value in {"length": length, "samples": samples}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if keys.shape != (rows * samples,):
        raise ValueError(f"keys must be one per row, shape ({rows * samples},), got {keys.shape}")
    if prefilled is not None and prefilled.cache.mask.shape != (rows, prompt_length - 1):
        expected, got = (rows, prompt_length - 1), prefilled.cache.mask.shape
        raise ValueError(f"prefilled must hold [B, P - 1] = {expected} slots of these prompts, got {got}")
