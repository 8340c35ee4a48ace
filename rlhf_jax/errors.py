"""What went wrong outside the program, said in one sentence.

Files, downloads, disks and options fail for reasons that a traceback does not explain. Such failures raise `UserError`;
the command line prints its message alone. Mistakes in calling a function stay `TypeError` and `ValueError`.
"""

__all__ = ["UserError", "missing_extra"]


class UserError(Exception):
    """A failure that the user can mend: the message names the file or option and the remedy."""


def missing_extra(module: str, extra: str, purpose: str) -> UserError:
    """The error for an optional dependency that is not installed.

    Args:
      module: the import name that is missing.
      extra: the extra of rlhf_jax that brings it.
      purpose: what it is needed for, as the end of "... is needed to".

    >>> str(missing_extra("gguf", "quickstart", "read a GGUF model"))
    "The package `gguf` is needed to read a GGUF model: pip install 'rlhf_jax[quickstart]'"
    """
    return UserError(f"The package `{module}` is needed to {purpose}: pip install 'rlhf_jax[{extra}]'")
