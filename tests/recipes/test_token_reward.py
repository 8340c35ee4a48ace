"""The reward model that is a decoder: what its parts are, and that it learns an order that depends on the prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.recipes import token_reward
from rlhf_jax.recipes.sequences import Task
from rlhf_jax.types import PreferenceBatch, TokenInputs

SHAPE = TransformerConfig(vocab_size=6, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32)
TASK = Task(Transformer(SHAPE), prompt_length=2, length=3, end_token=0, pad_token=5)


@pytest.fixture(scope="module")
def base():
    one = jnp.zeros((1, 1), jnp.int32)
    return TASK.model.init(jax.random.key(0), one, one == 0, method="initialise")["params"]


def test_a_beginning_scores_the_sum_of_its_parts_and_padding_adds_nothing(base):
    scorer = {"decoder": base, "kernel": jax.random.normal(jax.random.key(1), (16,))}
    tokens, mask = jnp.array([[1, 2, 3, 4, 0]]), jnp.ones((1, 5), bool)
    whole = token_reward.parts(TASK, scorer, TokenInputs(tokens, mask))
    short = TokenInputs(tokens.at[:, 3:].set(5), mask.at[:, 3:].set(False))
    beginning = token_reward.parts(TASK, scorer, short)
    np.testing.assert_allclose(beginning[0, 0], whole[0, 0], rtol=1e-5)
    assert beginning[0, 1:].tolist() == [0.0, 0.0]
    state = token_reward.init(TASK, base, optax.sgd(0.1))
    assert state.apply_fn(state.params, TokenInputs(tokens, mask)).tolist() == [0.0]
    np.testing.assert_allclose(state.apply_fn(scorer, TokenInputs(tokens, mask)), whole.sum(1), rtol=1e-5)
    changed = token_reward.parts(TASK, scorer, TokenInputs(tokens.at[0, 2].set(1), mask))
    assert float(changed[0, 0]) != pytest.approx(float(whole[0, 0]))  # a part knows its own token


def pairs(key, count):
    """The answer that begins as the prompt ends is preferred; the other pairs, of weight 0, say the opposite."""
    keys, sizes = jax.random.split(key, 3), (2, 2, 1)
    prompt, rest, wrong = (jax.random.randint(k, (count, n), 1, 5) for k, n in zip(keys, sizes, strict=True))
    wrong = jnp.where(wrong == prompt[:, 1:], wrong % 4 + 1, wrong)
    made = lambda first: TokenInputs(jnp.concatenate([prompt, first, rest], 1), jnp.ones((count, 5), bool))
    return PreferenceBatch(made(prompt[:, 1:]), made(wrong), jnp.ones(count))


def test_an_order_that_depends_on_the_prompt_is_learnt_from_pairs_that_weigh_something(base):
    right, fresh = pairs(jax.random.key(2), 1024), pairs(jax.random.key(3), 256)
    turned = PreferenceBatch(right.rejected, right.chosen, jnp.zeros(1024))
    given = jax.tree.map(lambda *x: jnp.concatenate(x), right, turned)
    learn = jax.jit(functools.partial(token_reward.learn, updates=300, rows=64))
    state, told = learn(token_reward.init(TASK, base, optax.adam(1e-2)), given, jax.random.key(4))
    assert float(token_reward.accuracy(TASK, state.params, fresh)) > 0.95
    assert float(told["reward/accuracy"]) > 0.6
    ties = PreferenceBatch(right.rejected, right.chosen, jnp.full(1024, 0.5))
    both = jax.tree.map(lambda *x: jnp.concatenate(x), fresh, ties)
    one, other = (float(token_reward.accuracy(TASK, state.params, x)) for x in (both, fresh))
    assert one == pytest.approx(other)
