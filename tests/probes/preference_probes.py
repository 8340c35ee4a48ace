# ruff: noqa: RUF001  (Greek letters in answers are meant)
"""Losses on preferences, run to the policy or the margin that their labels imply."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problem import (
    BETA,
    LOG_REFERENCE,
    OPTIMUM,
    REFERENCE,
    REWARDS,
    STAR,
    TV,
    UNIFORM_OPTIMUM,
    N,
    R,
    minimise,
    minimise_all,
    probe,
    tokens,
    whole,
)

from rlhf_jax.algorithms import unpaired_preference as unpaired
from rlhf_jax.losses import (
    anchored_preference,
    divergence_preference,
    online_preference,
    preference,
    preference_inputs,
    reference_free_preference,
    unpaired_preference,
)
from rlhf_jax.testing import enumerable

# --- preferences ------------------------------------------------------------------------------------------------------

PAIRS = "preferences with Bradley-Terry labels"
FIRST, SECOND = (jnp.asarray(index.ravel()) for index in np.indices((N, N)))
WINS = jax.nn.sigmoid(REWARDS[FIRST] - REWARDS[SECOND])  # [N²] P(first is preferred)


def pairs(
    loss: Callable[..., jax.Array], optimum: jax.Array, *, wins: jax.Array = WINS, reference: jax.Array = LOG_REFERENCE
) -> jax.Array:
    """Distance from an optimum after training on all pairs of the reference's samples."""
    weight = jnp.exp(LOG_REFERENCE[FIRST] + LOG_REFERENCE[SECOND]) * wins

    def population(table, old, key, step):
        ratios = whole(table) - reference
        return jnp.sum(weight * loss(ratios[FIRST], ratios[SECOND]))

    return enumerable.total_variation(whole(minimise(population, REFERENCE)), optimum)


@probe(PAIRS, "DPO", STAR, TV, 2e-3)
def dpo_probe():
    return pairs(lambda *x: preference.dpo(*x, beta=BETA), OPTIMUM)


@probe(PAIRS, "robust DPO, 10 % of labels flipped", STAR, TV, 2e-3)
def robust_dpo_probe():
    flipped = 0.9 * WINS + 0.1 * (1 - WINS)
    return pairs(lambda *x: preference.robust_dpo(*x, beta=BETA, label_smoothing=0.1), OPTIMUM, wins=flipped)


@probe(PAIRS, "IPO", "π_ref exp(P(y ≻ π_ref)/β) / Z", TV, 2e-3)
def ipo_probe():
    beats = jnp.sum(WINS.reshape(N, N) * jnp.exp(LOG_REFERENCE)[None], axis=-1)
    optimum, _ = enumerable.regularised_optimum(LOG_REFERENCE, beats, beta=BETA)
    return pairs(lambda *x: preference.ipo_sum(*x, beta=BETA), optimum)


@probe(PAIRS, "CPO (no reference)", "exp(r/β) / Z", TV, 2e-3)
def cpo_probe():
    return pairs(lambda *x: reference_free_preference.cpo(*x, beta=BETA), UNIFORM_OPTIMUM, reference=jnp.zeros(N))


@probe(PAIRS, "SimPO without target margin", "exp(r R/β) / Z", TV, 2e-3)
def simpo_probe():
    lengths = jnp.full(N * N, R)
    loss = lambda *x: reference_free_preference.simpo(*x, lengths, lengths, beta=BETA * R, gamma=0.0)
    return pairs(loss, UNIFORM_OPTIMUM, reference=jnp.zeros(N))


