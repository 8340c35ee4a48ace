"""Float64 answers by explicit loops, written from the definitions and from nothing else, to test fast code against.

Everything takes nested sequences or NumPy arrays and returns Python floats or float64 arrays. Masks are bool, True
counts; a slot outside the mask is never read. Slow on purpose.
"""

import math
from collections.abc import Sequence

import numpy as np

__all__ = [
    "bradley_terry",
    "clipped_surrogate",
    "cross_entropy",
    "discounted_returns",
    "dpo",
    "entropy",
    "gae",
    "group_relative",
    "ipo",
    "jensen_shannon",
    "k1",
    "k2",
    "k3",
    "kl_divergence",
    "lambda_returns",
    "leave_one_out",
    "log_sigmoid",
    "log_softmax",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "sequence_mean",
    "sequence_sum",
    "token_log_probs",
    "token_mean",
    "vtrace",
    "whiten",
]

Vector = Sequence[float] | np.ndarray
Matrix = Sequence[Sequence[float]] | Sequence[np.ndarray] | np.ndarray
Flags = Sequence[bool] | np.ndarray


# --- masked statistics ------------------------------------------------------------------------------------------------


def _kept(x: Matrix | Vector, mask: Matrix | Flags) -> list[float]:
    kept = []
    for value, keep in zip(np.ravel(x), np.ravel(mask), strict=True):
        if keep:
            kept.append(float(value))
    return kept


def masked_sum(x: Matrix | Vector, mask: Matrix | Flags) -> float:
    """Σ of the true slots.

    >>> masked_sum([1.0, math.nan], [True, False])
    1.0
    """
    return math.fsum(_kept(x, mask))


def masked_mean(x: Matrix | Vector, mask: Matrix | Flags) -> float:
    """Mean of the true slots, 0 if there is none."""
    kept = _kept(x, mask)
    return math.fsum(kept) / len(kept) if kept else 0.0


def masked_variance(x: Matrix | Vector, mask: Matrix | Flags, *, ddof: int = 0) -> float:
    """Σ (x - mean)² / (n - ddof) of the true slots, 0 unless n > ddof."""
    kept = _kept(x, mask)
    if len(kept) <= ddof:
        return 0.0
    mean = math.fsum(kept) / len(kept)
    return math.fsum((value - mean) ** 2 for value in kept) / (len(kept) - ddof)


def whiten(x: Matrix, mask: Matrix, *, shift_mean: bool = True, ddof: int = 0, epsilon: float = 1e-8) -> np.ndarray:
    """(x - mean) / √(variance + ε) at the true slots (plus the mean again if not shifted), 0 elsewhere."""
    mean, deviation = masked_mean(x, mask), math.sqrt(masked_variance(x, mask, ddof=ddof) + epsilon)
    white = np.zeros(np.shape(x))
    for slot in np.ndindex(white.shape):
        if np.asarray(mask)[slot]:
            white[slot] = (float(np.asarray(x)[slot]) - mean) / deviation + (0.0 if shift_mean else mean)
    return white


def token_mean(x: Matrix, mask: Matrix) -> float:
    """Mean over all tokens of the batch (DAPO)."""
    return masked_mean(x, mask)


def _rows(x: Matrix, mask: Matrix) -> list[list[float]]:
    rows = [_kept(np.asarray(row), np.asarray(kept)) for row, kept in zip(x, mask, strict=True)]
    return [row for row in rows if row]


def sequence_mean(x: Matrix, mask: Matrix) -> float:
    """Mean over rows with a token of each row's token mean (GRPO)."""
    rows = _rows(x, mask)
    return math.fsum(math.fsum(row) / len(row) for row in rows) / len(rows) if rows else 0.0


def sequence_sum(x: Matrix, mask: Matrix) -> float:
    """Mean over rows with a token of each row's token sum."""
    rows = _rows(x, mask)
    return math.fsum(math.fsum(row) for row in rows) / len(rows) if rows else 0.0


# --- distributions ----------------------------------------------------------------------------------------------------


def log_softmax(logits: Vector) -> np.ndarray:
    """x - log Σ exp x of one vector [V]."""
    x = np.asarray(logits, np.float64)
    top = max(float(value) for value in x)
    return x - top - math.log(math.fsum(math.exp(float(value) - top) for value in x))


