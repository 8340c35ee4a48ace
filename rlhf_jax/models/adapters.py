"""Low-rank adapters as transformations of a tree of parameters: LoRA, rank-stabilised LoRA, DoRA.

Adapters are a nested dict with the paths of the chosen kernels; where the kernel stood there is a dict of "down"
[in, r], "up" [r, out] and, for DoRA, "magnitude" [out]. They are what a train state holds; the base is frozen beside.

Two ways to run a model with them:

* `apply_lora` and `apply_dora` return plain parameters, which any model accepts: the sum is formed inside the step, and
  its gradient too, so that adapted kernels exist once more while the step runs.
* `attach_lora` and `attach_dora` put an `Adapted` leaf where the kernel stood; the models of this library compute
  x · W + s · (x · down) · up from it without forming the sum, also over quantised W.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jax import Array
from jax.typing import ArrayLike

__all__ = [
    "Adapted",
    "apply_dora",
    "apply_lora",
    "attach_dora",
    "attach_lora",
    "init_dora",
    "init_lora",
    "lora_scale",
    "rslora_scale",
    "unmerge_lora",
]

Predicate = Callable[[str], bool]
Scale = Callable[[ArrayLike, int], ArrayLike]


def lora_scale(alpha: ArrayLike, rank: int) -> ArrayLike:
    """α / r, LoRA's factor of the low-rank product (Hu et al. 2021, section 4.1).

    >>> lora_scale(16.0, 4)
    4.0
    """
    return alpha / rank


def rslora_scale(alpha: ArrayLike, rank: int) -> ArrayLike:
    """α / √r, which keeps the size of updates the same at every rank.

    Reference: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732

    >>> rslora_scale(16.0, 4)
    8.0
    """
    return alpha / rank**0.5


def _flat(tree: dict) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(tree, sep="/"))  # type: ignore[arg-type]


def _chosen(params: dict, predicate: Predicate) -> dict[str, Any]:
    flat = _flat(params)
    chosen = {path: leaf for path, leaf in flat.items() if predicate(path)}
    if not chosen:
        raise ValueError(f"predicate chooses none of the {len(flat)} parameters; the first paths are {list(flat)[:5]}")
    for path, leaf in chosen.items():
        if leaf.ndim < 2:
            raise ValueError(f"{path} has the shape {leaf.shape}; only kernels [..., in, out] take an adapter")
    return chosen


def init_lora(
    key: Array, params: dict, predicate: Predicate, rank: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, Any]:
    """Adapters that change nothing yet: `down` uniform in ±1/√in, `up` zero.

    Args:
      key: typed key, consumed. A kernel's draw depends on its own path alone, not on what else is chosen.
      params: nested dicts of parameters; `Quantised` kernels will do.
      predicate: path such as "layer_0/attention/query/kernel" -> bool.
      rank: r, at least 1.
      dtype: of the adapters.
    Returns:
      Nested dicts of {"down": [..., in, r], "up": [..., r, out]} at the chosen paths.
    Raises:
      ValueError: rank is below 1, nothing is chosen, or a chosen leaf is no kernel.
    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685

    >>> params = {"up": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    >>> adapters = init_lora(jax.random.key(0), params, lambda path: path.endswith("kernel"), 2)
    >>> jax.tree.map(jnp.shape, adapters["up"]["kernel"], is_leaf=lambda x: hasattr(x, "shape"))
    {'down': (3, 2), 'up': (2, 5)}
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def start(path: str, shape: tuple[int, ...]) -> dict[str, Array]:
        *lead, rows, columns = shape
        bound = rows**-0.5
        down = jax.random.uniform(
            jax.random.fold_in(key, zlib.crc32(path.encode())), (*lead, rows, rank), dtype, -bound, bound
        )
        return {"down": down, "up": jnp.zeros((*lead, rank, columns), dtype)}

    started = {path: start(path, leaf.shape) for path, leaf in _chosen(params, predicate).items()}
    return traverse_util.unflatten_dict(started, sep="/")


def init_dora(
    key: Array, params: dict, predicate: Predicate, rank: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, Any]:
    """As `init_lora`, and "magnitude" [..., out], the length of each column of the kernel.

    Reference: Liu et al. 2024, https://arxiv.org/abs/2402.09353

    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> init_dora(jax.random.key(0), params, lambda path: True, 1)["kernel"]["magnitude"].tolist()
    [5.0]
    """
    adapters = init_lora(key, params, predicate, rank, dtype=dtype)
    flat = _flat(adapters)
    for path, kernel in _chosen(params, predicate).items():
        flat[f"{path}/magnitude"] = _lengths(_plain(kernel)).astype(dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def _plain(kernel: Any) -> Array:
    return kernel.dequantised() if hasattr(kernel, "dequantised") else kernel


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _lengths(kernel: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(_wide(kernel)), axis=-2))


def _product(adapter: dict[str, Array], alpha: ArrayLike, scale: Scale) -> Array:
    """s · down · up, at least in float32."""
    return jnp.matmul(_wide(adapter["down"]), _wide(adapter["up"])) * scale(alpha, adapter["up"].shape[-2])


def _mapped(params: dict, adapters: dict, change: Callable[[Any, dict[str, Array]], Any]) -> dict:
    """The parameters with change(kernel, adapter) at the adapters' paths."""
    flat = _flat(params)
    parts = _flat(adapters)
    found: dict[str, dict[str, Array]] = {}
    for path, leaf in parts.items():
        kernel, _, name = path.rpartition("/")
        found.setdefault(kernel, {})[name] = leaf
    if missing := sorted(found.keys() - flat.keys()):
        raise ValueError(f"adapters stand at paths that the parameters do not have: {missing[:5]}")
    changed = {path: change(flat[path], adapter) for path, adapter in found.items()}
    return traverse_util.unflatten_dict(flat | changed, sep="/")


def apply_lora(params: dict, adapters: dict, *, alpha: ArrayLike = 16.0, scale: Scale = lora_scale) -> dict:
    """Parameters with W + s · down · up for every adapted kernel W (Hu et al. 2021, eq. 3).

    This is also how adapters are merged for good. Sums are float32 even over narrower kernels, so that small updates
    are not rounded away; cast the result where that is wanted.

    Args:
      params: frozen base, nested dicts.
      adapters: from `init_lora`.
      alpha: α.
      scale: s as a function of (α, r): `lora_scale` or `rslora_scale`.
    Returns:
      Plain parameters; leaves without adapter are shared. `up` = 0 gives the base.
    Raises:
      ValueError: an adapter has no kernel.
    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685

    >>> adapters = {"kernel": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}
    >>> apply_lora({"kernel": jnp.eye(2)}, adapters, alpha=0.5)["kernel"].tolist()
    [[1.5, 0.5], [0.5, 1.5]]
    """
    return _mapped(params, adapters, lambda kernel, a: _wide(_plain(kernel)) + _product(a, alpha, scale))


def unmerge_lora(merged: dict, adapters: dict, *, alpha: ArrayLike = 16.0, scale: Scale = lora_scale) -> dict:
    """The base that `apply_lora` with the same adapters gave `merged`, up to one rounding of each number.

    >>> adapters = {"kernel": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}
    >>> unmerge_lora(apply_lora({"kernel": jnp.eye(2)}, adapters), adapters)["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return _mapped(merged, adapters, lambda kernel, a: _wide(kernel) - _product(a, alpha, scale))


def apply_dora(params: dict, adapters: dict, *, alpha: ArrayLike = 16.0, scale: Scale = lora_scale) -> dict:
    """Parameters with m · V / ‖V‖ per column, V = W + s · down · up, for every adapted kernel W.

    The lengths ‖V‖ are constants: no gradient flows through them (section 4.3 of the paper).

    Args:
      params: frozen base, nested dicts.
      adapters: from `init_dora`; "magnitude" is m.
      alpha: α.
      scale: s as a function of (α, r).
    Returns:
      Plain parameters. Fresh adapters give the base.
    Reference: Liu et al. 2024, eq. 5 and section 4.3, https://arxiv.org/abs/2402.09353

    >>> adapters = {"kernel": {"down": jnp.zeros((2, 1)), "up": jnp.zeros((1, 1)), "magnitude": jnp.array([10.0])}}
    >>> apply_dora({"kernel": jnp.array([[3.0], [4.0]])}, adapters)["kernel"].ravel().tolist()
    [6.0, 8.0]
    """

    def change(kernel: Any, adapter: dict[str, Array]) -> Array:
        direction = _wide(_plain(kernel)) + _product(adapter, alpha, scale)
        return direction * (_wide(adapter["magnitude"]) / jax.lax.stop_gradient(_lengths(direction)))[..., None, :]

    return _mapped(params, adapters, change)


@struct.dataclass
class Adapted:
    """A kernel [..., in, out] beside its adapter, not summed."""

    base: Any  # the kernel, plain or `Quantised`
    down: Array  # [..., in, r]
    up: Array  # [..., r, out]
    scale: Array  # [] s
    magnitude: Array | None = None  # [..., out] of DoRA

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.base.shape

    def times(self, x: Array, product: Callable[[Array, Any], Array]) -> Array:
        """x [..., in] -> [..., out], where `product` multiplies with the base."""
        low = jnp.dot(jnp.dot(x, self.down.astype(x.dtype)), self.up.astype(x.dtype)) * self.scale.astype(x.dtype)
        y = product(x, self.base) + low
        if self.magnitude is None:
            return y
        lengths = jax.lax.stop_gradient(_lengths(self.direction()))
        factor = (_wide(self.magnitude) / lengths).astype(x.dtype)
        return y * factor.reshape((1,) * (y.ndim - 1) + factor.shape)

    def direction(self) -> Array:
        """W + s · down · up."""
        return _wide(_plain(self.base)) + jnp.matmul(_wide(self.down), _wide(self.up)) * self.scale

    def summed(self) -> Array:
        """The adapted kernel, as `apply_lora` and `apply_dora` give it."""
        direction = self.direction()
        if self.magnitude is None:
            return direction
        return direction * (_wide(self.magnitude) / jax.lax.stop_gradient(_lengths(direction)))[..., None, :]


def attach_lora(params: dict, adapters: dict, *, alpha: ArrayLike = 16.0, scale: Scale = lora_scale) -> dict:
    """As `apply_lora`, but with an `Adapted` leaf in place of each sum, for the models of this library.

    The numbers are those of `apply_lora` up to rounding; memory and time grow with r instead of with in · out.

    >>> adapters = {"kernel": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}
    >>> attach_lora({"kernel": jnp.eye(2)}, adapters, alpha=0.5)["kernel"].summed().tolist()
    [[1.5, 0.5], [0.5, 1.5]]
    """
    factor = lambda a: jnp.asarray(scale(alpha, a["up"].shape[-2]), jnp.float32)
    return _mapped(params, adapters, lambda kernel, a: Adapted(kernel, a["down"], a["up"], factor(a)))


def attach_dora(params: dict, adapters: dict, *, alpha: ArrayLike = 16.0, scale: Scale = lora_scale) -> dict:
    """As `apply_dora`, but with an `Adapted` leaf in place of each sum, for the models of this library.

    >>> adapters = {"kernel": {"down": jnp.zeros((2, 1)), "up": jnp.zeros((1, 1)), "magnitude": jnp.array([10.0])}}
    >>> attach_dora({"kernel": jnp.array([[3.0], [4.0]])}, adapters)["kernel"].summed().ravel().tolist()
    [6.0, 8.0]
    """
    factor = lambda a: jnp.asarray(scale(alpha, a["up"].shape[-2]), jnp.float32)
    return _mapped(params, adapters, lambda kernel, a: Adapted(kernel, a["down"], a["up"], factor(a), a["magnitude"]))
