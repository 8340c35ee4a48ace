"""A function under examination: its arguments, its masked results and its gradients, compiled once for all checks."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.testing.case import Case, spread

__all__ = ["NotApplicable", "Subject", "examine"]


class NotApplicable(ValueError):
    """A specification gives a check nothing to work on."""


class Subject:
    """A function with one drawn set of arguments.

    Results are compared where the mask counts. Gradients are those of one number: the results weighted by fixed random
    numbers, so that every result has its say.
    """

    def __init__(self, function: Callable[..., Any], case: Case):
        self.function, self.case = function, case
        self.name = getattr(function, "__name__", None) or repr(function)
        self.names = case.names(function)
        self.takes_axis_name = "axis_name" in inspect.signature(function).parameters
        self.arguments = case.arguments(self.names)
        self.floats = tuple(
            index
            for index, (word, value) in enumerate(zip(case.inputs, self.arguments, strict=True))
            if word.letters != "_" and value.dtype.kind == "f"
        )
        masked = case.mask_word()
        self.mask_letters = "" if masked is None else masked.letters
        self.mask_index = next((i for i, word in enumerate(case.inputs) if word.domain == "mask"), None)
        self.mask: np.ndarray | None = None
        if self.mask_index is not None:
            self.mask = self.arguments[self.mask_index]
        elif masked is not None:
            self.mask = case.draw_mask(np.random.default_rng(7), masked.letters)
        self.hidden = [self._hidden(index) for index in range(len(self.arguments))]
        rng = np.random.default_rng(11)
        self.weights = [np.asarray(rng.normal(size=case.shape(w.letters)), np.float32) for w in case.outputs]
        self.knobs = {name: values[len(values) // 2] for name, values in case.knob_values().items()}
        self.weak_knobs = {name: float(value) for name, value in self.knobs.items()}
        self.traces = 0
        self._compiled = jax.jit(self._run)
        self._forward = jax.jit(self.results)

    def _hidden(self, index: int) -> np.ndarray | None:
        if self.mask is None or index == self.mask_index or self.case.inputs[index].letters == "_":
            return None
        visible = spread(self.mask, self.mask_letters, self.case.inputs[index].letters)
        return None if visible is None else np.broadcast_to(~visible, self.arguments[index].shape)

    @property
    def rows_are_separable(self) -> bool:
        """Whether shards of the batch can give the whole result: by axis_name, by rows or by totals."""
        return self.takes_axis_name or all(
            w.letters[:1] in ("B", "N") or w.domain == "total" for w in self.case.outputs
        )

    @contextlib.contextmanager
    def in_words(self, words: str) -> Iterator[None]:
        """Turns an error about a traced value into a broken promise."""
        try:
            yield
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            raise AssertionError(f"{self.name}: {words}: a traced value is turned into a Python number") from error

    def results(self, arguments: Sequence[Any], mask: Any, knobs: dict[str, Any], **extra: Any) -> list[Array]:
        """Leaves of the function's result, 0 outside the mask."""
        words, letters = self.case.inputs, self.mask_letters
        arguments = list(arguments)
        for index, word in enumerate(words):
            if index == self.mask_index:
                arguments[index] = jnp.asarray(mask)
            elif word.letters != "_":
                value = jnp.asarray(arguments[index])
                visible = None if mask is None else spread(jnp.asarray(mask), letters, word.letters)
                if self.mask_index is None and visible is not None:  # an elementwise function: its caller's part
                    value = jnp.where(visible, value, jnp.zeros((), value.dtype))
                arguments[index] = value
        leaves = jax.tree.leaves(self.function(*arguments, **self.case.static, **knobs, **extra))
        if len(leaves) != len(self.case.outputs):
            raise AssertionError(f"{self.name}: {len(leaves)} results, specified are {len(self.case.outputs)}")
        seen = []
        sizes = dict(zip(letters, jnp.shape(mask), strict=True)) if mask is not None else {}
        for leaf, word in zip(leaves, self.case.outputs, strict=True):
            wrong = any(sizes.get(letter, n) != n for letter, n in zip(word.letters, leaf.shape, strict=False))
            if wrong or leaf.ndim != len(word.letters):
                raise AssertionError(f"{self.name}: a result of shape {leaf.shape}, specified is [{word.letters}]")
            visible = None if mask is None else spread(jnp.asarray(mask), letters, word.letters)
            seen.append(leaf if visible is None else jnp.where(visible, leaf, jnp.zeros((), leaf.dtype)))
        return seen

    def objective(self, leaves: Sequence[Array], weights: Sequence[Any], axis_name: str | None = None) -> Array:
        """One number that depends on every float result of the whole batch."""
        total = jnp.zeros(())
        for leaf, weight, word in zip(leaves, weights, self.case.outputs, strict=True):
            if leaf.shape != weight.shape:
                raise AssertionError(f"{self.name}: a result of shape {leaf.shape}, specified is {weight.shape}")
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                part = jnp.sum(leaf * weight)
                local = word.letters[:1] in ("B", "N") or word.domain == "total"
                total += jax.lax.psum(part, axis_name) if axis_name is not None and local else part
        return total

    def _run(self, arguments: list[Any], mask: Any, knobs: dict[str, Any]) -> tuple[list[Array], tuple[Array, ...]]:
        self.traces += 1

        def objective(floats):
            merged = dict(enumerate(arguments)) | dict(zip(self.floats, floats, strict=True))
            leaves = self.results([merged[i] for i in range(len(arguments))], mask, knobs)
            return self.objective(leaves, self.weights), leaves

        gradients, leaves = jax.grad(objective, has_aux=True)(tuple(arguments[i] for i in self.floats))
        return leaves, gradients

    def run(
        self, arguments: Sequence[Any] | None = None, *, mask: Any = None, knobs: dict[str, Any] | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Results and gradients of the float arguments, compiled."""
        with self.in_words("jit fails"):
            leaves, gradients = self._compiled(
                list(self.arguments if arguments is None else arguments),
                self.mask if mask is None else mask,
                self.knobs if knobs is None else knobs,
            )
        return [np.asarray(leaf) for leaf in leaves], [np.asarray(gradient) for gradient in gradients]

    def forward(self, arguments: Sequence[Any], *, mask: Any) -> list[Array]:
        """Results without gradients, compiled, of arguments that may have other sizes than the case's."""
        with self.in_words("jit fails"):
            return self._forward(list(arguments), mask, self.knobs)

    def eager(self, arguments: Sequence[Any], *, mask: Any = None, knobs: dict[str, Any] | None = None) -> list[Array]:
        """Results, one operation at a time."""
        return self.results(arguments, self.mask if mask is None else mask, self.knobs if knobs is None else knobs)

    def knob_settings(self) -> list[dict[str, np.float32]]:
        """Every value of every knob, one at a time."""
        tried = [(name, value) for name, values in self.case.knob_values().items() for value in values]
        return [{**self.knobs, name: value} for name, value in tried]

    def map_knobs(self, knobs: dict[str, np.ndarray]) -> list[Array]:
        """Results for arrays of knobs by vmap."""
        return jax.jit(jax.vmap(lambda one: self.results(self.arguments, self.mask, one)))(knobs)

    def shifted(
        self, arguments: Sequence[Any], mask: Any, weights: Sequence[Any], axis_name: str | None = None
    ) -> tuple[list[Array], Array]:
        """Results, and the gradient of one parameter that shifts every float argument, averaged over devices."""
        extra = {"axis_name": axis_name} if self.takes_axis_name else {}

        def objective(shift):
            moved = [value + shift if i in self.floats else value for i, value in enumerate(arguments)]
            leaves = self.results(moved, mask, self.knobs, **extra)
            return self.objective(leaves, weights, axis_name), leaves

        gradient, leaves = jax.grad(objective, has_aux=True)(jnp.zeros(()))
        return leaves, gradient if axis_name is None else jax.lax.pmean(gradient, axis_name)

    def gathered(self, leaves: Sequence[Array]) -> list[np.ndarray]:
        """Results of the whole from those of its parts, [parts, ...] each."""
        whole = []
        for leaf, word in zip(leaves, self.case.outputs, strict=True):
            value = np.asarray(leaf)
            if word.letters[:1] in ("B", "N"):
                whole.append(value.reshape((-1, *value.shape[2:])))
            elif word.domain == "total":
                whole.append(value.sum(0))
            else:
                self.same([value], [np.broadcast_to(value[:1], value.shape)], "devices disagree")
                whole.append(value[0])
        return whole

    def dirty(self, arguments: Sequence[Any], garbage: tuple[float, int]) -> list[Any]:
        """Arguments with garbage wherever the mask hides them."""
        soiled = list(arguments)
        for index, hidden in enumerate(self.hidden):
            if hidden is not None:
                kind = soiled[index].dtype.kind
                fill = {"f": garbage[0], "i": garbage[1], "b": True}[kind]
                soiled[index] = np.where(hidden, np.asarray(fill, soiled[index].dtype), soiled[index])
        return soiled

    def cast(self, dtype: Any) -> list[Any]:
        """Arguments with the float ones in another type."""
        return [jnp.asarray(x, dtype) if i in self.floats else x for i, x in enumerate(self.arguments)]

    def same(self, actual: Sequence[Any], expected: Sequence[Any], words: str, *, exact: bool = False) -> None:
        """Raises in words unless results are equal, to rounding or to the last bit."""
        for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
            left, right = np.asarray(left), np.asarray(right)
            message = f"{self.name}: {words} (result {index})"
            if exact or right.dtype.kind != "f":
                np.testing.assert_array_equal(left, right, message)
            else:
                finite = np.abs(right[np.isfinite(right)])
                scale = max(1.0, float(finite.max())) if finite.size else 1.0
                np.testing.assert_allclose(left, right, self.case.rtol, self.case.atol * scale, err_msg=message)


@functools.lru_cache(maxsize=4)
def examine(function: Callable[..., Any], case: Case) -> Subject:
    """The function with the case's arguments, shared by consecutive checks."""
    return Subject(function, case)
