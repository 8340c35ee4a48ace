"""Recipes for small decoders: the multiplier, the tilted weights, and that AC-HF and GRPO raise a reward they can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import constraints
from rlhf_jax.algorithms import actor_critic, group, policy_distillation
from rlhf_jax.group_advantages import group_centred
from rlhf_jax.losses.human_distillation import human_step_weights
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.recipes import sequences
from rlhf_jax.recipes.sequences import Constraint, Judged, Prompts, Task
from rlhf_jax.recipes.teacher_samples import Rated, distil, rate, tilt
from rlhf_jax.types import TokenInputs

SHAPE = TransformerConfig(vocab_size=6, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=16)
TASK = Task(Transformer(SHAPE), prompt_length=2, length=2, end_token=0, pad_token=5)
PROMPTS = Prompts(jnp.array([[1, 2], [3, 1], [2, 2], [4, 3]]), jnp.ones((4, 2), bool), jnp.array([1, 2, 1, 2]))
CRITIC = ScalarHead(scale=0.0)


def judge(rollout, truth, states):
    """The first token should be the truth; 4 costs."""
    first = rollout.responses[:, 0]
    return Judged((first == truth).astype(jnp.float32), (first == 4).astype(jnp.float32), truth == 1)


@pytest.fixture(scope="module")
def base():
    one = jnp.zeros((1, 1), jnp.int32)
    return TASK.model.init(jax.random.key(0), one, one == 0, method="initialise")["params"]


def judge_tokens(rollout, truth, states):
    """The same reward, for the token that earns it."""
    told = judge(rollout, truth, states)
    first = jnp.pad(told.rewards[:, None], ((0, 0), (0, 1)))
    return Judged(first, jnp.zeros_like(first), jnp.zeros(first.shape, bool))


@pytest.mark.parametrize(("method", "judge"), [("ac_hf", judge), ("ac_hf", judge_tokens), ("grpo", judge)])
def test_a_checkable_reward_is_learnt(base, method, judge):
    knobs = {"task": TASK, "judge": judge, "turns": 30, "rows": 16, "minibatches": 1}
    if method == "ac_hf":
        params = {"actor": base, "critic": CRITIC.init(jax.random.key(1), jnp.zeros((1, 8)))["params"]}
        apply = sequences.actor_critic_policy(TASK, CRITIC)
        agent = actor_critic.init(params, apply, optax.adam(1e-2), kl_coefficient=0.0)
        learner = sequences.Learner(agent, constraints.init_lagrange())
        call = functools.partial(sequences.learn, config=actor_critic.Config(), **knobs)
    else:
        train = group.init(base, policies.token_policy(TASK.model, prompt_length=2), optax.adam(1e-2))
        learner = sequences.GroupLearner(train, constraints.init_lagrange())
        call = functools.partial(sequences.learn_in_groups, config=group.Config(group=4, kl_weight=0.0), **knobs)
    step = jax.jit(call)
    learner, before = step(learner, base, PROMPTS, jax.random.key(2))
    learner, after = step(learner, base, PROMPTS, jax.random.key(3))
    assert float(after["human/reward"]) > float(before["human/reward"]) + 0.2
    assert float(after["constraint/multiplier"]) == 0.0  # the default constrains nothing


@pytest.mark.parametrize("method", ["ac_hf", "grpo"])
def test_the_multiplier_divides_the_rewards_and_the_pull_towards_the_reference_alike(base, method):
    reference = jax.tree.map(lambda x: 0.5 * x, base)

    def learnt(multiplier, scale):
        scaled = lambda *seen: (told := judge(*seen))._replace(rewards=scale * told.rewards, costs=0.0 * told.costs)
        knobs = {"task": TASK, "judge": scaled, "turns": 3, "rows": 4, "minibatches": 1}
        lagrange = constraints.init_lagrange(multiplier)
        if method == "ac_hf":
            params = {"actor": base, "critic": CRITIC.init(jax.random.key(1), jnp.zeros((1, 8)))["params"]}
            apply = sequences.actor_critic_policy(TASK, CRITIC)
            agent = actor_critic.init(params, apply, optax.adam(1e-2), kl_coefficient=2.0 * scale)
            call = functools.partial(sequences.learn, config=actor_critic.Config(), **knobs)
            learner = sequences.Learner(agent, lagrange)
            return jax.jit(call)(learner, reference, PROMPTS, jax.random.key(2))[0].agent.train.params["actor"]
        train = group.init(base, policies.token_policy(TASK.model, prompt_length=2), optax.adam(1e-2))
        config = group.Config(group=4, advantages=group_centred, kl_weight=2.0 * scale)
        call = functools.partial(sequences.learn_in_groups, config=config, **knobs)
        learner = sequences.GroupLearner(train, lagrange)
        return jax.jit(call)(learner, reference, PROMPTS, jax.random.key(2))[0].train.params

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), learnt(3.0, 1.0), learnt(0.0, 0.25))


def test_the_multiplier_follows_answers_at_stake_alone():
    costs, stake = jnp.array([1.0, 0.0, 1.0]), jnp.array([True, True, False])
    judged = Judged(jnp.zeros(3), costs, stake)
    state, told = sequences.ascend(constraints.init_lagrange(1.0), judged, Constraint(0.1, 0.5))
    assert float(state.multiplier) == pytest.approx(1.0 + 0.5 * (0.5 - 0.1))
    assert float(told["constraint/cost"]) == 0.5
    bounded = sequences.ascend(constraints.init_lagrange(1.0), judged, Constraint(0.1, 0.5, most=0.2))
    assert float(bounded[0].multiplier) == pytest.approx(1.0 + 0.5 * (0.2 - 0.1))
    assert float(bounded[1]["constraint/cost"]) == 0.5  # what is told is not bounded
    nobody = judged._replace(at_stake=jnp.zeros(3, bool))
    assert float(sequences.ascend(state, nobody, Constraint(0.1, 0.5))[0].multiplier) == float(state.multiplier)


def test_the_metric_of_rewards_is_of_whole_answers():
    answers, tokens = jnp.array([1.0, 2.0]), jnp.array([[0.5, 0.5], [2.0, 0.0]])
    lagrange = constraints.init_lagrange()
    told = [
        sequences.ascend(lagrange, Judged(x, jnp.zeros_like(x), jnp.zeros(x.shape, bool)), sequences.FREE)[1]
        for x in (answers, tokens)
    ]
    assert [float(x["human/reward"]) for x in told] == [1.5, 1.5]


def test_rewards_of_tokens_give_step_weights_and_a_student_that_follows_them(base):
    rated = jax.jit(lambda: rate(TASK, base, PROMPTS, jax.random.key(5), judge=judge_tokens, samples=256))()
    assert rated.rewards.shape == rated.mask.shape == (4, 256, 2)
    weights, _ = tilt(rated, beta=0.5)
    before, done = jnp.zeros((4, 256, 2)).at[..., 1].set(rated.rewards[..., 0]), rated.rewards.sum(-1)
    for row in range(4):
        expected = human_step_weights(before[row], done[row], rated.mask[row], beta=0.5)
        np.testing.assert_allclose(weights[row], expected, rtol=1e-5)
    start = {"student": base}
    state = policy_distillation.init(start, policies.student(TASK.model, prompt_length=2), optax.adam(1e-2))
    learn = jax.jit(functools.partial(distil, task=TASK, updates=60, rows=16))
    state, _ = learn(state, base, rated, weights, jax.random.key(6))
    again = jax.jit(lambda params: rate(TASK, params, PROMPTS, jax.random.key(7), judge=judge_tokens, samples=64))
    rewards = [float(again(params).rewards.sum(-1).mean()) for params in (base, state.params["student"])]
    assert rewards[1] > rewards[0] + 0.2


def test_tilted_weights_have_mean_one_and_meet_the_limit():
    rng = np.random.default_rng(0)
    rewards, costs = rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 2, (8, 4)).astype(np.float32)
    costs[:, 0] = 0.0  # a harmless answer is always there
    inputs, mask = TokenInputs(jnp.zeros((8, 4, 4), jnp.int32), jnp.ones((8, 4, 4), bool)), jnp.ones((8, 4, 2), bool)
    rated = Rated(inputs, mask, jnp.asarray(rewards), jnp.asarray(costs), jnp.ones((8, 4), bool))
    weights, lagrange = tilt(rated, beta=0.5)
    expected = np.exp(rewards / 0.5)
    np.testing.assert_allclose(weights, expected / expected.mean(1, keepdims=True), rtol=1e-5)
    assert float(lagrange.multiplier) == 0.0
    weights, lagrange = jax.jit(lambda: tilt(rated, beta=0.05, constraint=Constraint(0.05, 2.0), steps=400))()
    np.testing.assert_allclose(weights.mean(1), 1.0, rtol=1e-5)
    assert float(lagrange.multiplier) > 0
    assert float((weights * costs).mean()) == pytest.approx(0.05, abs=5e-3)
    expected = np.exp((rewards - float(lagrange.multiplier) * costs) / 0.05)
    np.testing.assert_allclose(weights, expected / expected.mean(1, keepdims=True), rtol=1e-4, atol=1e-6)
