"""losses/distillation.py and losses/sampled_distillation.py against float64 sums, their limits and their gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.losses import distillation, sampled_distillation

ROWS, V = 3, 4


@st.composite
def pairs(draw):
    """(student, teacher) logits [3, 4]; the teacher may forbid tokens."""
    finite = st.floats(-15, 15, width=32, allow_subnormal=False)
    student = [[draw(finite) for _ in range(V)] for _ in range(ROWS)]
    teacher = [[draw(st.one_of(finite, finite, st.just(-math.inf))) for _ in range(V)] for _ in range(ROWS)]
    for row in teacher:
        row[draw(st.integers(0, V - 1))] = draw(finite)
    return np.array(student, np.float32), np.array(teacher, np.float32)


def log_softmax(row, temperature=1.0):
    scaled = [float(z) / temperature for z in row]
    top = max(scaled)
    log_z = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - log_z for z in scaled]


def expected(log_p, f):
    return math.fsum(math.exp(x) * f(x, i) for i, x in enumerate(log_p) if x > -math.inf)


def cross_entropy_of(q, p):
    return -expected(p, lambda _, i: q[i])


def forward_of(q, p):
    return expected(p, lambda x, i: x - q[i])


def reverse_of(q, p):
    return expected(q, lambda x, i: x - p[i])


def jsd_of(q, p, beta):
    m = [math.log(beta * math.exp(x) + (1 - beta) * math.exp(y)) for x, y in zip(p, q, strict=True)]
    return beta * forward_of(m, p) + (1 - beta) * forward_of(m, q)


def variation_of(q, p):
    return math.fsum(abs(math.exp(x) - math.exp(y)) for x, y in zip(p, q, strict=True)) / 2


ORACLES = {
    distillation.soft_cross_entropy: cross_entropy_of,
    distillation.forward_kl: forward_of,
    distillation.reverse_kl: reverse_of,
    distillation.total_variation: variation_of,
    distillation.generalised_jsd: functools.partial(jsd_of, beta=0.5),
    functools.partial(distillation.generalised_jsd, beta=0.1): functools.partial(jsd_of, beta=0.1),
}


@pytest.mark.parametrize("index", range(len(ORACLES)))
@given(case=pairs(), temperature=st.sampled_from([0.7, 1.0, 3.0]))
def test_divergences_equal_float64(index, case, temperature):
    function, oracle = list(ORACLES.items())[index]
    result = function(*case, temperature=temperature)
    for row, student, teacher in zip(result, *case, strict=True):
        want = oracle(log_softmax(student, temperature), log_softmax(teacher, temperature))
        np.testing.assert_allclose(row, want, rtol=3e-5, atol=3e-5)


@given(case=pairs(), temperature=st.sampled_from([0.7, 1.0, 3.0]))
def test_hinton_and_hard_targets_equal_float64(case, temperature):
    soft = distillation.hinton_cross_entropy(*case, temperature=temperature)
    hard = distillation.hard_cross_entropy(*case)
    for i, (student, teacher) in enumerate(zip(*case, strict=True)):
        want = temperature**2 * cross_entropy_of(log_softmax(student, temperature), log_softmax(teacher, temperature))
        np.testing.assert_allclose(soft[i], want, rtol=3e-5, atol=3e-5)
        likeliest = max(range(V), key=lambda v: (teacher[v], -v))
        np.testing.assert_allclose(hard[i], -log_softmax(student)[likeliest], rtol=1e-5, atol=1e-5)


@given(case=pairs())
def test_relations_between_divergences(case):
    student, teacher = case
    close = {"rtol": 1e-4, "atol": 5e-5}
    forward, reverse = distillation.forward_kl(*case), distillation.reverse_kl(*case)
    variation, jsd = distillation.total_variation(*case), distillation.generalised_jsd(*case)
    entropy = distillation.soft_cross_entropy(teacher, teacher)
    np.testing.assert_allclose(distillation.soft_cross_entropy(*case), forward + entropy, **close)
    assert (forward >= -1e-5).all()
    assert (reverse >= -1e-5).all()
    assert (2 * variation**2 <= jnp.minimum(forward, reverse) + 1e-4).all()  # Pinsker
    assert (jsd <= math.log(2) + 1e-5).all()
    assert (variation <= 1 + 1e-6).all()
    swapped = distillation.generalised_jsd(teacher, student, beta=0.9)
    np.testing.assert_allclose(distillation.generalised_jsd(*case, beta=0.1), swapped, **close)
    for same in (distillation.forward_kl, distillation.reverse_kl):
        np.testing.assert_array_equal(same(teacher, teacher), 0.0)
    for same in (distillation.generalised_jsd, distillation.total_variation):
        np.testing.assert_allclose(same(teacher, teacher), 0.0, atol=1e-6)


def test_jsd_tends_to_the_two_divergences_and_is_zero_at_the_ends():
    with jax.enable_x64(True):
        case = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[1.0, 0.5, -0.7]])
        forward = distillation.generalised_jsd(*case, beta=1e-6) / 1e-6
        reverse = distillation.generalised_jsd(*case, beta=1 - 1e-6) / 1e-6
        np.testing.assert_allclose(forward, distillation.forward_kl(*case), rtol=1e-4)
        np.testing.assert_allclose(reverse, distillation.reverse_kl(*case), rtol=1e-4)
        for beta in (0.0, 1.0):
            np.testing.assert_allclose(distillation.generalised_jsd(*case, beta=beta), 0.0, atol=1e-12)


def test_soft_targets_tend_to_hard_ones_and_kl_has_their_gradient():
    student, teacher = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[1.0, 0.5, -0.7]])
    hard = distillation.hard_cross_entropy(student, teacher)
    np.testing.assert_allclose(distillation.soft_cross_entropy(student, teacher * 1e3), hard, rtol=1e-6)
    gradients = [
        jax.grad(lambda z, f=f: jnp.sum(f(z, teacher)))(student)
        for f in (distillation.soft_cross_entropy, distillation.forward_kl)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], jax.nn.softmax(student) - jax.nn.softmax(teacher), rtol=1e-5)


def test_the_factor_keeps_the_gradient_at_high_temperature():
    student, teacher = jnp.array([[0.3, -1.0, 0.7]]), jnp.array([[1.0, 0.5, -1.5]])
    for temperature in (30.0, 100.0):
        gradient = jax.grad(
            lambda z, t=temperature: jnp.sum(distillation.hinton_cross_entropy(z, teacher, temperature=t))
        )
        np.testing.assert_allclose(gradient(student), (student - teacher) / 3, rtol=0.1)
    np.testing.assert_array_equal(
        distillation.hinton_cross_entropy(student, teacher, temperature=1.0),
        distillation.soft_cross_entropy(student, teacher),
    )


def test_infinite_where_the_mathematics_is():
    allowed, forbidden = jnp.array([[0.0, 1.0]]), jnp.array([[0.0, -jnp.inf]])
    assert np.isposinf(distillation.forward_kl(forbidden, allowed))
    assert np.isposinf(distillation.soft_cross_entropy(forbidden, allowed))
    assert np.isposinf(distillation.reverse_kl(allowed, forbidden))
    for bounded in (distillation.generalised_jsd, distillation.total_variation):
        assert np.isfinite(bounded(allowed, forbidden))
        assert np.isfinite(bounded(forbidden, allowed))


FULL = [*ORACLES, distillation.hinton_cross_entropy, distillation.hard_cross_entropy]


@pytest.mark.parametrize("function", FULL)
def test_gradients_equal_finite_differences_and_stop_at_the_teacher(function):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        student, teacher = jnp.asarray(rng.normal(size=(3, V))), jnp.asarray(rng.normal(size=(3, V)))
        assert function(student, teacher).dtype == jnp.float64
        jax.test_util.check_grads(lambda z: function(z, teacher), (student,), order=1, modes=["rev"])
        assert not jax.grad(lambda t: jnp.sum(function(student, t)))(teacher).any()


@pytest.mark.parametrize("function", FULL)
def test_extremes_give_finite_values_and_gradients(function):
    student = jnp.array([[80.0, -80.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-1e4, 1e4, 0.0, 0.0]])
    teacher = jnp.array([[-80.0, 80.0, 0.0, 1.0], [0.0, 0.0, -jnp.inf, 0.0], [1e4, -1e4, 0.0, 0.0]])
    if getattr(function, "func", function) is distillation.reverse_kl:
        teacher = teacher.at[1, 2].set(-80.0)
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(function(z, teacher)))(student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    both = jnp.array([[0.0, 1.0, -jnp.inf, 2.0]])
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(function(z, both[:, ::-1][:, ::-1] + 1.0)))(both)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("function", FULL)
def test_jit_dtype_and_sweeps(function):
    rng = np.random.default_rng(0)
    narrow = [jnp.asarray(rng.normal(size=(3, V)), jnp.bfloat16) for _ in range(2)]
    wide = [x.astype(jnp.float32) for x in narrow]
    assert function(*narrow).dtype == jnp.float32
    np.testing.assert_allclose(function(*narrow), function(*wide), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(function)(*wide), function(*wide), rtol=1e-5, atol=1e-7)
    if function is not distillation.hard_cross_entropy:
        knobs = jnp.array([0.5, 2.0])
        swept = jax.vmap(lambda t: function(*wide, temperature=t))(knobs)
        looped = jnp.stack([function(*wide, temperature=t) for t in knobs])
        np.testing.assert_allclose(swept, looped, rtol=1e-5, atol=1e-7)


# --- top k ------------------------------------------------------------------------------------------------------------


@given(case=pairs(), k=st.integers(1, V))
def test_top_k_equals_float64_over_buckets(case, k):
    student, teacher = case
    log_p = np.array([log_softmax(row) for row in teacher])
    indices = np.argsort(-log_p, axis=-1)[:, :k]
    known = np.take_along_axis(log_p, indices, -1).astype(np.float32)
    result = distillation.top_k_kl(student, indices, known)
    for row in range(ROWS):
        q = np.exp(log_softmax(student[row]))
        p = np.exp(known[row].astype(np.float64))
        top = math.fsum(x * math.log(x / q[i]) for x, i in zip(p, indices[row], strict=True) if x > 0)
        tail = max(1 - math.fsum(p), 0.0)
        rest = math.fsum(q[v] for v in range(V) if v not in indices[row])
        want = top + (tail * math.log(tail / rest) if k < V and tail > 0 else 0.0)
        np.testing.assert_allclose(result[row], want, rtol=1e-4, atol=1e-4)
    assert (result <= distillation.forward_kl(student, teacher) + 1e-4).all()
    if k == V:
        np.testing.assert_allclose(result, distillation.forward_kl(student, teacher), rtol=1e-4, atol=1e-4)


def test_top_k_pulls_the_tail_together():
    teacher = jnp.log(jnp.array([[0.6, 0.2, 0.15, 0.05]]))
    known = jnp.array([[0, 1]]), teacher[:, :2]
    lumped = jnp.log(jnp.array([[0.6, 0.2, 0.05, 0.15]]))  # the tail's inside is free
    np.testing.assert_allclose(distillation.top_k_kl(lumped, *known), 0.0, atol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(distillation.top_k_kl(z, *known)))(jnp.zeros((1, 4)))
    np.testing.assert_allclose(gradient, [[-0.35, 0.05, 0.15, 0.15]], atol=1e-6)


def test_top_k_gradients_and_extremes():
    indices = jnp.array([[1, 3], [0, 2]])
    with jax.enable_x64(True):
        student = jnp.asarray(np.random.default_rng(0).normal(size=(2, V)))
        known = jnp.log(jnp.array([[0.5, 0.2], [0.7, 0.3]]))  # the second row leaves nothing for the tail
        assert distillation.top_k_kl(student, indices, known).dtype == jnp.float64
        jax.test_util.check_grads(lambda z: distillation.top_k_kl(z, indices, known), (student,), 1, modes=["rev"])
        assert not jax.grad(lambda p: jnp.sum(distillation.top_k_kl(student, indices, p)))(known).any()
    known = jnp.log(jnp.array([[0.5, 0.2], [0.7, 0.3]]))
    extreme = jnp.array([[0.0, 80.0, 0.0, 80.0], [-80.0, 0.0, -80.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(distillation.top_k_kl(z, indices, known)))(extreme)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert distillation.top_k_kl(extreme.astype(jnp.bfloat16), indices, known).dtype == jnp.float32


# --- samples ----------------------------------------------------------------------------------------------------------


@given(case=pairs())
def test_sampled_estimates_have_the_expectations_of_the_full_losses(case):
    student, teacher = case
    teacher = np.where(np.isfinite(teacher), teacher, -15).astype(np.float32)
    log_p = jax.nn.log_softmax(teacher)
    behaviour = jnp.full((ROWS, V), 1 / V)

    def reverse(z):
        log_q = jax.nn.log_softmax(z)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_q)) * sampled_distillation.sampled_reverse_kl(log_q, log_p))

    def soft(z):
        log_q = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(log_p) * sampled_distillation.sampled_cross_entropy(log_q, jnp.ones_like(log_q)))

    def off_policy(z):
        log_q = jax.nn.log_softmax(z)
        weights = jnp.exp(log_p) / behaviour
        return jnp.sum(behaviour * sampled_distillation.sampled_cross_entropy(log_q, weights))

    for estimate, full in (
        (reverse, distillation.reverse_kl),
        (soft, distillation.soft_cross_entropy),
        (off_policy, distillation.soft_cross_entropy),
    ):
        got = jax.value_and_grad(estimate)(student)
        want = jax.value_and_grad(lambda z, f=full: jnp.sum(f(z, teacher)))(student)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-3, atol=1e-4)


def test_sampled_reverse_kl_is_a_policy_gradient_on_its_advantages():
    log_probs, teacher = jnp.array([-1.0, -0.2, -80.0]), jnp.array([-3.0, -0.1, 0.0])
    advantages = sampled_distillation.sampled_reverse_kl_advantages(log_probs, teacher)
    np.testing.assert_allclose(advantages, [-2.0, 0.1, 80.0], rtol=1e-6)
    value, gradient = jax.vjp(sampled_distillation.sampled_reverse_kl, log_probs, teacher)
    np.testing.assert_allclose(value, -advantages, rtol=1e-6)
    for_student, for_teacher = gradient(jnp.ones(3))
    np.testing.assert_allclose(for_student, -advantages, rtol=1e-6)
    assert not for_teacher.any()
    stopped = jax.grad(lambda q, p: sampled_distillation.sampled_reverse_kl_advantages(q, p).sum(), (0, 1))
    assert not any(x.any() for x in stopped(log_probs, teacher))
    weights = jax.grad(lambda w: sampled_distillation.sampled_cross_entropy(log_probs, w).sum())(teacher)
    assert not weights.any()


# --- kickstarting -----------------------------------------------------------------------------------------------------


def test_kickstarting_anneals_and_lets_go():
    policy, teacher = jnp.array([1.0, -2.0]), jnp.array([10.0, 20.0])
    weight = optax.linear_schedule(1.0, 0.0, 4)
    for step, share in ((0, 1.0), (1, 0.75), (4, 0.0), (9, 0.0)):
        result = jax.jit(lambda s: distillation.kickstarting(policy, teacher, s, weight=weight))(step)
        np.testing.assert_allclose(result, np.array(policy) + share * np.array(teacher), rtol=1e-6)
    gradients = jax.grad(lambda a, b: distillation.kickstarting(a, b, 1, weight=weight).sum(), (0, 1))(policy, teacher)
    np.testing.assert_allclose(gradients[0], 1.0)
    np.testing.assert_allclose(gradients[1], 0.75)


def test_mistakes_are_refused_in_words():
    logits = jnp.zeros((2, V))
    for function in FULL:
        with pytest.raises(AssertionError):
            function(logits, logits[:1])
        with pytest.raises(TypeError, match="teacher_logits must be floating"):
            function(logits, jnp.zeros((2, V), int))
    with pytest.raises(TypeError, match="teacher_indices must be integer"):
        distillation.top_k_kl(logits, jnp.zeros((2, 1)), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="k <= V"):
        distillation.top_k_kl(logits, jnp.zeros((2, 5), int), jnp.zeros((2, 5)))
    with pytest.raises(AssertionError):
        distillation.top_k_kl(logits, jnp.zeros((2, 2), int), jnp.zeros((2, 3)))
    with pytest.raises(AssertionError):
        sampled_distillation.sampled_reverse_kl(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(AssertionError):
        distillation.kickstarting(jnp.zeros(2), jnp.zeros(3), 0, weight=lambda _: 1.0)
