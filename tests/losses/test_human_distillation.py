"""losses/human_distillation.py: float64 oracles, exact optima on an enumerable vocabulary, and what does not work."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.losses import human_distillation
from rlhf_jax.losses.distillation import soft_cross_entropy
from rlhf_jax.losses.sampled_distillation import sampled_reverse_kl_advantages
from rlhf_jax.testing import enumerable

FINITE = st.floats(-8, 8, width=32)
CANDIDATES = hnp.arrays(np.float32, (2, 4), elements=FINITE)


def normalised(weights):
    total = math.fsum(weights)
    return [w / total for w in weights]


# --- formulas ---------------------------------------------------------------------------------------------------------


@given(student=CANDIDATES, teacher=CANDIDATES, rewards=CANDIDATES, beta=st.sampled_from([0.5, 1.0, 4.0]))
def test_the_reweighted_teacher_equals_float64(student, teacher, rewards, beta):
    target = human_distillation.human_teacher_logits(teacher, rewards, beta=beta)
    loss = human_distillation.human_reweighted_cross_entropy(student, teacher, rewards, beta=beta)
    for i in range(2):
        tops = (float(teacher[i].max()), float(rewards[i].max()))
        wanted = normalised(
            [
                math.exp(float(z) - tops[0]) * math.exp((float(r) - tops[1]) / beta)
                for z, r in zip(teacher[i], rewards[i], strict=True)
            ]
        )
        np.testing.assert_allclose(jnp.exp(target[i]), wanted, rtol=1e-4, atol=1e-6)
        own = normalised([math.exp(float(z)) for z in student[i]])
        entropy = -math.fsum(p * math.log(q) for p, q in zip(wanted, own, strict=True))
        np.testing.assert_allclose(loss[i], entropy, rtol=1e-4, atol=1e-4)


@given(teacher=CANDIDATES, rewards=CANDIDATES, shift=FINITE)
def test_only_differences_of_rewards_count(teacher, rewards, shift):
    mask = np.ones((2, 4), bool)
    for function in (
        lambda r: jnp.exp(human_distillation.human_teacher_logits(teacher, r, beta=0.7)),
        lambda r: human_distillation.human_weights(r, mask, beta=0.7) / 8,
    ):
        np.testing.assert_allclose(function(rewards + shift), function(rewards), rtol=1e-3, atol=1e-5)


def test_limits_of_beta():
    teacher, rewards = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[1.0, 3.0, -2.0]])
    mask = jnp.ones((1, 3), bool)
    endless = human_distillation.human_teacher_logits(teacher, rewards, beta=jnp.inf)
    np.testing.assert_allclose(endless, jax.nn.log_softmax(teacher), rtol=1e-6)
    equal = human_distillation.human_teacher_logits(teacher, jnp.full((1, 3), 7.0), beta=0.1)
    np.testing.assert_allclose(equal, jax.nn.log_softmax(teacher), rtol=1e-5)
    greedy = human_distillation.human_teacher_logits(teacher, rewards, beta=1e-3)
    np.testing.assert_allclose(jnp.exp(greedy), [[0.0, 1.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(human_distillation.human_weights(rewards, mask, beta=jnp.inf), 1.0)
    np.testing.assert_allclose(human_distillation.human_weights(jnp.full((1, 3), 7.0), mask, beta=0.1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(human_distillation.human_weights(rewards, mask, beta=1e-3), [[0.0, 3.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(
        human_distillation.human_reweighted_cross_entropy(teacher + 1, teacher, rewards, beta=jnp.inf),
        soft_cross_entropy(teacher + 1, teacher),
        rtol=1e-6,
    )


@given(rewards=hnp.arrays(np.float32, (6,), elements=FINITE), mask=hnp.arrays(np.bool_, (6,)))
def test_human_weights_equal_float64_and_have_mean_one(rewards, mask):
    weights = human_distillation.human_weights(np.where(mask, rewards, np.nan).astype(np.float32), mask, beta=0.8)
    assert not np.asarray(weights)[~mask].any()
    kept = [float(r) for r, keep in zip(rewards, mask, strict=True) if keep]
    if kept:
        top = max(kept)
        raw = [math.exp((r - top) / 0.8) for r in kept]
        np.testing.assert_allclose(
            np.asarray(weights)[mask], np.array(normalised(raw)) * len(kept), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(np.asarray(weights)[mask].mean(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("map_devices", [jax.vmap, jax.pmap])
def test_human_weights_share_one_mean_across_devices(map_devices):
    rewards = np.random.default_rng(0).normal(size=12).astype(np.float32) * 3
    mask = np.arange(12) % 5 != 0
    mask[3:6] = False  # one device has none
    whole = human_distillation.human_weights(rewards, mask, beta=0.5)
    sharded = map_devices(
        lambda r, m: human_distillation.human_weights(r, m, beta=0.5, axis_name="data"), axis_name="data"
    )
    np.testing.assert_allclose(sharded(rewards.reshape(4, 3), mask.reshape(4, 3)).reshape(12), whole, rtol=1e-5)


@given(
    values=hnp.arrays(np.float32, (3, 4), elements=FINITE),
    rewards=hnp.arrays(np.float32, (3,), elements=FINITE),
    mask=hnp.arrays(np.bool_, (3, 4)),
)
def test_step_weights_equal_float64_have_mean_one_and_see_differences_alone(values, rewards, mask):
    hidden = np.where(mask, values, np.nan).astype(np.float32)
    weights = np.asarray(human_distillation.human_step_weights(hidden, rewards, mask, beta=0.8), np.float64)
    assert not weights[~mask].any()
    raw = np.zeros(mask.shape)
    for row in range(3):
        real = [float(v) for v in values[row][mask[row]]] + [float(rewards[row])]
        raw[row, mask[row]] = [(after - before) / 0.8 for before, after in itertools.pairwise(real)]
    if mask.any():
        scaled = np.exp(raw - raw[mask].max())
        scale = scaled[mask].mean()
        np.testing.assert_allclose(weights[mask], scaled[mask] / scale, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(weights[mask].mean(), 1.0, rtol=1e-5)
    shifted = human_distillation.human_step_weights(hidden + 1, rewards + 1, mask, beta=0.8)
    np.testing.assert_allclose(shifted, weights, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        human_distillation.human_step_weights(hidden, rewards, mask, beta=jnp.inf), np.where(mask, 1.0, 0.0)
    )


def test_a_sequences_step_weights_multiply_to_its_weight():
    values, rewards = jnp.array([[0.3, -0.5, 2.0]]), jnp.array([1.5])
    mask = jnp.ones((1, 3), bool)
    weights = human_distillation.human_step_weights(values, rewards, mask, beta=0.7)
    gains = jnp.array([-0.8, 2.5, -0.5]) / 0.7
    scale = jnp.exp(gains).mean()
    np.testing.assert_allclose(jnp.prod(weights * scale), jnp.exp((1.5 - 0.3) / 0.7), rtol=1e-5)


def test_rewards_and_losses_are_their_formulas():
    log_probs, teacher = jnp.array([[-1.0, -2.0]]), jnp.array([[-0.5, -4.0]])
    human, weights = jnp.array([[0.0, 3.0]]), jnp.array([[1.5]])
    shaped = human_distillation.human_reverse_kl_rewards(log_probs, teacher, human, beta=0.2)
    np.testing.assert_allclose(shaped, [[0.2 * 0.5, 3 - 0.2 * 2.0]], rtol=1e-6)
    alone = human_distillation.human_reverse_kl_rewards(log_probs, teacher, 0 * human, beta=0.2)
    np.testing.assert_allclose(alone, 0.2 * sampled_reverse_kl_advantages(log_probs, teacher), rtol=1e-6)
    np.testing.assert_array_equal(
        human_distillation.human_reverse_kl_rewards(log_probs, teacher, human, beta=0.0), human
    )
    np.testing.assert_allclose(
        human_distillation.reward_weighted_cross_entropy(log_probs, weights), [[1.5, 3.0]], rtol=1e-6
    )
    soft = jnp.array([[3.0, 5.0]])
    mixed = functools.partial(human_distillation.human_soft_targets, soft, log_probs)
    np.testing.assert_allclose(mixed(weights), [[3 + 0.5, 5 + 1.0]], rtol=1e-6)
    np.testing.assert_allclose(mixed(weights, baseline=jnp.array([[2.0, 1.0]])), [[6 - 0.5, 5 + 1.0]], rtol=1e-6)
    np.testing.assert_allclose(mixed(weights, baseline=1.5), 1.5 * soft, rtol=1e-6)
    np.testing.assert_allclose(mixed(jnp.ones((1, 1))), soft, rtol=1e-6)
    weighted = human_distillation.reward_weighted_cross_entropy(log_probs, weights)
    np.testing.assert_allclose(mixed(weights, baseline=0.0), weighted, rtol=1e-6)
    per_token = human_distillation.reward_weighted_cross_entropy(log_probs, jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(per_token, [[1.0, 4.0]], rtol=1e-6)


# --- exact optima -----------------------------------------------------------------------------------------------------

V, R, BETA = 3, 2, 0.7
SEQUENCES = jnp.asarray(enumerable.sequences(V, R))
rng = np.random.default_rng(3)
TEACHER = jnp.asarray(rng.normal(size=(enumerable.table_size(V, R), V)), jnp.float32)
REWARDS = jnp.asarray(rng.normal(size=V**R), jnp.float32)
TEACHER_TOKENS = enumerable.token_log_probs_of_table(TEACHER, SEQUENCES)  # [9, 2]
TEACHER_LOG_P = TEACHER_TOKENS.sum(-1)
OPTIMUM = enumerable.regularised_optimum(TEACHER_LOG_P, REWARDS, beta=BETA)[0]
HUMAN = jnp.exp(REWARDS / BETA)[:, None]
PREFIXES = jnp.stack([jnp.zeros(V**R, int), 1 + SEQUENCES[:, 0]], -1)  # rows of the table along each sequence


def under_teacher(per_token):
    """E_{y ~ π_T} of a loss summed over tokens."""
    return jnp.sum(jnp.exp(TEACHER_LOG_P) * per_token.sum(-1))


def soft_along(table):
    """[9, 2] H(π_T, π_S) at every prefix of every sequence."""
    return soft_cross_entropy(table, TEACHER)[PREFIXES]


def reweighted_teacher(table):
    student = enumerable.sequence_log_probs(table, R)
    return human_distillation.human_reweighted_cross_entropy(student, TEACHER_LOG_P, REWARDS, beta=BETA)


def on_policy(table):
    log_probs = enumerable.token_log_probs_of_table(table, SEQUENCES)
    landed = jnp.stack([jnp.zeros_like(REWARDS), REWARDS], -1)
    rewards = human_distillation.human_reverse_kl_rewards(log_probs, TEACHER_TOKENS, landed, beta=BETA)
    returns = jnp.cumsum(rewards[:, ::-1], -1)[:, ::-1]
    return -jnp.sum(jax.lax.stop_gradient(jnp.exp(log_probs.sum(-1)))[:, None] * returns * log_probs)


def weighted_likelihood(table):
    log_probs = enumerable.token_log_probs_of_table(table, SEQUENCES)
    return under_teacher(human_distillation.reward_weighted_cross_entropy(log_probs, HUMAN))


def soft_values():
    """[9, 2] V(s) = β log E_{y ~ π_T}[exp(r / β) | s] before each token."""
    tilted = TEACHER_LOG_P + REWARDS / BETA
    first = SEQUENCES[:, 0]
    given_first = jnp.stack([jax.nn.logsumexp(jnp.where(first == word, tilted, -jnp.inf)) for word in range(V)])
    given_first = given_first - jax.nn.log_softmax(TEACHER[0])
    return BETA * jnp.stack([jnp.full(V**R, jax.nn.logsumexp(tilted)), given_first[first]], -1)


def step_weighted_likelihood(table, often=1.0):
    """The weights per token; `often` is how often a sequence is looked at, for its first token alone 1."""
    log_probs = enumerable.token_log_probs_of_table(table, SEQUENCES)
    mask = jnp.ones(log_probs.shape, bool)
    weights = human_distillation.human_step_weights(soft_values(), REWARDS, mask, beta=BETA)
    return under_teacher(often * human_distillation.reward_weighted_cross_entropy(log_probs, weights))


# Looking at what follows the first word more or less often moves no next-token distribution.
OFTEN = jnp.stack([jnp.ones(V**R), jnp.array([0.3, 1.0, 3.0])[SEQUENCES[:, 0]]], -1)


def soft_targets(table, baseline):
    log_probs = enumerable.token_log_probs_of_table(table, SEQUENCES)
    losses = human_distillation.human_soft_targets(soft_along(table), log_probs, HUMAN, baseline=baseline)
    return under_teacher(losses)


def weighted_soft_targets(table):
    return under_teacher(HUMAN * soft_along(table))


@functools.cache
def learnt(objective):
    """Distribution over sequences after gradient descent on an exact expectation, from a uniform student."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 400))

    def step(carry, _):
        table, state = carry
        updates, state = optimizer.update(jax.grad(objective)(table), state)
        return (optax.apply_updates(table, updates), state), None

    @jax.jit
    def train():
        table = jnp.zeros_like(TEACHER)
        return jax.lax.scan(step, (table, optimizer.init(table)), length=400)[0][0]

    return enumerable.sequence_log_probs(train(), R)


