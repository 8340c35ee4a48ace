"""Advantages of groups whose own optimum is known: every group of four samples of three answers is enumerated.

Passing in k tries asks for variety where one try asks for the best guess: three prompts that the policy cannot tell
apart are each solved by another answer, so that the optimum of pass@1 is the most frequent one's answer alone, and
those of pass@2 and pass@4 are mixtures.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from problem import BETA, TV, minimise_all, probe, root

from rlhf_jax import group_advantages, kl, pass_at_k
from rlhf_jax.losses import policy
from rlhf_jax.testing import enumerable

ENUMERATED = "groups of four, all enumerated"
A, G = 3, 4
GROUPS = list(itertools.product(range(A), repeat=G))
ROWS = jnp.array(GROUPS)  # [A^G, G] the answer of every sample
SHARES = np.array([0.45, 0.3, 0.25])  # of prompts that each answer solves


def log_softmax(free: np.ndarray) -> np.ndarray:
    """Log-probs of the answers in float64; the last logit is 0."""
    logits = np.append(free, 0.0)
    return logits - np.logaddexp.reduce(logits)


def grouped(judged: jax.Array) -> Callable[..., jax.Array]:
    """The mean loss of all groups, each as likely as the policy draws it; advantages [A^G * G] in their order."""

    def population(logits, old, *_):
        log_probs = jax.nn.log_softmax(logits)[ROWS]
        weight = jnp.exp(jnp.sum(jax.nn.log_softmax(old)[ROWS], axis=-1))
        return jnp.sum(weight * jnp.mean(policy.reinforce(log_probs, judged.reshape(ROWS.shape)), axis=-1))

    return population


def over_prompts(advantage: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mean advantage of every sample over the prompts, from which of a prompt's samples are right."""
    return sum(share * advantage(ROWS.reshape(-1) == answer) for answer, share in enumerate(SHARES))


def best_mixture(k: int) -> np.ndarray:
    """Maximises Σ q (1 - (1 - π)^k): a wrong answer's chance 1 - π goes with q^(-1/(k - 1))."""
    wrong = SHARES ** (-1 / (k - 1))
    return np.log(1 - wrong * (A - 1) / wrong.sum())


def chen_rest(k: int) -> np.ndarray:
    """Where the standardised advantage of pass@k rests: every prompt pulls its answer as hard.

    Of four samples c ~ Bin(4, π) are right. Each has the advantage (1 - R) / √(R (1 - R)) with R = 1 - C(4 - c, k) /
    C(4, k); the wrong ones take the same total away, so that a prompt pulls by E[Σ A] / π (1 - π) per unit of π.
    """

    def pull(p: float) -> float:
        total = 0.0
        for right in range(1, G + 1):
            passed = 1 - math.comb(G - right, k) / math.comb(G, k)
            if passed < 1:
                gain = (1 - passed) / math.sqrt(passed * (1 - passed))
                total += math.comb(G, right) * p**right * (1 - p) ** (G - right) * right * gain
        return total / (p * (1 - p))

    def residual(free: np.ndarray) -> np.ndarray:
        pulls = [share * pull(p) for share, p in zip(SHARES, np.exp(log_softmax(free)), strict=True)]
        return np.diff(pulls)

    return log_softmax(root(residual, np.log(SHARES[:-1] / SHARES[-1])))


def passed(right: jax.Array) -> jax.Array:
    """Every sample of a group is credited with the group's pass@2."""
    chance = pass_at_k.pass_at_k(jnp.sum(right.reshape(ROWS.shape), axis=-1), G, k=2)
    return jnp.repeat(chance, G)


