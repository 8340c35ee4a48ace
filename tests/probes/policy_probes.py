"""Policy-gradient losses and advantages of drawn groups, run to the optimum of the KL-regularised reward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from problem import (
    BETA,
    LOG_REFERENCE,
    MASK,
    OPTIMUM,
    PREFIX,
    REFERENCE,
    REWARDS,
    STAR,
    TV,
    N,
    R,
    minimise,
    probe,
    shaped,
    tokens,
    whole,
)

from rlhf_jax import advantages, constraints, group_advantages, kl, masking, returns, rewards, token_advantages
from rlhf_jax.losses import (
    covariance_policy,
    gated_policy,
    importance,
    policy,
    sequence_policy,
    value,
)
from rlhf_jax.testing import enumerable

# --- online: the KL-shaped reward is maximal at π_ref exp(r / β) / Z -------------------------------------------------

ONLINE = "policy gradient, KL in the reward"


def online(loss: Callable[..., jax.Array], *, inner: int = 2) -> jax.Array:
    """Distance from the optimum after training on all sequences, weighted by the policy that would have drawn them."""

    def population(table, old_table, key, step):
        old = tokens(old_table)
        gain = returns.discounted_returns(shaped(old), MASK)
        weight = jnp.exp(old.sum(-1))
        baseline = jnp.sum(weight * gain[:, 0])
        losses = loss(tokens(table), old, gain, baseline)
        return jnp.sum(weight * losses.reshape(N, -1).sum(-1))

    table = minimise(population, REFERENCE, inner=inner)
    return enumerable.total_variation(whole(table), OPTIMUM)


TOKEN_LEVEL = {
    "REINFORCE": lambda new, old, a: policy.reinforce(new, a),
    "importance-weighted surrogate": policy.surrogate,
    "PPO clip": lambda *x: policy.clipped_surrogate(*x).loss,
    "dual clip": lambda *x: policy.dual_clip_surrogate(*x).loss,
    "two-sided clip": lambda *x: policy.two_sided_surrogate(*x).loss,
    "CISPO": lambda *x: gated_policy.cispo(*x).loss,
    "SAPO": gated_policy.sapo,
    "DPPO-TV": lambda *x: gated_policy.dppo_tv(*x).loss,
    "DPPO-KL": lambda *x: gated_policy.dppo_kl(*x).loss,
    "KL-Cov": lambda *x: covariance_policy.kl_cov(*x, MASK),
    "GSPO-token": lambda *x: sequence_policy.gspo_token(*x, MASK, clip_low=0.2, clip_high=0.2).loss,
}
SEQUENCE_LEVEL = {
    "GSPO": lambda *x: sequence_policy.gspo(*x, MASK, clip_low=0.2, clip_high=0.2).loss,
    "LUSPO": lambda *x: sequence_policy.luspo(*x, MASK, clip_low=0.2, clip_high=0.2).loss,
    "GMPO": lambda *x: sequence_policy.gmpo(*x, MASK).loss,
    "VESPO": lambda *x: sequence_policy.vespo(*x, MASK),
}
for name, loss in TOKEN_LEVEL.items():
    probe(ONLINE, name, STAR, TV, 2e-3)(
        lambda loss=loss, inner=1 if name == "REINFORCE" else 2: online(
            lambda new, old, gain, baseline: loss(new, old, gain - baseline), inner=inner
        )
    )
for name, loss in SEQUENCE_LEVEL.items():
    probe(ONLINE, name, STAR, TV, 2e-3)(
        lambda loss=loss, inner=1 if name == "VESPO" else 2: online(
            lambda new, old, gain, baseline: loss(new, old, gain[:, 0] - baseline), inner=inner
        )
    )


@probe(ONLINE, "REINFORCE on the reference's samples, importance weights", STAR, TV, 2e-3)
def importance_probe():
    sampler = tokens(REFERENCE)

    def population(table, old_table, key, step):
        old = tokens(old_table)
        weights = importance.sequence_truncated_weights(old, sampler, MASK, cap=jnp.inf)
        gain = returns.discounted_returns(shaped(old), MASK)
        gain = gain - jnp.sum(jnp.exp(old.sum(-1)) * gain[:, 0])
        return jnp.sum((jnp.exp(LOG_REFERENCE) * weights)[:, None] * policy.reinforce(tokens(table), gain))

    return enumerable.total_variation(whole(minimise(population, REFERENCE)), OPTIMUM)


def actor_critic(actor_loss: Callable[..., jax.Array], critic_loss: Callable[..., jax.Array], inner: int) -> jax.Array:
    """Distance from the optimum of a policy trained beside its critic, a number per prefix."""

    def population(params, old, key, step):
        table, critic = params
        old_log_probs, old_values = tokens(old[0]), old[1][PREFIX]
        estimate = advantages.gae(shaped(old_log_probs), old_values, MASK)
        weight = jnp.exp(old_log_probs.sum(-1))[:, None]
        actor = actor_loss(tokens(table), old_log_probs, estimate, old_values)
        return jnp.sum(weight * (actor + critic_loss(critic[PREFIX], old_values, estimate.returns)))

    table, _ = minimise(population, (REFERENCE, jnp.zeros(REFERENCE.shape[0])), inner=inner)
    return enumerable.total_variation(whole(table), OPTIMUM)


@probe(ONLINE, "A2C with a learned critic", STAR, TV, 5e-3)
def a2c_probe():
    return actor_critic(
        lambda new, old, estimate, values: policy.a2c(new, estimate.returns, values),
        lambda new, old, target: value.squared_error(new, target),
        inner=1,
    )


@probe(ONLINE, "PPO: GAE, clip, clipped critic", STAR, TV, 5e-3)
def ppo_probe():
    return actor_critic(
        lambda new, old, estimate, values: policy.clipped_surrogate(new, old, estimate.advantages).loss,
        lambda new, old, target: value.clipped_squared_error(new, old, target),
        inner=4,
    )


# --- groups of samples ------------------------------------------------------------------------------------------------

GROUPS, G = 256, 4
GROUPED = "sampled groups, KL in the reward"


def grouped(
    advantage: Callable[..., jax.Array],
    loss: Callable[..., jax.Array] = lambda new, old, judged, mask, key: policy.reinforce(new, judged),
    *,
    kl_in_reward: bool = True,
    inner: int = 1,
) -> jax.Array:
    """Distance from the optimum after training on drawn groups.

    At the optimum the KL-shaped reward of every sequence is the same, so the noise of sampling goes with the error.
    """

    def sampled(table, old_table, key, step):
        draw, choose = jax.random.split(key)
        old = whole(old_table)
        drawn = jax.random.categorical(draw, old, shape=(GROUPS * G,))
        score = (REWARDS - BETA * (old - LOG_REFERENCE) if kl_in_reward else REWARDS)[drawn]
        mask = jnp.ones((GROUPS * G, R), bool)
        judged = advantage(score, mask, old, drawn)
        new, before = tokens(table)[drawn], tokens(old_table)[drawn]
        total = masking.sequence_sum(loss(new, before, judged, mask, choose), mask)
        if not kl_in_reward:
            total += BETA * masking.sequence_sum(kl.k3(new, tokens(REFERENCE)[drawn]), mask)
        return total

    table = minimise(sampled, REFERENCE, steps=600, inner=inner)
    return enumerable.total_variation(whole(table), OPTIMUM)


def spread(estimator: Callable[..., jax.Array], **knobs: Any) -> Callable[..., jax.Array]:
    return lambda score, mask, old, drawn: group_advantages.to_tokens(estimator(score, group=G, **knobs), mask)


def greedy_baseline(score, mask, old, drawn):
    best = jnp.argmax(old)
    greedy = (REWARDS - BETA * (old - LOG_REFERENCE))[best]
    return group_advantages.to_tokens(group_advantages.remax(score, jnp.full_like(score, greedy)), mask)


def with_lengths(score, mask, old, drawn):
    lengths = mask.sum(-1)
    return group_advantages.to_tokens(group_advantages.optimal_reward_baseline(score, lengths, group=G), mask)


def whitened_returns(score, mask, old, drawn):
    return token_advantages.reinforce_plus_plus(rewards.score_at_last_token(score, mask), mask).advantages


def token_baseline(score, mask, old, drawn):
    """As if both tokens were as likely, and the rest of each distribution lay on two others."""
    chance = jnp.broadcast_to(jnp.exp(old[drawn] / R)[:, None], mask.shape)
    squares = chance**2 + 0.5 * (1 - chance) ** 2
    landed = rewards.score_at_last_token(score, mask)
    return token_advantages.optimal_token_baseline(landed, jnp.log(chance), squares, mask, group=G).advantages


ESTIMATORS = {
    "optimal token baseline": token_baseline,
    "RLOO (leave one out)": spread(group_advantages.leave_one_out),
    "GRPO (group mean and std)": spread(group_advantages.group_relative),
    "Dr. GRPO (group mean)": spread(group_advantages.group_centred),
    "GRPO with the batch's std": spread(group_advantages.group_relative_batch_std),
    "GPG": spread(group_advantages.gpg),
    "OPO": with_lengths,
    "ReMax": greedy_baseline,
    "REINFORCE++": whitened_returns,
    "REINFORCE++ baseline": lambda score, mask, old, drawn: token_advantages.reinforce_plus_plus_baseline(
        score, mask, group=G
    ),
}
for name, estimator in ESTIMATORS.items():
    probe(GROUPED, name, STAR, TV, 2e-3)(lambda estimator=estimator: grouped(estimator))


@probe(GROUPED, "Clip-Cov", STAR, TV, 2e-3)
def clip_cov_probe():
    loss = lambda new, old, judged, mask, key: covariance_policy.clip_cov(new, old, judged, mask, key).loss
    return grouped(spread(group_advantages.leave_one_out), loss, inner=2)


# --- controllers ------------------------------------------------------------------------------------------------------


def controlled(init, update, measured):
    """What a controller ends at that answers to the exact best policy of its coefficient."""

    def answer(state, _):
        return update(state, measured(state)), None

    state, _ = jax.jit(lambda state: jax.lax.scan(answer, state, length=2000))(init)
    return measured(state)


CONTROL = "controllers, answered by the exact best policy"
COSTS = jnp.asarray([1.0, 0.0, 0.5] * 3)


@probe(CONTROL, "adaptive KL", "KL(π ‖ π_ref) = target", "error in nats", 5e-3)
def adaptive_kl_probe():
    def distance(state):
        best, _ = enumerable.regularised_optimum(LOG_REFERENCE, REWARDS, beta=state.coefficient)
        return enumerable.kl_divergence(best, LOG_REFERENCE)

    update = lambda state, now: kl.update_adaptive_kl(state, now, batch_size=100, target=0.3, horizon=10_000.0)
    return jnp.abs(controlled(kl.init_adaptive_kl(5.0), update, distance) - 0.3)


def mean_cost(state):
    """Of the policy that maximises r - λ c less the KL."""
    mixed = constraints.penalised_rewards(REWARDS, COSTS, state.multiplier) * (1 + state.multiplier)
    best, _ = enumerable.regularised_optimum(LOG_REFERENCE, mixed, beta=BETA)
    return enumerable.expectation(best, COSTS)


CONTROLLERS = {
    "Lagrange multiplier": (constraints.init_lagrange(), constraints.update_lagrange),
    "Lagrange multiplier, PID": (constraints.init_pid_lagrange(), constraints.update_pid_lagrange),
}
for name, (init, update) in CONTROLLERS.items():
    probe(CONTROL, name, "E cost = limit", "error of the cost", 1e-3)(
        lambda init=init, update=update: jnp.abs(
            controlled(init, lambda state, cost: update(state, cost, limit=0.25), mean_cost) - 0.25
        )
    )
