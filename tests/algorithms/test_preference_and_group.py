"""The DPO and GRPO families: loops, devices, micro-batches, padding, missing things, and the optima they reach."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_contract_algorithms as contract
import test_exact_optimum as exact
from flax import jax_utils

from rlhf_jax import group_advantages, kl, masking
from rlhf_jax.algorithms import group, preference
from rlhf_jax.losses import policy, sequence_policy
from rlhf_jax.losses import preference as losses
from rlhf_jax.losses.preference_inputs import length_desensitised_sum
from rlhf_jax.models import policies
from rlhf_jax.testing import enumerable
from rlhf_jax.training.epochs import run_epochs
from rlhf_jax.training.sharding import make_mesh, shard, shard_batch, split_devices
from rlhf_jax.training.state import path_matches, split_params
from rlhf_jax.types import PreferenceBatch

B, P, R, G = contract.B, contract.P, contract.R, 2
APPLY = policies.token_policy(contract.MODEL, prompt_length=P)
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def log_probs_of(params, inputs):
    return jax.jit(APPLY)(params, inputs)


# --- material: ragged rows of the contract's decoder ------------------------------------------------------------------


def pairs():
    """(clean batch, the same with garbage in all that counts nothing)"""
    sides = []
    for seed in (2, 3):
        inputs = contract.ragged(seed)
        sides.append(preference.Completions(inputs, inputs.mask[:, P:]))
    weight = jnp.asarray([1.0, 2, 0, 1, 0.5, 1, 1, 3])
    batch = preference.with_reference(PreferenceBatch(*sides, weight), APPLY, contract.decoder(5))

    def spoil(side):
        counts = side.mask & (weight > 0)[:, None]
        return side.replace(
            inputs=contract.spoil_inputs(side.inputs),
            reference_log_probs=contract.spoil(side.reference_log_probs, counts),
        )

    return batch, PreferenceBatch(spoil(batch.chosen), spoil(batch.rejected), weight)


def answers():
    inputs = contract.ragged(4)
    mask = inputs.mask[:, P:]
    old, reference = (log_probs_of(contract.decoder(), inputs) + 0.3 * contract.normal(s, B, R) for s in (5, 6))
    config = group.Config(group=G)
    batch, _ = group.experience(inputs, mask, old, contract.normal(7, B), reference, config=config)
    weights = jnp.abs(contract.normal(8, B, R))
    batch = batch.replace(importance=weights)
    names = ("old_log_probs", "reference_log_probs", "importance")
    spoilt = {name: contract.spoil(getattr(batch, name), mask) for name in names}
    return batch, batch.replace(inputs=contract.spoil_inputs(inputs), **spoilt)


PREFERENCE = lambda knob: preference.Config(beta=knob, chosen_nll_weight=0.5)
GROUP = lambda knob: group.Config(group=G, kl_weight=knob)
SUBJECTS = {"preference": (preference, pairs, PREFERENCE), "group": (group, answers, GROUP)}


@functools.cache
def subject(name):
    module, material, config = SUBJECTS[name]
    batch, dirty = material()
    update = lambda state, batch, knob, **static: module.update(state, batch, config=config(knob), **static)
    state = module.init(contract.decoder(), APPLY, contract.SGD)
    traces = []

    def counted(state, batch, knob, frozen=None):
        traces.append(1)
        return update(state, batch, knob, frozen=frozen)

    step = jax.jit(counted)
    return state, batch, dirty, update, step, traces, step(state, batch, 0.3)


@pytest.fixture(params=SUBJECTS)
def name(request):
    return request.param


def test_devices_micro_batches_padding_order_and_knobs(name):
    state, batch, dirty, update, step, traces, expected = subject(name)
    assert expected[1]["optim/grad_norm"] > 0.01
    mapped = jax.pmap(functools.partial(update, axis_name="devices"), axis_name="devices", in_axes=(0, 0, None))
    found = mapped(jax_utils.replicate(state), split_devices(batch), 0.3)
    contract.assert_close(jax_utils.unreplicate(found), expected)
    parts = jax.jit(functools.partial(update, microbatches=4))
    contract.assert_close(parts(state, batch, 0.3), expected)
    step(expected[0], batch, 0.3)  # a later state is of the first one's types
    before = len(traces)
    assert before == 1
    contract.assert_close(step(state, dirty, 0.3), expected, rtol=1e-6, atol=1e-7)
    order = np.random.default_rng(0).permutation(B)
    contract.assert_close(step(state, jax.tree.map(lambda x: x[order], batch), 0.3), expected)
    objective = "preference/loss" if name == "preference" else "optim/grad_norm"
    assert abs(step(state, batch, 0.6)[1][objective] - expected[1][objective]) > 1e-4
    assert len(traces) == before
    mesh = make_mesh(data=4)
    contract.assert_close(step(shard(state, mesh), shard_batch(batch, mesh), 0.3), expected)


def test_frozen_parameters_stay_and_the_rest_learns_the_same(name):
    state, batch, _, _, step, _, expected = subject(name)
    trained, frozen = split_params(state.params, path_matches("layer_1|norm"))
    after, _ = step(SUBJECTS[name][0].init(trained, APPLY, contract.SGD), batch, 0.3, frozen)
    contract.assert_close(after.params, split_params(expected[0].params, path_matches("layer_1|norm"))[0])


# --- preference -------------------------------------------------------------------------------------------------------


def table_policy(params, tokens):
    return enumerable.token_log_probs_of_table(params["table"], tokens)


def given(params, inputs):
    """A "policy" whose log-probs are its parameters."""
    del inputs
    return params


@functools.cache
def numbers():
    rng = np.random.default_rng(1)
    log_probs, reference = (-np.abs(rng.normal(size=(2 * B, R))).astype(np.float32) for _ in range(2))
    mask = np.arange(R)[None] < rng.integers(1, R + 1, (2 * B, 1))
    weight = np.abs(rng.normal(size=B)).astype(np.float32)
    return log_probs, reference, mask, weight


def pair_batch(reference=True):
    _, known, mask, weight = numbers()
    sides = [
        preference.Completions(jnp.zeros(B), jnp.asarray(mask[rows]), jnp.asarray(known[rows]) if reference else None)
        for rows in (slice(B), slice(B, None))
    ]
    return PreferenceBatch(*sides, jnp.asarray(weight))


SUMMARIES = {
    "summed": (preference.summed, lambda x, other: sum(x)),
    "averaged": (preference.averaged, lambda x, other: sum(x) / len(x)),
    "desensitised": (
        functools.partial(length_desensitised_sum, alpha=0.25),
        lambda x, other: sum(v if t < other else 0.25 * v for t, v in enumerate(x)),
    ),
}
SIGMOID = lambda x: 1 / (1 + math.exp(-x))
PAIR_LOSSES = {
    "dpo": (losses.dpo, lambda c, r: -math.log(SIGMOID(0.3 * (c - r)))),
    "ipo": (losses.ipo_sum, lambda c, r: (c - r - 1 / 0.6) ** 2),
}


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("pair_loss", PAIR_LOSSES)
@pytest.mark.parametrize("with_reference", [True, False])
def test_pair_terms_equal_loops(summary, pair_loss, with_reference):
    log_probs, reference, mask, weight = numbers()
    by_loop, loss = SUMMARIES[summary], PAIR_LOSSES[pair_loss]
    config = preference.Config(loss=loss[0], beta=0.3, summarise=by_loop[0], chosen_nll_weight=1.0)
    terms = preference.loss(jnp.asarray(log_probs), given, pair_batch(with_reference), config=config)
    expected = dict.fromkeys(terms, 0.0)
    for b in range(B):
        sides = []
        for row, other in ((b, b + B), (b + B, b)):
            ratios = [float(log_probs[row, t] - with_reference * reference[row, t]) for t in range(R) if mask[row, t]]
            sides.append(by_loop[1](ratios, mask[other].sum()))
        chosen, rejected = sides
        own = [float(log_probs[b, t]) for t in range(R) if mask[b, t]]
        for key, value in {
            "loss": loss[1](chosen, rejected),
            "accuracy": float(chosen > rejected),
            "margin": 0.3 * (chosen - rejected),
            "chosen_reward": 0.3 * chosen,
            "rejected_reward": 0.3 * rejected,
            "chosen_nll": -sum(own) / len(own),
        }.items():
            expected[f"preference/{key}"] += weight[b] * value
    for key, (total, count) in terms.items():
        CLOSE(total, expected[key], err_msg=key)
        CLOSE(count, weight.sum())


def test_reference_parameters_and_known_log_probs_are_the_same():
    state, batch, *_ = subject("preference")
    bare = PreferenceBatch(
        *(side.replace(reference_log_probs=None) for side in (batch.chosen, batch.rejected)), batch.weight
    )
    config = preference.Config()
    step = jax.jit(functools.partial(preference.update, config=config))
    contract.assert_close(step(state, bare, reference=contract.decoder(5)), step(state, batch))
    with pytest.raises(ValueError, match="not both"):
        step(state, batch, reference=contract.decoder(5))
    at_start = preference.loss(contract.decoder(5), APPLY, batch, config=config)["preference/loss"]
    CLOSE(at_start.sum / at_start.count, math.log(2))  # a policy equal to its reference


def test_dpo_reaches_the_optimum_of_the_reward_behind_the_preferences():
    """All ordered pairs, weighing as much as Bradley and Terry say, at π_ref's own start."""
    config = preference.Config(beta=exact.BETA)

    def run(problem, key):
        del key
        apply_fn = lambda params, places: table_policy(params, exact.TOKENS[places])
        batch = exact.all_comparisons(problem, None)
        sides = [preference.Completions(x, exact.MASK[x]) for x in (batch.chosen, batch.rejected)]
        batch = preference.with_reference(PreferenceBatch(*sides, batch.weight), apply_fn, {"table": problem.reference})
        state = preference.init({"table": problem.reference}, apply_fn, exact.adam(0.1, 300))
        update = lambda state, _: preference.update(state, batch, config=config)
        return jax.lax.scan(update, state, None, length=300)[0].params["table"]

    assert exact.distances(exact.for_all_seeds(run), exact.TARGETS).max() <= exact.TOLERANCE