PREFIX_BASELINE = jnp.array([[1.0, 0.2], [1.0, 0.2], [1.0, 0.2]] + 3 * [[1.0, 2.0]] + 3 * [[1.0, -0.5]])
EXACT = {
    "human-reweighted teacher": reweighted_teacher,
    "on-policy reverse KL": on_policy,
    "reward-weighted likelihood": weighted_likelihood,
    "likelihood with weights per token": step_weighted_likelihood,
    "the same, prefixes seen more or less often": functools.partial(step_weighted_likelihood, often=OFTEN),
    "soft targets with a human term": functools.partial(soft_targets, baseline=1.0),
    "soft targets, baseline of the prefix": functools.partial(soft_targets, baseline=PREFIX_BASELINE),
}


@pytest.mark.parametrize("form", EXACT)
def test_every_form_reaches_the_human_optimum(form):
    reached = learnt(EXACT[form])
    assert enumerable.total_variation(reached, OPTIMUM) <= 0.01
    assert enumerable.total_variation(reached, TEACHER_LOG_P) > 0.1


def test_weighting_soft_targets_stays_at_the_teacher():
    reached = learnt(weighted_soft_targets)
    assert enumerable.total_variation(reached, TEACHER_LOG_P) <= 0.01
    assert enumerable.total_variation(reached, OPTIMUM) > 0.1


