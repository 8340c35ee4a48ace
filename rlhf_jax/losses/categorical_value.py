"""Critics that predict a distribution over fixed atoms, trained by cross-entropy: C51, two-hot, HL-Gauss.

A return becomes a target distribution by `two_hot` or `hl_gauss`, a distribution of returns by `project`. The loss is
`cross_entropy`, and `mean` reads the value off. Leading axes `[...]` are any, N is the number of atoms.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import floating

__all__ = ["cross_entropy", "hl_gauss", "mean", "project", "two_hot"]


def _atoms(support: Array, name: str) -> Array:
    (support,) = floating(**{name: support})
    if support.ndim != 1 or support.shape[0] < 2:
        raise ValueError(f"{name} must be one axis of at least 2 increasing numbers, got shape {support.shape}")
    return support


def two_hot(values: Array, support: Array) -> Array:
    """Splits each value between its two neighbouring atoms so that the mean is the value.

    Args:
      values: [...] returns; stopped. Values beyond the support go to its end.
      support: [N] increasing atoms, not necessarily evenly spaced.
    Returns:
      [..., N] probabilities: at most two are positive.
    Raises: ValueError for a support that is not one axis of at least 2, TypeError for integer inputs (at trace time).
    Reference: Schrittwieser et al. 2019 (MuZero), https://arxiv.org/abs/1911.08265

    >>> two_hot(jnp.array(0.25), jnp.array([-1.0, 0.0, 1.0])).tolist()
    [0.0, 0.75, 0.25]
    """
    support, (values,) = _atoms(support, "support"), floating(values=values)
    values = jnp.clip(jax.lax.stop_gradient(values), support[0], support[-1])
    above = jnp.clip(jnp.searchsorted(support, values, side="right"), 1, support.shape[0] - 1)
    share = (values - support[above - 1]) / (support[above] - support[above - 1])
    upper = jax.nn.one_hot(above, support.shape[0], dtype=values.dtype)
    lower = jax.nn.one_hot(above - 1, support.shape[0], dtype=values.dtype)
    return lower * (1.0 - share)[..., None] + upper * share[..., None]


def hl_gauss(values: Array, edges: Array, *, smoothing: ArrayLike = 0.75) -> Array:
    """Histogram of a Gaussian around each value: p_i = Φ((e_{i+1} - v)/σ) - Φ((e_i - v)/σ), normalised.

    Args:
      values: [...] returns; stopped. Values beyond the edges count as the edge.
      edges: [N + 1] increasing edges of the N bins.
      smoothing: σ over the mean bin width; towards 0 it gives the bin that holds the value.
    Returns:
      [..., N] probabilities.
    Raises: ValueError for edges that are not one axis of at least 2, TypeError for integer inputs (at trace time).
    Reference: Farebrother et al. 2024, https://arxiv.org/abs/2403.03950

    >>> [round(p, 3) for p in hl_gauss(jnp.array(0.5), jnp.array([-1.0, 0.0, 1.0, 2.0])).tolist()]
    [0.241, 0.519, 0.241]
    """
    edges, (values,) = _atoms(edges, "edges"), floating(values=values)
    values = jnp.clip(jax.lax.stop_gradient(values), edges[0], edges[-1])
    sigma = smoothing * (edges[-1] - edges[0]) / (edges.shape[0] - 1)
    offsets = edges.reshape((1,) * values.ndim + edges.shape) - values[..., None]
    cumulative = jax.scipy.stats.norm.cdf(offsets / sigma)
    return jnp.diff(cumulative, axis=-1) / (cumulative[..., -1:] - cumulative[..., :1])


def project(probabilities: Array, locations: Array, support: Array) -> Array:
    """Moves a distribution onto fixed atoms (C51): every mass is split as `two_hot` splits its location.

    Args:
      probabilities: [..., M] masses of the target distribution; stopped.
      locations: [..., M] where they lie, for instance r + γ·support; stopped.
      support: [N] increasing atoms, not necessarily evenly spaced.
    Returns:
      [..., N] probabilities with the same sum; the same mean too, if no location lies beyond the support.
    Raises: AssertionError if probabilities and locations differ in shape, ValueError and TypeError as `two_hot`.
    Reference: Bellemare et al. 2017, eq. 7, https://arxiv.org/abs/1707.06887

    >>> project(jnp.array([0.5, 0.5]), jnp.array([0.5, 9.0]), jnp.array([0.0, 1.0, 2.0])).tolist()
    [0.25, 0.25, 0.5]
    """
    probabilities, locations = floating(probabilities=probabilities, locations=locations)
    return jnp.einsum("...m,...mn->...n", jax.lax.stop_gradient(probabilities), two_hot(locations, support))


def cross_entropy(logits: Array, probabilities: Array) -> Array:
    """Cross-entropy from target probabilities: -Σ_i p_i·log softmax(logits)_i.

    Args:
      logits: [..., N] predicted.
      probabilities: [..., N] target; stopped.
    Returns:
      [...] loss; smallest, the entropy of the target, where softmax(logits) = probabilities.
    Raises: TypeError for integer inputs, AssertionError if shapes differ (at trace time).
    Reference: Bellemare et al. 2017, algorithm 1, https://arxiv.org/abs/1707.06887

    >>> round(float(cross_entropy(jnp.zeros(4), jnp.array([1.0, 0.0, 0.0, 0.0]))), 3)
    1.386
    """
    logits, probabilities = floating(logits=logits, probabilities=probabilities)
    log_probs = jax.nn.log_softmax(logits)
    probabilities = jax.lax.stop_gradient(probabilities)
    return -jnp.sum(jnp.where(probabilities > 0, probabilities * log_probs, 0.0), axis=-1)


def mean(logits: Array, support: Array) -> Array:
    """The value of a categorical critic: Σ_i softmax(logits)_i·support_i.

    Args:
      logits: [..., N] predicted; the gradient flows.
      support: [N] atoms, or the centres of the bins.
    Returns:
      [...] value. The mean of `two_hot(v)` is v.
    Raises: ValueError if logits and support differ in N, TypeError for integer inputs (at trace time).
    Reference: Bellemare et al. 2017, algorithm 1, https://arxiv.org/abs/1707.06887

    >>> float(mean(jnp.zeros(3), jnp.array([0.0, 1.0, 5.0])))
    2.0
    """
    support, (logits,) = _atoms(support, "support"), floating(logits=logits)
    if logits.shape[-1:] != support.shape:
        raise ValueError(f"logits must have one entry per atom, {support.shape[0]}, got shape {logits.shape}")
    return jnp.einsum("...n,n->...", jax.nn.softmax(logits), support)