# --- group ------------------------------------------------------------------------------------------------------------


def group_material():
    log_probs, reference, mask, _ = numbers()
    rng = np.random.default_rng(6)
    old = log_probs + 0.4 * rng.normal(size=log_probs.shape).astype(np.float32)
    rewards = rng.normal(size=2 * B).astype(np.float32)
    rewards[3] = np.nan
    return log_probs, old, reference, mask, rewards


def test_experience_and_terms_equal_loops():
    """GRPO with a missing reward and the KL both in reward and in loss."""
    log_probs, old, reference, mask, rewards = group_material()
    rows, size = 2 * B, 4
    config = group.Config(group=size, kl_in_reward=0.2, kl_weight=0.04)
    spoilt = (jnp.where(mask, x, jnp.nan) for x in (old, reference))
    batch, told = group.experience(
        jnp.zeros(rows), jnp.asarray(mask), next(spoilt), jnp.asarray(rewards), next(spoilt), config=config
    )
    ratio = lambda b: sum(float(old[b, t] - reference[b, t]) for t in range(R) if mask[b, t])
    shaped = [float(rewards[b]) - 0.2 * ratio(b) for b in range(rows)]
    present = [b for b in range(rows) if not math.isnan(rewards[b])]
    advantages = np.zeros(rows)
    for start in range(0, rows, size):
        those = [b for b in range(start, start + size) if b in present]
        mean = sum(shaped[b] for b in those) / len(those)
        deviation = math.sqrt(sum((shaped[b] - mean) ** 2 for b in those) / (len(those) - 1))
        for b in those:
            advantages[b] = (shaped[b] - mean) / (deviation + 1e-4)
    CLOSE(batch.advantages, advantages)
    average = lambda of: sum(map(of, present)) / len(present)
    CLOSE(told["human/score"], average(lambda b: float(rewards[b])))
    CLOSE(told["policy/kl"], average(ratio))
    CLOSE(told["policy/length"], average(lambda b: mask[b].sum()))
    CLOSE(told["human/missing"], 1 / rows)
    CLOSE(told["group/undecided"], 0.0)

    def answer(b, of):
        real = [t for t in range(R) if mask[b, t]]
        return sum(of(b, t) for t in real) / len(real)

    def surrogate(b, t):
        r = math.exp(log_probs[b, t] - old[b, t])
        return -min(r * advantages[b], min(max(r, 0.8), 1.2) * advantages[b])

    def k3(x):
        return math.exp(-x) - 1 + x

    terms = group.loss(jnp.asarray(log_probs), given, batch, config=config)
    expected = {
        "policy/loss": average(lambda b: answer(b, surrogate)),
        "policy/reference_kl": average(lambda b: answer(b, lambda b, t: k3(float(log_probs[b, t] - reference[b, t])))),
        "policy/step_kl": average(lambda b: answer(b, lambda b, t: k3(float(old[b, t] - log_probs[b, t])))),
    }
    for key, value in expected.items():
        CLOSE(terms[key].sum / terms[key].count, value, err_msg=key)
    assert 0 < terms["policy/clip_fraction"].sum < terms["policy/clip_fraction"].count