@pytest.mark.parametrize("baseline", [0.0, 1.0, PREFIX_BASELINE])
def test_the_baseline_changes_neither_expected_value_nor_gradient(baseline):
    table = jax.random.normal(jax.random.key(1), TEACHER.shape)
    got = jax.value_and_grad(soft_targets)(table, baseline)
    want = jax.value_and_grad(weighted_likelihood)(table)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


def test_a_baseline_near_the_weights_lowers_the_variance():
    """Against (c), b = E[w] leaves much less gradient noise where people disagree little."""
    log_p, weights = jnp.exp(TEACHER_LOG_P), 1 + 0.05 * REWARDS[:, None]

    def noise(baseline):
        def loss_of(table, index):
            log_probs = enumerable.token_log_probs_of_table(table, SEQUENCES)
            losses = human_distillation.human_soft_targets(soft_along(table), log_probs, weights, baseline=baseline)
            return losses[index].sum()

        gradients = jax.vmap(jax.grad(loss_of), (None, 0))(jnp.zeros_like(TEACHER), jnp.arange(V**R))
        mean = jnp.tensordot(log_p, gradients, 1)
        # At the first prefix, which all sequences pass; later ones add the noise of being reached, the same for both.
        return jnp.sum(log_p[:, None] * jnp.square(gradients - mean[None])[:, 0])

    assert noise(1.0) < 0.05 * noise(0.0)


