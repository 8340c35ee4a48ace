"""Preference losses that depend on a pair's margin alone: DPO and the other functions of ρ_w - ρ_l.

One signature for all: ``(chosen_log_ratios, rejected_log_ratios, *, beta, knobs) -> loss per pair [...]``. A log-ratio
ρ is a completion's summed log π(y|x) - log π_ref(y|x), over completion tokens only, in nats; β ρ is the reward that
the policy implies. Adding the same number to both log-ratios of a pair (to both per-token means in the `_mean` forms)
changes nothing here. Losses are unreduced, float32 (float64 inputs stay float64); the gradient flows into both
log-ratios.

Where the others are: `anchored_preference` (each log-ratio has its own target), `divergence_preference` (f-DPO),
`distributional_preference` (AOT), `reference_free_preference` (CPO, SimPO, ORPO ...), `unpaired_preference` (KTO, BCO),
`online_preference` (online DPO, XPO, Nash-MD), `preference_inputs` (LD-DPO's sum, WPO's weights).

A mixture of losses is their weighted sum, for instance MPO (Wang et al. 2024, https://arxiv.org/abs/2411.10442):

>>> from rlhf_jax.losses.anchored_preference import bco_pair
>>> chosen, rejected, chosen_nll = jnp.array([0.4]), jnp.array([-0.2]), jnp.array([1.5])
>>> mixture = 0.8 * dpo(chosen, rejected) + 0.2 * bco_pair(chosen, rejected, beta=0.1) + 1.0 * chosen_nll
>>> [round(x, 3) for x in mixture.tolist()]
[2.302]
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import bounded_exp, floating, knob, per_token

__all__ = [
    "accuracy",
    "conservative_dpo",
    "discopop",
    "dpo",
    "dpo_mean",
    "exo",
    "hinge",
    "ipo_mean",
    "ipo_sum",
    "robust_dpo",
]


def _margins(chosen_log_ratios: Array, rejected_log_ratios: Array) -> Array:
    chosen, rejected = floating(chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    return chosen - rejected


def _logits(chosen_log_ratios: Array, rejected_log_ratios: Array, beta: ArrayLike) -> Array:
    margins = _margins(chosen_log_ratios, rejected_log_ratios)
    return knob(beta, margins) * margins


def _mean_margins(chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array) -> Array:
    chosen, rejected = floating(chosen_log_ratios=chosen, rejected_log_ratios=rejected)
    return per_token(chosen, chosen_lengths) - per_token(rejected, rejected_lengths)


def dpo(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1) -> Array:
    """Direct preference optimisation: -log σ(β (ρ_w - ρ_l)).

    Args:
      chosen_log_ratios: [...] summed log π - log π_ref of the preferred completions, in nats.
      rejected_log_ratios: [...] the same of the rejected completions.
      beta: strength of the implied KL constraint; larger stays closer to the reference. Default 0.1 (appendix B).
    Returns:
      [...] loss per pair. Equal log-ratios give log 2.
    Raises:
      TypeError: an input is not floating. AssertionError: shapes differ.
    Reference: Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290

    >>> round(float(dpo(jnp.array(0.0), jnp.array(0.0))), 4)
    0.6931
    """
    return -jax.nn.log_sigmoid(_logits(chosen_log_ratios, rejected_log_ratios, beta))


def dpo_mean(
    chosen_log_ratios: Array,
    rejected_log_ratios: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    beta: ArrayLike = 5.0,
) -> Array:
    """Length-normalised DPO: -log σ(β (ρ_w / |y_w| - ρ_l / |y_l|)).

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed over tokens, as for `dpo`.
      chosen_lengths, rejected_lengths: [...] completion tokens; 0 counts as 1.
      beta: per token, hence larger than in `dpo`. Default 5 (Tülu 3).
    Returns:
      [...] loss per pair. Lengths of 1 give `dpo`.
    Reference: Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124

    >>> round(float(dpo_mean(jnp.array([4.0]), jnp.array([2.0]), jnp.array([2]), jnp.array([1]))[0]), 4)
    0.6931
    """
    return -jax.nn.log_sigmoid(
        beta * _mean_margins(chosen_log_ratios, rejected_log_ratios, chosen_lengths, rejected_lengths)
    )


def conservative_dpo(
    chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1, label_smoothing: ArrayLike = 0.1
) -> Array:
    """cDPO, for labels flipped with probability ε: -(1 - ε) log σ(β Δ) - ε log σ(-β Δ), Δ = ρ_w - ρ_l.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] as for `dpo`.
      beta: as for `dpo`. Default 0.1.
      label_smoothing: ε, [] or [...] per pair. Default 0.1 (the baseline's in Chowdhury et al. 2024, section 6).
    Returns:
      [...] loss per pair, minimal at β Δ = log((1 - ε) / ε). ε = 0 gives `dpo`; ε = 0.5 is minimal at Δ = 0.
    Reference: Mitchell 2023, https://ericmitchell.ai/cdpo.pdf

    >>> round(float(conservative_dpo(jnp.array(3.0), jnp.array(3.0), label_smoothing=0.3)), 4)
    0.6931
    """
    logits = _logits(chosen_log_ratios, rejected_log_ratios, beta)
    epsilon = knob(label_smoothing, logits)
    return -(1 - epsilon) * jax.nn.log_sigmoid(logits) - epsilon * jax.nn.log_sigmoid(-logits)


def robust_dpo(
    chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1, label_smoothing: ArrayLike = 0.1
) -> Array:
    """Robust DPO: ((1 - ε) ℓ(Δ) - ε ℓ(-Δ)) / (1 - 2 ε), ℓ(Δ) = -log σ(β Δ).

    Over labels flipped with probability ε its mean is the DPO loss of the true labels.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] as for `dpo`.
      beta: as for `dpo`. Default 0.1 (appendix B).
      label_smoothing: ε in [0, 0.5), [] or [...] per pair. Default 0.1 (section 6).
    Returns:
      [...] loss per pair, unbounded below as Δ grows. ε = 0 gives `dpo`; equal log-ratios give log 2.
    Reference: Chowdhury, Kini and Natarajan 2024, https://arxiv.org/abs/2403.00409

    >>> round(float(robust_dpo(jnp.array(3.0), jnp.array(3.0), label_smoothing=0.3)), 4)
    0.6931
    """
    logits = _logits(chosen_log_ratios, rejected_log_ratios, beta)
    kept, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    epsilon = knob(label_smoothing, logits)
    return (epsilon * flipped - (1 - epsilon) * kept) / (1 - 2 * epsilon)


def hinge(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.05) -> Array:
    """Hinge on the normalised margin (SLiC, RSO): max(0, 1 - β (ρ_w - ρ_l)).

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] as for `dpo`.
      beta: γ in RSO; 1 / β nats of margin are enough. Default 0.05 (RSO).
    Returns:
      [...] loss per pair. Equal log-ratios give 1; a margin above 1 / β gives 0 without gradient.
    Reference: Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425;
      Liu et al. 2023 (RSO, hinge-norm), https://arxiv.org/abs/2309.06657

    >>> hinge(jnp.array([0.0, 30.0]), jnp.array([0.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    return jax.nn.relu(1 - _logits(chosen_log_ratios, rejected_log_ratios, beta))


def ipo_sum(chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1) -> Array:
    """Identity preference optimisation on summed log-ratios: (ρ_w - ρ_l - 1 / (2 β))².

    The equation as printed, and as OpenRLHF computes it. TRL computes `ipo_mean`; their betas do not compare.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] as for `dpo`.
      beta: τ in the paper. Default 0.1, one of its values.
    Returns:
      [...] loss per pair, 0 at a margin of 1 / (2 β), however sure the label is.
    Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036

    >>> float(ipo_sum(jnp.array(6.0), jnp.array(1.0), beta=0.1))
    0.0
    """
    margins = _margins(chosen_log_ratios, rejected_log_ratios)
    return jnp.square(margins - 0.5 / knob(beta, margins))


def ipo_mean(
    chosen_log_ratios: Array,
    rejected_log_ratios: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    beta: ArrayLike = 0.1,
) -> Array:
    """Identity preference optimisation per token: (ρ_w / |y_w| - ρ_l / |y_l| - 1 / (2 β))².

    What TRL computes; by its account also what the paper's authors ran.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed over tokens, as for `dpo`.
      chosen_lengths, rejected_lengths: [...] completion tokens; 0 counts as 1.
      beta: τ in the paper. Default 0.1 (TRL).
    Returns:
      [...] loss per pair. Lengths of 1 give `ipo_sum`.
    Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036

    >>> float(ipo_mean(jnp.array([12.0]), jnp.array([1.0]), jnp.array([2]), jnp.array([1]), beta=0.1)[0])
    0.0
    """
    margins = _mean_margins(chosen_log_ratios, rejected_log_ratios, chosen_lengths, rejected_lengths)
    return jnp.square(margins - 0.5 / knob(beta, margins))


def exo(
    chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.1, label_smoothing: ArrayLike = 1e-3
) -> Array:
    """Efficient exact optimisation of a pair: KL(q ‖ p), q = σ(β (ρ_w - ρ_l)), p = 1 - ε.

    The reverse of the KL that cDPO minimises: q log(q / p) + (1 - q) log((1 - q) / (1 - p)).

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] as for `dpo`.
      beta: β_π. Default 0.1 (appendix B).
      label_smoothing: ε, above 0, since log ε enters; [] or [...] per pair. Default 1e-3 (the authors' code).
    Returns:
      [...] loss per pair, at least 0, and 0 where q = 1 - ε, the minimum of `conservative_dpo`.
    Reference: Ji et al. 2024, https://arxiv.org/abs/2402.00856

    >>> round(abs(float(exo(jnp.log(4.0), jnp.array(0.0), beta=1.0, label_smoothing=0.2))), 5)
    0.0
    """
    logits = _logits(chosen_log_ratios, rejected_log_ratios, beta)
    epsilon = knob(label_smoothing, logits)
    won = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-epsilon))
    lost = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(epsilon))
    return won + lost


