"""Gradients of a weighted sum of global means, the same on 1 device, N devices and k micro-batches.

An algorithm's loss function returns terms: ``dict[str, Totals]``, one (sum, count) pair per term over the rows it was
given. The objective is Σᵢ wᵢ · (Σ sumᵢ) / (Σ countᵢ), where the inner sums run over all devices and all micro-batches
*before* the division. An average of averages would weigh a token by the company it happens to keep.

Counts must not depend on parameters: they come from masks and weights in the batch. They are treated as constants.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.masking import Totals, mean_of_totals

__all__ = ["clip_by_global_norm", "loss_and_gradients", "split_rows"]

Terms = dict[str, Totals]
Counts = dict[str, Array]


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    """Gradients times min(1, max_norm / ‖g‖), with the Euclidean norm of the whole tree; for `optax.chain`.

    Equals `optax.clip_by_global_norm` up to rounding. That one divides every gradient by the norm, and XLA on a CPU
    keeps all quotients beside the gradients: a second copy of them, which a product with one factor does not need.

    Args:
      max_norm: the largest norm, above 0. Gradients within it are left alone, bit for bit.
    Returns:
      A transformation without state.
    Reference: Pascanu et al. 2012, https://arxiv.org/abs/1211.5063

    >>> clip_by_global_norm(1.0).update({"a": jnp.array([3.0, 4.0])}, optax.EmptyState())[0]["a"].round(3).tolist()
    [0.6, 0.8]
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        factor = max_norm / jnp.maximum(optax.tree.norm(updates), max_norm)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def split_rows(batch: Any, microbatches: int) -> Any:
    """Splits every leaf [B, ...] into [k, B / k, ...]; micro-batch i holds rows i, i + k, i + 2k, ...

    The split is strided, not contiguous: a batch whose rows lie on N devices gives micro-batches whose rows lie on the
    same N devices, without communication, whenever B / k is a multiple of N.

    Args:
      batch: pytree whose leaves all have the leading axis B.
      microbatches: k, a Python int >= 1 that divides B.
    Returns:
      The same pytree with leaves [k, B / k, ...].
    Raises:
      ValueError: k < 1, a leaf without a leading axis, leading axes that differ, or k does not divide B.

    >>> split_rows(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}")
    rows: dict[int | None, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        rows.setdefault(jnp.shape(leaf)[0] if jnp.ndim(leaf) else None, jax.tree_util.keystr(path) or "batch")
    if len(rows) > 1 or None in rows:
        found = ", ".join(f"{name} has {'none' if size is None else size}" for size, name in rows.items())
        raise ValueError(f"every leaf of batch must have the same leading axis B, but {found}")
    for size in rows:
        if size is not None and size % microbatches:
            raise ValueError(f"microbatches must divide the rows of batch, got microbatches={microbatches}, B={size}")
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1), batch
    )


def loss_and_gradients(
    terms_fn: Callable[[Any, Any], Terms],
    params: Any,
    batch: Any,
    *,
    weights: Mapping[str, ArrayLike],
    axis_name: str | None = None,
    microbatches: int = 1,
) -> tuple[Any, dict[str, Array]]:
    """∇_params Σᵢ wᵢ · sumᵢ / countᵢ with sums and counts over all devices and micro-batches, and every term's mean.

    With ``microbatches=k > 1`` two passes run. The first yields only the counts; everything in ``terms_fn`` that leads
    to sums alone is dead code there, which XLA removes, so it costs no model forward. The second is a `lax.scan` that
    adds up float32 gradients of one micro-batch at a time, hence the activations of B / k rows are alive at once.
    A term whose count is 0 everywhere contributes 0.

    Equal up to the order of floating-point sums: 1 device, N devices (``pmap``, ``shard_map``, sharded ``jit``) and any
    number of micro-batches, however ragged the masks. That holds for terms that are sums over rows; statistics that
    couple rows (whitened advantages, for instance) belong before this call, in the batch.

    Args:
      terms_fn: (params, batch) -> {name: Totals of these rows}; called under differentiation, so it must not divide,
        nor psum its totals. Counts must not depend on params; they are stopped.
      params: pytree of floating-point arrays to differentiate; what is frozen is closed over by ``terms_fn``
        (see `rlhf_jax.training.state.split_params`).
      batch: pytree whose leaves all have the leading axis B, the rows of this device.
      weights: {name: weight} of the terms that make up the objective; values may be traced. Other terms are reported
        and not differentiated.
      axis_name: mapped axis of devices; ``None`` on one device and under ``jit`` with sharded arrays.
      microbatches: k, a Python int that divides B; see `split_rows` for which rows go together.
    Returns:
      (gradients shaped and typed like ``params``, already summed over devices; {name: global mean} for every term).
    Raises:
      ValueError: a weight names no term; rows that cannot be split evenly.

    >>> def terms(w, x):
    ...     return {"squared": Totals(jnp.sum((w * x) ** 2), jnp.asarray(x.size, jnp.float32))}
    >>> grads, metrics = loss_and_gradients(terms, jnp.array(3.0), jnp.array([1.0, 2.0]), weights={"squared": 1.0})
    >>> float(grads), float(metrics["squared"])
    (15.0, 22.5)
    """
    params = _vary(params, axis_name)  # each device differentiates its own share; the shares are summed at the end

    def checked_terms(params: Any, rows: Any) -> Terms:
        terms = terms_fn(params, rows)
        if missing := sorted(set(weights) - set(terms)):
            raise ValueError(f"weights name {missing}, but terms_fn returns {sorted(terms)}")
        return {name: Totals(t.sum, jax.lax.stop_gradient(t.count)) for name, t in terms.items()}

    def share(params: Any, rows: Any, counts: Counts | None) -> tuple[Array, Terms]:
        terms = checked_terms(params, rows)
        counts = global_counts({name: t.count for name, t in terms.items()}) if counts is None else counts
        means = [weights[name] * mean_of_totals(Totals(terms[name].sum, counts[name])) for name in weights]
        return jnp.asarray(sum(means)), {name: Totals(t.sum, counts[name]) for name, t in terms.items()}

    def global_counts(counts: Counts) -> Counts:
        return counts if axis_name is None else jax.lax.psum(counts, axis_name)

    differentiate = jax.grad(share, has_aux=True)
    parts = split_rows(batch, microbatches)
    if microbatches == 1:
        grads, terms = differentiate(params, batch, None)
    else:
        _, counts = jax.lax.scan(
            lambda _, rows: (None, {name: t.count for name, t in checked_terms(params, rows).items()}), None, parts
        )
        counts = global_counts(jax.tree.map(lambda c: jnp.sum(c, axis=0), counts))

        def accumulate(total: Any, rows: Any) -> tuple[Any, Terms]:
            grads, terms = differentiate(params, rows, counts)
            return jax.tree.map(lambda t, g: t + _widen(g), total, grads), terms

        grads, terms = jax.lax.scan(accumulate, jax.tree.map(lambda p: jnp.zeros_like(_widen(p)), params), parts)
        terms = {name: Totals(jnp.sum(t.sum, axis=0), counts[name]) for name, t in terms.items()}
    if axis_name is not None:
        grads = jax.lax.psum(jax.tree.map(_widen, grads), axis_name)
        terms = {name: Totals(jax.lax.psum(t.sum, axis_name), t.count) for name, t in terms.items()}
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return grads, {name: mean_of_totals(t) for name, t in terms.items()}


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _vary(tree: Any, axis_name: str | None) -> Any:
    """Marks replicated arrays as per-device inside `jax.shard_map`, so that gradients are not summed there already."""
    if axis_name is None:
        return tree

    cast = getattr(jax.lax, "pcast", None)

    def vary(x: Array) -> Array:
        try:
            return cast(x, axis_name, to="varying") if cast else getattr(jax.lax, "pvary")(x, axis_name)  # noqa: B009
        except ValueError:  # varies already, or a mapped axis that keeps no such marks (vmap)
            return x

    return jax.tree.map(vary, tree)
