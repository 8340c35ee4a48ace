"""Whole training runs on languages so small that the answer is known: AC-HF, PD and the reward model reach it.

A sentence has at most R words out of V and ends with word 0 or when R is full, so that rows are ragged. All N sentences
are listed. Policies are tables with a row per prefix; the best policy is π_ref exp(r / β) / Z. Everything is sampled
inside one compiled loop, for three different rewards and references at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import actor_critic, policy_distillation, reward_model
from rlhf_jax.losses.distillation import soft_cross_entropy
from rlhf_jax.losses.human_distillation import human_step_weights, human_weights
from rlhf_jax.testing import enumerable
from rlhf_jax.types import ActorCritic, Distilled, PreferenceBatch

V, R, BETA = 4, 3, 0.5
SEEDS = (0, 1, 2)
END = 0
PREFIXES = enumerable.table_size(V, R)
TOLERANCE = 0.02


def sentences():
    """[N, R] every sentence once, filled up with END; [N, R] bool, its words."""
    tokens = enumerable.sequences(V, R)
    mask = np.cumsum(tokens == END, axis=-1) - (tokens == END) == 0
    once = np.all(mask | (tokens == END), axis=-1)
    return jnp.asarray(tokens[once]), jnp.asarray(mask[once])


TOKENS, MASK = sentences()
N = TOKENS.shape[0]
CODE = [V**t for t in reversed(range(R))]  # a sentence read as a number
PLACES = jnp.zeros(V**R, jnp.int32).at[TOKENS @ jnp.array(CODE)].set(jnp.arange(N))


class Problem(NamedTuple):
    """A reference (or teacher) and what people think of every sentence."""

    reference: jax.Array  # [PREFIXES, V] logits
    rewards: jax.Array  # [N]


def problem(seed):
    rng = np.random.default_rng(seed)
    return Problem(
        jnp.asarray(rng.normal(size=(PREFIXES, V)), jnp.float32), jnp.asarray(rng.normal(size=N), jnp.float32)
    )


PROBLEMS = jax.tree.map(lambda *x: jnp.stack(x), *map(problem, SEEDS))


def prefix_rows(tokens):
    """[..., R] row of a table that predicts each token."""
    rows, within, start = [], jnp.zeros(tokens.shape[:-1], jnp.int32), 0
    for t in range(R):
        rows.append(start + within)
        within, start = within * V + tokens[..., t], start + V**t
    return jnp.stack(rows, axis=-1)


def speak(table, key, number):
    """[number] sentences, by their place in TOKENS, drawn from a policy word by word."""
    words, alive = jnp.zeros((number, 0), jnp.int32), jnp.ones(number, bool)
    for t, now in enumerate(jax.random.split(key, R)):
        row = prefix_rows(jnp.pad(words, ((0, 0), (0, R - t))))[:, t]
        word = jnp.where(alive, jax.random.categorical(now, table[row]), END)
        words, alive = jnp.concatenate([words, word[:, None]], axis=-1), alive & (word != END)
    return PLACES[words @ jnp.array(CODE)]


def whole(table):
    """[N] log-probs of every sentence."""
    return jnp.sum(jnp.where(MASK, enumerable.token_log_probs_of_table(table, TOKENS), 0.0), axis=-1)


def optimum(given):
    return enumerable.regularised_optimum(whole(given.reference), given.rewards, beta=BETA)[0]


def distances(tables, targets):
    """[seeds] total variation."""
    return np.asarray(enumerable.total_variation(jax.vmap(whole)(tables), targets))


TARGETS = jax.vmap(optimum)(PROBLEMS)
TEACHERS = jax.vmap(whole)(PROBLEMS.reference)


def test_the_listed_sentences_are_all_and_the_problem_is_not_solved_at_the_start():
    assert N == 1 + 3 + 9 * 4
    np.testing.assert_allclose(jnp.exp(TEACHERS).sum(-1), 1.0, rtol=1e-5)
    assert MASK.sum(-1).min() == 1
    assert MASK.sum(-1).max() == R
    assert distances(PROBLEMS.reference, TARGETS).min() > 0.3


def test_spoken_sentences_are_as_frequent_as_they_are_likely():
    number, probability = 100_000, np.exp(TEACHERS[0])
    drawn = jax.jit(speak, static_argnums=2)(PROBLEMS.reference[0], jax.random.key(0), number)
    deviation = np.sqrt(number * probability * (1 - probability))
    assert np.all(np.abs(np.bincount(drawn, minlength=N) - number * probability) < 5 * deviation + 1)


def adam(rate, steps):
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def for_all_seeds(run):
    """run(problem, key) for every seed in one program."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(SEEDS))
    return jax.jit(jax.vmap(run))(PROBLEMS, keys)


# --- AC-HF ------------------------------------------------------------------------------------------------------------

