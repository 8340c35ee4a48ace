"""One table of the algorithms, and what each row of it must keep: devices, micro-batches, padding, resuming, freezing.

All run on the same two-layer decoder with ragged rows. Plain gradient descent with momentum is the optimiser wherever
gradients are compared, so that the state after a step holds them as they are; resuming uses Adam.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils

from rlhf_jax import masking
from rlhf_jax.algorithms import actor_critic, policy_distillation, reward_model, sft
from rlhf_jax.generation.sampler import generate
from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead, SequenceScore
from rlhf_jax.models.transformer import Transformer, TransformerConfig, output_table
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.sharding import make_mesh, shard, shard_batch, split_devices
from rlhf_jax.training.state import merge_params, path_matches, split_params
from rlhf_jax.types import PreferenceBatch, TokenInputs

V, D, B, P, R = 17, 16, 8, 4, 5
MODEL = Transformer(
    TransformerConfig(vocab_size=V, width=D, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24)
)
CRITIC, SCORER = ScalarHead(hidden=8), SequenceScore()
HUGE = 2**31 - 1
CLOSE = {"rtol": 2e-4, "atol": 2e-5}

# --- material ---------------------------------------------------------------------------------------------------------


@functools.cache
def decoder(seed=0):
    """Random parameters, large enough for every layer to matter."""
    one = jnp.ones((1, 1), jnp.int32)
    init = functools.partial(MODEL.init, method="initialise")
    shapes = jax.eval_shape(init, jax.random.key(0), one, one > 0)["params"]
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 0.3) + (x.ndim == 1))
    return jax.tree.map(lambda x: draw(x).astype(jnp.float32), shapes)


def head_params(head, *inputs):
    return jax.jit(head.init)(jax.random.key(1), *inputs)["params"]


def ragged(seed, responses=True):
    """TokenInputs [B, P + R] with left-padded prompts; one row has no response at all, another is full."""
    rng = np.random.default_rng(seed)
    prompts, lengths = rng.integers(1, P + 1, B), rng.integers(1, R + 1, B)
    prompts[:2], lengths[:3] = (P, 1), (R, 1, 0)
    slots = np.arange(P + R)
    mask = (slots >= P - prompts[:, None]) & (slots < P + lengths[:, None])
    return TokenInputs(jnp.asarray(rng.integers(0, V, (B, P + R)), jnp.int32), jnp.asarray(mask))


def with_trunk(inputs):
    run = jax.jit(functools.partial(MODEL.apply, last=1))
    return inputs.replace(trunk=run({"params": decoder()}, inputs.tokens, inputs.mask).hidden)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def spoil(x, mask):
    """Garbage outside a mask over leading axes."""
    wrong = HUGE if jnp.issubdtype(x.dtype, jnp.integer) else jnp.nan
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, wrong)


def spoil_inputs(inputs):
    trunk = None if inputs.trunk is None else spoil(inputs.trunk, inputs.mask)
    return inputs.replace(tokens=spoil(inputs.tokens, inputs.mask), trunk=trunk)


# --- the table --------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """An algorithm with everything that its update needs."""

    module: Any
    apply_fn: Callable[..., Any]
    params: Any
    batch: Any
    dirty: Any  # the same batch with garbage in its padding
    knobs: dict[str, float]  # numeric knobs, traced
    config: Callable[..., Any]  # traced knobs -> Config
    trained: str  # pattern of the parameters to train where the others are frozen


def sft_subject():
    inputs = ragged(1)
    apply_fn = policies.token_policy(MODEL, prompt_length=P)
    batch = sft.Batch(inputs, inputs.mask[:, P:])
    config = lambda *, length: sft.Config(reduce=functools.partial(masking.fixed_length_totals, length=length))
    return Subject(
        sft,
        apply_fn,
        decoder(),
        batch,
        batch.replace(inputs=spoil_inputs(inputs)),
        {"length": 4.0},
        config,
        "layer_1|norm",
    )


def reward_subject():
    chosen, rejected = ragged(2), ragged(3)

    def apply_fn(params, inputs):
        hidden = MODEL.apply({"params": params["trunk"]}, inputs.tokens, inputs.mask).hidden
        return SCORER.apply({"params": params["head"]}, hidden, inputs.mask)

    head = head_params(SCORER, jnp.zeros((1, 1, D)), jnp.ones((1, 1), bool))
    batch = PreferenceBatch(chosen, rejected, jnp.asarray([1.0, 2, 0, 1, 0.5, 1, 1, 3]))
    dirty = batch.replace(chosen=spoil_inputs(chosen), rejected=spoil_inputs(rejected))
    knobs = {"label_smoothing": 0.1, "centring": 0.05}
    return Subject(
        reward_model,
        apply_fn,
        {"trunk": decoder(), "head": head},
        batch,
        dirty,
        knobs,
        lambda **k: reward_model.Config(**k),
        "layer_1|head",
    )


def actor_critic_subject():
    inputs = with_trunk(ragged(4))
    mask = inputs.mask[:, P:]
    apply_fn = policies.actor_critic(MODEL, CRITIC, prompt_length=P, first=1)
    params = {"actor": decoder(), "critic": head_params(CRITIC, jnp.zeros((1, D)))}
    now = jax.jit(apply_fn)(params, inputs)
    batch = actor_critic.Batch(
        inputs,
        mask,
        jnp.where(mask, now.log_probs + 0.3 * normal(5, B, R), 0.0),  # some ratios outside the clipping range
        jnp.where(mask, now.values + 0.3 * normal(6, B, R), 0.0),
        jnp.where(mask, normal(7, B, R), 0.0),
        jnp.where(mask, normal(8, B, R), 0.0),
    )
    dirty = batch.replace(inputs=spoil_inputs(inputs)).replace(
        **{name: spoil(getattr(batch, name), mask) for name in ("old_log_probs", "old_values", "advantages", "returns")}
    )
    knobs = {"clip": 0.2, "value_clip": 0.2, "value_weight": 0.5}
    return Subject(
        actor_critic,
        apply_fn,
        params,
        batch,
        dirty,
        knobs,
        lambda **k: actor_critic.Config(**k),
        "actor/layer_1|critic",
    )


def distillation_subject():
    inputs = ragged(9)
    look = functools.partial(policies.response_hidden, MODEL, prompt_length=P)
    hidden = jax.jit(look)(decoder(5), inputs)
    batch = policy_distillation.Batch(
        policies.TeacherInputs(inputs, hidden),
        inputs.mask[:, P:],
        jnp.asarray([0.1, 2, 1, 0.5, 3, 1, 0.2, 0.2]),
        jnp.asarray([1.8, 0.7, 1, 1.3, 0.5, 1, 1.7, 1.7]),
    )
    dirty = batch.replace(inputs=policies.TeacherInputs(spoil_inputs(inputs), spoil(hidden, batch.mask)))
    apply_fn = policies.student(MODEL, prompt_length=P)
    config = lambda *, length: policy_distillation.Config(
        reduce=functools.partial(masking.fixed_length_totals, length=length)
    )
    params = {"student": decoder(), "teacher_table": output_table(decoder(5))}
    return Subject(policy_distillation, apply_fn, params, batch, dirty, {"length": 4.0}, config, "student/layer_1")


MAKERS = {
    "sft": sft_subject,
    "reward_model": reward_subject,
    "actor_critic": actor_critic_subject,
    "policy_distillation": distillation_subject,
}
SGD = optax.sgd(0.1, momentum=0.9)


@functools.cache
def subject(name):
    return MAKERS[name]()


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


def start(one, params=None, optimizer=SGD):
    return one.module.init(one.params if params is None else params, one.apply_fn, optimizer)


def step_of(one):
    """(state, batch, knobs) -> (state, metrics), all traced."""

    def step(state, batch, knobs, **static):
        return one.module.update(state, batch, config=one.config(**knobs), **static)

    return step


@functools.cache
def compiled(name, microbatches=1):
    """The session's one compiled step per algorithm and number of micro-batches, and how often it was traced."""
    traces = []

    def step(state, batch, knobs, frozen=None):
        traces.append(1)
        return step_of(subject(name))(state, batch, knobs, frozen=frozen, microbatches=microbatches)

    return jax.jit(step), traces


