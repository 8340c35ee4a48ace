# ruff: noqa: RUF001  (Greek letters in answers are meant)
"""Critics on whole trajectories, and critics that learn another statistic than the mean."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from decision_probes import (
    ACTIONS,
    BEHAVIOUR,
    CHANCE,
    DISCOUNT,
    MDP,
    NEXT,
    POLICY_VALUES,
    RETURNS,
    STATES,
    STEP_DISCOUNT,
    STEP_REWARD,
    TARGET_POLICY,
    A,
    S,
)
from problem import ERROR, minimise, minimise_all, probe, root

from rlhf_jax import advantages, returns
from rlhf_jax.losses import categorical_value, feedback, offline_q_learning, q_learning, value

# --- trajectories of two steps ----------------------------------------------------------------------------------------

TRAJECTORIES = "critics on trajectories of two steps"
START, ACTION, MIDDLE, SECOND, END = (
    jnp.asarray(i.ravel()) for i in np.indices((STATES, ACTIONS, STATES, ACTIONS, STATES))
)
STATE, TAKEN = jnp.stack([START, MIDDLE], axis=-1), jnp.stack([ACTION, SECOND], axis=-1)
SIGNALS = MDP.rewards[STATE, TAKEN]
STEPS = jnp.ones(STATE.shape, bool)
NO, LAST = jnp.zeros(STATE.shape, bool), jnp.arange(2)[None] == jnp.ones((len(START), 1))
WEIGHT = jnp.prod(TARGET_POLICY[STATE, TAKEN], axis=-1) * MDP.transitions[START, ACTION, MIDDLE]
WEIGHT = WEIGHT * MDP.transitions[MIDDLE, SECOND, END]


def learned(targets: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Regression of state values on targets(values of both steps, values of what follows each), [N, 2]."""

    def population(values, *_):
        goal = targets(values[STATE], jnp.stack([values[MIDDLE], values[END]], axis=-1))
        return jnp.sum(WEIGHT[:, None] * value.squared_error(values[STATE], goal))

    return population


KNOBS = {"discount": DISCOUNT}
TARGETS = {
    "returns of two steps": lambda v, after: returns.n_step_returns(
        SIGNALS, v, STEPS, n=2, bootstrap_value=after[:, 1], **KNOBS
    ),
    "λ-returns, λ = 0.7": lambda v, after: returns.lambda_returns(
        SIGNALS, v, STEPS, bootstrap_value=after[:, 1], trace_lambda=0.7, **KNOBS
    ),
    "GAE's returns, λ = 0.7": lambda v, after: (
        advantages.gae(SIGNALS, v, STEPS, bootstrap_value=after[:, 1], gae_lambda=0.7, **KNOBS).returns
    ),
    "GAE's returns, cut by a time limit": lambda v, after: (
        advantages.gae_with_truncation(SIGNALS, v, after, NO, LAST, STEPS, gae_lambda=0.7, **KNOBS).returns
    ),
}


HOLE = "GAE's returns, a hole between the steps counted as one"


def through_hole(v: jax.Array, after: jax.Array) -> jax.Array:
    spread = lambda x: jnp.stack([x[:, 0], jnp.full(len(START), jnp.nan), x[:, 1]], axis=-1)
    steps = jnp.broadcast_to(jnp.array([[True, False, True]]), (len(START), 3))
    estimate = advantages.gae_through_holes(
        spread(SIGNALS), spread(v), steps, bootstrap_value=after[:, 1], gae_lambda=0.7, **KNOBS
    )
    return estimate.returns[:, ::2]


TARGETS[HOLE] = through_hole


def hole_values() -> np.ndarray:
    """Targets r + γ²λ V' + γ²λ² (r' + γ V'' - V') of first steps and r + γ V' of second ones, in the mean of both."""
    policy, transitions, rewards = (np.asarray(x, np.float64) for x in (TARGET_POLICY, MDP.transitions, MDP.rewards))
    reward, step, one = (policy * rewards).sum(-1), np.einsum("sa,sat->st", policy, transitions), np.eye(STATES)
    decay, often = DISCOUNT**2 * 0.7, np.diag(step.sum(0))  # every state once as the first, and as often as the second
    first = decay * step + decay * 0.7 * step @ (DISCOUNT * step - one)
    left = one + often - first - often @ (DISCOUNT * step)
    return np.linalg.solve(left, reward + decay * 0.7 * step @ reward + often @ reward)


@functools.cache
def followed() -> dict[str, jax.Array]:
    losses = {name: learned(targets) for name, targets in TARGETS.items()}
    return minimise_all(losses, jnp.zeros(STATES), steps=2000)


for name in TARGETS:
    answer = "the linear equations of its targets" if name == HOLE else "V of the policy"
    probe(TRAJECTORIES, name, answer, ERROR, 1e-3)(
        lambda name=name: jnp.max(jnp.abs(followed()[name] - (hole_values() if name == HOLE else POLICY_VALUES)))
    )


