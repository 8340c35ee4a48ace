"""Returns along time, and the one backward recursion behind every return and advantage of the library.

The recursion is y_t = x_t + d_t y_next(t), in which next(t) is the next *valid* slot: a slot outside the mask is not a
step, it neither decays nor earns, and its output is 0. So padding on either side changes nothing, and neither do holes,
for instance the words of a tool or of the user between two turns of a dialogue. A reward that lies outside the mask is
lost; put it on a valid token.

Index t: value V_t is of the state before token t is chosen, reward r_t is what choosing it earned, and discount γ_t is
what the state after it counts for. γ_t = 0 ends an episode inside a row. `bootstrap_value` is the value of the state
after a row's last valid token, 0 if that token ended the episode.

A discount or λ is one number (traced; sweep it with `vmap`) or one per step, [..., T]. Nothing is stopped here: the
losses stop the targets that they consume.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax import masking
from rlhf_jax.rewards import check_rewards

__all__ = [
    "at_next_valid",
    "backward_recursion",
    "discounted_returns",
    "lambda_returns",
    "n_step_returns",
]


# --- the recursion ----------------------------------------------------------------------------------------------------


def clean(mask: Array, *arrays: Array, names: tuple[str, ...] = ("rewards", "values")) -> tuple[Array, ...]:
    """The arrays in one dtype, float32 at least, and 0 outside the mask."""
    wide = [check_rewards(x, name) for x, name in zip(arrays, names, strict=False)]
    dtype = jnp.result_type(*wide)
    return masking.zero_outside(mask, *(x.astype(dtype) for x in wide))


def per_step(knob: ArrayLike, mask: Array, like: Array, name: str) -> Array:
    """[..., T] a knob that is one number or one per step, 0 outside the mask."""
    knob = jnp.asarray(knob, like.dtype)
    if knob.shape not in ((), like.shape):
        raise ValueError(f"{name} must be one number or have shape {like.shape}, one per step; got shape {knob.shape}")
    return jnp.where(mask, knob, jnp.zeros_like(like))


def final_values(bootstrap_value: ArrayLike, like: Array) -> Array:
    """[...] the value after each row's last valid token."""
    value, rows = jnp.asarray(bootstrap_value, like.dtype), like.shape[:-1]
    if value.shape not in ((), rows):
        raise ValueError(f"bootstrap_value must be one number or have shape {rows}, one per row; got {value.shape}")
    return jnp.broadcast_to(value, rows)


def backward_recursion(x: Array, decay: Array, mask: Array, final: Array) -> Array:
    """The recursion itself: y_t = x_t + d_t y_next(t), starting from y = final after the last valid slot.

    Args:
      x: [..., T] what each step adds; anything may stand outside the mask.
      decay: [..., T] d_t, what the rest is multiplied by.
      mask: [..., T] bool, slots that are steps.
      final: [...] y after the last valid slot.
    Returns:
      [..., T] y, 0 outside the mask.
    Raises: TypeError for a mask that is not bool; AssertionError if shapes differ.

    >>> x, half = jnp.array([1.0, jnp.nan, 2.0]), jnp.full(3, 0.5)
    >>> backward_recursion(x, half, jnp.array([True, False, True]), jnp.array(4.0)).tolist()
    [3.0, 0.0, 4.0]
    """
    x, decay = masking.zero_outside(mask, x, decay)

    def step(y_next: Array, slot: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x_t, decay_t, valid = slot
        y = jnp.where(valid, x_t + decay_t * y_next, y_next)
        return y, jnp.where(valid, y, 0.0)

    time_first = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), (x, decay, mask))
    return jnp.moveaxis(jax.lax.scan(step, final, time_first, reverse=True)[1], 0, -1)


def at_next_valid(x: Array, mask: Array, final: Array) -> Array:
    """Looks one step ahead: x at the next valid slot after t, or `final` if there is none.

    Args:
      x: [..., T]; anything may stand outside the mask.
      mask: [..., T] bool, slots that are steps.
      final: [...] what stands after the last valid slot.
    Returns:
      [..., T] x_next(t), also at slots outside the mask.
    Raises: TypeError for a mask that is not bool; AssertionError if shapes differ.

    >>> x, mask = jnp.array([1.0, jnp.nan, 2.0]), jnp.array([True, False, True])
    >>> at_next_valid(x, mask, jnp.array(4.0)).tolist()
    [2.0, 2.0, 4.0]
    """
    masking.check_mask(mask, x)
    length, axis = mask.shape[-1], mask.ndim - 1
    slots = jnp.where(mask, jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis), length)
    upcoming = jax.lax.cummin(slots, axis=axis, reverse=True)  # the first valid slot at or after t
    after = jnp.concatenate([upcoming[..., 1:], jnp.full_like(upcoming[..., :1], length)], axis=-1)
    return jnp.take_along_axis(jnp.concatenate([x, final[..., None]], axis=-1), after, axis=-1)