@functools.cache
def expected(name):
    one = subject(name)
    return compiled(name)[0](start(one), one.batch, one.knobs)


def assert_close(actual, wanted, **tolerance):
    """States (parameters, momentum, counters) and metrics."""
    actual, wanted = jax.device_get((actual, wanted))
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    check = functools.partial(np.testing.assert_allclose, **(tolerance or CLOSE))
    jax.tree.map(check, jax.tree.leaves(actual), jax.tree.leaves(wanted))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))


# --- the rows agree ---------------------------------------------------------------------------------------------------


def test_the_subjects_are_not_trivial(name):
    """Every trained parameter has a gradient, rows are ragged, and garbage stands where the batch has padding."""
    one, (state, metrics) = subject(name), expected(name)
    train = getattr(state, "train", state)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), train.params, one.params)
    still = {
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, m in jax.tree_util.tree_leaves_with_path(moved)
        if not m
    }
    below = {p for p in still if "layer_0" in p and name == "actor_critic"}  # the actor starts at its trunk's top
    assert still - below == ({"teacher_table"} if name == "policy_distillation" else set())
    assert metrics["optim/grad_norm"] > 0.01
    assert any(
        not np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(one.batch), jax.tree.leaves(one.dirty), strict=True)
    )


def test_compiled_and_eager_agree(name):
    """The algorithm runs one operation at a time; the network, which is not its own, stays compiled."""
    one = subject(name)
    eager = one._replace(apply_fn=jax.jit(one.apply_fn))
    found = step_of(eager)(start(eager), one.batch, one.knobs)
    structure = jax.tree.structure(expected(name))  # which names the function that was not wrapped
    assert_close(jax.tree.unflatten(structure, jax.tree.leaves(found)), expected(name))


