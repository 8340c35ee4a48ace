"""Preference losses on completions that the policy has just sampled: online DPO, XPO, Nash-MD.

Two completions per prompt are sampled and a person, judge or reward model says which one wins; `order_pairs` turns the
verdict into the (chosen, rejected) that every loss of `preference` takes. Sampling is not differentiated through.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.losses import preference
from rlhf_jax.losses._pairs import check_flags, floating, knob

__all__ = ["OrderedPairs", "geometric_mixture", "nash_md", "online_dpo", "order_pairs", "xpo"]


class OrderedPairs(NamedTuple):
    """The same quantity of the winner and of the loser of each pair."""

    chosen: Array  # [...]
    rejected: Array  # [...]


def order_pairs(first: Array, second: Array, first_wins: Array) -> OrderedPairs:
    """Sorts two completions' log-ratios (or log-probs, lengths, scores) into chosen and rejected.

    Args:
      first, second: [...] of the two completions.
      first_wins: [...] bool.
    Returns:
      OrderedPairs(chosen [...], rejected [...]).
    Raises: TypeError if first_wins is not bool. AssertionError if shapes differ.

    >>> pairs = order_pairs(jnp.array([1.0, 2.0]), jnp.array([5.0, 6.0]), jnp.array([True, False]))
    >>> pairs.chosen.tolist(), pairs.rejected.tolist()
    ([1.0, 6.0], [5.0, 2.0])
    """
    check_flags("first_wins", first_wins, first)
    check_flags("first_wins", first_wins, second)
    return OrderedPairs(jnp.where(first_wins, first, second), jnp.where(first_wins, second, first))


def online_dpo(first_log_ratios: Array, second_log_ratios: Array, first_wins: Array, *, beta: ArrayLike = 0.1) -> Array:
    """Online DPO: `preference.dpo` on two fresh samples, ordered by the verdict.

    Args:
      first_log_ratios, second_log_ratios: [...] summed log π - log π_ref of two completions sampled from π.
      first_wins: [...] bool, the verdict.
      beta: as for `preference.dpo`. Default 0.1 (TRL).
    Returns:
      [...] loss per pair. Swapping the completions and negating the verdict changes nothing.
    Reference: Guo et al. 2024, https://arxiv.org/abs/2402.04792

    >>> round(float(online_dpo(jnp.array(1.0), jnp.array(1.0), jnp.array(True))), 4)
    0.6931
    """
    return preference.dpo(*order_pairs(first_log_ratios, second_log_ratios, first_wins), beta=beta)


def xpo(
    chosen_log_ratios: Array,
    rejected_log_ratios: Array,
    reference_sample_log_probs: Array,
    *,
    beta: ArrayLike = 0.1,
    alpha: ArrayLike = 1e-5,
) -> Array:
    """Exploratory preference optimisation: -log σ(β (ρ_w - ρ_l)) + α log π(ỹ), ỹ sampled from the reference.

    The last term moves probability off what the reference would write anyway: optimism that makes the policy explore.

    Args:
      chosen_log_ratios, rejected_log_ratios: [...] summed log π - log π_ref of a pair of one sample of π and one of
        π_ref, ordered by the verdict (`order_pairs`).
      reference_sample_log_probs: [...] summed log π of the pair's sample of π_ref.
      beta: as for `preference.dpo`. Default 0.1 (TRL; the paper gives no value).
      alpha: α, strength of the optimism. Default 1e-5 (TRL).
    Returns:
      [...] loss per pair. α = 0 gives `preference.dpo`.
    Reference: Xie et al. 2024, algorithm 1, https://arxiv.org/abs/2405.21046

    >>> round(float(xpo(jnp.array(1.0), jnp.array(1.0), jnp.array(-2.0), alpha=0.1)), 4)
    0.4931
    """
    (sample,) = floating(reference_sample_log_probs=reference_sample_log_probs)
    return preference.dpo(chosen_log_ratios, rejected_log_ratios, beta=beta) + alpha * sample


def geometric_mixture(log_probs: Array, reference_log_probs: Array, *, mixture: ArrayLike = 0.5) -> Array:
    """The policy that Nash-MD plays against: log π_mix ∝ (1 - m) log π + m log π_ref, normalised over the vocabulary.

    Args:
      log_probs: [..., V] of the next token under the policy; unnormalised logits do too.
      reference_log_probs: [..., V] under the reference.
      mixture: m in [0, 1]; 0 gives the policy, 1 the reference. Default 0.5 (TRL; the paper compares values).
    Returns:
      [..., V] log-probs of the mixture, to sample the opponent's completion from token by token.
    Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886

    >>> mixed = geometric_mixture(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1])))
    >>> [round(x, 4) for x in jnp.exp(mixed).tolist()]
    [0.75, 0.25]
    """
    policy, reference = floating(log_probs=log_probs, reference_log_probs=reference_log_probs)
    return jax.nn.log_softmax((1 - knob(mixture, policy)) * policy + mixture * reference, axis=-1)


def nash_md(log_probs: Array, reference_log_probs: Array, win_probabilities: Array, *, beta: ArrayLike = 0.1) -> Array:
    """Nash-MD's policy gradient as a loss: -(P(y ≻ y') - ½ - β (log π(y) - log π_ref(y))) log π(y), bracket stopped.

    With y from the policy and y' from `geometric_mixture`, its mean gradient is that of
    β KL(π ‖ π_ref) - P(π ≻ π_mix), the mixture held fixed.

    Args:
      log_probs: [...] summed log π of y.
      reference_log_probs: [...] summed log π_ref of y; stopped.
      win_probabilities: [...] P(y ≻ y'), or 1 and 0 for a verdict; stopped.
      beta: τ in the paper, the KL's weight. Default 0.1 (TRL).
    Returns:
      [...] loss per completion; only its gradient means something. The ½ is a control variate: it changes no mean.
    Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886

    >>> pair = jnp.array([-2.0]), jnp.array([-2.0]), jnp.array([1.0])
    >>> nash_md(*pair).tolist()
    [1.0]
    """
    policy, reference, wins = floating(
        log_probs=log_probs, reference_log_probs=reference_log_probs, win_probabilities=win_probabilities
    )
    advantage = wins - 0.5 - beta * (policy - reference)
    return -jax.lax.stop_gradient(advantage) * policy
