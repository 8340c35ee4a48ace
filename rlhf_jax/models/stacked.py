"""The decoder with the parameters of its layers stacked, which are run by one `jax.lax.scan`.

The tree of a `rlhf_jax.models.transformer.Transformer` has one branch per layer; `stack_layers` turns them into one
branch "layers" whose leaves have the layers first, and `unstack_layers` turns it back. `StackedTransformer` computes
the same numbers from that tree. Its program holds one layer instead of all of them, so that it compiles in a fraction
of the time, and with `Transformer.remat` the activations of one layer at a time are alive on every backend.

It trains and scores, and refuses a cache: a scan would cut every layer's weights, keys and values out of their stacks
for each token that is generated. Generation takes the plain model on ``unstack_layers(params)``: that copy lives while
the rollout does and is gone when the gradients need their room.

Optimisers that look at a whole leaf (factored moments, trust ratios, masks by the number of dimensions) see the stack
of a kernel as one leaf; Adam and its kin, which look at single numbers, do not tell the difference.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models.attention import visible
from rlhf_jax.models.transformer import (
    Block,
    Cache,
    Output,
    Transformer,
    TransformerConfig,
    kernel_of,
    rotations,
    texts,
    within,
    written,
)

__all__ = ["StackedTransformer", "stack_layers", "unstack_layers"]


def _layer_names(params: dict) -> list[str]:
    names = [name for name in params if name.startswith("layer_")]
    return sorted(names, key=lambda name: int(name.removeprefix("layer_")))


def stack_layers(params: dict) -> dict:
    """Parameters with "layer_0", "layer_1", ... as one branch "layers" of leaves [L, ...].

    Args:
      params: of a `Transformer`: plain, `rlhf_jax.models.quantisation.Quantised` or adapted leaves, or adapters alone.
    Returns:
      The same tree with "layers" in place of the layers; other leaves are shared.
    Raises:
      ValueError: no layers, a layer is missing, or layers that differ (some dense and some sparse, some adapted).

    >>> stack_layers({"embed": 0, "layer_0": {"scale": jnp.ones(3)}, "layer_1": {"scale": jnp.ones(3)}})["layers"]
    {'scale': Array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)}
    """
    names = _layer_names(params)
    if names != [f"layer_{index}" for index in range(len(names))] or not names:
        raise ValueError(f"params must have the branches layer_0, layer_1, ... to stack, got {sorted(params)}")
    kind = lambda name: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), params[name])
    if odd := [name for name in names if kind(name) != kind(names[0])]:
        raise ValueError(f"layers to stack must have the same parameters, but {', '.join(odd)} differ from layer_0")
    rest = {name: part for name, part in params.items() if name not in names}
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def unstack_layers(params: dict) -> dict:
    """The tree that `stack_layers` was given.

    >>> sorted(unstack_layers({"embed": 0, "layers": {"scale": jnp.ones((2, 3))}}))
    ['embed', 'layer_0', 'layer_1']
    """
    rest = {name: part for name, part in params.items() if name != "layers"}
    count = len(jax.tree.leaves(params["layers"])[0])
    return rest | {f"layer_{i}": jax.tree.map(lambda leaf: leaf[i], params["layers"]) for i in range(count)}  # noqa: B023


@dataclasses.dataclass(frozen=True)
class StackedTransformer:
    """`Transformer` on the parameters of `stack_layers`, for training and scoring; equal in values and gradients.

    It has what `rlhf_jax.models.policies` asks of a `Transformer`. With `model.remat` each layer is recomputed in the
    backward pass, from the activations that entered it, just before its gradient needs it.
    """

    model: Transformer

    @property
    def config(self) -> TransformerConfig:
        """The model's shape."""
        return self.model.config

    def apply(
        self,
        variables: dict[str, Any],
        inputs: Array,
        mask: Array,
        *,
        cache: Cache | None = None,
        segments: Array | None = None,
        first: int = 0,
        last: int | None = None,
        tap: int | None = None,
    ) -> Output:
        """Runs layers first..last-1; the arguments are those of `Transformer.__call__`.

        Raises:
          ValueError: there is a cache.
        """
        if cache is not None:
            raise ValueError(
                "stacked layers take no cache; generate with the plain Transformer, on unstack_layers(params)"
            )
        params, count = variables["params"], self.config.num_layers
        ends = {"params": {name: part for name, part in params.items() if name != "layers"}}
        stop = count if last is None else last
        x = inputs if first else self.model.apply(ends, inputs, mask, segments=segments, last=0).hidden
        middle = stop if tap is None else tap
        tapped = x = self._layers(params["layers"], x, mask, segments, first, middle)
        x = self._layers(params["layers"], x, mask, segments, middle, stop)
        if last is None:
            x = self.model.apply(ends, x, mask, segments=segments, first=count).hidden
        return Output(x, None if tap is None else tapped, None)

    def _layers(self, stack: Any, x: Array, mask: Array, segments: Array | None, first: int, stop: int) -> Array:
        """Layers first..stop-1."""
        if first == stop:
            return x
        config = self.config
        span = written(within(mask, segments), None, segments)
        windows = [config.window(index) for index in range(first, stop)]
        kinds = sorted(set(windows), key=str)
        allowed = [visible(*span, window) for window in kinds]
        turns = [rotations(config, span.position, segments, window) for window in kinds]
        # Layers of several windows choose theirs by number.
        which = jnp.asarray([kinds.index(window) for window in windows])
        choices = jax.tree.map(lambda *each: jnp.stack(each), *zip(turns, allowed, strict=True))
        # A kernel is compiled for one window, so layers of several go without.
        kernel = kernel_of(self.model.kernel, windows[0]) if len(kinds) == 1 else None
        block, text = Block(config, config.is_sparse(first), kernel), texts(within(mask, segments), segments)

        def layer(x: Array, part: tuple[Any, Array]) -> tuple[Array, None]:
            params, kind = part
            turn, allowed = jax.tree.map(lambda each: each[kind], choices)
            return block.apply({"params": params}, x, turn, allowed, None, None, text)[0], None

        if self.model.remat is not None:
            layer = jax.checkpoint(layer, policy=self.model.remat, prevent_cse=False)
        cut = stack if (first, stop) == (0, config.num_layers) else jax.tree.map(lambda leaf: leaf[first:stop], stack)
        return jax.lax.scan(layer, x, (cut, which))[0]