def test_four_mapped_devices_are_one_device(name):
    one = subject(name)
    step = functools.partial(step_of(one), axis_name="devices")
    mapped = jax.pmap(step, axis_name="devices", in_axes=(0, 0, None))
    found = mapped(jax_utils.replicate(start(one)), split_devices(one.batch), one.knobs)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    assert_close(jax_utils.unreplicate(found), expected(name))


@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 1, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_mesh_is_one_device(name, sizes):
    one, mesh = subject(name), make_mesh(**sizes)
    found = compiled(name)[0](shard(start(one), mesh), shard_batch(one.batch, mesh), one.knobs)
    assert_close(found, expected(name))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_micro_batches_are_one_batch(name, microbatches):
    one = subject(name)
    assert_close(compiled(name, microbatches)[0](start(one), one.batch, one.knobs), expected(name))


def test_what_padding_holds_changes_nothing(name):
    one = subject(name)
    found = compiled(name)[0](start(one), one.dirty, one.knobs)
    assert_close(found, expected(name), rtol=1e-6, atol=1e-7)


def test_the_order_of_rows_changes_nothing(name):
    one, order = subject(name), np.random.default_rng(0).permutation(B)
    shuffled = jax.tree.map(lambda x: x[order], one.batch)
    assert_close(compiled(name)[0](start(one), shuffled, one.knobs), expected(name))


def test_rows_that_count_nothing_change_nothing(name):
    """A row without weight or token can be replaced by a copy of another, as long as it still counts nothing."""
    one, empty = subject(name), 2
    copied = jax.tree.map(lambda x: x.at[empty].set(x[0]), one.batch)
    kept = {"weight": one.batch.weight} if name == "reward_model" else {"mask": one.batch.mask}
    copied = copied.replace(**kept)
    assert_close(compiled(name)[0](start(one), copied, one.knobs), expected(name))


# --- knobs, types, freezing -------------------------------------------------------------------------------------------


def test_a_numeric_knob_is_traced_and_alive(name):
    one = subject(name)
    step, traces = compiled(name)
    before, first = expected(name), len(traces)
    for knob, value in one.knobs.items():
        _, metrics = step(start(one), one.batch, one.knobs | {knob: value * 1.7})
        now, then = (jax.device_get(m) for m in (metrics, before[1]))
        assert any(abs(now[key] - then[key]) > 1e-6 for key in now), knob
    assert len(traces) == first


def test_the_second_step_is_not_compiled_anew(name):
    one, (state, _) = subject(name), expected(name)
    step, traces = compiled(name)
    first = len(traces)
    step(state, one.batch, one.knobs)
    assert len(traces) == first


def test_knobs_as_python_numbers_give_the_same(name):
    one = subject(name)
    step = jax.jit(functools.partial(one.module.update, config=one.config(**one.knobs)))
    assert_close(step(start(one), one.batch), expected(name))


def test_narrow_parameters_give_finite_float32_losses(name):
    one = subject(name)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), one.params)
    terms = jax.jit(lambda params: one.module.loss(params, one.apply_fn, one.batch, config=one.config(**one.knobs)))
    for key, (total, count) in terms(narrow).items():
        assert total.dtype == count.dtype == jnp.float32, key
        wanted = expected(name)[1].get(key)
        assert np.isfinite(total), key
        if "loss" in key:
            np.testing.assert_allclose(total / count, wanted, rtol=0.1, atol=0.05, err_msg=key)
    state, metrics = compiled(name)[0](start(one, narrow), one.batch, one.knobs)
    assert {p.dtype for p in jax.tree.leaves(getattr(state, "train", state).params)} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(m) for m in metrics.values())