def bare(batch_mask, advantages, old):
    return group.Batch(jnp.zeros(len(advantages)), jnp.asarray(batch_mask), jnp.asarray(old), jnp.asarray(advantages))


def test_losses_per_answer_are_averaged_over_answers():
    log_probs, old, _, mask, _ = group_material()
    mask = mask.copy()
    mask[2] = False
    advantages = np.linspace(-1, 1, 2 * B).astype(np.float32)
    wide = functools.partial(sequence_policy.gspo, clip_low=1.0, clip_high=jnp.inf)
    config = group.Config(group=4, surrogate=wide, kl_weight=None)
    total, count = group.loss(jnp.asarray(log_probs), given, bare(mask, advantages, old), config=config)["policy/loss"]
    expected = [
        -float(advantages[b]) * math.exp(np.mean((log_probs[b] - old[b])[mask[b]])) for b in range(2 * B) if b != 2
    ]
    CLOSE(total / count, np.mean(expected))
    weighted = bare(mask, advantages, old).replace(importance=jnp.ones(mask.shape))
    with pytest.raises(ValueError, match="one per answer"):
        group.loss(jnp.asarray(log_probs), given, weighted, config=config)


def test_token_advantages_importance_and_settings():
    log_probs, old, _, mask, _ = group_material()
    advantages = np.broadcast_to(np.linspace(-1, 1, R).astype(np.float32), mask.shape)
    config = group.Config(
        group=4, surrogate=group.over_tokens(policy.surrogate), kl_weight=None, reduce=masking.token_totals
    )
    batch = bare(mask, np.where(mask, advantages, np.nan), old).replace(importance=jnp.full(mask.shape, 2.0))
    total, count = group.loss(jnp.asarray(log_probs), given, batch, config=config)["policy/loss"]
    CLOSE(total / count, np.mean((-2.0 * np.exp(log_probs - old) * advantages)[mask]))
    assert "policy/clip_fraction" not in group.loss(jnp.asarray(log_probs), given, batch, config=config)


