"""Log-probabilities of tokens, entropy and concentration of policies; the only place where tokens are shifted.

Everywhere else index t of log-probs, values, rewards, advantages and masks is the same generated token. A decoder's
state at position t predicts token t + 1; `predictions` and `shifted_log_probs` are where the two are brought together.

Logits of narrow dtypes are widened to float32 before the softmax; float64 stays float64. A logit of -inf is a forbidden
token: probability 0, no contribution to entropy, no NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.vocabulary_chunks import HeadStatistics, head_log_probs, head_statistics

__all__ = [
    "HeadStatistics",
    "Predictions",
    "entropy",
    "head_log_probs",
    "head_statistics",
    "log_normaliser",
    "predictions",
    "response_states",
    "shifted_log_probs",
    "sum_of_squared_probs",
    "token_log_probs",
]


def _scaled(logits: Array, temperature: ArrayLike) -> Array:
    logits = jnp.asarray(logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature


def _check_tokens(tokens: Array, shape: tuple[int, ...]) -> Array:
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got dtype {tokens.dtype}")
    if tokens.shape != shape:
        raise ValueError(f"tokens must have shape {shape}, one id per row of logits, got {tokens.shape}")
    return tokens


def token_log_probs(logits: Array, tokens: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Log-probability of each token under aligned logits: z_y / τ - log Σ_v exp(z_v / τ).

    Args:
      logits: [..., V]; row t is the distribution that token t was drawn from (no shift here).
      tokens: [...] int ids.
      temperature: τ, divides the logits; τ -> ∞ gives -log V for every token.
    Returns:
      [...] float32 log-probs (float64 for float64 logits). An id outside [0, V) gives NaN.
    Raises:
      TypeError: tokens are not integers. ValueError: shapes do not match.

    >>> round(float(token_log_probs(jnp.array([2.0, 0.0, 1.0]), jnp.array(0))), 4)
    -0.4076
    """
    scaled = _scaled(logits, temperature)
    tokens = _check_tokens(tokens, scaled.shape[:-1])
    inside = jnp.where(tokens < 0, scaled.shape[-1], tokens)
    chosen = jnp.take_along_axis(scaled, inside[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def log_normaliser(logits: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Log of the softmax's denominator: log Σ_v exp(z_v / τ), the input of `losses.supervised.z_loss`.

    Args:
      logits: [..., V]; -inf is a forbidden token.
      temperature: τ, divides the logits.
    Returns:
      [...]; adding c to all logits adds c / τ.

    >>> round(float(log_normaliser(jnp.zeros(4))), 4)
    1.3863
    """
    return jax.nn.logsumexp(_scaled(logits, temperature), axis=-1)


class Predictions(NamedTuple):
    """States beside the tokens they predict."""

    states: Array  # [..., T-1, X] hidden states or logits
    tokens: Array  # [..., T-1] the tokens that came next


def predictions(states: Array, tokens: Array) -> Predictions:
    """Brings states and tokens of the same positions together: state t beside token t + 1.

    The last state and the first token have no partner and are dropped. Use it before `head_log_probs`.

    >>> predictions(jnp.arange(6.0).reshape(3, 2), jnp.array([7, 8, 9])).tokens.tolist()
    [8, 9]
    """
    states, tokens = jnp.asarray(states), jnp.asarray(tokens)
    tokens = _check_tokens(tokens, states.shape[:-1])
    return Predictions(states[..., :-1, :], tokens[..., 1:])


def response_states(states: Array, *, prompt_length: int) -> Array:
    """The states that predict the response tokens: positions P - 1 to P + R - 2 of [..., P + R, X] -> [..., R, X].

    Args:
      states: [..., P + R, X] hidden states or logits over prompt and response.
      prompt_length: P, static, at least 1 (the first response token is predicted from the last prompt token).
    Returns:
      [..., R, X], index t belongs to response token t.
    Raises:
      ValueError: prompt_length is not an int in [1, P + R].

    >>> response_states(jnp.arange(4.0)[:, None], prompt_length=2)[:, 0].tolist()
    [1.0, 2.0]
    """
    length = states.shape[-2]
    if type(prompt_length) is not int or not 1 <= prompt_length <= length:
        raise ValueError(f"prompt_length must be an int between 1 and {length}, got {prompt_length!r}")
    return states[..., prompt_length - 1 : length - 1, :]


def shifted_log_probs(logits: Array, tokens: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Log-probability of each token given those before it: log softmax(z_t / τ)[token_{t+1}].

    Args:
      logits: [..., T, V] a decoder's output on `tokens`.
      tokens: [..., T] int ids.
      temperature: τ, divides the logits.
    Returns:
      [..., T-1]; index t belongs to ``tokens[..., t + 1]``. A mask for it is ``mask[..., 1:]``.
    Raises:
      TypeError: tokens are not integers. ValueError: shapes do not match.

    >>> logits = jnp.array([[0.0, 0.0], [9.0, -9.0]])
    >>> [round(x, 3) for x in shifted_log_probs(logits, jnp.array([0, 1])).tolist()]
    [-0.693]
    """
    return token_log_probs(*predictions(logits, tokens), temperature=temperature)


def _log_softmax(logits: Array, temperature: ArrayLike) -> tuple[Array, Array]:
    """(log p, p) with log p = 0 where p = 0, so that products and their gradients stay finite."""
    log_probs = jax.nn.log_softmax(_scaled(logits, temperature), axis=-1)
    allowed = jnp.isfinite(log_probs)
    log_probs = jnp.where(allowed, log_probs, 0.0)
    return log_probs, jnp.where(allowed, jnp.exp(log_probs), 0.0)


def entropy(logits: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Entropy of each row in nats: H = -Σ_v p_v log p_v with p = softmax(z / τ).

    Args:
      logits: [..., V]; -inf is a forbidden token.
      temperature: τ, divides the logits.
    Returns:
      [...] between 0 and log V; log V for equal logits.
    Reference: Shannon 1948, https://doi.org/10.1002/j.1538-7305.1948.tb01338.x

    >>> round(float(entropy(jnp.zeros(4))), 4)
    1.3863
    """
    log_probs, probs = _log_softmax(logits, temperature)
    return -jnp.sum(probs * log_probs, axis=-1)


def sum_of_squared_probs(logits: Array, *, temperature: ArrayLike = 1.0) -> Array:
    """Collision probability of each row: Σ_v p_v², the chance that two draws agree.

    1 - Σ p² is the Gini impurity (Tsallis entropy of order 2); 1 / Σ p² is the effective number of tokens.

    Args:
      logits: [..., V]; -inf is a forbidden token.
      temperature: τ, divides the logits.
    Returns:
      [...] between 1 / V and 1; 1 / V for equal logits.
    Reference: Simpson 1949, https://doi.org/10.1038/163688a0

    >>> float(sum_of_squared_probs(jnp.zeros(4)))
    0.25
    """
    return jnp.sum(jnp.square(_log_softmax(logits, temperature)[1]), axis=-1)