def bisected(inverse: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> jax.Array:
    """Log of the distribution with π / π_ref = inverse(level), the multiplier found so that it sums to 1 (float64)."""
    reference, score = np.exp(np.asarray(LOG_REFERENCE, np.float64)), np.asarray(REWARDS, np.float64) / BETA
    for _ in range(200):
        middle = 0.5 * (low + high)
        total = float((reference * inverse(score - middle)).sum())
        low, high = (middle, high) if total > 1 else (low, middle)
    return jnp.log(jnp.asarray(reference * inverse(score - middle), jnp.float32))


TOP = float(jnp.max(REWARDS)) / BETA
F_DIVERGENCES = {
    "forward KL": (divergence_preference.forward_kl_dpo, lambda s: -1 / s, TOP + 1e-9, TOP + 1e3),
    "Jensen-Shannon": (
        divergence_preference.jensen_shannon_dpo,
        lambda s: np.exp(s) / (2 - np.exp(s)),
        TOP - np.log(2) + 1e-9,
        TOP + 1e3,
    ),
    "α = ½": (divergence_preference.alpha_divergence_dpo, lambda s: (1 - 0.5 * s) ** -2.0, TOP - 2 + 1e-9, TOP + 1e3),
}
for name, (loss, inverse, low, high) in F_DIVERGENCES.items():
    probe(PAIRS, f"f-DPO, {name}", "f'(π/π_ref) = (r - λ)/β", TV, 5e-3)(
        lambda loss=loss, inverse=inverse, low=low, high=high: pairs(
            lambda *x: loss(*x, beta=BETA), bisected(inverse, low, high)
        )
    )


@probe(PAIRS, "online DPO, own samples", STAR, TV, 2e-3)
def online_dpo_probe():
    def population(table, old, key, step):
        log_p, ratios = whole(old), whole(table) - LOG_REFERENCE
        weight = jnp.exp(log_p[FIRST] + log_p[SECOND])
        won, lost = (
            online_preference.online_dpo(ratios[FIRST], ratios[SECOND], jnp.full(N * N, verdict), beta=BETA)
            for verdict in (True, False)
        )
        return jnp.sum(weight * (WINS * won + (1 - WINS) * lost))

    return enumerable.total_variation(whole(minimise(population, REFERENCE)), OPTIMUM)


def saturated(credit: jax.Array) -> jax.Array:
    """Log of the policy that maximises Σ credit σ(β ρ): nothing for answers of negative credit, and good ones share.

    With u = π / π_ref a good answer's marginal credit β σ'(β log u) / (u π_ref) falls in u, and all are equal; both are
    found by bisection in float64.
    """
    credit, reference = (np.asarray(x, np.float64) for x in (credit, jnp.exp(LOG_REFERENCE)))
    good = credit > 0
    scale = np.log(np.where(good, credit, 1.0) * BETA / reference)

    def shares(log_level: float) -> np.ndarray:
        low, high = np.full(N, -80.0), np.full(N, 80.0)
        for _ in range(100):
            x = (low + high) / 2
            slope = -2 * np.logaddexp(0, -BETA * x) - BETA * x  # log σ'
            more = scale + slope - x > log_level
            low, high = np.where(more, x, low), np.where(more, high, x)
        return np.where(good, reference * np.exp(low), 0.0)

    low, high = -40.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle).sum() > 1 else (low, middle)
    return jnp.log(jnp.asarray(np.maximum(shares(middle), 1e-30), jnp.float32))


MASKS = jnp.ones((N * N, R), bool)
LENGTHS = jnp.full(N * N, R)


def weighted_by_policy(ratios, log_probs):
    """WPO: the weight of a pair is the same whoever wins, so its optimum is DPO's."""
    weights = preference_inputs.wpo_weights(log_probs[FIRST], jnp.full((N * N, R), 0.5), MASKS)
    others = preference_inputs.wpo_weights(log_probs[SECOND], jnp.full((N * N, R), 0.5), MASKS)
    return weights * others * preference.dpo(ratios[FIRST], ratios[SECOND], beta=BETA)


CREDIT = jnp.exp(LOG_REFERENCE) * jnp.sum(((2 * WINS - 1) * jnp.exp(LOG_REFERENCE[SECOND])).reshape(N, N), axis=-1)
MORE = {
    "DPO per token": (
        lambda ratios, _: preference.dpo_mean(ratios[FIRST], ratios[SECOND], LENGTHS, LENGTHS, beta=BETA * R),
        STAR,
        OPTIMUM,
    ),
    "WPO": (weighted_by_policy, STAR, OPTIMUM),
    "APO-zero": (
        lambda ratios, _: anchored_preference.apo_zero(ratios[FIRST], ratios[SECOND], beta=BETA),
        "max Σ (wins - losses) σ(β ρ)",
        saturated(CREDIT),
    ),
}


@functools.cache
def more_pairs() -> dict[str, jax.Array]:
    weight = jnp.exp(LOG_REFERENCE[FIRST] + LOG_REFERENCE[SECOND]) * WINS

    def population(loss):
        return lambda table, *_: jnp.sum(weight * loss(whole(table) - LOG_REFERENCE, tokens(table)))

    return minimise_all({name: population(loss) for name, (loss, *_) in MORE.items()}, REFERENCE)


for name, (_, answer, optimum) in MORE.items():
    probe(PAIRS, name, answer, TV, 5e-3)(
        lambda name=name, optimum=optimum: enumerable.total_variation(whole(more_pairs()[name]), optimum)
    )


@probe(PAIRS, "Nash-MD", "its own best response, π_ref exp(P(y ≻ π_mix)/β) / Z", TV, 5e-3)
def nash_md_probe():
    def opponent(log_p):
        mixed = online_preference.geometric_mixture(log_p, LOG_REFERENCE)
        return jnp.sum(WINS.reshape(N, N) * jnp.exp(mixed)[None], axis=-1)

    def population(table, old, key, step):
        log_p = whole(old)
        loss = online_preference.nash_md(whole(table), LOG_REFERENCE, opponent(log_p), beta=BETA)
        return jnp.sum(jnp.exp(log_p) * loss)

    log_p = whole(minimise(population, REFERENCE))
    response, _ = enumerable.regularised_optimum(LOG_REFERENCE, opponent(log_p), beta=BETA)
    return enumerable.total_variation(log_p, response)


# --- thumbs -----------------------------------------------------------------------------------------------------------

THUMBS = "thumbs up with chance σ(r), every answer as often"
UP = jax.nn.sigmoid(REWARDS)