PASS_1 = "pass@k training, k = 1"
PASSING = {
    "pass@2 of four samples as the reward": (
        over_prompts(passed),
        "max pass@2, 1 - π ∝ 1/q",
        lambda: best_mixture(2),
    ),
    "best-of-group advantage": (
        over_prompts(lambda right: pass_at_k.best_of_group_advantage(right.astype(jnp.float32), group=G)),
        "max pass@4, 1 - π ∝ q^(-1/3)",
        lambda: best_mixture(G),
    ),
    "pass@k training, k = 2": (
        over_prompts(lambda right: pass_at_k.pass_at_k_advantage(right, group=G, k=2)),
        "q E[Σ A] / π (1 - π) equal for all answers, binomial sums",
        lambda: chen_rest(2),
    ),
    "pass@k training, k = 3": (
        over_prompts(lambda right: pass_at_k.pass_at_k_advantage(right, group=G, k=3)),
        "q E[Σ A] / π (1 - π) equal for all answers, binomial sums",
        lambda: chen_rest(3),
    ),
    PASS_1: (
        over_prompts(lambda right: pass_at_k.pass_at_k_advantage(right, group=G, k=1)),
        "max pass@1, the answer to most prompts alone",
        lambda: np.log([1.0, 1e-30, 1e-30]),
    ),
}

# --- GDPO -------------------------------------------------------------------------------------------------------------

LOG_START = jnp.log(jnp.array([0.5, 0.3, 0.2]))
SCORES = jnp.array([[100.0, 0.0], [0.0, 1.0], [40.0, 0.8]])  # [A, 2] two rewards, one a hundred times the other
WEIGHTS = (1.0, 1.5)


def with_kl(judged: jax.Array) -> Callable[..., jax.Array]:
    """The exact KL to the start is added, so that the answer lies inside."""
    policy_gradient = grouped(judged)
    return lambda logits, *x: policy_gradient(logits, *x) + BETA * kl.full_kl(logits, LOG_START)


def gdpo_rest() -> np.ndarray:
    """π_ref exp(a / β) / Z, where π a is what an answer collects on average of the advantages of a group, over G."""
    scores, reference = (np.asarray(x, np.float64) for x in (SCORES, LOG_START))
    judged = []
    for group in GROUPS:
        total = np.zeros(G)
        for reward, weight in zip(scores.T, WEIGHTS, strict=True):
            mine = reward[list(group)]
            total += weight * (mine - mine.mean()) / (mine.std(ddof=1) + 1e-4)
        judged.append(total)
    scale = math.sqrt(np.concatenate(judged).var() + 1e-8)

    def residual(free: np.ndarray) -> np.ndarray:
        log_p = log_softmax(free)
        collected = np.zeros(A)
        for group, advantages in zip(GROUPS, judged, strict=True):
            chance = math.exp(sum(log_p[answer] for answer in group))
            for answer, advantage in zip(group, advantages, strict=True):
                collected[answer] += chance * advantage / scale / G
        return np.diff(log_p - reference - collected / (BETA * np.exp(log_p)))

    return log_softmax(root(residual, reference[:-1] - reference[-1]))


TWO_REWARDS = SCORES[ROWS.reshape(-1)]
SUMMED = "GRPO on the sum of both rewards, against GDPO's answer"
SEPARATE = {
    "GDPO, rewards of scale 100 and 1": (
        with_kl(group_advantages.gdpo(TWO_REWARDS, group=G, weights=jnp.array(WEIGHTS))),
        "π_ref exp(a/β) / Z, a the answer's mean advantage under π",
        gdpo_rest,
    )
}


@functools.cache
def passing() -> dict[str, jax.Array]:
    """[A] log-probs that the groups of the three prompts end at."""
    found = minimise_all({name: grouped(judged) for name, (judged, *_) in PASSING.items()}, LOG_START)
    return jax.tree.map(jax.nn.log_softmax, found)


@functools.cache
def separate() -> dict[str, jax.Array]:
    """[A] log-probs that the groups with two rewards end at."""
    summed = with_kl(group_advantages.group_relative(jnp.sum(TWO_REWARDS * jnp.array([WEIGHTS]), axis=-1), group=G))
    losses = {name: loss for name, (loss, *_) in SEPARATE.items()} | {SUMMED: summed}
    return jax.tree.map(jax.nn.log_softmax, minimise_all(losses, LOG_START))


def distance(found: Callable[[], dict[str, jax.Array]], name: str, answer: Callable[[], np.ndarray]) -> jax.Array:
    return enumerable.total_variation(found()[name], jnp.asarray(answer(), jnp.float32))


for found, problems in ((passing, PASSING), (separate, SEPARATE)):
    for name, (_, answer, optimum) in problems.items():
        probe(ENUMERATED, name, answer, TV, 1e-3)(functools.partial(distance, found, name, optimum))
