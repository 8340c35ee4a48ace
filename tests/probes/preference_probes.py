# ruff: noqa: RUF001  (Greek letters in answers are meant)
"""Losses on preferences, run to the policy or the margin that their labels imply."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
    probe,
    whole,
)

from rlhf_jax.losses import (
    anchored_preference,
    divergence_preference,
    online_preference,
    preference,
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


@probe(PAIRS, "Nash-MD", "its own best response, π_ref exp(P(y ≻ π_mix)/β) / Z", TV, 5e-3)
def nash_md_probe():
    def opponent(log_p):
        mixed = jax.nn.log_softmax(0.5 * log_p + 0.5 * LOG_REFERENCE)
        return jnp.sum(WINS.reshape(N, N) * jnp.exp(mixed)[None], axis=-1)

    def population(table, old, key, step):
        log_p = whole(old)
        loss = online_preference.nash_md(whole(table), LOG_REFERENCE, opponent(log_p), beta=BETA)
        return jnp.sum(jnp.exp(log_p) * loss)

    log_p = whole(minimise(population, REFERENCE))
    response, _ = enumerable.regularised_optimum(LOG_REFERENCE, opponent(log_p), beta=BETA)
    return enumerable.total_variation(log_p, response)


@probe(PAIRS, "BCO pairs at shift -β log Z", STAR, TV, 5e-3)
def bco_probe():
    """Thumbs up with chance σ(r): the classifier's optimum β ρ - δ = r is a policy for δ = -β log Z alone."""
    _, value_of_optimum = enumerable.regularised_optimum(LOG_REFERENCE, REWARDS, beta=BETA)
    up = jax.nn.sigmoid(REWARDS)

    def population(table, old, key, step):
        ratios = whole(table) - LOG_REFERENCE
        good, bad = (
            unpaired_preference.bco(ratios, jnp.full(N, wanted), -value_of_optimum, beta=BETA)
            for wanted in (True, False)
        )
        return jnp.sum(jnp.exp(LOG_REFERENCE) * (up * good + (1 - up) * bad))

    return enumerable.total_variation(whole(minimise(population, REFERENCE)), OPTIMUM)


def margins(loss: Callable[..., jax.Array], expected: Callable[[jax.Array], jax.Array], wins: jax.Array) -> jax.Array:
    """Largest error of the margin that one pair ends with, preferred with these chances."""
    zero = jnp.zeros_like(wins)

    def population(margin, old, key, step):
        return jnp.sum(wins * loss(margin, zero) + (1 - wins) * loss(zero, margin))

    return jnp.max(jnp.abs(minimise(population, zero + 0.1, steps=2000) - expected(wins)))


CHANCES = jnp.array([0.3, 0.6, 0.9])
MARGINS = {
    "conservative DPO": (
        lambda *x: preference.conservative_dpo(*x, beta=BETA, label_smoothing=0.1),
        lambda p: jax.scipy.special.logit(0.8 * p + 0.1) / BETA,
        "logit((1-2ε) p + ε)/β",
    ),
    "IPO, one pair": (lambda *x: preference.ipo_sum(*x, beta=BETA), lambda p: (2 * p - 1) / (2 * BETA), "(2p-1)/2β"),
    "hinge (SLiC)": (lambda *x: preference.hinge(*x, beta=BETA), lambda p: jnp.sign(p - 0.5) / BETA, "±1/β"),
    "NCA": (
        # as one answer beside a fixed one: p weighs σ(β m), ½ weighs σ(-β m)
        lambda *x: anchored_preference.nca(*x, beta=BETA),
        lambda p: jnp.log(2 * p) / BETA,
        "log(2p)/β",
    ),
}
for name, (loss, expected, answer) in MARGINS.items():
    probe("one pair, preferred with chance p", name, "margin " + answer, "largest error in nats", 0.02)(
        lambda loss=loss, expected=expected: margins(loss, expected, CHANCES)
    )