# --- returns ----------------------------------------------------------------------------------------------------------


def discounted_returns(
    rewards: Array, mask: Array, *, bootstrap_value: ArrayLike = 0.0, discount: ArrayLike = 1.0
) -> Array:
    """The discounted sum of what follows: G_t = r_t + γ_t G_next(t), and the bootstrap value after the last token.

    γ = 1 gives the reward to go, γ = 0 the reward itself.

    Args:
      rewards: [..., T] per token.
      mask: [..., T] bool, tokens that are steps.
      bootstrap_value: [] or [...] value after the last valid token.
      discount: γ, one number or [..., T].
    Returns:
      [..., T] returns in reward units, 0 outside the mask.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ.
    Reference: Sutton and Barto 2018, eq. 3.8 and 3.9, http://incompleteideas.net/book/the-book-2nd.html

    >>> discounted_returns(jnp.array([[1.0, 0.0, 4.0]]), jnp.array([[True, True, True]]), discount=0.5).tolist()
    [[2.0, 2.0, 4.0]]
    """
    (rewards,) = clean(mask, rewards)
    return backward_recursion(
        rewards, per_step(discount, mask, rewards, "discount"), mask, final_values(bootstrap_value, rewards)
    )


def n_step_returns(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    n: int,
    bootstrap_value: ArrayLike = 0.0,
    discount: ArrayLike = 1.0,
) -> Array:
    """n rewards and then the value: G_t = r_t + γ r_{t+1} + ... + γ^{n-1} r_{t+n-1} + γ^n V_{t+n}.

    Steps are valid tokens; where fewer than n are left the bootstrap value ends the sum. n = 1 gives the one-step
    target r + γ V, n >= T `discounted_returns`. Costs n passes over the row.

    Args:
      rewards: [..., T] per token.
      values: [..., T] of the state before each token.
      mask: [..., T] bool, tokens that are steps.
      n: static int >= 1, steps before bootstrapping.
      bootstrap_value: [] or [...] value after the last valid token.
      discount: γ, one number or [..., T].
    Returns:
      [..., T] returns in reward units, 0 outside the mask.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ or
      n < 1.
    Reference: Sutton and Barto 2018, eq. 7.1, http://incompleteideas.net/book/the-book-2nd.html

    >>> rewards, values = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.0, 0.0, 10.0]])
    >>> n_step_returns(rewards, values, jnp.array([[True, True, True]]), n=2).tolist()
    [[13.0, 6.0, 4.0]]
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be an int >= 1, got {n!r}")
    rewards, values = clean(mask, rewards, values)
    discounts, final = per_step(discount, mask, rewards, "discount"), final_values(bootstrap_value, rewards)

    def one_step_further(_: int, targets: Array) -> Array:
        return rewards + discounts * at_next_valid(targets, mask, final)

    return jnp.where(mask, jax.lax.fori_loop(0, n, one_step_further, values), 0.0)


def lambda_returns(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    bootstrap_value: ArrayLike = 0.0,
    discount: ArrayLike = 1.0,
    trace_lambda: ArrayLike = 0.95,
) -> Array:
    """The exponential average of all n-step returns: G_t = r_t + γ ((1 - λ) V_next(t) + λ G_next(t)).

    λ = 0 gives the one-step target, λ = 1 `discounted_returns`. Equal to `gae(...).returns`.

    Args:
      rewards: [..., T] per token.
      values: [..., T] of the state before each token.
      mask: [..., T] bool, tokens that are steps.
      bootstrap_value: [] or [...] value after the last valid token.
      discount: γ, one number or [..., T].
      trace_lambda: λ, one number or [..., T].
    Returns:
      [..., T] returns in reward units, 0 outside the mask.
    Raises: TypeError for integer rewards or a mask that is not bool; AssertionError or ValueError if shapes differ.
    Reference: Sutton and Barto 2018, section 12.1, http://incompleteideas.net/book/the-book-2nd.html

    >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.5]])
    >>> lambda_returns(rewards, values, jnp.array([[True, True]]), trace_lambda=0.5).tolist()
    [[0.75, 1.0]]
    """
    rewards, values = clean(mask, rewards, values)
    discounts, final = per_step(discount, mask, rewards, "discount"), final_values(bootstrap_value, rewards)
    trace = per_step(trace_lambda, mask, rewards, "trace_lambda")
    targets = rewards + discounts * (1.0 - trace) * at_next_valid(values, mask, final)
    return backward_recursion(targets, discounts * trace, mask, final)