def thumbs(optimum: jax.Array, **settings: Any) -> jax.Array:
    """Distance from an optimum after training by the algorithm, good and bad verdicts weighing as they are likely."""
    config = unpaired.Config(beta=BETA, **settings)
    say = lambda params, rows: tokens(params["table"])[rows]
    rows, mask = jnp.tile(jnp.arange(N), 2), jnp.ones((2 * N, R), bool)
    good = jnp.arange(2 * N) < N
    others = unpaired.Batch(jnp.roll(rows, 1), mask, good, jnp.ones(2 * N))
    batch = unpaired.Batch(rows, mask, good, jnp.concatenate([UP, 1 - UP]), mismatched=others)
    batch = unpaired.with_reference(batch, say, {"table": REFERENCE})
    state = unpaired.init({"table": REFERENCE}, say, optax.adam(optax.cosine_decay_schedule(0.1, 800)))
    update = lambda state, _: (unpaired.update(state, batch, config=config)[0], None)
    state, _ = jax.jit(lambda state: jax.lax.scan(update, state, length=800))(state)
    return enumerable.total_variation(whole(state.train.params["table"]), optimum)


SATURATED = "max Σ (2σ(r) - 1) σ(β ρ)"


@probe(THUMBS, "KTO", SATURATED, TV, 5e-3)
def kto_probe():
    """Bad answers lose everything, so mismatched ones are unlikely on average, and the reference point comes to 0."""
    return thumbs(saturated(2 * UP - 1))


@probe(THUMBS, "APO-zero without pairs", SATURATED, TV, 5e-3)
def apo_zero_unpaired_probe():
    loss = lambda ratios, good, anchor, *, beta: unpaired_preference.apo_zero_unpaired(ratios, good, beta=beta)
    return thumbs(saturated(2 * UP - 1), loss=loss, anchor=unpaired.nothing)


@probe(THUMBS, "BCO at shift -β log Z", STAR, TV, 5e-3)
def bco_probe():
    """The classifier's optimum β ρ - δ = r is a policy for δ = -β log Z alone."""
    _, value_of_optimum = enumerable.regularised_optimum(LOG_REFERENCE, REWARDS, beta=BETA)
    return thumbs(OPTIMUM, loss=unpaired_preference.bco, anchor=lambda point, rewards: -value_of_optimum)


# --- one pair ---------------------------------------------------------------------------------------------------------

CHANCES = jnp.array([0.3, 0.6, 0.9])
MARGINS = {
    "conservative DPO": (
        lambda *x: preference.conservative_dpo(*x, beta=BETA, label_smoothing=0.1),
        lambda p: jax.scipy.special.logit(0.8 * p + 0.1) / BETA,
        "logit((1-2ε) p + ε)/β",
    ),
    "IPO, one pair": (lambda *x: preference.ipo_sum(*x, beta=BETA), lambda p: (2 * p - 1) / (2 * BETA), "(2p-1)/2β"),
    "hinge (SLiC)": (lambda *x: preference.hinge(*x, beta=BETA), lambda p: jnp.sign(p - 0.5) / BETA, "±1/β"),
    "CPO with a hinge": (
        lambda *x: reference_free_preference.cpo_hinge(*x, beta=BETA),
        lambda p: jnp.sign(p - 0.5) / BETA,
        "±1/β",
    ),
    "IPO per token, answers of two tokens": (
        lambda *x: preference.ipo_mean(*x, jnp.full(3, 2), jnp.full(3, 2), beta=BETA),
        lambda p: (2 * p - 1) / BETA,
        "2 (2p-1)/2β",
    ),
    "EXO": (
        lambda *x: preference.exo(*x, beta=BETA, label_smoothing=0.1),
        lambda p: (2 * p - 1) * jax.scipy.special.logit(0.9) / BETA,
        "(2p-1) logit(1-ε)/β",
    ),
    "SPPO": (lambda *x: anchored_preference.sppo(*x, beta=BETA), lambda p: (2 * p - 1) / (2 * BETA), "(2p-1)/2β"),
    "NCA": (
        # as one answer beside a fixed one: p weighs σ(β m), ½ weighs σ(-β m)
        lambda *x: anchored_preference.nca(*x, beta=BETA),
        lambda p: jnp.log(2 * p) / BETA,
        "log(2p)/β",
    ),
}


@functools.cache
def margins() -> dict[str, jax.Array]:
    """The margins that pairs end with, preferred with these chances."""
    zero = jnp.zeros_like(CHANCES)

    def population(loss):
        return lambda margin, *_: jnp.sum(CHANCES * loss(margin, zero) + (1 - CHANCES) * loss(zero, margin))

    return minimise_all({name: population(loss) for name, (loss, *_) in MARGINS.items()}, zero + 0.1, steps=2000)


for name, (_, expected, answer) in MARGINS.items():
    probe("one pair, preferred with chance p", name, "margin " + answer, "largest error in nats", 0.02)(
        lambda name=name, expected=expected: jnp.max(jnp.abs(margins()[name] - expected(CHANCES)))
    )
