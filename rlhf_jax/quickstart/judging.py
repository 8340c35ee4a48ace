"""The stage "judging": held-out prefixes continued by each policy, scored by a judge that training never touched."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import kl, masking
from rlhf_jax.logprobs import head_log_probs, response_states
from rlhf_jax.models.transformer import Transformer, output_table
from rlhf_jax.quickstart.context import Policy, Run, continuations
from rlhf_jax.quickstart.material import Tokens, prompts
from rlhf_jax.quickstart.rewards import RewardModels, score
from rlhf_jax.training.state import merge_params
from rlhf_jax.types import Rollout

__all__ = ["Judged", "judged"]


class Judged(NamedTuple):
    """Continuations of held-out prefixes by one policy, judged."""

    texts: list[str]  # prefix and continuation
    continuations: list[str]
    scores: np.ndarray  # [N] of the judge
    lengths: np.ndarray  # [N] tokens
    responses: list[list[int]]
    reference_kl: np.ndarray  # [N] nats per continuation: Σ log π - log π_base


def judged(run: Run, policy: Policy, base: Policy, models: RewardModels, key: Array) -> Judged:
    """Continues held-out prefixes of the judge's half and lets the judge score the result.

    A policy on the base model's trunk has left the judge's activations behind while it generated.
    """
    settings, tokenizer = run.settings, run.material.tokenizer
    pool = prompts(run.material, run.material.judge, settings.prompt_length)
    beginnings = Tokens(pool.tokens[: settings.eval_prompts], pool.mask[: settings.eval_prompts])
    same_trunk = policy.model == base.model
    batches = continuations(run, policy, beginnings, key, tap=settings.judge_layer if same_trunk else None)
    look = functools.partial(_look, base.model, settings.judge_layer, settings.prompt_length)
    looked = jax.device_get([look(base.trained, base.frozen, models.judge, rollout) for rollout in batches])
    rows = [
        row for b in jax.device_get(batches) for row in zip(b.tokens, b.mask, b.responses, b.response_mask, strict=True)
    ]
    rows = rows[: len(beginnings.tokens)]
    responses = [[int(token) for token in response[mask]] for _, _, response, mask in rows]
    return Judged(
        texts=[tokenizer.decode([int(t) for t in tokens[mask]]) for tokens, mask, _, _ in rows],
        continuations=[tokenizer.decode(response) for response in responses],
        scores=np.concatenate([scores for scores, _ in looked])[: len(rows)],
        lengths=np.array([len(response) for response in responses]),
        responses=responses,
        reference_kl=np.concatenate([distance for _, distance in looked])[: len(rows)],
    )


@functools.partial(jax.jit, static_argnums=range(3))
def _look(
    model: Transformer, layer: int, prompt_length: int, trained: dict, frozen: dict, judge: dict, rollout: Rollout
) -> tuple[Array, Array]:
    """The judge's scores, and Σ log π - log π_base, in one pass of the base model, or of its upper layers."""
    params, kept = merge_params(trained, frozen), rollout.trunk is not None
    start, first = (rollout.trunk, layer) if kept else (rollout.tokens, 0)
    out = model.apply({"params": params}, start, rollout.mask, first=first, tap=layer)
    states = response_states(out.hidden, prompt_length=prompt_length)
    reference = head_log_probs(states, output_table(params), rollout.responses)
    distance = kl.k1(*masking.zero_outside(rollout.response_mask, rollout.raw_log_probs, reference))
    return score(judge, out.tap, rollout.mask), jnp.sum(distance, axis=-1)
