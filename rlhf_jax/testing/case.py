"""Describes the arguments and results of a loss in shape letters, and draws ragged data for them.

A specification reads like an `einsum` string: one word per positional argument, an arrow, one word per result. A word
is ``letters`` or ``letters:domain``. B is the batch, T the tokens, N the row groups (B / ``rows_together``); V, D and
any other letter are sizes. ``"BT:log_prob BT BT:mask -> B"`` is a function of log-probs [B, T], some reals [B, T] and a
bool mask [B, T] that returns one number per row; nothing after the arrow is one scalar.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Case", "Word"]

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

DRAWS: dict[str, Draw] = {
    "real": lambda rng, shape: rng.normal(size=shape),
    "log_prob": lambda rng, shape: -rng.exponential(size=shape),
    "positive": lambda rng, shape: 0.2 + rng.exponential(size=shape),
    "unit": lambda rng, shape: rng.uniform(0.05, 0.95, size=shape),
    "sign": lambda rng, shape: np.where(rng.random(shape) < 0.5, 1.0, -1.0),
}
"""How the float domains of a specification are drawn; the extremes they allow are in `EXTREMES`."""

EXTREMES: dict[str, tuple[float, ...]] = {
    "real": (1.0, -1.0),
    "log_prob": (-1.0,),
    "positive": (1.0, 1e-6),
    "unit": (0.0, 1.0),
    "sign": (),
}
"""Values that a domain's argument is filled with in `check_extremes`; those of size 1 or more times `Case.extreme`."""

WHOLE = ("mask", "flag", "token", "length")
"""Domains that are not float: a mask selects, a flag is other bool data, a token is an int below V, a length counts."""


class Word(NamedTuple):
    """One argument or result of a specification."""

    letters: str
    domain: str