def token_log_probs(logits: np.ndarray, tokens: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """log softmax(logits / temperature)[token] for logits [..., V] and tokens [...], aligned (not shifted)."""
    result = np.zeros(np.shape(tokens))
    for slot in np.ndindex(result.shape):
        result[slot] = log_softmax(np.asarray(logits, np.float64)[slot] / temperature)[int(np.asarray(tokens)[slot])]
    return result


def entropy(logits: Vector) -> float:
    """-Σ p log p of one distribution, in nats."""
    return -math.fsum(math.exp(value) * value for value in log_softmax(logits))


def cross_entropy(target_logits: Vector, logits: Vector) -> float:
    """H(P, Q) = -Σ P log Q, P of the first logits."""
    return -math.fsum(math.exp(p) * q for p, q in zip(log_softmax(target_logits), log_softmax(logits), strict=True))


def kl_divergence(logits: Vector, other_logits: Vector) -> float:
    """KL(P ‖ Q) = Σ P (log P - log Q)."""
    pairs = zip(log_softmax(logits), log_softmax(other_logits), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


def jensen_shannon(logits: Vector, other_logits: Vector, *, weight: float = 0.5) -> float:
    """β KL(P ‖ M) + (1 - β) KL(Q ‖ M) with M = β P + (1 - β) Q."""
    log_p, log_q = log_softmax(logits), log_softmax(other_logits)
    log_m = [math.log(weight * math.exp(p) + (1 - weight) * math.exp(q)) for p, q in zip(log_p, log_q, strict=True)]
    return weight * kl_divergence(log_p, log_m) + (1 - weight) * kl_divergence(log_q, log_m)


def k1(log_prob: float, reference_log_prob: float) -> float:
    """Δ = log π - log π_ref: unbiased for KL(π ‖ π_ref) under samples of π."""
    return float(log_prob) - float(reference_log_prob)


def k2(log_prob: float, reference_log_prob: float) -> float:
    """½ Δ²."""
    return 0.5 * k1(log_prob, reference_log_prob) ** 2


def k3(log_prob: float, reference_log_prob: float) -> float:
    """exp(-Δ) - 1 + Δ: unbiased and never negative."""
    delta = k1(log_prob, reference_log_prob)
    return math.expm1(-delta) + delta


# --- returns and advantages, one row at a time ------------------------------------------------------------------------


def _steps(mask: Flags) -> list[int]:
    return [t for t, keep in enumerate(mask) if keep]


def discounted_returns(
    rewards: Vector, mask: Flags, *, discount: float = 1.0, bootstrap_value: float = 0.0
) -> np.ndarray:
    """G_t = r_t + γ r_next + γ² ... over the true slots, 0 elsewhere."""
    result, steps = np.zeros(len(rewards)), _steps(mask)
    for index, t in enumerate(steps):
        later = steps[index:]
        result[t] = math.fsum(discount**k * float(rewards[s]) for k, s in enumerate(later))
        result[t] += discount ** len(later) * bootstrap_value
    return result


def gae(
    rewards: Vector,
    values: Vector,
    mask: Flags,
    *,
    discount: float = 1.0,
    lambda_: float = 0.95,
    bootstrap_value: float = 0.0,
) -> np.ndarray:
    """A_t = Σ_k (γλ)^k δ_{t+k} by the sum itself (Schulman et al. 2016, eq. 16), over the true slots, holes skipped."""
    result, steps = np.zeros(len(rewards)), _steps(mask)
    deltas = []
    for index, t in enumerate(steps):
        following = float(values[steps[index + 1]]) if index + 1 < len(steps) else bootstrap_value
        deltas.append(float(rewards[t]) + discount * following - float(values[t]))
    for index, t in enumerate(steps):
        result[t] = math.fsum((discount * lambda_) ** k * delta for k, delta in enumerate(deltas[index:]))
    return result


def lambda_returns(
    rewards: Vector,
    values: Vector,
    mask: Flags,
    *,
    discount: float = 1.0,
    lambda_: float = 0.95,
    bootstrap_value: float = 0.0,
) -> np.ndarray:
    """(1 - λ) Σ_n λ^(n-1) G^(n) with the rest of the weight on the full return, by the n-step returns themselves."""
    result, steps = np.zeros(len(rewards)), _steps(mask)
    for index, t in enumerate(steps):
        left = len(steps) - index
        total = 0.0
        for n in range(1, left + 1):
            partial = math.fsum(discount**k * float(rewards[steps[index + k]]) for k in range(n))
            tail = float(values[steps[index + n]]) if n < left else bootstrap_value
            weight = (1 - lambda_) * lambda_ ** (n - 1) if n < left else lambda_ ** (n - 1)
            total += weight * (partial + discount**n * tail)
        result[t] = total
    return result


def vtrace(
    log_ratios: Vector,
    rewards: Vector,
    values: Vector,
    mask: Flags,
    *,
    discount: float = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    bootstrap_value: float = 0.0,
) -> np.ndarray:
    """Targets v_t = V_t + Σ_k γ^k (Π c) δ_{t+k} by the double sum (Espeholt et al. 2018, eq. 1); 0 outside the mask."""
    result, steps = np.zeros(len(rewards)), _steps(mask)
    for index, t in enumerate(steps):
        total, product = float(values[t]), 1.0
        for k, s in enumerate(steps[index:]):
            place = index + k
            following = float(values[steps[place + 1]]) if place + 1 < len(steps) else bootstrap_value
            ratio = math.exp(float(log_ratios[s]))
            delta = min(clip_rho, ratio) * (float(rewards[s]) + discount * following - float(values[s]))
            total += discount**k * product * delta
            product *= min(clip_c, ratio)
        result[t] = total
    return result


def group_relative(rewards: Vector, *, group: int, ddof: int = 0, epsilon: float = 1e-4) -> np.ndarray:
    """(r - mean) / (standard deviation + ε) inside each run of `group` rewards."""
    result = np.zeros(len(rewards))
    for start in range(0, len(rewards), group):
        block = [float(r) for r in rewards[start : start + group]]
        deviation = math.sqrt(masked_variance(block, [True] * group, ddof=ddof))
        for offset, reward in enumerate(block):
            result[start + offset] = (reward - math.fsum(block) / group) / (deviation + epsilon)
    return result


def leave_one_out(rewards: Vector, *, group: int) -> np.ndarray:
    """Each reward minus the mean of the others of its group (RLOO)."""
    result = np.zeros(len(rewards))
    for start in range(0, len(rewards), group):
        for place in range(start, start + group):
            others = [float(rewards[other]) for other in range(start, start + group) if other != place]
            result[place] = float(rewards[place]) - math.fsum(others) / len(others)
    return result


# --- losses, one token or pair at a time ------------------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    """-log(1 + exp(-x)) without overflow.

    >>> round(log_sigmoid(0.0), 4)
    -0.6931
    """
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def clipped_surrogate(log_prob: float, old_log_prob: float, advantage: float, *, clip: float = 0.2) -> float:
    """-min(ratio A, clip(ratio, 1 - ε, 1 + ε) A) (Schulman et al. 2017, eq. 7)."""
    ratio = math.exp(float(log_prob) - float(old_log_prob))
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def dpo(chosen_log_ratio: float, rejected_log_ratio: float, *, beta: float = 0.1) -> float:
    """-log σ(β (chosen - rejected)) (Rafailov et al. 2023, eq. 7)."""
    return -log_sigmoid(beta * (float(chosen_log_ratio) - float(rejected_log_ratio)))


def ipo(chosen_log_ratio: float, rejected_log_ratio: float, *, beta: float = 0.1) -> float:
    """(chosen - rejected - 1 / (2 β))² (Azar et al. 2024, eq. 17)."""
    return (float(chosen_log_ratio) - float(rejected_log_ratio) - 1 / (2 * beta)) ** 2


def bradley_terry(chosen_reward: float, rejected_reward: float, *, margin: float = 0.0) -> float:
    """-log σ(chosen - rejected - margin)."""
    return -log_sigmoid(float(chosen_reward) - float(rejected_reward) - margin)
