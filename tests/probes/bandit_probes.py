"""Answers of one token, so that a term per token is exact: the KL in the loss, the entropy bonus, costs and advice."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from preference_probes import TOP, bisected
from problem import BETA, LOG_REFERENCE, OPTIMUM, REWARDS, STAR, TV, UNIFORM_OPTIMUM, N, minimise_all, probe

from rlhf_jax import constraints, kl, logprobs
from rlhf_jax.losses import feedback, policy
from rlhf_jax.testing import enumerable

BANDIT = "answers of one token, samples of the policy"
COSTS = jnp.asarray([1.0, 0.0, 0.5] * 3)
MULTIPLIER = 0.8
ADVICE = jnp.asarray([3.0, -1.0, 0.0] * 3)  # right labels minus wrong ones
CONSISTENCY = 0.8


def bandit(term: Callable[[jax.Array], jax.Array], *, gain: jax.Array = REWARDS, shape=jax.nn.log_softmax):
    """REINFORCE on the gain with a second term [N], both weighted by the policy that would have drawn the answers."""

    def population(logits, old, *_):
        log_probs = shape(logits)
        weight = jnp.exp(jax.lax.stop_gradient(log_probs))
        judged = gain - jnp.sum(weight * gain)
        return jnp.sum(weight * (policy.reinforce(log_probs, judged) + term(log_probs)))

    return population


def penalty(estimate: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return bandit(lambda log_probs: BETA * estimate(log_probs, LOG_REFERENCE))


def constrained() -> Callable[..., jax.Array]:
    gain = constraints.constrained_advantages(REWARDS, COSTS, MULTIPLIER)
    return bandit(lambda log_probs: BETA * kl.full_kl(log_probs, LOG_REFERENCE), gain=gain)


CONSTRAINED, _ = enumerable.regularised_optimum(
    LOG_REFERENCE, (REWARDS - MULTIPLIER * COSTS) / (1 + MULTIPLIER), beta=BETA
)
BEST = jnp.where(jnp.arange(N) == jnp.argmax(REWARDS), 0.0, -jnp.inf)
ONE_TOKEN = {
    "k2 in the loss": (penalty(kl.k2), STAR, OPTIMUM),
    "k1 with the gradient of k2 in the loss": (penalty(kl.k1_with_k2_gradient), STAR, OPTIMUM),
    "k3 with the gradient of k2 in the loss": (penalty(kl.k3_with_k2_gradient), STAR, OPTIMUM),
    "the exact KL in the loss": (penalty(kl.full_kl), STAR, OPTIMUM),
    "k3 in the loss": (
        penalty(kl.k3),
        "π_ref β / (λ - r): its gradient is that of KL(π_ref ‖ π)",
        bisected(lambda s: -1 / s, TOP + 1e-9, TOP + 1e3),
    ),
    "k1 in the loss": (penalty(kl.k1), "the best answer alone: k1 has no gradient on average", BEST),
    "entropy bonus of weight β": (
        bandit(lambda log_probs: policy.entropy_bonus(logprobs.entropy(log_probs), coefficient=BETA)),
        "exp(r/β) / Z",
        UNIFORM_OPTIMUM,
    ),
    "advantages less λ times those of a cost": (constrained(), "π_ref exp((r - λc)/(1+λ)β) / Z", CONSTRAINED),
    "the actor behind advice (policy shaping)": (
        bandit(
            lambda log_probs: BETA * kl.k2(log_probs, LOG_REFERENCE),
            shape=lambda logits: feedback.shape_policy(logits, ADVICE, consistency=CONSISTENCY),
        ),
        "π_ref exp(r/β) / (Z Advise), so that what is done is π_ref exp(r/β) / Z",
        jax.nn.log_softmax(OPTIMUM + jnp.log1p(((1 - CONSISTENCY) / CONSISTENCY) ** ADVICE)),
    ),
}


@functools.cache
def one_token() -> dict[str, jax.Array]:
    """[N] log-probs of the actor."""
    found = minimise_all({name: loss for name, (loss, *_) in ONE_TOKEN.items()}, LOG_REFERENCE, steps=2000)
    return jax.tree.map(jax.nn.log_softmax, found)


for name, (_, answer, optimum) in ONE_TOKEN.items():
    probe(BANDIT, name, answer, TV, 1e-3)(
        lambda name=name, optimum=optimum: enumerable.total_variation(one_token()[name], optimum)
    )

# --- Advise -----------------------------------------------------------------------------------------------------------

LABELS = "labels right and wrong"
RIGHTS, WRONGS = np.array([3, 0, 1, 0]), np.array([1, 2, 0, 0])  # labels that each of four actions has got
ACTOR = np.array([0.4, 0.3, 0.2, 0.1])


def likelihood(good: bool, right: int, wrong: int) -> float:
    """Chance of an action's labels, if each says what is true with the chance that is called consistency."""
    truth, error = (right, wrong) if good else (wrong, right)
    return CONSISTENCY**truth * (1 - CONSISTENCY) ** error


def worlds() -> list[tuple[np.ndarray, float]]:
    """Which actions are good, in all ways there are, each with the chance of the labels."""
    return [
        (np.array(good), np.prod([likelihood(*x) for x in zip(good, RIGHTS, WRONGS, strict=True)]))
        for good in itertools.product((True, False), repeat=len(ACTOR))
    ]


@probe(LABELS, "Advise", "P(action is good), given labels: Bayes over all worlds", "largest error", 1e-5)
def advise_probe():
    exact = sum(chance * good for good, chance in worlds()) / sum(chance for _, chance in worlds())
    advice = feedback.advise_log_probs(jnp.asarray(RIGHTS - WRONGS, jnp.float32), consistency=CONSISTENCY)
    return jnp.max(jnp.abs(jnp.exp(advice) - exact))


@probe(LABELS, "policy shaping", "P(action), given that it is good and labels: Bayes over all worlds", TV, 1e-5)
def policy_shaping_probe():
    joint = sum(chance * good * ACTOR for good, chance in worlds())
    labels = jnp.asarray(RIGHTS - WRONGS, jnp.float32)
    shaped = feedback.shape_policy(jnp.log(ACTOR), labels, consistency=CONSISTENCY)
    return enumerable.total_variation(shaped, jnp.log(joint / joint.sum()))