# --- promises ---------------------------------------------------------------------------------------------------------


def test_nothing_flows_to_teacher_rewards_weights_or_baseline():
    student, teacher, rewards = (jax.random.normal(jax.random.key(i), (2, 3)) for i in range(3))
    mask = jnp.ones((2, 3), bool)
    losses = [
        (lambda t, r: human_distillation.human_teacher_logits(t, r, beta=0.5), (teacher, rewards)),
        (
            lambda t, r: human_distillation.human_reweighted_cross_entropy(student, t, r, beta=0.5),
            (teacher, rewards),
        ),
        (lambda r: human_distillation.human_weights(r, mask, beta=0.5), (rewards,)),
        (lambda v, r: human_distillation.human_step_weights(v, r, mask, beta=0.5), (teacher, rewards[:, 0])),
        (
            lambda *a: human_distillation.human_reverse_kl_rewards(*a, beta=0.5),
            (student, teacher, rewards),
        ),
        (lambda w: human_distillation.reward_weighted_cross_entropy(student, w), (rewards,)),
        (
            lambda w, b: human_distillation.human_soft_targets(teacher, student, w, baseline=b),
            (rewards, rewards + 1),
        ),
    ]
    for loss, stopped in losses:
        for gradient in jax.grad(lambda *a, f=loss: jnp.sum(jnp.sin(f(*a))), tuple(range(len(stopped))))(*stopped):
            assert not gradient.any()


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        student, teacher, rewards = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 3))) for i in range(3))

        def total(z):
            log_probs = jax.nn.log_softmax(z)
            reweighted = human_distillation.human_reweighted_cross_entropy(z, teacher, rewards, beta=0.5)
            weighted = human_distillation.reward_weighted_cross_entropy(log_probs, rewards)
            mixed = human_distillation.human_soft_targets(jnp.square(z), log_probs, rewards[:, :1], baseline=0.3)
            assert reweighted.dtype == weighted.dtype == mixed.dtype == jnp.float64
            return reweighted.sum() + weighted.sum() + mixed.sum()

        jax.test_util.check_grads(total, (student,), order=1, modes=["rev"])


