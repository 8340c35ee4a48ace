# ruff: noqa: RUF001  (Greek letters in answers are meant)
"""Critics and actors on a decision process whose values are known by linear algebra."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from problem import ERROR, minimise, probe

from rlhf_jax import advantages
from rlhf_jax.losses import (
    categorical_value,
    feedback,
    offline_q_learning,
    policy,
    q_learning,
    tamer,
    value,
)
from rlhf_jax.testing import enumerable

# --- a decision process -----------------------------------------------------------------------------------------------

STATES, ACTIONS, DISCOUNT = 3, 2, 0.8
RNG = np.random.default_rng(5)
MDP = enumerable.MDP(
    jnp.asarray(RNG.dirichlet(np.ones(STATES), size=(STATES, ACTIONS)), jnp.float32),
    jnp.asarray(RNG.normal(size=(STATES, ACTIONS)), jnp.float32),
    jnp.full((STATES, ACTIONS), DISCOUNT),
)
_, BEST_VALUES = enumerable.soft_optimum(MDP, jnp.full((STATES, ACTIONS), -jnp.log(2.0)), beta=1e-4)
TARGET_POLICY = jnp.asarray(RNG.dirichlet(np.ones(ACTIONS), size=STATES), jnp.float32)
BEHAVIOUR = jnp.full((STATES, ACTIONS), 1 / ACTIONS)
S, A, NEXT, NEXT_A = (jnp.asarray(i.ravel()) for i in np.indices((STATES, ACTIONS, STATES, ACTIONS)))
STEP_REWARD, STEP_DISCOUNT, CHANCE = MDP.rewards[S, A], MDP.discounts[S, A], MDP.transitions[S, A, NEXT]
CRITICS, ACTORS = "critics on a decision process", "actor-critic with human feedback on a decision process"


def action_value_error(loss: Callable[[jax.Array], jax.Array], expected: jax.Array) -> jax.Array:
    """Largest error of a table of action values trained by bootstrapping."""

    def population(table, old, key, step):
        return jnp.sum(CHANCE * loss(table))

    return jnp.max(jnp.abs(minimise(population, jnp.zeros((STATES, ACTIONS)), steps=3000) - expected))


BEST_ACTION_VALUES = enumerable.action_values(MDP, BEST_VALUES)
POLICY_VALUES = enumerable.policy_values(MDP, TARGET_POLICY)
POLICY_ACTION_VALUES = enumerable.action_values(MDP, POLICY_VALUES)


@probe(CRITICS, "Q-learning", "Q*", ERROR, 0.02)
def q_learning_probe():
    loss = lambda q: q_learning.q_learning(q[S], A, STEP_REWARD, STEP_DISCOUNT, q[NEXT])
    return action_value_error(loss, BEST_ACTION_VALUES)


@probe(CRITICS, "double Q-learning", "Q*", ERROR, 0.02)
def double_q_probe():
    loss = lambda q: q_learning.double_q_learning(q[S], A, STEP_REWARD, STEP_DISCOUNT, q[NEXT], q[NEXT])
    return action_value_error(loss, BEST_ACTION_VALUES)


@probe(CRITICS, "SARSA", "Q of the policy", ERROR, 0.02)
def sarsa_probe():
    taken = TARGET_POLICY[NEXT, NEXT_A]
    loss = lambda q: taken * q_learning.sarsa(q[S], A, STEP_REWARD, STEP_DISCOUNT, q[NEXT], NEXT_A)
    return action_value_error(loss, POLICY_ACTION_VALUES)


@probe(CRITICS, "expected SARSA", "Q of the policy", ERROR, 0.02)
def expected_sarsa_probe():
    loss = lambda q: q_learning.expected_sarsa(q[S], A, STEP_REWARD, STEP_DISCOUNT, q[NEXT], TARGET_POLICY[NEXT])
    return action_value_error(loss, POLICY_ACTION_VALUES)


@functools.cache
def ilql() -> tuple[tuple[jax.Array, jax.Array], tuple[np.ndarray, np.ndarray]]:
    """Q and V of the behaviour's steps, and the fixed point, found by iterating both in float64."""
    expectile = 0.8

    def population(params, old, key, step):
        q, values = params
        terms = offline_q_learning.ilql(
            q[S], values[S], values[NEXT], old[0][S], A, STEP_REWARD, STEP_DISCOUNT, expectile=expectile
        )
        return jnp.sum(BEHAVIOUR[S, A] * CHANCE * (terms.q + terms.value))

    found = minimise(population, (jnp.zeros((STATES, ACTIONS)), jnp.zeros(STATES)), steps=3000)
    transitions, rewards = (np.asarray(x, np.float64) for x in (MDP.transitions, MDP.rewards))
    exact = np.zeros(STATES)
    for _ in range(300):
        targets = rewards + DISCOUNT * transitions @ exact
        weights = np.where(targets > exact[:, None], expectile, 1 - expectile)
        exact = (weights * targets).sum(-1) / weights.sum(-1)
    return found, (targets, exact)


