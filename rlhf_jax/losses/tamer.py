"""TAMER: human feedback as a reward to be modelled, with credit for the steps that the person may have meant.

A signal given at time t judges something that happened a moment before. The reaction time has a known distribution;
the credit of a step is the probability that the signal is about it: the mass of delays that lead back into the step.
The model Ĥ(s, a) of human reward is regressed on the signals, and the agent takes the action with the largest Ĥ.

Times are in seconds. T is the number of steps, F the number of signals.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.losses._pairs import floating

__all__ = ["deep_tamer", "delay_credit", "gamma_delay", "tamer", "uniform_delay"]


def uniform_delay(delay: Array, *, low: ArrayLike = 0.2, high: ArrayLike = 0.6) -> Array:
    """Probability of a reaction time up to `delay` seconds, uniform between low and high.

    Args:
      delay: [...] seconds, any sign.
      low: shortest reaction.
      high: longest reaction, above low.
    Returns:
      [...] in [0, 1].
    Raises: TypeError for integer delays.
    Reference: Knox and Stone 2009, https://doi.org/10.1145/1597735.1597738

    >>> [round(p, 3) for p in uniform_delay(jnp.array([0.1, 0.3, 9.0])).tolist()]
    [0.0, 0.25, 1.0]
    """
    (delay,) = floating(delay=delay)
    return jnp.clip((delay - low) / (high - jnp.asarray(low)), 0.0, 1.0)


def gamma_delay(delay: Array, *, shape: ArrayLike = 2.0, scale: ArrayLike = 0.28) -> Array:
    """Probability of a reaction time up to `delay` seconds, gamma distributed with mean shape·scale.

    Args:
      delay: [...] seconds, any sign.
      shape: k > 0; 1 gives the exponential distribution.
      scale: θ > 0 in seconds.
    Returns:
      [...] in [0, 1].
    Raises: TypeError for integer delays.
    Reference: Knox and Stone 2009, https://doi.org/10.1145/1597735.1597738

    >>> [round(p, 3) for p in gamma_delay(jnp.array([-1.0, 0.28, 9.0])).tolist()]
    [0.0, 0.264, 1.0]
    """
    (delay,) = floating(delay=delay)
    return jax.scipy.special.gammainc(jnp.asarray(shape, delay.dtype), jnp.maximum(delay, 0.0) / scale)


def delay_credit(
    feedback_times: Array,
    starts: Array,
    ends: Array,
    mask: Array,
    *,
    distribution: Callable[[Array], Array] = uniform_delay,
) -> Array:
    """Credit of every step for every signal: P(t - end <= delay <= t - start), scaled to sum to 1 over the steps.

    Args:
      feedback_times: [..., F] when the signals were given, in seconds.
      starts: [..., T] when the steps began.
      ends: [..., T] when they ended.
      mask: [..., T] bool, the steps that took place.
      distribution: cumulative distribution of the reaction time; `uniform_delay`, `gamma_delay`, or a partial of them
        with other knobs.
    Returns:
      [..., F, T] credits, stopped, 0 outside the mask. They sum to 1 per signal, or are all 0 where no step can have
      been meant. A later signal credits later steps: moving all times alike changes nothing.
    Raises: TypeError for integer times or a mask that is not bool, ValueError if leading axes differ (at trace time).
    Reference: Knox and Stone 2009, https://doi.org/10.1145/1597735.1597738

    >>> starts = jnp.array([0.0, 0.2, 0.4])
    >>> credit = delay_credit(jnp.array([0.7]), starts, starts + 0.2, jnp.ones(3, bool))
    >>> [round(c, 3) for c in credit[0].tolist()]
    [0.25, 0.5, 0.25]
    """
    (feedback_times,) = floating(feedback_times=feedback_times)
    starts, ends = floating(starts=starts, ends=ends)
    starts, ends = masking.zero_outside(mask, starts, ends)
    if feedback_times.shape[:-1] != starts.shape[:-1]:
        raise ValueError(
            f"feedback_times and starts must share leading axes, got {feedback_times.shape} and {starts.shape}"
        )
    times = jax.lax.stop_gradient(feedback_times)[..., :, None]
    starts, ends = jax.lax.stop_gradient((starts, ends))
    mass = distribution(times - starts[..., None, :]) - distribution(times - ends[..., None, :])
    mass = jnp.where(mask[..., None, :], mass, 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return mass / jnp.where(total > 0, total, 1.0)


def tamer(predictions: Array, credit: Array, mask: Array, feedback: Array) -> Array:
    """TAMER, per signal: (h - Σ_t c_t·Ĥ(s_t, a_t))², no factor one half.

    Args:
      predictions: [..., T] the model's Ĥ of the steps taken.
      credit: [..., F, T] from `delay_credit`; stopped.
      mask: [..., T] bool, the steps that took place.
      feedback: [..., F] the signals h; stopped.
    Returns:
      [..., F] loss. With all credit on one step it is `value.squared_error` there.
    Raises: TypeError for integer inputs or a mask that is not bool, ValueError if axes do not match (at trace time).
    Reference: Knox and Stone 2009, https://doi.org/10.1145/1597735.1597738

    >>> tamer(jnp.array([1.0, 3.0]), jnp.array([[0.5, 0.5]]), jnp.ones(2, bool), jnp.array([5.0])).tolist()
    [9.0]
    """
    predictions, credit, feedback = _regression_inputs(predictions, credit, mask, feedback)
    return jnp.square(feedback - jnp.einsum("...ft,...t->...f", credit, predictions))


def deep_tamer(predictions: Array, credit: Array, mask: Array, feedback: Array) -> Array:
    """Deep TAMER, per signal and step: c_t·(Ĥ(s_t, a_t) - h)², no factor one half.

    Every step is regressed on the signal by itself, with its credit as the weight; so pairs can be replayed alone.

    Args:
      predictions: [..., T] the model's Ĥ of the steps taken.
      credit: [..., F, T] from `delay_credit`; stopped.
      mask: [..., T] bool, the steps that took place.
      feedback: [..., F] the signals h; stopped.
    Returns:
      [..., F, T] loss, 0 outside the mask. Its sum over steps is never below `tamer`, if the credits sum to 1.
    Raises: TypeError for integer inputs or a mask that is not bool, ValueError if axes do not match (at trace time).
    Reference: Warnell et al. 2018, https://arxiv.org/abs/1709.10163

    >>> deep_tamer(jnp.array([1.0, 3.0]), jnp.array([[0.5, 0.5]]), jnp.ones(2, bool), jnp.array([5.0])).tolist()
    [[8.0, 2.0]]
    """
    predictions, credit, feedback = _regression_inputs(predictions, credit, mask, feedback)
    return credit * jnp.square(predictions[..., None, :] - feedback[..., :, None])


def _regression_inputs(predictions: Array, credit: Array, mask: Array, feedback: Array) -> tuple[Array, Array, Array]:
    (predictions,), (credit,), (feedback,) = (
        floating(predictions=predictions),
        floating(credit=credit),
        floating(feedback=feedback),
    )
    if credit.shape != (*feedback.shape, predictions.shape[-1]) or feedback.shape[:-1] != predictions.shape[:-1]:
        raise ValueError(
            "credit must be [..., F, T] for feedback [..., F] and predictions [..., T], "
            f"got {credit.shape}, {feedback.shape} and {predictions.shape}"
        )
    (predictions,) = masking.zero_outside(mask, predictions)
    credit, feedback = jax.lax.stop_gradient((jnp.where(mask[..., None, :], credit, 0.0), feedback))
    return predictions, credit, feedback