def test_extremes_are_finite_and_a_missing_reward_is_loud():
    student = teacher = jnp.array([[80.0, -80.0, 0.0], [0.0, 0.0, 0.0]])
    rewards = jnp.array([[-1e4, 1e4, 0.0], [80.0, 80.0, 80.0]])
    value, gradient = jax.value_and_grad(
        lambda z: jnp.sum(human_distillation.human_reweighted_cross_entropy(z, teacher, rewards, beta=0.1))
    )(student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    weights = human_distillation.human_weights(jnp.array([1e4, -1e4, 0.0]), jnp.ones(3, bool), beta=0.1)
    np.testing.assert_allclose(weights, [3.0, 0.0, 0.0])
    np.testing.assert_array_equal(human_distillation.human_weights(rewards, jnp.zeros((2, 3), bool), beta=1.0), 0.0)
    steps = human_distillation.human_step_weights(rewards, jnp.array([-1e4, 1e4]), rewards == rewards, beta=0.1)
    assert np.isfinite(steps).all()
    one = human_distillation.human_weights(rewards, jnp.zeros((2, 3), bool).at[0, 0].set(True), beta=1.0)
    assert float(one[0, 0]) == 1.0
    missing = human_distillation.human_teacher_logits(teacher, rewards.at[0, 0].set(jnp.nan), beta=1.0)
    assert np.isnan(missing[0]).all()
    assert np.isfinite(missing[1]).all()


def test_knobs_are_swept_and_narrow_inputs_widened():
    student, teacher, rewards = (jax.random.normal(jax.random.key(i), (2, 3)) for i in range(3))
    mask, betas = jnp.ones((2, 3), bool), jnp.array([0.3, 1.0, 2.0])
    functions = (
        lambda k, s, t, r: human_distillation.human_reweighted_cross_entropy(s, t, r, beta=k),
        lambda k, s, t, r: human_distillation.human_weights(r, mask, beta=k),
        lambda k, s, t, r: human_distillation.human_step_weights(t, r[:, 0], mask, beta=k),
        lambda k, s, t, r: human_distillation.human_reverse_kl_rewards(s, t, r, beta=k),
        lambda k, s, t, r: human_distillation.human_soft_targets(t, s, r, baseline=k),
    )
    for function in functions:
        swept = jax.jit(jax.vmap(function, (0, None, None, None)))(betas, student, teacher, rewards)
        looped = jnp.stack([function(k, student, teacher, rewards) for k in betas])
        np.testing.assert_allclose(swept, looped, rtol=1e-5, atol=1e-6)
        narrow = [x.astype(jnp.bfloat16) for x in (student, teacher, rewards)]
        result = function(0.5, *narrow)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, function(0.5, *(x.astype(jnp.float32) for x in narrow)), rtol=1e-6)


def test_mistakes_are_refused_in_words():
    logits, integers = jnp.zeros((2, 3)), jnp.zeros((2, 3), int)
    with pytest.raises(TypeError, match="rewards must be floating, got dtype int32"):
        human_distillation.human_teacher_logits(logits, integers, beta=1.0)
    with pytest.raises(AssertionError):
        human_distillation.human_reweighted_cross_entropy(logits, logits, logits[:1], beta=1.0)
    with pytest.raises(TypeError, match="rewards must be floating"):
        human_distillation.human_weights(integers, integers > 0, beta=1.0)
    with pytest.raises(TypeError, match="mask must be bool"):
        human_distillation.human_weights(logits, logits, beta=1.0)
    with pytest.raises(TypeError, match="rewards must be floating"):
        human_distillation.human_step_weights(logits, integers[:, 0], logits == 0, beta=1.0)
    with pytest.raises(AssertionError):
        human_distillation.human_step_weights(logits, logits[:, 0], logits[:, :2] == 0, beta=1.0)
    with pytest.raises(TypeError, match="human_rewards must be floating"):
        human_distillation.human_reverse_kl_rewards(logits, logits, integers, beta=1.0)
    for weights in (jnp.ones(2), jnp.ones((3, 1)), jnp.ones((2, 2))):
        with pytest.raises(ValueError, match=r"write `weights\[..., None\]` for one per sequence"):
            human_distillation.reward_weighted_cross_entropy(logits, weights)
        with pytest.raises(ValueError, match="weights must be"):
            human_distillation.human_soft_targets(logits, logits, weights)
    with pytest.raises(TypeError, match="weights must be floating"):
        human_distillation.reward_weighted_cross_entropy(logits, integers)