@probe(TRAJECTORIES, "human returns, episodes of two steps", "E of what is left, by summation", ERROR, 1e-3)
def human_returns_probe():
    goal = feedback.human_returns(SIGNALS, STEPS, discount=DISCOUNT)

    def population(values, *_):
        return jnp.sum(WEIGHT[:, None] * value.squared_error(values[jnp.arange(2)[None], STATE], goal))

    policy, transitions, rewards = (np.asarray(x, np.float64) for x in (TARGET_POLICY, MDP.transitions, MDP.rewards))
    second = (policy * rewards).sum(-1)
    first = (policy * (rewards + DISCOUNT * transitions @ second)).sum(-1)
    found = minimise(population, jnp.zeros((2, STATES)), steps=2000)
    return jnp.max(jnp.abs(found - np.stack([first, second])))


# --- other statistics of the return -----------------------------------------------------------------------------------

STATISTICS = "critics of a statistic of the return"
SAMPLES = np.asarray(RETURNS, np.float64)
DELTA, EXPECTILE = 0.3, 0.8
EDGES = jnp.linspace(-4.0, 4.0, 9)


def of_one(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return lambda estimate, *_: jnp.mean(loss(jnp.broadcast_to(estimate, RETURNS.shape), RETURNS))


def huber_centre() -> float:
    return root(lambda v: np.clip(v - SAMPLES, -DELTA, DELTA).sum(keepdims=True), np.median(SAMPLES, keepdims=True))[0]


def expectile_centre() -> float:
    weight = lambda v: np.where(v > SAMPLES, 1 - EXPECTILE, EXPECTILE)
    return root(lambda v: (weight(v) * (v - SAMPLES)).sum(keepdims=True), np.mean(SAMPLES, keepdims=True))[0]


CENTRES = {
    "Huber": (
        of_one(lambda v, g: value.huber(v, g, delta=DELTA)),
        "errors cut at ±δ add up to 0",
        huber_centre,
    ),
    "expectile 0.8": (
        of_one(lambda v, g: value.expectile_error(v, g, expectile=EXPECTILE)),
        "weighted errors add up to 0",
        expectile_centre,
    ),
}


@functools.cache
def centres() -> dict[str, jax.Array]:
    return minimise_all({name: loss for name, (loss, *_) in CENTRES.items()}, jnp.zeros(()), steps=2000)


for name, (_, answer, centre) in CENTRES.items():
    probe(STATISTICS, name, answer, ERROR, 1e-3)(lambda name=name, centre=centre: jnp.abs(centres()[name] - centre()))


@probe(STATISTICS, "categorical critic, HL-Gauss targets", "the mean histogram of the Gaussians", ERROR, 1e-3)
def hl_gauss_probe():
    targets = categorical_value.hl_gauss(RETURNS, EDGES)

    def population(logits, *_):
        return jnp.mean(categorical_value.cross_entropy(jnp.broadcast_to(logits, targets.shape), targets))

    edges = np.asarray(EDGES, np.float64)
    inside = lambda v: np.array([math.erf((e - v) / (0.75 * math.sqrt(2))) for e in edges])  # bins are 1 wide
    exact = np.mean([np.diff(inside(v)) / np.ptp(inside(v)) for v in SAMPLES], axis=0)
    found = minimise(population, jnp.zeros((1, len(exact))), steps=2000)
    return jnp.max(jnp.abs(jax.nn.softmax(found[0]) - exact))


@probe(STATISTICS, "categorical critic, C51 on a decision process", "its mean is V of the policy", ERROR, 1e-3)
def c51_probe():
    """The projection keeps the mean, as long as nothing is beyond the atoms."""
    support = jnp.linspace(-10.0, 10.0, 9)
    weight = TARGET_POLICY[S, A] * CHANCE / ACTIONS

    def population(logits, *_):
        after = STEP_REWARD[:, None] + STEP_DISCOUNT[:, None] * support[None]
        targets = categorical_value.project(jax.nn.softmax(logits[NEXT]), after, support)
        return jnp.sum(weight * categorical_value.cross_entropy(logits[S], targets))

    found = minimise(population, jnp.zeros((STATES, len(support))), steps=5000)
    return jnp.max(jnp.abs(categorical_value.mean(found, support) - POLICY_VALUES))


# --- conservative critics ---------------------------------------------------------------------------------------------

OFFLINE = "conservative critics on the behaviour's steps"
WEIGHT_OF_PENALTY = 0.5


@probe(OFFLINE, "Q-learning with CQL's penalty", "β_b (Q - r - γ E max Q) = ½ α (β_b - softmax Q)", ERROR, 1e-3)
def conservative_probe():
    def population(q, *_):
        error = q_learning.q_learning(q[S], A, STEP_REWARD, STEP_DISCOUNT, q[NEXT])
        penalty = offline_q_learning.conservative_penalty(q[S], A)
        return jnp.sum(BEHAVIOUR[S, A] * CHANCE / ACTIONS * (error + WEIGHT_OF_PENALTY * penalty))

    transitions, rewards, behaviour = (np.asarray(x, np.float64) for x in (MDP.transitions, MDP.rewards, BEHAVIOUR))

    def residual(flat: np.ndarray) -> np.ndarray:
        q = flat.reshape(rewards.shape)
        error = q - rewards - DISCOUNT * transitions @ q.max(-1)
        return (behaviour * error - 0.5 * WEIGHT_OF_PENALTY * (behaviour - scipy.special.softmax(q, axis=-1))).ravel()

    exact = root(residual, np.zeros(rewards.size)).reshape(rewards.shape)
    return jnp.max(jnp.abs(minimise(population, jnp.zeros(rewards.shape), steps=3000) - exact))
