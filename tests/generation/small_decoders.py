"""Small decoders of several families, ragged prompts, and what a training forward pass says about a rollout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.logprobs import response_states, token_log_probs
from rlhf_jax.models.transformer import Transformer, TransformerConfig

VOCABULARY = 23
SHAPE = {
    "vocab_size": VOCABULARY,
    "width": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 24,
    "rope_theta": 100.0,
    "max_length": 64,
}
FAMILIES = {
    "llama": {},
    "gpt": {"learned_positions": True, "norm": "layer", "gated": False, "qkv_bias": True, "num_kv_heads": 4},
    "windows": {"windows": (3, None), "attention_soft_cap": 5.0, "logit_soft_cap": 3.0, "post_norms": True},
    "experts": {"num_experts": 4, "experts_per_token": 2, "expert_width": 8, "tie_embeddings": False},
}
LENGTHS = (3, 7, 1, 5)


class Prompts(NamedTuple):
    """Left-padded prompts."""

    tokens: jax.Array  # [B, P]
    mask: jax.Array  # [B, P] bool


class Score(NamedTuple):
    """A training forward pass over a rollout."""

    logits: jax.Array  # [B, R, V] that predict the response tokens
    log_probs: jax.Array  # [B, R]
    tap: jax.Array  # [B, P + R, D] entering layer 1


def decoder(family="llama", **changes):
    """(model, params); every parameter random and of size one, so that none of them can be lost unseen."""
    config = TransformerConfig(**SHAPE | FAMILIES[family] | changes)
    return Transformer(config), random_params(config)


@functools.cache
def random_params(config, seed=0):
    ones = jnp.ones((1, 1), jnp.int32)
    shapes = jax.eval_shape(
        functools.partial(Transformer(config).init, method="initialise"), jax.random.key(0), ones, ones > 0
    )["params"]
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 1.0), x.dtype)
    return jax.tree.map(draw, shapes)


def ragged_prompts(lengths=LENGTHS, width=None, seed=0, garbage=0):
    """Random prompts of these lengths; padding holds `garbage`, which may lie outside the vocabulary."""
    rng = np.random.default_rng(seed)
    width = max(lengths) if width is None else width
    tokens, mask = np.full((len(lengths), width), garbage, np.int32), np.zeros((len(lengths), width), bool)
    for i, length in enumerate(lengths):
        tokens[i, width - length :] = rng.integers(0, VOCABULARY, length)
        mask[i, width - length :] = True
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))


@functools.partial(jax.jit, static_argnames=("model",))
def score(model, params, rollout):
    """What training sees: one forward pass over prompts and responses, without a cache."""
    out = model.apply({"params": params}, rollout.tokens, rollout.mask, tap=1)
    states = response_states(out.hidden, prompt_length=rollout.prompt_length)
    logits = model.apply({"params": params}, states, method="logits")
    return Score(logits, token_log_probs(logits, jnp.where(rollout.response_mask, rollout.responses, 0)), out.tap)


def assert_close_where(mask, actual, expected, tolerance=1e-4):
    """Equal within a tolerance wherever the mask is true."""
    mask = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(actual)[mask], np.asarray(expected)[mask], rtol=tolerance, atol=tolerance)