TURNS, EPOCHS, MINIBATCHES, SAMPLES = 150, 2, 2, 1024


def table_and_values(params, tokens):
    return ActorCritic(
        enumerable.token_log_probs_of_table(params["actor"], tokens), params["critic"][prefix_rows(tokens)]
    )


def act_and_learn(given, key, *, gae_lambda):
    """AC-HF with samples of its own: (actor's table, critic's values [PREFIXES], [TURNS] KL as it was reported)."""
    config = actor_critic.Config(value_weight=1.0, gae_lambda=gae_lambda)
    optimizer = adam(0.05, TURNS * EPOCHS * MINIBATCHES)
    start = {"actor": given.reference, "critic": jnp.zeros(PREFIXES)}
    state = actor_critic.init(start, table_and_values, optimizer, kl_coefficient=BETA)

    def turn(state, key):
        sample_key, order_key = jax.random.split(key)
        drawn = speak(state.train.params["actor"], sample_key, SAMPLES)
        tokens, mask = TOKENS[drawn], MASK[drawn]
        old = table_and_values(state.train.params, tokens)
        batch, told = actor_critic.experience(
            tokens,
            mask,
            old.log_probs,
            enumerable.token_log_probs_of_table(given.reference, tokens),
            old.values,
            given.rewards[drawn],
            kl_coefficient=state.kl.coefficient,
            config=config,
        )
        state, _ = actor_critic.update_epochs(
            state, batch, order_key, epochs=EPOCHS, minibatches=MINIBATCHES, config=config
        )
        return state, told["policy/kl"]

    state, told = jax.lax.scan(turn, state, jax.random.split(key, TURNS))
    return state.train.params["actor"], state.train.params["critic"], told


@pytest.mark.parametrize("gae_lambda", [0.95, 1.0])
def test_ac_hf_reaches_the_optimum_and_its_critic_the_value(gae_lambda):
    """Also with whitened advantages: they hold reward and KL alike, so their scale moves no optimum."""
    tables, values, told = for_all_seeds(functools.partial(act_and_learn, gae_lambda=gae_lambda))
    assert distances(tables, TARGETS).max() <= TOLERANCE
    reached = jax.vmap(lambda p, q, r: enumerable.regularised_objective(p, q, r, beta=BETA))(
        jax.vmap(whole)(tables), TEACHERS, PROBLEMS.rewards
    )
    np.testing.assert_allclose(values[:, 0], reached, atol=2e-3)  # row 0 is the empty prefix
    np.testing.assert_allclose(told[:, -20:].mean(-1), enumerable.kl_divergence(TARGETS, TEACHERS), rtol=0.03)


# --- PD ---------------------------------------------------------------------------------------------------------------

STEPS, TEACHER_SAMPLES = 300, 4096


def beside(teacher):
    """The student's table beside the teacher's."""

    def apply(params, tokens):
        rows = prefix_rows(tokens)
        return Distilled(
            soft_cross_entropy(params["table"], teacher)[rows],
            enumerable.token_log_probs_of_table(params["table"], tokens),
            soft_cross_entropy(teacher, teacher)[rows],
        )

    return apply


def distil(given, key, *, draw, steps):
    """PD from a student that knows nothing; draw(problem, key) -> ([B] sentences, [B] weights, [B] importance)."""
    config = policy_distillation.Config()
    state = policy_distillation.init({"table": jnp.zeros((PREFIXES, V))}, beside(given.reference), adam(0.1, steps))

    def step(state, key):
        drawn, weights, importance = draw(given, key)
        batch = policy_distillation.Batch(TOKENS[drawn], MASK[drawn], weights, importance)
        return policy_distillation.update(state, batch, config=config)

    state, _ = jax.lax.scan(step, state, jax.random.split(key, steps))
    return state.params["table"]


def likings(given, drawn):
    return human_weights(given.rewards[drawn], jnp.ones(drawn.shape, bool), beta=BETA)


def soft_values(given):
    """[N, R] V(s) = β log E_{y ~ π_T}[exp(r / β) | s] before each word."""
    rows, log_teacher = prefix_rows(TOKENS), whole(given.reference)
    after = MASK.T[:, None] & (rows.T[:, :, None] == rows.T[:, None])  # [R, N, N] sentences that begin like this one
    total = lambda log_p: jax.nn.logsumexp(jnp.where(after, log_p, -jnp.inf), axis=-1)
    return BETA * (total(log_teacher + given.rewards / BETA) - total(log_teacher)).T


def teacher_samples(given, key):
    return speak(given.reference, key, TEACHER_SAMPLES)


def plain(given, key):
    drawn = teacher_samples(given, key)
    return drawn, jnp.ones(drawn.shape), None


def human(given, key):
    drawn = teacher_samples(given, key)
    return drawn, likings(given, drawn), None