@probe(CRITICS, "ILQL, expectile 0.8", "V = the expectile of Q", ERROR, 0.02)
def ilql_probe():
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x - exact)) for x, exact in zip(*ilql(), strict=True)]))


@probe(CRITICS, "ILQL's policy, β = 2", "π_b exp(β Q) / Z", "largest error of a probability", 0.02)
def ilql_policy_probe():
    found, (targets, _) = ilql()
    policy_ = jax.nn.softmax(offline_q_learning.ilql_logits(jnp.log(BEHAVIOUR), *found, beta=2.0))
    weight = np.asarray(BEHAVIOUR) * np.exp(2.0 * targets)
    return jnp.max(jnp.abs(policy_ - weight / weight.sum(-1, keepdims=True)))


RETURNS = jnp.asarray(RNG.normal(size=5), jnp.float32)


@probe(CRITICS, "quantile regression", "the quantiles of the return", ERROR, 0.02)
def quantile_probe():
    def population(quantiles, old, key, step):
        return value.quantile_huber(quantiles, RETURNS, kappa=1e-2)

    return jnp.max(jnp.abs(minimise(population, jnp.zeros(5), steps=2000) - jnp.sort(RETURNS)))


@probe(CRITICS, "categorical critic, two-hot targets", "the mean return", ERROR, 0.02)
def categorical_probe():
    support = jnp.linspace(-3.0, 3.0, 7)
    targets = categorical_value.two_hot(RETURNS, support)

    def population(logits, old, key, step):
        return jnp.mean(categorical_value.cross_entropy(jnp.broadcast_to(logits, targets.shape), targets))

    found = minimise(population, jnp.zeros((1, 7)))
    return jnp.abs(categorical_value.mean(found, support)[0] - RETURNS.mean())


def vtrace_error(policy_: jax.Array, rho_bar: float) -> jax.Array:
    """Largest error of state values learned from the behaviour's steps by V-trace."""
    steps = jnp.ones((S.shape[0], 1), bool)
    log_probs, behaviour = jnp.log(TARGET_POLICY)[S, A][:, None], jnp.log(BEHAVIOUR)[S, A][:, None]

    def population(values, old, key, step):
        target = advantages.vtrace(
            log_probs,
            behaviour,
            STEP_REWARD[:, None],
            values[S][:, None],
            steps,
            bootstrap_value=values[NEXT],
            discount=DISCOUNT,
            rho_bar=rho_bar,
        ).returns
        weight = (BEHAVIOUR[S, A] * CHANCE)[:, None]
        return jnp.sum(weight * value.squared_error(values[S][:, None], target))

    found = minimise(population, jnp.zeros(STATES), steps=3000)
    return jnp.max(jnp.abs(found - enumerable.policy_values(MDP, policy_)))


@probe(CRITICS, "V-trace, ρ̄ = ∞", "V of the policy, off-policy", ERROR, 0.02)
def vtrace_probe():
    return vtrace_error(TARGET_POLICY, jnp.inf)


@probe(CRITICS, "V-trace, ρ̄ = 1", "V of min(ρ̄ μ, π) / Σ", ERROR, 0.02)
def clipped_vtrace_probe():
    clipped = jnp.minimum(BEHAVIOUR, TARGET_POLICY)
    return vtrace_error(clipped / clipped.sum(-1, keepdims=True), 1.0)


def regret(logits: jax.Array) -> jax.Array:
    """Largest loss of value against the best policy."""
    return jnp.max(BEST_VALUES - enumerable.policy_values(MDP, jax.nn.softmax(logits)))