def test_equal_answers_are_undecided_and_what_is_missing_is_said():
    mask, zeros = jnp.ones((4, 2), bool), jnp.zeros((4, 2))
    config = group.Config(group=2)
    rewards = jnp.array([1.0, 1.0, 0.0, 2.0])
    _, told = group.experience(jnp.zeros(4), mask, zeros, rewards, zeros, config=config)
    assert float(told["group/undecided"]) == 0.5
    with pytest.raises(ValueError, match="reference_log_probs is missing"):
        group.experience(jnp.zeros(4), mask, zeros, rewards, config=config)
    free = group.Config(group=2, kl_weight=None)
    batch, _ = group.experience(jnp.zeros(4), mask, zeros, rewards, config=free)
    with pytest.raises(ValueError, match="needs the batch's reference_log_probs"):
        group.loss(zeros, given, batch, config=config)
    with pytest.raises(ValueError, match="group must divide"):
        group.experience(jnp.zeros(3), mask[:3], zeros[:3], rewards[:3], config=free)
    with pytest.raises(ValueError, match="group must be an int"):
        group.Config(group=0)
    with pytest.raises(TypeError, match="floating"):
        group.experience(jnp.zeros(4), mask, zeros, jnp.ones(4, jnp.int32), config=free)


def test_epochs_take_every_step_and_one_pass_is_one_update():
    step = lambda total, rows: (total + jnp.sum(rows), {"mean": jnp.mean(rows)})
    rows = jnp.arange(8.0)
    assert float(run_epochs(step, 0.0, rows, jax.random.key(0), epochs=2, minibatches=4)[0]) == 56
    assert float(run_epochs(step, 0.0, rows, jax.random.key(0), epochs=3)[0]) == 84
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        run_epochs(step, 0.0, rows, jax.random.key(0), epochs=0)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_group_pass_in_one_step_is_one_update_in_any_number_of_parts(microbatches):
    state, batch, *_, expected = subject("group")
    run = functools.partial(group.update_epochs, epochs=1, config=GROUP(0.3), microbatches=microbatches)
    contract.assert_close(jax.jit(run)(state, batch, jax.random.key(0)), expected)


