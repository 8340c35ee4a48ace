"""A `config.json` whose entries are asked for by name and type, with errors that say what was found instead."""

from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import UserError

__all__ = ["Fields"]

_REQUIRED: Any = object()


class Fields:
    """Entries of a `config.json`. A null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = dict(values)
        self.source = source

    def get(self, name: str, default: Any = None) -> Any:
        """The entry as it stands, or `default` if it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number of at least 1."""
        value = self._require(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.source}: {name} must be a positive whole number, found {value!r}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A number."""
        value = self._require(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.source}: {name} must be a number, found {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.source}: {name} must be true or false, found {value!r}")
        return value

    def one_of(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """What `choices` has for the entry."""
        value = self.get(name, default)
        if value not in choices:
            raise UserError(f"{self.source}: {name} is {value!r}, expected one of {', '.join(choices)}")
        return choices[value]

    def refuse(self, name: str, *harmless: Any) -> None:
        """An error if the entry asks for something the decoder does not do; absent and `harmless` values do not."""
        value = self.get(name)
        if value is not None and value not in harmless:
            raise UserError(f"{self.source}: {name} is {value!r}, which the decoder does not have; use another model")

    def _require(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is _REQUIRED:
            raise UserError(f"{self.source} lacks {name} (found: {', '.join(sorted(self.values)) or 'nothing'})")
        return value