def discopop(
    chosen_log_ratios: Array, rejected_log_ratios: Array, *, beta: ArrayLike = 0.05, tau: ArrayLike = 0.05
) -> Array:
    """DiscoPOP, the log-ratio modulated loss: (1 - m) (-log σ(z)) + m exp(-z), z = β (ρ_w - ρ_l), m = σ(z / τ).

    The product m exp(-z) is one exponential, since exp(-z) alone leaves float32 at z = -89.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] as for `dpo`.
      beta: as for `dpo`. Default 0.05 (appendix B.1).
      tau: τ, width of the blend. Default 0.05 (appendix E); infinite gives the mean of the two losses.
    Returns:
      [...] loss per pair, neither convex nor monotonic near 0. Equal log-ratios give (log 2 + 1) / 2.
    Reference: Lu et al. 2024, https://arxiv.org/abs/2406.08414

    >>> round(float(discopop(jnp.array(1.0), jnp.array(1.0))), 4)
    0.8466
    """
    logits = _logits(chosen_log_ratios, rejected_log_ratios, beta)
    modulation = logits / tau
    logistic = -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-modulation)
    return logistic + bounded_exp(jax.nn.log_sigmoid(modulation) - logits)


def accuracy(chosen: Array, rejected: Array) -> Array:
    """Whether a pair is ranked as the person ranked it: 1 if chosen > rejected, ½ if equal, 0 otherwise.

    Args:
      chosen, rejected: [...] log-ratios, rewards or scores.
    Returns:
      [...] float. A policy equal to its reference has accuracy ½, not 0.

    >>> accuracy(jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (jnp.sign(jax.lax.stop_gradient(_margins(chosen, rejected))) + 1) / 2