# --- optima -----------------------------------------------------------------------------------------------------------

TURNS, SAMPLES, SIBLINGS = 200, 2048, 8


def sentences_learnt(problem, key, *, config):
    """Whole answers of several words, with the log-ratio in the reward."""
    state = group.init({"table": problem.reference}, table_policy, exact.adam(0.05, TURNS))

    def turn(state, key):
        drawn = exact.speak(state.params["table"], key, SAMPLES)
        tokens, mask = exact.TOKENS[drawn], exact.MASK[drawn]
        batch, told = group.experience(
            tokens,
            mask,
            table_policy(state.params, tokens),
            problem.rewards[drawn],
            table_policy({"table": problem.reference}, tokens),
            config=config,
        )
        state, _ = group.update_epochs(state, batch, key, epochs=1, config=config)
        return state, told["policy/kl"]

    state, _ = jax.lax.scan(turn, state, jax.random.split(key, TURNS))
    return state.params["table"]


@pytest.mark.parametrize("advantages", [group_advantages.leave_one_out, group_advantages.group_centred])
def test_rloo_and_dr_grpo_with_the_kl_in_the_reward_reach_the_optimum(advantages):
    config = group.Config(
        group=SIBLINGS,
        advantages=advantages,
        kl_weight=None,
        kl_in_reward=exact.BETA,
        reduce=functools.partial(masking.fixed_length_totals, length=float(exact.R)),
    )
    tables = exact.for_all_seeds(functools.partial(sentences_learnt, config=config))
    assert exact.distances(tables, exact.TARGETS).max() <= exact.TOLERANCE


WORDS, STRENGTH = 12, 0.8


def words_learnt(reference, rewards, key, *, estimate):
    """Answers of one word, with the KL in the loss: (log π, its target)."""
    config = group.Config(
        group=SIBLINGS, advantages=group_advantages.leave_one_out, kl_weight=STRENGTH, kl_estimate=estimate
    )
    say = lambda params, words: jax.nn.log_softmax(params["logits"])[words]
    state = group.init({"logits": reference}, say, exact.adam(0.05, TURNS))

    def turn(state, key):
        words = jax.random.categorical(key, state.params["logits"], shape=(SAMPLES, 1))
        now, then = say(state.params, words), say({"logits": reference}, words)
        mask = jnp.ones(words.shape, bool)
        batch, _ = group.experience(words, mask, now, rewards[words[:, 0]], then, config=config)
        return group.update(state, batch, config=config)

    state, _ = jax.lax.scan(turn, state, jax.random.split(key, TURNS))
    return jax.nn.log_softmax(state.params["logits"])


@pytest.mark.parametrize("estimate", [kl.k2, kl.k3])
def test_a_kl_in_the_loss_reaches_the_optimum_of_its_gradient(estimate):
    rng = np.random.default_rng(0)
    reference, rewards = (jnp.asarray(rng.normal(size=(3, WORDS)), jnp.float32) for _ in range(2))
    run = jax.jit(jax.vmap(functools.partial(words_learnt, estimate=estimate)))
    found = run(reference, rewards, jax.random.split(jax.random.key(0), 3))
    start = jax.nn.log_softmax(reference)
    tilted = jax.nn.log_softmax(start + rewards / STRENGTH)
    low, high = np.max(rewards, -1) + 1e-6, np.max(rewards, -1) + STRENGTH  # Σ π_ref β / (λ - r) = 1 lies between
    for _ in range(60):
        level = (low + high) / 2
        above = np.sum(np.exp(start) * STRENGTH / (level[:, None] - rewards), -1) > 1
        low, high = np.where(above, level, low), np.where(above, high, level)
    rational = start + jnp.log(STRENGTH / (high[:, None] - rewards))
    reached, other = (tilted, rational) if estimate is kl.k2 else (rational, tilted)
    assert np.max(enumerable.total_variation(found, reached)) <= exact.TOLERANCE
    assert np.min(enumerable.total_variation(found, other)) > exact.TOLERANCE