def human_by_step(given, key):
    """As `human`, with a weight for every word: what it added to the soft value of the sentence."""
    drawn = teacher_samples(given, key)
    return drawn, human_step_weights(soft_values(given)[drawn], given.rewards[drawn], MASK[drawn], beta=BETA), None


def human_by_proposal(given, key):
    """As `human`, on rows drawn anew from a pool of the teacher's samples by `proposal`."""
    key, again = jax.random.split(key)
    pool = teacher_samples(given, key)
    weights = likings(given, pool)
    probabilities, importance = policy_distillation.proposal(weights)
    rows = jax.random.choice(again, TEACHER_SAMPLES, (TEACHER_SAMPLES,), p=probabilities)
    return pool[rows], weights[rows], importance[rows]


def human_by_enumeration(given, key):
    """Every sentence once, q = 1 / N, importance N π_T(y): expectations without luck."""
    log_teacher = whole(given.reference)
    exact = jnp.exp(given.rewards / BETA - jax.nn.logsumexp(log_teacher + given.rewards / BETA))
    return jnp.arange(N), exact, N * jnp.exp(log_teacher)


@pytest.mark.parametrize("draw", [plain, human, human_by_step, human_by_proposal])
def test_pd_reaches_the_teacher_or_the_teacher_that_people_like(draw):
    tables = for_all_seeds(functools.partial(distil, draw=draw, steps=STEPS))
    reached, other = (TEACHERS, TARGETS) if draw is plain else (TARGETS, TEACHERS)
    assert distances(tables, reached).max() <= TOLERANCE
    assert distances(tables, other).min() > 0.3


def test_without_luck_pd_reaches_the_optimum_itself():
    tables = for_all_seeds(functools.partial(distil, draw=human_by_enumeration, steps=1000))
    assert distances(tables, TARGETS).max() <= 1e-3


# --- reward model -----------------------------------------------------------------------------------------------------


def fit_rewards(batch, *, steps, **knobs):
    """[N] scores of all sentences, learnt from comparisons of sentences by number."""
    config = reward_model.Config(**knobs)
    state = reward_model.init({"scores": jnp.zeros(N)}, lambda params, items: params["scores"][items], adam(0.1, steps))
    update = lambda state, _: reward_model.update(state, batch, config=config)
    return jax.lax.scan(update, state, None, length=steps)[0].params["scores"]


CHOSEN, REJECTED = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(N), jnp.arange(N), indexing="ij"))


def sampled_comparisons(given, key, number=1_000_000):
    """How often one sentence was preferred to another, as Bradley and Terry say, for every ordered pair."""
    pair_key, choice_key = jax.random.split(key)
    first, second = jax.random.randint(pair_key, (2, number), 0, N)
    first_wins = jax.random.bernoulli(choice_key, jax.nn.sigmoid(given.rewards[first] - given.rewards[second]))
    outcome = jnp.where(first_wins, first * N + second, second * N + first)
    return PreferenceBatch(CHOSEN, REJECTED, jnp.zeros(N * N).at[outcome].add(1.0))


def all_comparisons(given, key):
    """Every ordered pair once, weighing as much as it is likely."""
    return PreferenceBatch(CHOSEN, REJECTED, jax.nn.sigmoid(given.rewards[CHOSEN] - given.rewards[REJECTED]))


def centred(x):
    return x - x.mean(axis=-1, keepdims=True)


def win_probabilities(scores):
    """[..., N, N]"""
    return jax.nn.sigmoid(scores[..., :, None] - scores[..., None, :])


def test_the_reward_model_recovers_the_differences_of_rewards_from_samples():
    scores = for_all_seeds(lambda given, key: fit_rewards(sampled_comparisons(given, key), steps=200, centring=0.0))
    error = jnp.abs(win_probabilities(scores) - win_probabilities(PROBLEMS.rewards))
    assert error.max() <= TOLERANCE


def test_without_luck_the_reward_model_recovers_them_exactly():
    scores = for_all_seeds(lambda given, key: fit_rewards(all_comparisons(given, key), steps=300, centring=0.0))
    np.testing.assert_allclose(centred(scores), centred(PROBLEMS.rewards), atol=5e-3)


def test_centring_fixes_the_origin_and_shrinks_the_differences():
    """The mean of (s_i + s_j)² over pairs holds the scores' variance too, not their mean alone."""
    scores = for_all_seeds(lambda given, key: fit_rewards(all_comparisons(given, key), steps=300))
    np.testing.assert_allclose(scores.mean(-1), 0.0, atol=1e-3)
    slopes = jnp.sum(scores * centred(PROBLEMS.rewards), -1) / jnp.sum(centred(PROBLEMS.rewards) ** 2, -1)
    assert slopes.min() > 0.8
    assert slopes.max() < 0.95
