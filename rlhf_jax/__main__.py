"""`python -m rlhf_jax` is `rlhf-jax`."""

from rlhf_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
