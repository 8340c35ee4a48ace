"""rlhf_jax: reinforcement learning from human feedback as pure functions for JAX and Flax."""
