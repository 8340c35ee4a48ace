"""Training a part of a model: which parameters an optimiser touches, and what the rest costs.

State is `flax.training.train_state.TrainState` as it is; keys, controllers and data positions stand beside it in the
run's own pytree. Two ways to freeze parameters, both by a predicate on the path (``"layer_0/mlp/gate/kernel"``):

* `split_params` takes the frozen leaves out of ``TrainState.params``. They are closed over by the loss and never
  differentiated: no gradient is computed or stored for them, and the backward pass ends at the lowest trained layer.
  They are not in the state that is checkpointed either. Prefer it.
* `trainable` keeps one tree and gives frozen leaves no optimiser state and an update of zero. Their gradients are part
  of the program; XLA removes them only where nothing reads them, which a gradient norm over the whole tree does.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from flax.training.train_state import TrainState

__all__ = ["init_train_state", "map_paths", "merge_params", "on_host", "path_matches", "split_params", "trainable"]

Predicate = Callable[[str], bool]


def init_train_state(params: Any, apply_fn: Callable[..., Any], optimizer: optax.GradientTransformation) -> TrainState:
    """`TrainState.create`, its step an int32 array as in every later state, so that a jitted step compiles once.

    >>> init_train_state({}, lambda params, inputs: inputs, optax.sgd(0.1)).step
    Array(0, dtype=int32)
    """
    state = TrainState.create(apply_fn=apply_fn, params=params, tx=optimizer)
    return state.replace(step=jnp.zeros((), jnp.int32))


def map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Applies ``function(path, leaf)`` to every leaf of any pytree; a path reads ``"layer_0/mlp/gate/kernel"``.

    >>> map_paths(lambda path, leaf: path, {"embed": {"embedding": 0}, "layer_0": [1, 2]})
    {'embed': {'embedding': 'embed/embedding'}, 'layer_0': ['layer_0/0', 'layer_0/1']}
    """
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(name(path), leaf), tree)


def path_matches(*patterns: str) -> Predicate:
    """The predicate "some regular expression is found in the path", for `split_params` and `trainable`.

    >>> upper = path_matches(r"^layer_(2|3)/", r"^final_norm/")
    >>> upper("layer_3/mlp/up/kernel"), upper("layer_1/mlp/up/kernel")
    (True, False)
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda path: any(pattern.search(path) for pattern in compiled)


def split_params(params: dict, predicate: Predicate) -> tuple[dict, dict]:
    """Splits nested dicts of parameters into (those whose path satisfies the predicate, the others).

    ``merge_params(*split_params(params, predicate))`` equals ``params``. Arrays are shared, not copied.

    Args:
      params: nested dicts of arrays, as Flax modules keep them.
      predicate: path -> bool; see `path_matches`.
    Returns:
      (chosen, others), nested dicts without empty branches.
    Raises:
      ValueError: no path satisfies the predicate, so nothing would be trained.

    >>> trained, frozen = split_params({"trunk": {"kernel": 1.0}, "head": {"kernel": 2.0}}, path_matches("^head/"))
    >>> trained, frozen
    ({'head': {'kernel': 2.0}}, {'trunk': {'kernel': 1.0}})
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if predicate(path)}
    if not chosen:
        raise ValueError(f"predicate chooses none of the {len(flat)} parameters; the first paths are {list(flat)[:5]}")
    others = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return traverse_util.unflatten_dict(chosen, sep="/"), traverse_util.unflatten_dict(others, sep="/")


def merge_params(*parts: dict) -> dict:
    """Merges nested dicts of parameters that have no leaf in common; the inverse of `split_params`.

    Pure tree surgery: usable inside ``jit`` and under differentiation.

    Raises:
      ValueError: two parts hold the same path.

    >>> merge_params({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})
    {'a': {'x': 1, 'y': 2}, 'b': 3}
    """
    merged: dict[str, Any] = {}
    for part in parts:
        flat = traverse_util.flatten_dict(part, sep="/")
        if shared := sorted(merged.keys() & flat.keys()):
            raise ValueError(f"parts to merge must not share parameters, but they share {shared[:5]}")
        merged |= flat
    return traverse_util.unflatten_dict(merged, sep="/")


def trainable(optimizer: optax.GradientTransformation, predicate: Predicate) -> optax.GradientTransformation:
    """The optimiser for the leaves whose path satisfies the predicate; the others get zero updates and no state.

    ``predicate = lambda path: True`` equals ``optimizer``. Transformations that look at the whole tree (clipping by
    global norm) see the trained leaves only when they are part of ``optimizer``.

    >>> tx = trainable(optax.adam(1e-3), path_matches("^head/"))
    >>> state = tx.init({"trunk": {"kernel": jax.numpy.ones(1000)}, "head": {"kernel": jax.numpy.ones(3)}})
    >>> sum(leaf.size for leaf in jax.tree.leaves(state))  # two moments of 3, one count
    7
    """
    return optax.partition(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: map_paths(lambda path, _: "trained" if predicate(path) else "frozen", params),
    )


def on_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimiser with its state in the host's memory between updates; the numbers are the same.

    An update brings the arrays of the state to the device and takes them back; single numbers stay on the device. It is
    for steps under ``jit``. Parameters that are placed before `init_train_state` decide where their moments go back to.

    >>> state = on_host(optax.adam(1e-3)).init({"kernel": jnp.ones(3)})
    >>> state[0].mu["kernel"].aval.memory_space == jax.memory.Space.Host
    True
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if jnp.ndim(leaf) else leaf, state)

    def init(params: Any) -> Any:
        return moved(optimizer.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, moved(state, jax.memory.Space.Device), params, **extra)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)