def human_actor(loss: Callable[..., jax.Array]) -> jax.Array:
    """Regret of a policy taught by feedback that depends on it: the exact advantage of its own behaviour."""

    def population(logits, old, key, step):
        chosen = jax.nn.softmax(old)
        values = enumerable.policy_values(MDP, chosen)
        judged = jax.lax.stop_gradient(enumerable.action_values(MDP, values) - values[:, None])
        return jnp.sum(
            jax.lax.stop_gradient(chosen) * loss(jax.nn.log_softmax(logits), jax.nn.log_softmax(old), judged)
        )

    return regret(minimise(population, jnp.zeros((STATES, ACTIONS)), rate=0.3))


@probe(ACTORS, "COACH", "the best policy", "regret", 0.02)
def coach_probe():
    return human_actor(lambda new, old, judged: feedback.coach(new, judged))


@probe(ACTORS, "Deep COACH, windows of one step", "the best policy", "regret", 0.02)
def deep_coach_probe():
    window = jnp.ones((STATES, ACTIONS, 1), bool)

    def loss(new, old, judged):
        nothing = jnp.zeros_like(judged)
        return feedback.deep_coach(new[..., None], old[..., None], window, judged, nothing, entropy_coefficient=0.0)

    return human_actor(loss)


@probe(ACTORS, "A2C, critic on human rewards", "the best policy", "regret", 0.02)
def human_actor_critic_probe():
    def population(params, old, key, step):
        logits, critic = params
        chosen = jax.nn.softmax(old[0])
        target = q_learning.bootstrapped_target(STEP_REWARD, STEP_DISCOUNT, critic[NEXT])
        actor = policy.a2c(jax.nn.log_softmax(logits)[S, A], target, critic[S])
        return jnp.sum(CHANCE * jax.lax.stop_gradient(chosen)[S, A] * (actor + value.squared_error(critic[S], target)))

    logits, _ = minimise(population, (jnp.zeros((STATES, ACTIONS)), jnp.zeros(STATES)), steps=2000)
    return regret(logits)


@probe(ACTORS, "episodic COACH, traces of two steps", "the best policy", "regret", 0.02)
def episodic_coach_probe():
    """Feedback on the second step reaches the first through the trace, where it is 0 on average."""

    def population(logits, old, key, step):
        chosen = jax.nn.softmax(old)
        values = enumerable.policy_values(MDP, chosen)
        judged = enumerable.action_values(MDP, values) - values[:, None]

        def descent(s, a, t, b):
            grad = lambda state, taken: jax.grad(lambda x: jax.nn.log_softmax(x)[state, taken])(old)
            trace = feedback.update_eligibility(feedback.init_eligibility(old), grad(s, a), decay=0.7)
            early = feedback.eligibility_gradient(trace, judged[s, a])
            trace = feedback.update_eligibility(trace, grad(t, b), decay=0.7)
            return early + feedback.eligibility_gradient(trace, judged[t, b])

        weight = chosen[S, A] * CHANCE * chosen[NEXT, NEXT_A]
        gradients = jax.vmap(descent)(S, A, NEXT, NEXT_A)
        return jnp.sum(logits * jax.lax.stop_gradient(jnp.tensordot(weight, gradients, axes=1)))

    return regret(minimise(population, jnp.zeros((STATES, ACTIONS)), rate=0.3))


@probe(ACTORS, "Deep TAMER, delayed signals", "the human's reward of each step", ERROR, 0.02)
def deep_tamer_probe():
    steps, human = jnp.ones((1, 2), bool), jnp.array([[0.8, -0.4]])
    credit = tamer.delay_credit(jnp.array([[0.7, 1.7]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 2.0]]), steps)

    def population(predictions, old, key, step):
        return jnp.sum(tamer.deep_tamer(predictions, credit, steps, human))

    return jnp.max(jnp.abs(minimise(population, jnp.zeros((1, 2))) - human))


@probe(ACTORS, "TAMER, delayed signals", "the human's reward of each step", ERROR, 0.02)
def tamer_probe():
    """Two steps of one second each, signals after 0.2 to 0.6 s: credit has to find the step that was meant."""
    starts, ends = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 2.0]])
    times = jnp.array([[0.7, 1.7]])
    steps = jnp.ones((1, 2), bool)
    credit = tamer.delay_credit(times, starts, ends, steps)
    human = jnp.array([[0.8, -0.4]])

    def population(predictions, old, key, step):
        return jnp.sum(tamer.tamer(predictions, credit, steps, jnp.sum(credit * human[:, None], axis=-1)))

    return jnp.max(jnp.abs(minimise(population, jnp.zeros((1, 2))) - human))
