"""Reward-model losses over pairs of scores: Bradley-Terry, what is added to it, and its extensions to ties.

Scores are a reward model's outputs, one per completion. Losses are per pair, unreduced, float32 (float64 inputs stay
float64). All but `centring` depend on the scores' difference only. A mixture is a sum:

>>> chosen, rejected = jnp.array([2.0]), jnp.array([1.0])
>>> loss = bradley_terry(chosen, rejected) + 0.01 * centring(chosen, rejected)
>>> [round(x, 4) for x in loss.tolist()]
[0.4033]

Lists of more than two are in `ranking`, ratings and step labels in `rating`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses._pairs import check_flags, floating, knob

__all__ = [
    "OutcomeLogProbs",
    "bradley_terry",
    "centring",
    "davidson",
    "davidson_log_probs",
    "rao_kupper",
    "rao_kupper_log_probs",
    "soft_bradley_terry",
]


def bradley_terry(
    chosen_scores: Array, rejected_scores: Array, *, margin: ArrayLike = 0.0, label_smoothing: ArrayLike = 0.0
) -> Array:
    """Bradley-Terry likelihood of the observed choice: -(1 - ε) log σ(Δ) - ε log σ(-Δ), Δ = s_w - s_l - margin.

    Args:
      chosen_scores: [...] scores of the preferred completions.
      rejected_scores: [...] scores of the rejected completions.
      margin: [] or [...] how far apart the scores should be, larger for clearer preferences. Default 0.
      label_smoothing: ε, [] or [...], probability that the label is flipped. Default 0.
    Returns:
      [...] loss per pair. Equal scores and no margin give log 2; ε = 0.5 has its minimum log 2 at Δ = 0.
    Raises:
      TypeError: a score is not floating. AssertionError: shapes differ.
    Reference: Bradley and Terry 1952; margin: Touvron et al. 2023 (Llama 2), eq. 2, https://arxiv.org/abs/2307.09288

    >>> round(float(bradley_terry(jnp.array(2.0), jnp.array(0.0), margin=2.0)), 4)
    0.6931
    """
    chosen, rejected = floating(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    difference = chosen - rejected - margin
    epsilon = knob(label_smoothing, difference)
    return -(1 - epsilon) * jax.nn.log_sigmoid(difference) - epsilon * jax.nn.log_sigmoid(-difference)


def soft_bradley_terry(first_scores: Array, second_scores: Array, first_win_probabilities: Array) -> Array:
    """Bradley-Terry cross-entropy for a soft label: -p log σ(s₁ - s₂) - (1 - p) log σ(s₂ - s₁).

    Args:
      first_scores, second_scores: [...] scores of the two completions.
      first_win_probabilities: [...] p in [0, 1], share of people who prefer the first; ½ for a tie. Stopped.
    Returns:
      [...] loss per pair, minimal at s₁ - s₂ = log(p / (1 - p)). It is `bradley_terry` with label_smoothing 1 - p.
    Reference: Christiano et al. 2017, section 2.2.3, https://arxiv.org/abs/1706.03741

    >>> round(float(soft_bradley_terry(jnp.array(1.0), jnp.array(1.0), jnp.array(0.8))), 4)
    0.6931
    """
    _, _, p = floating(
        first_scores=first_scores, second_scores=second_scores, first_win_probabilities=first_win_probabilities
    )
    return bradley_terry(first_scores, second_scores, label_smoothing=1 - jax.lax.stop_gradient(p))


def centring(chosen_scores: Array, rejected_scores: Array) -> Array:
    """The term that fixes a reward model's free constant: (s_w + s_l)².

    Args:
      chosen_scores, rejected_scores: [...] scores.
    Returns:
      [...] penalty per pair, to be added with a small weight (η = 0.01 in the paper). Opposite scores give 0.
    Reference: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244

    >>> float(centring(jnp.array(2.0), jnp.array(-2.0)))
    0.0
    """
    chosen, rejected = floating(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    return jnp.square(chosen + rejected)


# --- ties -------------------------------------------------------------------------------------------------------------


class OutcomeLogProbs(NamedTuple):
    """Log-probabilities of the three outcomes of a comparison; their exponentials sum to 1."""

    win: Array  # [...] the first is preferred
    tie: Array  # [...]
    loss: Array  # [...] the second is preferred


def rao_kupper_log_probs(first_scores: Array, second_scores: Array, *, theta: ArrayLike) -> OutcomeLogProbs:
    """Rao-Kupper: P(win) = σ(Δ - log θ), P(loss) = σ(-Δ - log θ), P(tie) = (θ² - 1) P(win) P(loss), Δ = s₁ - s₂.

    A win must be felt by more than log θ: a completion better by just that wins half of the time.

    Args:
      first_scores, second_scores: [...] scores.
      theta: θ ≥ 1, [] or [...], to be fitted with the scores (the paper gives no default): 1 + softplus(parameter).
    Returns:
      OutcomeLogProbs(win, tie, loss), each [...]. θ = 1 forbids ties and gives Bradley-Terry.
    Reference: Rao and Kupper 1967, https://doi.org/10.1080/01621459.1967.10482901

    >>> probs = rao_kupper_log_probs(jnp.array(0.0), jnp.array(0.0), theta=3.0)
    >>> [round(float(jnp.exp(p)), 4) for p in probs]
    [0.25, 0.5, 0.25]
    """
    first, second = floating(first_scores=first_scores, second_scores=second_scores)
    theta = knob(theta, first)
    win = jax.nn.log_sigmoid(first - second - jnp.log(theta))
    loss = jax.nn.log_sigmoid(second - first - jnp.log(theta))
    return OutcomeLogProbs(win, jnp.log(theta - 1) + jnp.log(theta + 1) + win + loss, loss)


def rao_kupper(chosen_scores: Array, rejected_scores: Array, tied: Array, *, theta: ArrayLike) -> Array:
    """Rao-Kupper likelihood of a choice or a tie: -log P(win), or -log P(tie) where the person saw no difference.

    Args:
      chosen_scores, rejected_scores: [...] scores; which is which does not matter in a tie.
      tied: [...] bool.
      theta: θ, see `rao_kupper_log_probs`; gradients flow into it. Above 1 if there are ties.
    Returns:
      [...] loss per pair. θ = 1 and no ties give `bradley_terry`; a choice is `bradley_terry` with margin log θ.
    Reference: Rao and Kupper 1967, https://doi.org/10.1080/01621459.1967.10482901

    >>> round(float(rao_kupper(jnp.array(0.0), jnp.array(0.0), jnp.array(True), theta=3.0)), 4)
    0.6931
    """
    chosen, rejected = floating(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    check_flags("tied", tied, chosen)
    # Two thetas, so that log(θ - 1) = -inf at θ = 1 sends no NaN into the gradient of pairs without a tie.
    win = rao_kupper_log_probs(chosen, rejected, theta=theta).win
    tie = rao_kupper_log_probs(chosen, rejected, theta=jnp.where(tied, knob(theta, chosen), 2.0)).tie
    return -jnp.where(tied, tie, win)


def davidson_log_probs(first_scores: Array, second_scores: Array, *, nu: ArrayLike) -> OutcomeLogProbs:
    """Davidson: P(win) : P(tie) : P(loss) = exp(Δ / 2) : ν : exp(-Δ / 2), Δ = s₁ - s₂.

    Args:
      first_scores, second_scores: [...] scores.
      nu: ν ≥ 0, [] or [...], to be fitted with the scores (the paper gives no default): exp(parameter). Between equals
        a tie is ν times as likely as a win.
    Returns:
      OutcomeLogProbs(win, tie, loss), each [...]. ν = 0 forbids ties and gives Bradley-Terry.
    Reference: Davidson 1970, https://doi.org/10.1080/01621459.1970.10481082

    >>> probs = davidson_log_probs(jnp.array(0.0), jnp.array(0.0), nu=2.0)
    >>> [round(float(jnp.exp(p)), 4) for p in probs]
    [0.25, 0.5, 0.25]
    """
    first, second = floating(first_scores=first_scores, second_scores=second_scores)
    nu = knob(nu, first)
    decided = jnp.logaddexp((first - second) / 2, (second - first) / 2)  # at least log 2
    ties = jnp.log1p(nu * jnp.exp(-decided))
    win, loss = jax.nn.log_sigmoid(first - second) - ties, jax.nn.log_sigmoid(second - first) - ties
    return OutcomeLogProbs(win, jnp.log(nu) - decided - ties, loss)


def davidson(chosen_scores: Array, rejected_scores: Array, tied: Array, *, nu: ArrayLike) -> Array:
    """Davidson likelihood of a choice or a tie: -log P(win), or -log P(tie) where the person saw no difference.

    Args:
      chosen_scores, rejected_scores: [...] scores; which is which does not matter in a tie.
      tied: [...] bool.
      nu: ν, see `davidson_log_probs`; gradients flow into it. Above 0 if there are ties.
    Returns:
      [...] loss per pair. ν = 0 and no ties give `bradley_terry`.
    Reference: Davidson 1970, https://doi.org/10.1080/01621459.1970.10481082

    >>> round(float(davidson(jnp.array(0.0), jnp.array(0.0), jnp.array(True), nu=2.0)), 4)
    0.6931
    """
    chosen, rejected = floating(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    check_flags("tied", tied, chosen)
    # Two nus, so that log ν = -inf at ν = 0 sends no NaN into the gradient of pairs without a tie.
    win = davidson_log_probs(chosen, rejected, nu=nu).win
    tie = davidson_log_probs(chosen, rejected, nu=jnp.where(tied, knob(nu, chosen), 1.0)).tie
    return -jnp.where(tied, tie, win)