def test_frozen_parameters_have_no_gradient_no_state_and_stay(name):
    one = subject(name)
    trained, frozen = split_params(one.params, path_matches(one.trained))
    state, metrics = compiled(name)[0](start(one, trained), one.batch, one.knobs, frozen)
    train, whole = getattr(state, "train", state), getattr(expected(name)[0], "train", expected(name)[0])
    assert jax.tree.structure(train.params) == jax.tree.structure(trained)
    held = sum(leaf.size for leaf in jax.tree.leaves(train.opt_state))
    assert (
        held == sum(leaf.size for leaf in jax.tree.leaves(trained)) < sum(p.size for p in jax.tree.leaves(one.params))
    )
    # What is trained learns exactly what it learns when nothing is frozen.
    assert_close(train.params, split_params(whole.params, path_matches(one.trained))[0])
    same = [key for key in metrics if key != "optim/grad_norm"]
    assert_close([metrics[k] for k in same], [expected(name)[1][k] for k in same])
    assert metrics["optim/grad_norm"] < expected(name)[1]["optim/grad_norm"]
    # Frozen parameters are an argument, and come back from no update: merging gives a whole model.
    assert jax.tree.structure(merge_params(train.params, frozen)) == jax.tree.structure(one.params)


# --- resuming ---------------------------------------------------------------------------------------------------------


def bits(tree):
    read = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
    return [read(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)]


def test_a_resumed_run_goes_on_bit_for_bit(name, tmp_path):
    """4 steps = 2 + a checkpoint into a fresh state + 2: Adam's moments, schedule, controller, keys, position."""
    one = subject(name)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.02, 10)))

    @jax.jit
    def turn(run):
        key, now = jax.random.split(run["key"])
        rows = jax.random.permutation(now, B)
        batch = jax.tree.map(lambda x: x[rows], one.batch)
        batch = jax.tree.map(lambda x: x * (1 + 0.01 * run["position"]) if x.dtype == jnp.float32 else x, batch)
        state, metrics = step_of(one)(run["state"], batch, one.knobs)
        if name == "actor_critic":
            distance = 10.0 * metrics["policy/step_kl"]
            state = actor_critic.steer(state, distance, sequences=B, config=actor_critic.Config(kl_horizon=100.0))
        return {"state": state, "key": key, "position": run["position"] + 1}, metrics

    def fresh(seed):
        params = jax.tree.map(lambda p: p + 0.1 * seed, one.params)
        return {"state": start(one, params, optimizer), "key": jax.random.key(seed), "position": jnp.int32(0)}

    run, told = fresh(0), []
    with Checkpoints(tmp_path) as checkpoints:
        for index in range(4):
            run, metrics = turn(run)
            told.append(metrics)
            if index == 1:
                checkpoints.save(2, run)
        resumed = checkpoints.restore(fresh(7)).state
        assert bits(resumed) != bits(run)
        for index in (2, 3):
            resumed, metrics = turn(resumed)
            assert bits(metrics) == bits(told[index])
    assert bits(resumed) == bits(run)
    assert bits(fresh(0)["state"]) != bits(run["state"])


# --- AC-HF: a whole turn ----------------------------------------------------------------------------------------------


def test_the_first_ratio_of_a_turn_is_one():
    """Generation's log-probs and trunk are training's: on its own samples a policy has moved nowhere yet."""
    one = subject("actor_critic")
    config = actor_critic.Config()
    prompts = ragged(11)
    tokens, mask = prompts.tokens[:, :P], prompts.mask[:, :P]

    @jax.jit
    def turn(state, key):
        params = state.train.params
        rollout = generate(
            MODEL,
            params["actor"],
            tokens,
            mask,
            jax.random.split(key, B),
            length=R,
            end_token=3,
            pad_token=HUGE % V,
            tap=1,
        )
        old = one.apply_fn(params, rollout.inputs)
        reference = policies.token_policy(MODEL, prompt_length=P, first=1)(decoder(5), rollout.inputs)
        batch, told = actor_critic.experience(
            rollout.inputs,
            rollout.response_mask,
            rollout.log_probs,
            reference,
            old.values,
            jnp.arange(float(B)),
            kl_coefficient=state.kl.coefficient,
            config=config,
        )
        return rollout, actor_critic.update(state, batch, config=config)[1] | told, old

    rollout, metrics, old = turn(start(one), jax.random.key(0))
    assert rollout.response_mask.sum(-1).min() > 1 or not rollout.response_mask.all()
    assert metrics["policy/clip_fraction"] == 0
    assert abs(metrics["policy/step_kl"]) < 1e-6
    assert abs(metrics["policy/loss"]) < 1e-5  # minus the mean of whitened advantages
    for b, t in zip(*np.nonzero(np.asarray(rollout.response_mask)), strict=True):
        assert abs(rollout.log_probs[b, t] - old.log_probs[b, t]) < 1e-4
