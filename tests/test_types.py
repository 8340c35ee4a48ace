"""types.py: everything is a pytree, and a rollout's views fit together."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.types import ActorCritic, Distilled, PreferenceBatch, Rollout, TokenBatch, TokenInputs

B, P, R = 2, 3, 4


def rollout(trunk=None):
    tokens = jnp.arange(B * (P + R)).reshape(B, P + R)
    response_mask = jnp.arange(R)[None] < jnp.array([4, 2])[:, None]
    mask = jnp.concatenate([jnp.ones((B, P), bool), response_mask], axis=1)
    return Rollout(tokens, mask, response_mask, jnp.zeros((B, R)), jnp.ones((B, R)), trunk)


def test_a_rollout_knows_its_prompt_its_responses_and_what_a_policy_takes():
    made = rollout(trunk=jnp.ones((B, P + R, 5)))
    assert made.prompt_length == P
    assert made.responses.tolist() == [[3, 4, 5, 6], [10, 11, 12, 13]]
    inputs = made.inputs
    assert isinstance(inputs, TokenInputs)
    assert inputs.tokens is made.tokens
    assert inputs.mask is made.mask
    assert inputs.trunk is made.trunk
    assert rollout().inputs.trunk is None


def test_all_are_pytrees_whose_rows_can_be_taken_inside_jit():
    x = jnp.arange(float(B))
    inputs = rollout().inputs
    trees = [
        inputs,
        rollout(),
        TokenBatch(inputs.tokens, inputs.mask, inputs.mask),
        PreferenceBatch(inputs, inputs, x),
        ActorCritic(x, x),
        Distilled(x, x, x),
    ]
    without_first = jax.jit(lambda tree: jax.tree.map(lambda x: x[1:], tree))
    for tree in trees:
        taken = without_first(tree)
        assert type(taken) is type(tree)
        assert jax.tree.structure(taken) == jax.tree.structure(tree)
        for leaf, whole in zip(jax.tree.leaves(taken), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(leaf, whole[1:])


def test_what_is_optional_is_no_leaf():
    assert len(jax.tree.leaves(ActorCritic(jnp.zeros(1), jnp.zeros(1)))) == 2
    assert len(jax.tree.leaves(rollout())) == 5
    assert len(jax.tree.leaves(rollout(trunk=jnp.zeros((B, P + R, 1))))) == 6
