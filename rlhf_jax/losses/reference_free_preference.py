"""Preference losses that need no reference model: CPO, SimPO, AlphaPO, ORPO, TPO.

Signature: ``(chosen_log_probs, rejected_log_probs, [lengths,] *, beta, knobs) -> loss per pair [...]``, where a
log-prob is a completion's summed log π(y|x) in nats, at most 0, and a length its number of tokens (0 counts as 1).

Most methods add the negative log-likelihood of the chosen completion. Except where a docstring says that it is in, add
it yourself. CPO as its paper trains it:

>>> chosen, rejected, lengths = jnp.array([-4.0]), jnp.array([-6.0]), jnp.array([4])
>>> loss = cpo(chosen, rejected) - chosen / lengths
>>> [round(x, 4) for x in loss.tolist()]
[1.5981]
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses import preference
from rlhf_jax.losses._pairs import floating, knob, per_token, power_scores

__all__ = ["alphapo", "cpo", "cpo_hinge", "odds_ratio", "orpo", "simpo", "tpo", "tpo_length_controlled"]


def _pair(chosen_log_probs: Array, rejected_log_probs: Array) -> tuple[Array, Array]:
    chosen, rejected = floating(chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs)
    return chosen, rejected


def cpo(
    chosen_log_probs: Array, rejected_log_probs: Array, *, beta: ArrayLike = 0.1, label_smoothing: ArrayLike = 0.0
) -> Array:
    """Contrastive preference optimisation, its preference term: -log σ(β (log π(y_w) - log π(y_l))).

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      beta: β. Default 0.1 (section 4.2).
      label_smoothing: ε as in `preference.conservative_dpo`. Default 0.
    Returns:
      [...] loss per pair: DPO with a uniform reference. The paper adds -log π(y_w); its code, per token.
    Reference: Xu et al. 2024, https://arxiv.org/abs/2401.08417

    >>> round(float(cpo(jnp.array(-4.0), jnp.array(-4.0))), 4)
    0.6931
    """
    chosen, rejected = _pair(chosen_log_probs, rejected_log_probs)
    return preference.conservative_dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def cpo_hinge(chosen_log_probs: Array, rejected_log_probs: Array, *, beta: ArrayLike = 0.1) -> Array:
    """CPO with a hinge in place of the logistic loss: max(0, 1 - β (log π(y_w) - log π(y_l))).

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      beta: β. Default 0.1 (as for `cpo`).
    Returns:
      [...] loss per pair. Equal log-probs give 1.
    Reference: Xu et al. 2024, https://arxiv.org/abs/2401.08417; hinge: Zhao et al. 2023, https://arxiv.org/abs/2305.10425

    >>> cpo_hinge(jnp.array([-4.0]), jnp.array([-4.0])).tolist()
    [1.0]
    """
    return preference.hinge(*_pair(chosen_log_probs, rejected_log_probs), beta=beta)


def simpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    beta: ArrayLike = 2.5,
    gamma: ArrayLike = 1.375,
) -> Array:
    """SimPO: -log σ(β log π(y_w) / |y_w| - β log π(y_l) / |y_l| - γ).

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      chosen_lengths, rejected_lengths: [...] completion tokens.
      beta: β. Default 2.5 (appendix B).
      gamma: γ, the target reward margin. Default 1.375, from γ / β = 0.55 (appendix B).
    Returns:
      [...] loss per pair. γ = 0 and lengths of 1 give `cpo`.
    Reference: Meng, Xia and Chen 2024, eq. 6, https://arxiv.org/abs/2405.14734

    >>> pair = jnp.array([-4.0]), jnp.array([-8.0]), jnp.array([2]), jnp.array([4])
    >>> [round(x, 4) for x in simpo(*pair, gamma=0.0).tolist()]
    [0.6931]
    """
    chosen, rejected = _pair(chosen_log_probs, rejected_log_probs)
    margins = per_token(chosen, chosen_lengths) - per_token(rejected, rejected_lengths)
    return -jax.nn.log_sigmoid(beta * margins - gamma)


def alphapo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    alpha: ArrayLike = 0.25,
    beta: ArrayLike = 2.5,
    gamma: ArrayLike = 0.1,
) -> Array:
    """AlphaPO, SimPO with a shaped reward: -log σ(β (r_w - r_l) - γ), r = (1 - π(y)^(-α / |y|)) / α.

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      chosen_lengths, rejected_lengths: [...] completion tokens.
      alpha: α, any sign. Above 0 unlikely completions are pushed away harder. Default 0.25.
      beta: β. Default 2.5.
      gamma: γ, the target reward margin. Default 0.1; the three defaults are TRL's account of the paper's table 3
        (Mistral-Instruct).
    Returns:
      [...] loss per pair. α = 0 gives `simpo`.
    Reference: Gupta et al. 2025, https://arxiv.org/abs/2501.03884

    >>> pair = jnp.array([-4.0]), jnp.array([-8.0]), jnp.array([2]), jnp.array([4])
    >>> [round(x, 4) for x in alphapo(*pair, gamma=0.0).tolist()]
    [0.6931]
    """
    chosen, rejected = _pair(chosen_log_probs, rejected_log_probs)
    chosen = power_scores(per_token(chosen, chosen_lengths), alpha)
    rejected = power_scores(per_token(rejected, rejected_lengths), alpha)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def _log_odds(mean_log_probs: Array) -> Array:
    """log p - log(1 - p), with p held below 1 - ε of the float type: a certain completion has finite odds."""
    held = jnp.minimum(mean_log_probs, -jnp.finfo(mean_log_probs.dtype).eps)
    return held - jax.nn.log1mexp(-held)


def odds_ratio(
    chosen_log_probs: Array, rejected_log_probs: Array, chosen_lengths: Array, rejected_lengths: Array
) -> Array:
    """ORPO's odds-ratio term: -log σ(log odds(y_w) - log odds(y_l)), odds = p / (1 - p), log p = log π(y) / |y|.

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      chosen_lengths, rejected_lengths: [...] completion tokens.
    Returns:
      [...] loss per pair. Equal mean log-probs give log 2. Unlikely completions (p → 0) make it `simpo` with β = 1,
      γ = 0.
    Reference: Hong, Lee and Thorne 2024, eq. 7, https://arxiv.org/abs/2403.07691

    >>> pair = jnp.array([-4.0]), jnp.array([-8.0]), jnp.array([2]), jnp.array([4])
    >>> [round(x, 4) for x in odds_ratio(*pair).tolist()]
    [0.6931]
    """
    chosen, rejected = _pair(chosen_log_probs, rejected_log_probs)
    won = _log_odds(per_token(chosen, chosen_lengths))
    return -jax.nn.log_sigmoid(won - _log_odds(per_token(rejected, rejected_lengths)))


def orpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    beta: ArrayLike = 0.1,
) -> Array:
    """Odds-ratio preference optimisation: -log π(y_w) / |y_w| + λ `odds_ratio`. The likelihood term is in.

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      chosen_lengths, rejected_lengths: [...] completion tokens.
      beta: λ in the paper. Default 0.1 (table 7). 0 leaves supervised fine-tuning.
    Returns:
      [...] loss per pair.
    Reference: Hong, Lee and Thorne 2024, eq. 6, https://arxiv.org/abs/2403.07691

    >>> pair = jnp.array([-4.0]), jnp.array([-8.0]), jnp.array([2]), jnp.array([4])
    >>> [round(x, 4) for x in orpo(*pair).tolist()]
    [2.0693]
    """
    ratio = odds_ratio(chosen_log_probs, rejected_log_probs, chosen_lengths, rejected_lengths)
    (chosen,) = floating(chosen_log_probs=chosen_log_probs)
    return knob(beta, ratio) * ratio - per_token(chosen, chosen_lengths)


def tpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    gold_log_probs: Array,
    *,
    beta: ArrayLike = 0.01,
    alpha: ArrayLike = 1.0,
) -> Array:
    """Triple preference optimisation: -log σ(β (log π(y_w) - log π(y_l))) - α log π(y_gold).

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      gold_log_probs: [...] log π of a third, best completion. Its mean over tokens is what the authors' code and TRL
        train on, whence the default α.
      beta: β. Default 0.01 (the authors' code).
      alpha: α, weight of the likelihood term. Default 1 (the authors' code).
    Returns:
      [...] loss per triple. α = 0 gives `cpo`.
    Reference: Saeidi et al. 2024, https://arxiv.org/abs/2405.16681

    >>> round(float(tpo(jnp.array(-4.0), jnp.array(-4.0), jnp.array(-1.0))), 4)
    1.6931
    """
    (gold,) = floating(gold_log_probs=gold_log_probs)
    return cpo(chosen_log_probs, rejected_log_probs, beta=beta) - alpha * gold


def tpo_length_controlled(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    gold_log_probs: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    beta: ArrayLike = 10.0,
    gamma: ArrayLike = 3.0,
    alpha: ArrayLike = 0.05,
) -> Array:
    """TPO-L: -log σ(β log π(y_w) / |y_w| - β log π(y_l) / |y_l| - γ) - α log π(y_gold).

    Args:
      chosen_log_probs, rejected_log_probs: [...] summed log π.
      gold_log_probs: [...] log π of a third, best completion; see `tpo`.
      chosen_lengths, rejected_lengths: [...] completion tokens.
      beta, gamma, alpha: β, γ, α. Defaults 10, 3, 0.05 (the authors' code, Llama-3-Instruct).
    Returns:
      [...] loss per triple. α = 0 gives `simpo`.
    Reference: Saeidi et al. 2024, https://arxiv.org/abs/2405.16681

    >>> pair = jnp.array([-4.0]), jnp.array([-8.0])
    >>> loss = tpo_length_controlled(*pair, jnp.array([-1.0]), jnp.array([2]), jnp.array([4]), gamma=0.0)
    >>> [round(x, 4) for x in loss.tolist()]
    [0.7431]
    """
    (gold,) = floating(gold_log_probs=gold_log_probs)
    pair = simpo(chosen_log_probs, rejected_log_probs, chosen_lengths, rejected_lengths, beta=beta, gamma=gamma)
    return pair - alpha * gold
