"""The smallest game: one observation, two actions, an episode of one step."""

import jax.numpy as jnp

from rlhf_jax.environments import Environment, Step


def coin() -> Environment:
    """Its own reward is always 0."""
    here, yes = jnp.ones(1), jnp.bool_(True)
    step = lambda key, state, action: Step(state, here, here, jnp.float32(0), yes, ~yes)
    return Environment(lambda key: (jnp.float32(0), here), step, 2, (1,), 10)
