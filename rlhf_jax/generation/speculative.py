"""Speculative decoding: a small draft proposes several tokens, the model judges all of them in one pass.

What comes out is distributed exactly as if the model itself had been sampled token by token; the draft only decides how
fast. A pass of the model over k tokens costs little more than one over a single token as long as reading the weights
is what takes the time, which is so for few rows and large models.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.generation.caching import anyone, grow, prefill, read_rows, rows_of
from rlhf_jax.generation.categorical import categorical
from rlhf_jax.generation.drawing import Warp
from rlhf_jax.models.transformer import Cache, Transformer, init_cache
from rlhf_jax.types import Rollout

__all__ = ["Speculated", "Verdict", "judge", "speculate"]


class Verdict(NamedTuple):
    """What becomes of the proposals."""

    accepted: Array  # [B] int32, proposals that stand, 0 .. A
    token: Array  # [B] int32, the token that follows them


def judge(key: Array, proposals: Array, draft_log_probs: Array, log_probs: Array) -> Verdict:
    """Accepts proposal x with probability min(1, p(x) / q(x)); after the first refusal draws from max(p - q, 0).

    If all stand, one more token is drawn from p. Accepted proposals and the token are distributed as draws from p.

    Args:
      key: [B] typed keys, consumed.
      proposals: [B, A] int32, drawn from q.
      draft_log_probs: [B, A, V] log q, normalised.
      log_probs: [B, A + 1, V] log p, normalised.
    Returns:
      `Verdict`. With p = q every proposal stands.
    Reference: Leviathan et al. 2023, algorithm 1, https://arxiv.org/abs/2211.17192

    >>> keys, log_p = jax.random.split(jax.random.key(0), 1), jnp.log(jnp.full((1, 3, 2), 0.5))
    >>> int(judge(keys, jnp.array([[0, 1]]), log_p[:, :2], log_p).accepted[0])
    2
    """
    ahead = proposals.shape[1]
    uniform_keys, draw_keys = jax.vmap(jax.random.split, out_axes=1)(key)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (ahead,)))(uniform_keys)
    chosen = lambda x: jnp.take_along_axis(x, proposals[..., None], axis=-1)[..., 0]
    stands = jnp.log(uniform) < chosen(log_probs[:, :ahead]) - chosen(draft_log_probs)
    accepted = jnp.sum(jnp.cumprod(stands, axis=-1), axis=-1).astype(jnp.int32)

    at = lambda x: jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0]
    p = at(jnp.exp(log_probs))
    q = at(jnp.pad(jnp.exp(draft_log_probs), ((0, 0), (0, 1), (0, 0))))  # nothing was proposed for the last place
    rest = jnp.maximum(p - q, 0.0)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)  # p = q up to rounding
    return Verdict(accepted, categorical(draw_keys, jnp.log(rest)))


class Speculated(NamedTuple):
    """A rollout, and how well the draft guessed."""

    rollout: Rollout
    accepted: Array  # [B] int32, response tokens that were proposed by the draft
    rounds: Array  # [B] int32, passes of the model over each row; each judges `ahead` proposals

    def acceptance(self, ahead: int) -> Array:
        """Share of the proposals that stood and were needed; [] in [0, 1]."""
        return jnp.sum(self.accepted) / (jnp.sum(self.rounds) * ahead)


class _Round(NamedTuple):
    index: Array  # []
    token: Array  # [B] the last token, not yet in the caches
    alive: Array  # [B] bool
    written: Array  # [B] response tokens
    cache: Cache  # one per row
    draft_cache: Cache  # one per row
    tokens: Array  # [B, R + A + 1]
    log_probs: Array  # [B, R + A + 1]
    raw_log_probs: Array  # [B, R + A + 1]
    accepted: Array  # [B]
    rounds: Array  # [B]


def _cut(cache: Cache, length: Array) -> Cache:
    """Forgets what was read behind the first length [B] slots of every row."""
    kept = jnp.arange(cache.mask.shape[-1])[None, None] < length[:, None, None]
    return cache._replace(mask=cache.mask & kept, length=length)


def speculate(
    model: Transformer,
    params: dict,
    draft: Transformer,
    draft_params: dict,
    prompts: Array,
    prompt_mask: Array,
    keys: Array,
    *,
    ahead: int,
    length: int,
    end_token: int,
    pad_token: int,
    warp: Warp | None = None,
) -> Speculated:
    """Continues every prompt by up to `length` tokens, of which a draft guesses most. Jit the caller.

    Args:
      model: the decoder whose distribution is sampled.
      params: its parameters.
      draft: a smaller decoder with the same vocabulary.
      draft_params: its parameters.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool; the last slot of every row must be a real token.
      keys: [B] typed keys, one per row, consumed. A row's sample does not depend on its neighbours.
      ahead: A, proposals per pass of the model.
      length: R, most tokens to generate.
      end_token: ends a row; it is part of the response.
      pad_token: fills the slots behind the end.
      warp: logits [B, V] -> logits [B, V], applied to the model and to the draft; the warped model's distribution is
        what is sampled. ``lambda logits: top_k(logits, 1)`` is greedy decoding.
    Returns:
      `Speculated`; its rollout is distributed as that of `generate`, with the same log-probs for the same tokens. The
      same key gives another sample.
    Raises:
      ValueError: ahead or length below 1, or different vocabularies.
    Reference: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023,
      https://arxiv.org/abs/2302.01318
    """
    for name, value in {"ahead": ahead, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if model.config.vocab_size != draft.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {draft.config.vocab_size}"
        raise ValueError(f"model and draft must share a vocabulary, got {sizes} tokens")
    rows, prompt_length = prompts.shape
    capacity = prompt_length + length + ahead

    def read_prompts(network: Transformer, weights: dict) -> Cache:
        read = prefill(network, weights, prompts, prompt_mask)
        whole = init_cache(network.config, rows, capacity) if read is None else grow(network, read.cache, capacity)
        return rows_of(whole)

    def log_probs_of(network: Transformer, weights: dict, hidden: Array) -> tuple[Array, Array]:
        """Of hidden states [B, T, D]: log-probs [B, T, V] of the warped and of the raw distribution."""
        logits = network.apply({"params": weights}, hidden, method="logits")
        warped = logits if warp is None else jax.vmap(warp, 1, 1)(logits)
        return jax.nn.log_softmax(warped), jax.nn.log_softmax(logits)

    def propose(round_keys: Array, state: _Round) -> tuple[Array, Array, Cache]:
        """proposals [B, A], their log-probs [B, A, V], and the draft's cache after reading all of them."""

        def step(carry: tuple[Array, Cache], index: Array) -> tuple[tuple[Array, Cache], tuple[Array, Array]]:
            token, cache = carry
            out = read_rows(draft, draft_params, token[:, None], state.alive[:, None], cache)
            log_q = log_probs_of(draft, draft_params, out.hidden)[0][:, 0]
            token = categorical(jax.vmap(jax.random.fold_in, (0, None))(round_keys, index), log_q)
            return (token, out.cache), (token, log_q)

        (_, cache), (tokens, log_q) = jax.lax.scan(step, (state.token, state.draft_cache), jnp.arange(ahead + 1))
        return tokens[:ahead].T, jnp.moveaxis(log_q[:ahead], 0, 1), cache

    def turn(state: _Round) -> _Round:
        round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.index)
        proposals, draft_log_probs, draft_cache = propose(round_keys, state)
        tokens = jnp.concatenate([state.token[:, None], proposals], axis=1)
        alive = jnp.broadcast_to(state.alive[:, None], tokens.shape)
        out = read_rows(model, params, tokens, alive, state.cache)
        log_probs, raw = log_probs_of(model, params, out.hidden)
        verdict = judge(
            jax.vmap(jax.random.fold_in, (0, None))(round_keys, ahead + 1), proposals, draft_log_probs, log_probs
        )

        place = jnp.arange(ahead + 1)[None]
        new = jnp.where(
            place == verdict.accepted[:, None], verdict.token[:, None], jnp.pad(proposals, ((0, 0), (0, 1)))
        )
        ends = (new == end_token) & (place <= verdict.accepted[:, None])
        until_end = jnp.where(jnp.any(ends, axis=-1), jnp.argmax(ends, axis=-1) + 1, ahead + 1)
        count = jnp.minimum(jnp.minimum(verdict.accepted + 1, until_end), length - state.written)
        count = jnp.where(state.alive, count, 0)
        written = state.written + count
        going = state.alive & ~jnp.any(ends, axis=-1) & (written < length)

        chosen = lambda x: jnp.take_along_axis(x, new[..., None], axis=-1)[..., 0]
        write = jax.vmap(lambda buffer, x, start: jax.lax.dynamic_update_slice_in_dim(buffer, x, start, axis=0))
        read = jnp.where(going, count, 0)
        return _Round(
            index=state.index + 1,
            token=jnp.where(going, verdict.token, state.token),
            alive=going,
            written=written,
            cache=_cut(out.cache, state.cache.length + read),
            draft_cache=_cut(draft_cache, state.draft_cache.length + read),
            tokens=write(state.tokens, new, state.written),
            log_probs=write(state.log_probs, chosen(log_probs), state.written),
            raw_log_probs=write(state.raw_log_probs, chosen(raw), state.written),
            accepted=state.accepted + jnp.minimum(verdict.accepted, count),
            rounds=state.rounds + state.alive,
        )

    none = jnp.zeros((rows,), jnp.int32)
    empty = jnp.zeros((rows, length + ahead + 1))
    state = _Round(
        index=jnp.zeros((), jnp.int32),
        token=prompts[:, -1],
        alive=jnp.ones((rows,), bool),
        written=none,
        cache=read_prompts(model, params),
        draft_cache=read_prompts(draft, draft_params),
        tokens=empty.astype(jnp.int32),
        log_probs=empty,
        raw_log_probs=empty,
        accepted=none,
        rounds=none,
    )
    state = jax.lax.while_loop(lambda s: anyone(s.alive), turn, state)
    mask = jnp.arange(length)[None] < state.written[:, None]
    inside = lambda x, fill: jnp.where(mask, x[:, :length], fill)
    rollout = Rollout(
        tokens=jnp.concatenate([prompts, inside(state.tokens, pad_token)], axis=1),
        mask=jnp.concatenate([prompt_mask, mask], axis=1),
        response_mask=mask,
        log_probs=inside(state.log_probs, 0.0),
        raw_log_probs=inside(state.raw_log_probs, 0.0),
    )
    return Speculated(rollout, state.accepted, state.rounds)