def _parse(words: str) -> tuple[Word, ...]:
    parsed = []
    for word in words.split():
        letters, _, domain = word.partition(":")
        parsed.append(Word(letters, domain or "real"))
    return tuple(parsed)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What a function takes and returns, from which the contract's checks draw their data.

    A function whose specification has no mask is elementwise by the library's convention: its caller zeroes the inputs
    outside a mask before, and reduces under the mask after. The checks then do exactly this around it.

    Attributes:
      spec: arguments and results, see the module's docstring; ``_`` stands for an argument given in `fixed`.
      knobs: numeric keyword arguments with the values to try, or one value v, tried as v/2, v and 2v.
      static: structural keyword arguments, passed as they are.
      fixed: values of the positional arguments written ``_``, by name: states, keys, functions.
      draws: how to draw an argument, by name, where its domain's distribution will not do; it has no extremes then.
      stopped: names of the float arguments through which no gradient may flow.
      rows_together: rows that belong together (a group of samples, a pair) and move together.
      sizes: of letters; B, T, V and D have defaults.
      extreme: how large an extreme log-ratio is.
      holes: whether masks may have holes inside a row.
      skip: names of checks to leave out, each with its reason.
      rtol, atol: tolerance of comparisons between two orders of summation.
    """

    spec: str
    knobs: Mapping[str, float | Sequence[float]] = dataclasses.field(default_factory=dict)
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draws: Mapping[str, Draw] = dataclasses.field(default_factory=dict)
    stopped: tuple[str, ...] = ()
    rows_together: int = 1
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    extreme: float = 80.0
    holes: bool = True
    skip: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rtol: float = 2e-5
    atol: float = 2e-6

    def __post_init__(self):
        if self.spec.count("->") != 1:
            raise ValueError(f"spec needs one arrow between arguments and results, got {self.spec!r}")
        for word in (*self.inputs, *self.outputs):
            if word.domain not in (*DRAWS, *WHOLE, "total"):
                raise ValueError(f"unknown domain {word.domain!r} in {self.spec!r}; know {(*DRAWS, *WHOLE, 'total')}")

    @functools.cached_property
    def inputs(self) -> tuple[Word, ...]:
        """One word per positional argument."""
        return _parse(self.spec.split("->")[0])

    @functools.cached_property
    def outputs(self) -> tuple[Word, ...]:
        """One word per leaf of the result; the domain ``total`` marks sums that add up over rows."""
        return _parse(self.spec.split("->")[1]) or (Word("", "real"),)

    def size(self, letter: str) -> int:
        """Size of the axis a letter stands for."""
        if letter == "N":
            return self.size("B") // self.rows_together
        return {"B": 8, "T": 8, "V": 5, "D": 3, **self.sizes}[letter]

    def shape(self, letters: str) -> tuple[int, ...]:
        """Shape that a word's letters stand for."""
        return tuple(self.size(letter) for letter in letters)

    def names(self, function: Callable[..., Any]) -> tuple[str, ...]:
        """The function's own names of the positional arguments."""
        parameters = list(inspect.signature(function).parameters)
        if len(parameters) < len(self.inputs):
            raise ValueError(f"{self.spec!r} has {len(self.inputs)} arguments, the function takes {parameters}")
        return tuple(parameters[: len(self.inputs)])

    def knob_values(self) -> dict[str, np.ndarray]:
        """[K] values to try of every knob."""
        values = {}
        for name, value in self.knobs.items():
            tried = value if isinstance(value, Sequence) else (value / 2, value, 2 * value)
            values[name] = np.asarray(tried, np.float32)
        return values

    def mask_word(self) -> Word | None:
        """What is masked: the first mask of the specification, or what the caller of an elementwise function masks."""
        masks = [word for word in self.inputs if word.domain == "mask"]
        if masks:
            return masks[0]
        letters = [word.letters for word in self.inputs if word.letters.startswith("B")]
        if not letters:
            return None
        return Word("BT" if any(word.startswith("BT") for word in letters) else "B", "mask")

    def draw_mask(self, rng: np.random.Generator, letters: str) -> np.ndarray:
        """Bool mask of ragged rows that end early: a full, an empty and a one-token row, and holes."""
        shape = self.shape(letters)
        if not letters.endswith("T"):
            return rng.random(shape) < 0.8
        rows, content = shape[0], max(shape[-1] - 3, 1)
        lengths = np.resize([content, content - 1, 0, 1, 2, content], rows)
        mask = np.arange(shape[-1]) < lengths.reshape((rows,) + (1,) * (len(shape) - 1))
        if self.holes:
            holes = rng.random(mask.shape) < 0.2
            holes[3 % rows] = False
            mask = mask & ~holes
        return np.broadcast_to(mask, shape).copy()

    def arguments(self, names: Sequence[str], seed: int = 0) -> list[Any]:
        """Draws the positional arguments, float32, int32 or bool; what a mask hides is finite here."""
        rng = np.random.default_rng(seed)
        drawn: list[Any] = []
        for name, (letters, domain) in zip(names, self.inputs, strict=True):
            shape = self.shape("" if letters == "_" else letters)
            if letters == "_":
                drawn.append(self.fixed[name])
            elif name in self.draws:
                value = np.asarray(self.draws[name](rng, shape))
                drawn.append(value.astype(np.float32) if value.dtype.kind == "f" else value)
            elif domain == "mask":
                drawn.append(self.draw_mask(rng, letters))
            elif domain == "flag":
                drawn.append(rng.random(shape) < 0.5)
            elif domain == "token":
                drawn.append(rng.integers(0, self.size("V"), shape).astype(np.int32))
            elif domain == "length":
                drawn.append(rng.integers(1, self.size("T") + 1, shape).astype(np.int32))
            else:
                drawn.append(DRAWS[domain](rng, shape).astype(np.float32))
        return drawn


def spread(mask: Any, letters: str, target: str) -> Any:
    """A mask over `letters`, made to broadcast against an array over `target`; None where it does not apply."""
    sizes = dict(zip(letters, mask.shape, strict=True))
    if not letters or [letter for letter in target if letter in sizes] != list(letters):
        return None
    return mask.reshape([sizes.get(letter, 1) for letter in target])
