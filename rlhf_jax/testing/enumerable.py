"""Exact answers: policies over so few sequences, and MDPs with so few states, that every expectation is a sum.

A sequence space over V tokens and length R has V^R members, listed by `sequences`. Of the problem
max_π E_π[r] - β KL(π ‖ π_ref) the optimum is known, π*(y) ∝ π_ref(y) exp(r(y) / β), and so is its value
β log Σ_y π_ref(y) exp(r(y) / β): whatever is trained on r can be measured against it. All functions are differentiable
and jittable; log-distributions are [..., N] arrays whose exponentials sum to 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

__all__ = [
    "MDP",
    "action_values",
    "expectation",
    "kl_divergence",
    "policy_values",
    "regularised_objective",
    "regularised_optimum",
    "sequence_log_probs",
    "sequences",
    "soft_optimum",
    "table_size",
    "token_log_probs_of_table",
    "total_variation",
]


def sequences(vocabulary: int, length: int) -> np.ndarray:
    """All sequences of a vocabulary: [V^R, R] int32 in lexicographic order.

    >>> sequences(2, 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    return np.stack(np.unravel_index(np.arange(vocabulary**length), (vocabulary,) * length), -1).astype(np.int32)


def table_size(vocabulary: int, length: int) -> int:
    """How many prefixes shorter than R there are, 1 + V + ... + V^(R-1): the rows of a tabular policy.

    >>> table_size(3, 2)
    4
    """
    return sum(vocabulary**t for t in range(length))


def token_log_probs_of_table(table: Array, tokens: ArrayLike) -> Array:
    """Log-probs of each token of given sequences under a tabular autoregressive policy: log π(y_t | y_<t).

    Args:
      table: [1 + V + ... + V^(R-1), V] logits, a row per prefix: the shorter first, then lexicographic.
      tokens: [..., R] int.
    Returns:
      [..., R] log-probs. Any distribution over the V^R sequences is one of these tables.

    >>> float(jnp.exp(token_log_probs_of_table(jnp.zeros((3, 2)), jnp.array([0, 1]))[1]))
    0.5
    """
    tokens = jnp.asarray(tokens)
    vocabulary, length = table.shape[-1], tokens.shape[-1]
    if table.shape[0] != table_size(vocabulary, length):
        raise ValueError(f"a table for V={vocabulary}, R={length} has {table_size(vocabulary, length)} rows")
    rows, within, start = [], jnp.zeros(tokens.shape[:-1], jnp.int32), 0
    for t in range(length):
        rows.append(start + within)
        within, start = within * vocabulary + tokens[..., t], start + vocabulary**t
    log_table = jax.nn.log_softmax(table, axis=-1)
    return log_table[jnp.stack(rows, -1), tokens]


def sequence_log_probs(table: Array, length: int) -> Array:
    """Log-distribution over all sequences under a tabular policy: [V^R], in the order of `sequences`.

    >>> float(jnp.exp(sequence_log_probs(jnp.zeros((3, 2)), 2)).sum())
    1.0
    """
    return token_log_probs_of_table(table, sequences(table.shape[-1], length)).sum(-1)


def expectation(log_p: Array, x: Array) -> Array:
    """E_p[x] = Σ p x over the last axis; members of probability 0 add 0.

    >>> float(expectation(jnp.log(jnp.array([0.5, 0.5])), jnp.array([1.0, 3.0])))
    2.0
    """
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, x, 0.0), axis=-1)


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p ‖ q) = Σ p (log p - log q) over the last axis, in nats.

    >>> float(kl_divergence(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))))
    0.14384
    """
    return expectation(log_p, jnp.where(jnp.exp(log_p) > 0, log_p - log_q, 0.0))


def total_variation(log_p: Array, log_q: Array) -> Array:
    """½ Σ |p - q| over the last axis: the largest difference in the probability of any event.

    >>> float(total_variation(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))))
    0.25
    """
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def regularised_objective(log_p: Array, reference_log_p: Array, rewards: Array, *, beta: ArrayLike) -> Array:
    """E_p[r] - β KL(p ‖ reference), what RLHF maximises (Ziegler et al. 2019, eq. 2)."""
    return expectation(log_p, rewards) - beta * kl_divergence(log_p, reference_log_p)


def regularised_optimum(reference_log_p: Array, rewards: Array, *, beta: ArrayLike) -> tuple[Array, Array]:
    """The policy that maximises `regularised_objective`, and the maximum.

    log π*(y) = log π_ref(y) + r(y) / β - log Z, and the maximum is β log Z. As β -> inf the policy is the reference.

    Args:
      reference_log_p: [..., N] log-distribution.
      rewards: [..., N].
      beta: weight of the KL term, in reward per nat.
    Returns:
      [..., N] log π* and [...] β log Z.
    Reference: Rafailov et al. 2023, eq. 4, https://arxiv.org/abs/2305.18290

    >>> best, value = regularised_optimum(jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, 1.0]), beta=1.0)
    >>> [round(float(x), 3) for x in (*jnp.exp(best), value)]
    [0.269, 0.731, 0.62]
    """
    tilted = reference_log_p + rewards / beta
    log_z = jax.nn.logsumexp(tilted, axis=-1, keepdims=True)
    return tilted - log_z, jnp.asarray(beta * log_z[..., 0])


class MDP(NamedTuple):
    """A finite Markov decision process; an episode ends where the discount of a transition is 0."""

    transitions: Array  # [S, A, S] probability of the next state
    rewards: Array  # [S, A] expected reward of an action
    discounts: Array  # [S, A] discount after an action, 0 where the episode ends


def policy_values(mdp: MDP, policy: Array) -> Array:
    """State values of a policy, the solution of V = Σ_a π (r + γ P V) (Bellman).

    Args:
      mdp: with S states and A actions.
      policy: [S, A] probabilities.
    Returns:
      [S] expected discounted return from each state.
    """
    reward = jnp.sum(policy * mdp.rewards, axis=-1)
    step = jnp.einsum("sa,sa,sat->st", policy, mdp.discounts, mdp.transitions)
    return jnp.linalg.solve(jnp.eye(reward.shape[0]) - step, reward)


def action_values(mdp: MDP, values: Array) -> Array:
    """Q(s, a) = r(s, a) + γ(s, a) Σ_t P(t | s, a) V(t): [S, A]; minus V(s) it is the exact advantage."""
    return mdp.rewards + mdp.discounts * jnp.einsum("sat,t->sa", mdp.transitions, values)


def soft_optimum(mdp: MDP, reference_log_policy: Array, *, beta: ArrayLike, steps: int = 200) -> tuple[Array, Array]:
    """The policy that maximises return minus β KL to a reference at every step, by dynamic programming.

    V(s) = β log Σ_a π_ref(a|s) exp(Q(s, a) / β), log π*(a|s) = log π_ref + (Q - V) / β. With one state and one step it
    is `regularised_optimum`; as β -> 0 it is value iteration, the greedy optimum.

    Args:
      mdp: with S states and A actions.
      reference_log_policy: [S, A] log-probabilities.
      beta: weight of the KL term.
      steps: sweeps over all states; H suffice for episodes of at most H steps.
    Returns:
      [S, A] log π* and [S] its soft values.
    """

    def sweep(values: Array, _: None) -> tuple[Array, None]:
        tilted = reference_log_policy + action_values(mdp, values) / beta
        return jnp.asarray(beta * jax.nn.logsumexp(tilted, axis=-1)), None

    values, _ = jax.lax.scan(sweep, jnp.zeros(mdp.rewards.shape[0]), length=steps)
    quality = action_values(mdp, values)
    log_policy = reference_log_policy + (quality - values[:, None]) / beta
    return log_policy, values
