"""The command `rlhf-jax quickstart`: its settings, stages, progress and report."""
