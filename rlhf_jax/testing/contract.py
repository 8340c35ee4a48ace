"""What every loss promises, as checks over a function and a `Case`: each raises ``AssertionError`` in words.

`check_contract` runs all of them. A loss that multiplies by its mask, averages averages, or calls ``float`` on a knob
does not pass. A check that a specification gives nothing to work on raises `NotApplicable`: none passes in silence.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.testing.case import EXTREMES, Case
from rlhf_jax.testing.subject import NotApplicable, examine

__all__ = [
    "CHECKS",
    "NotApplicable",
    "check_contract",
    "check_devices",
    "check_dtypes",
    "check_extremes",
    "check_garbage",
    "check_jit",
    "check_knobs",
    "check_micro_batches",
    "check_padding",
    "check_permutation",
    "check_stopped",
]

GARBAGE = ((np.nan, -100), (np.inf, 2**30), (-1e9, 0))
"""What padding may hold: a float and an int at a time."""

DEVICES = 4


def check_jit(function: Callable[..., Any], case: Case) -> None:
    """The compiled function equals the eager one, with its results in the specified shapes."""
    subject = examine(function, case)
    compiled, _ = subject.run()
    subject.same(subject.eager(subject.arguments), compiled, "eager and jit differ")


def check_knobs(function: Callable[..., Any], case: Case) -> None:
    """Every numeric knob is traced: a new value compiles nothing, and `vmap` over values equals a loop over them."""
    subject = examine(function, case)
    if not subject.knobs:
        raise NotApplicable("the case names no knobs")
    settings = subject.knob_settings()
    looped = [subject.run(knobs=setting)[0] for setting in settings]
    if subject.traces != 1:
        raise AssertionError(f"{subject.name}: compiled {subject.traces} times while only knobs changed")
    with subject.in_words("vmap over knobs fails"):
        mapped = subject.map_knobs({name: np.stack([setting[name] for setting in settings]) for name in subject.knobs})
    for index, (setting, expected) in enumerate(zip(settings, looped, strict=True)):
        subject.same([leaf[index] for leaf in mapped], expected, f"vmap over knobs differs from a loop at {setting}")


def check_garbage(function: Callable[..., Any], case: Case) -> None:
    """NaN, inf and -1e9 (-100 and 2³⁰ for tokens) behind the mask change no value and no gradient, to the last bit."""
    subject = examine(function, case)
    if all(hidden is None for hidden in subject.hidden):
        raise NotApplicable("nothing is masked")
    expected, expected_gradients = subject.run()
    for garbage in GARBAGE:
        where = f"{garbage[0]} in padding"
        values, gradients = subject.run(subject.dirty(subject.arguments, garbage))
        subject.same(values, expected, f"{where} changes a result", exact=True)
        for index, gradient, before in zip(subject.floats, gradients, expected_gradients, strict=True):
            name = subject.names[index]
            np.testing.assert_array_equal(
                gradient, before, f"{subject.name}: {where} changes the gradient of {name}", strict=True
            )
            hidden = subject.hidden[index]
            if hidden is not None and np.any(np.where(hidden, gradient, 0.0)):
                raise AssertionError(f"{subject.name}: {name} has a gradient where the mask hides it")


def check_padding(function: Callable[..., Any], case: Case) -> None:
    """Padding on the left instead of the right, or more of it, moves results along and changes none."""
    subject = examine(function, case)
    if subject.mask is None or subject.mask_letters != "BT":
        raise NotApplicable("there is no mask over tokens")
    expected, _ = subject.run()
    shifts = np.where(subject.mask.any(-1), np.argmax(subject.mask[:, ::-1], -1), 0)

    def roll(value: Any, letters: str) -> Any:
        if not letters.startswith("B") or "T" not in letters:
            return value
        axis = letters.index("T") - 1
        return np.stack([np.roll(row, shift, axis=axis) for row, shift in zip(value, shifts, strict=True)])

    rolled = [roll(value, word.letters) for value, word in zip(subject.arguments, case.inputs, strict=True)]
    moved, _ = subject.run(rolled, mask=roll(subject.mask, "BT"))
    aligned = [roll(np.asarray(leaf), word.letters) for leaf, word in zip(expected, case.outputs, strict=True)]
    subject.same(moved, aligned, "padding on the left differs from padding on the right")

    def widen(value: Any, letters: str, fill: Any) -> Any:
        widths = [(0, 3 if letter == "T" else 0) for letter in letters]
        return np.pad(value, widths, constant_values=fill) if "T" in letters else value

    longer = []
    for value, word in zip(subject.arguments, case.inputs, strict=True):
        kind = np.asarray(value).dtype.kind if word.letters != "_" else "_"
        longer.append(widen(value, word.letters, {"f": np.nan, "b": False}.get(kind, 0)))
    widened = subject.forward(longer, mask=widen(subject.mask, "BT", False))
    trimmed = []
    for leaf, word in zip(widened, case.outputs, strict=True):
        at = word.letters.find("T")
        trimmed.append(leaf if at < 0 else jax.lax.slice_in_dim(leaf, 0, case.size("T"), axis=at))
    subject.same(trimmed, expected, "three more slots of padding change a result")


def check_permutation(function: Callable[..., Any], case: Case) -> None:
    """Rows (in their blocks of `Case.rows_together`) may come in any order: row results follow, totals stay."""
    subject = examine(function, case)
    if not any(word.letters.startswith(("B", "N")) for word in case.inputs):
        raise NotApplicable("no argument has rows")
    blocks = np.random.default_rng(1).permutation(case.size("N"))
    rows = (blocks[:, None] * case.rows_together + np.arange(case.rows_together)).ravel()

    def permute(value: Any, letters: str) -> Any:
        return value[{"B": rows, "N": blocks}[letters[0]]] if letters[:1] in ("B", "N") else value

    arguments = [permute(value, word.letters) for value, word in zip(subject.arguments, case.inputs, strict=True)]
    mask = None if subject.mask is None else subject.mask[rows]
    expected, _ = subject.run()
    permuted = [permute(np.asarray(leaf), word.letters) for leaf, word in zip(expected, case.outputs, strict=True)]
    subject.same(subject.run(arguments, mask=mask)[0], permuted, "results depend on the order of the rows")


def check_extremes(function: Callable[..., Any], case: Case) -> None:
    """Values and gradients are finite for ±80, for rows without a token, for one token and for nothing at all."""
    subject = examine(function, case)
    trials: list[tuple[str, list[Any], np.ndarray | None]] = []
    for index in subject.floats:
        for value in EXTREMES[case.inputs[index].domain] if subject.names[index] not in case.draws else ():
            value = value * case.extreme if abs(value) >= 1 else value
            arguments = list(subject.arguments)
            arguments[index] = np.full_like(arguments[index], value)
            trials.append((f"{subject.names[index]} = {value:g}", arguments, subject.mask))
    equal = [
        np.zeros_like(x) if i in subject.floats and w.domain in ("real", "log_prob") and n not in case.draws else x
        for i, (n, x, w) in enumerate(zip(subject.names, subject.arguments, case.inputs, strict=True))
    ]
    trials.append(("all reals equal", equal, subject.mask))
    if subject.mask is not None and "mask" not in case.skip:
        nothing = np.zeros_like(subject.mask)
        one = nothing.copy()
        one[(0,) * one.ndim] = True
        trials += [("an empty mask", subject.arguments, nothing), ("one token in all", subject.arguments, one)]
    for words, arguments, mask in trials:
        values, gradients = subject.run(arguments, mask=mask)
        if not all(np.isfinite(value).all() for value in values if value.dtype.kind == "f"):
            raise AssertionError(f"{subject.name}: not finite for {words}: {values}")
        for index, gradient in zip(subject.floats, gradients, strict=True):
            if not np.isfinite(gradient).all():
                raise AssertionError(f"{subject.name}: gradient of {subject.names[index]} not finite for {words}")


def check_dtypes(function: Callable[..., Any], case: Case) -> None:
    """bfloat16 inputs give the float32 result of the same numbers, float64 inputs stay float64."""
    subject = examine(function, case)
    if not subject.floats:
        raise NotApplicable("no argument is a float")

    def require(leaves: Sequence[Any], given: str, wanted: str) -> None:
        for leaf in leaves:
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.dtype(wanted):
                raise AssertionError(f"{subject.name}: {given} inputs give {leaf.dtype}, want {wanted}")

    narrow = subject.cast(jnp.bfloat16)
    wide = [np.asarray(x, np.float32) if i in subject.floats else x for i, x in enumerate(narrow)]
    results = subject.eager(narrow, knobs=subject.weak_knobs)
    require(results, "bfloat16", "float32")
    subject.same(results, subject.run(wide)[0], "bfloat16 inputs are not computed in float32")
    with jax.enable_x64(True):
        double = subject.cast(np.float64)
        leaves = jax.eval_shape(lambda: subject.eager(double, knobs=subject.weak_knobs))
    require(leaves, "float64", "float64")


def check_stopped(function: Callable[..., Any], case: Case) -> None:
    """No gradient reaches the arguments in `Case.stopped`; some gradient reaches every other float argument."""
    subject = examine(function, case)
    unknown = set(case.stopped) - {subject.names[index] for index in subject.floats}
    if unknown:
        raise ValueError(f"stopped names {sorted(unknown)}, the float arguments are {subject.names}")
    if not subject.floats:
        raise NotApplicable("no argument is a float")
    for index, gradient in zip(subject.floats, subject.run()[1], strict=True):
        name, flows = subject.names[index], bool(np.any(gradient))
        if flows and name in case.stopped:
            raise AssertionError(f"{subject.name}: a gradient flows to {name}, which should be stopped")
        if not flows and name not in case.stopped:
            raise AssertionError(f"{subject.name}: no gradient reaches {name}; name it in stopped if that is meant")


def check_devices(function: Callable[..., Any], case: Case) -> None:
    """Four devices with a quarter of the rows each give the values and the parameter gradient of one device.

    This is about the collectives of functions with an ``axis_name``; without one, devices are micro-batches at the same
    time (`check_micro_batches`). Gradients are averaged over devices by the caller.
    """
    subject = examine(function, case)
    if not subject.takes_axis_name:
        raise NotApplicable("the function has no axis_name: devices are micro-batches, see there")
    if case.size("N") % DEVICES:
        raise ValueError(f"{case.size('N')} blocks of rows do not spread over {DEVICES} devices")
    if jax.device_count() < DEVICES:
        raise NotApplicable(f"{jax.device_count()} devices; set XLA_FLAGS=--xla_force_host_platform_device_count=4")
    one, one_gradient = subject.shifted(subject.arguments, subject.mask, subject.weights)
    shard = functools.partial(_shard, parts=DEVICES)
    inputs = [shard(value, word.letters) for value, word in zip(subject.arguments, case.inputs, strict=True)]
    weights = [shard(value, word.letters) for value, word in zip(subject.weights, case.outputs, strict=True)]
    mask = None if subject.mask is None else shard(subject.mask, subject.mask_letters)
    axes = (
        [0 if word.letters[:1] in ("B", "N") else None for word in case.inputs],
        None if mask is None else 0,
        [0 if word.letters[:1] in ("B", "N") else None for word in case.outputs],
    )
    many, gradients = jax.pmap(
        functools.partial(subject.shifted, axis_name="devices"), axis_name="devices", in_axes=axes
    )(inputs, mask, weights)
    subject.same(subject.gathered(many), one, "four devices differ from one")
    np.testing.assert_allclose(
        gradients, np.full(DEVICES, one_gradient), 1e-4, 1e-5, err_msg=f"{subject.name}: gradients on four devices"
    )


def check_micro_batches(function: Callable[..., Any], case: Case) -> None:
    """Two halves of the batch, one after the other, give the results of the whole: rows join, totals add up."""
    subject = examine(function, case)
    if subject.takes_axis_name or not subject.rows_are_separable or case.size("N") % 2:
        raise NotApplicable("a result depends on all rows; return masking.Totals to accumulate it")
    parts = []
    for index in range(2):
        part = [
            value if word.letters[:1] not in ("B", "N") else _shard(value, word.letters, 2)[index]
            for value, word in zip(subject.arguments, case.inputs, strict=True)
        ]
        mask = None if subject.mask is None else _shard(subject.mask, subject.mask_letters, 2)[index]
        parts.append(subject.forward(part, mask=mask))
    stacked = [jnp.stack(leaves) for leaves in zip(*parts, strict=True)]
    subject.same(subject.gathered(stacked), subject.run()[0], "two micro-batches differ from one batch")


def _shard(value: Any, letters: str, parts: int) -> Any:
    return value.reshape((parts, -1, *value.shape[1:])) if letters[:1] in ("B", "N") else value


CHECKS: dict[str, Callable[[Callable[..., Any], Case], None]] = {
    "jit": check_jit,
    "knobs": check_knobs,
    "garbage": check_garbage,
    "padding": check_padding,
    "permutation": check_permutation,
    "extremes": check_extremes,
    "dtypes": check_dtypes,
    "stopped": check_stopped,
    "devices": check_devices,
    "micro_batches": check_micro_batches,
}
"""All checks of the contract by the name that `Case.skip` uses."""


def check_contract(function: Callable[..., Any], case: Case) -> dict[str, str]:
    """Runs every check that the case's specification applies to.

    Args:
      function: a loss or any other pure function of arrays.
      case: its arguments and results in shape letters.
    Returns:
      What happened to each check: "passed", or why it was left out.
    Raises: AssertionError, in words, at the first promise that the function breaks.

    >>> from rlhf_jax import masking
    >>> check_contract(masking.token_mean, Case("BT BT:mask ->"))["garbage"]
    'passed'
    """
    unknown = set(case.skip) - {*CHECKS, "mask"}
    if unknown:
        raise ValueError(f"skip names {sorted(unknown)}; the checks are {(*CHECKS,)}")
    report = {}
    for name, check in CHECKS.items():
        report[name] = case.skip.get(name, "passed")
        if name not in case.skip:
            try:
                check(function, case)
            except NotApplicable as reason:
                report[name] = f"not applicable: {reason}"
    return report
