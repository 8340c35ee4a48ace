"""Small problems with known answers, and every algorithm of the library run to them in one compiled loop each.

The policies are tables over all V^R = 9 sequences of V = 3 tokens and length R = 2, so that expectations are sums and
nothing is left to luck. Where groups of samples belong to the algorithm, samples are drawn. `docs/probes.py` writes the
distances down.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from rlhf_jax import rewards
from rlhf_jax.testing import enumerable

V, R, BETA = 3, 2, 0.5
STAR, TV, ERROR = "π_ref exp(r/β) / Z", "total variation", "largest error"
RNG = np.random.default_rng(4)
SEQUENCES = jnp.asarray(enumerable.sequences(V, R))  # [N, R]
N = SEQUENCES.shape[0]
MASK = jnp.ones((N, R), bool)
PREFIX = jnp.stack([jnp.zeros(N, jnp.int32), 1 + SEQUENCES[:, 0]], axis=-1)  # [N, R] row of the table
REFERENCE = jnp.asarray(RNG.normal(size=(enumerable.table_size(V, R), V)), jnp.float32)
TEACHER = jnp.asarray(RNG.normal(size=REFERENCE.shape), jnp.float32)
REWARDS = jnp.asarray(RNG.normal(size=N), jnp.float32)


def tokens(table: jax.Array) -> jax.Array:
    """[N, R] log-probs of every token of every sequence."""
    return enumerable.token_log_probs_of_table(table, SEQUENCES)


def whole(table: jax.Array) -> jax.Array:
    """[N] log-probs of every sequence."""
    return tokens(table).sum(-1)


LOG_REFERENCE, LOG_TEACHER = whole(REFERENCE), whole(TEACHER)
UNIFORM = jnp.full(N, -jnp.log(float(N)))
OPTIMUM, _ = enumerable.regularised_optimum(LOG_REFERENCE, REWARDS, beta=BETA)
HUMAN_OPTIMUM, _ = enumerable.regularised_optimum(LOG_TEACHER, REWARDS, beta=BETA)
UNIFORM_OPTIMUM, _ = enumerable.regularised_optimum(UNIFORM, REWARDS, beta=BETA)


class Probe(NamedTuple):
    """An algorithm, its known answer, and how to run it."""

    family: str
    name: str
    answer: str
    measure: str
    tolerance: float
    run: Callable[[], jax.Array]


PROBES: list[Probe] = []


def probe(family: str, name: str, answer: str, measure: str, tolerance: float) -> Callable[[Any], Any]:
    """Registers a function that returns the distance from the answer."""

    def register(run: Callable[[], jax.Array]) -> Callable[[], jax.Array]:
        PROBES.append(Probe(family, name, answer, measure, tolerance, run))
        return run

    return register


def minimise(
    loss: Callable[..., jax.Array], params: Any, *, steps: int = 800, rate: float = 0.1, inner: int = 1
) -> Any:
    """Adam with a rate that falls to 0: loss(params, params when the data was gathered, key, step)."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps * inner))

    def update(carry, _):
        params, state, old, key, step = carry
        gradient = jax.grad(loss)(params, old, key, step)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state, old, key, step), None

    def gather(carry, step):
        params, state, key = carry
        key, now = jax.random.split(key)
        carry, _ = jax.lax.scan(update, (params, state, params, now, step), length=inner)
        return (carry[0], carry[1], key), None

    @jax.jit
    def run(params):
        carry = (params, optimizer.init(params), jax.random.key(0))
        return jax.lax.scan(gather, carry, jnp.arange(steps, dtype=jnp.float32))[0][0]

    return run(params)


def minimise_all(
    losses: dict[str, Callable[..., jax.Array]], start: Any, starts: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Each loss from the same start, or its own, all in one program: Adam treats every number by itself."""

    def total(params: dict[str, Any], old: dict[str, Any], key: jax.Array, step: jax.Array) -> jax.Array:
        return sum((loss(params[name], old[name], key, step) for name, loss in losses.items()), jnp.zeros(()))

    return minimise(total, dict.fromkeys(losses, start) | (starts or {}), **options)


def root(residual: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Where a function of float64 numbers is 0, apart from the library: it fails if none is found."""
    found = scipy.optimize.root(residual, np.asarray(start, np.float64), tol=1e-13)
    if np.max(np.abs(found.fun)) > 1e-10:
        raise ArithmeticError(f"no root found: {found.message}")
    return found.x


def shaped(old: jax.Array) -> jax.Array:
    """[N, R] token rewards: the score on the last token, minus β times the log-ratio."""
    scores = rewards.score_at_last_token(REWARDS, MASK)
    return rewards.kl_shaped_rewards(scores, old, tokens(REFERENCE), MASK, beta=BETA)
