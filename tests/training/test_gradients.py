"""gradients.py: one device = many devices = many micro-batches, on ragged masks, at the cost promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import masking
from rlhf_jax.masking import Totals
from rlhf_jax.training.gradients import clip_by_global_norm, loss_and_gradients, split_rows

B, T, D = 16, 5, 3
WEIGHTS = {"token": 1.0, "sequence": -0.5, "never": 2.0}


def terms(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    scores = hidden @ params["v"]
    return {
        "token": masking.token_totals(jnp.square(scores - 1.0), batch["mask"]),
        "sequence": masking.sequence_mean_totals(jnp.sin(scores), batch["mask"]),
        "never": masking.token_totals(scores, jnp.zeros_like(batch["mask"])),
        "metric": masking.token_totals(scores, batch["mask"]),
    }


def ragged_batch(seed):
    """Rows of different lengths, garbage outside the mask; the rows of one micro-batch of four are all empty."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(0, T + 1, B)[:, None]
    mask[1::4] = False
    x = np.where(mask[..., None], rng.normal(size=(B, T, D)), 1e9)
    return {"x": jnp.asarray(x, jnp.float32), "mask": jnp.asarray(mask)}


def some_params(seed):
    rng = np.random.default_rng(seed)
    return {"w": jnp.float32(rng.normal(size=(D, 4))), "v": jnp.float32(rng.normal(size=4))}


def oracle(params, batch):
    """Float64 objective with plain loops over rows and tokens."""
    w, v = (np.asarray(params[n], np.float64) for n in ("w", "v"))
    squares, scores, rows = [], [], []
    for x, kept in zip(np.asarray(batch["x"], np.float64), np.asarray(batch["mask"]), strict=True):
        row = [float(np.tanh(token @ w) @ v) for token, keep in zip(x, kept, strict=True) if keep]
        squares += [(s - 1) ** 2 for s in row]
        scores += row
        rows += [sum(np.sin(s) for s in row) / len(row)] if row else []
    means = {"token": squares, "sequence": rows, "metric": scores}
    return {name: sum(values) / len(values) for name, values in means.items()} | {"never": 0.0}


def on_one_device(params, batch, microbatches):
    return jax.jit(functools.partial(loss_and_gradients, terms, weights=WEIGHTS, microbatches=microbatches))(
        params, batch
    )


def on_pmap(params, batch, microbatches):
    step = functools.partial(loss_and_gradients, terms, weights=WEIGHTS, microbatches=microbatches, axis_name="batch")
    split = jax.tree.map(lambda x: x.reshape(4, B // 4, *x.shape[1:]), batch)
    results = jax.pmap(step, axis_name="batch", in_axes=(None, 0))(params, split)
    for leaf in jax.tree.leaves(results):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: x[0], results)


def on_vmap(params, batch, microbatches):
    step = functools.partial(loss_and_gradients, terms, weights=WEIGHTS, microbatches=microbatches, axis_name="batch")
    split = jax.tree.map(lambda x: x.reshape(4, B // 4, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x[0], jax.vmap(step, axis_name="batch", in_axes=(None, 0))(params, split))


def mesh():
    return jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))


def on_shard_map(params, batch, microbatches, **options):
    step = functools.partial(loss_and_gradients, terms, weights=WEIGHTS, microbatches=microbatches, axis_name="batch")
    mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("batch")), out_specs=P(), **options)
    return jax.jit(mapped)(params, batch)


def on_unchecked_shard_map(params, batch, microbatches):
    return on_shard_map(params, batch, microbatches, check_vma=False)


def on_sharded_jit(params, batch, microbatches):
    batch = jax.device_put(batch, NamedSharding(mesh(), P("batch")))
    params = jax.device_put(params, NamedSharding(mesh(), P()))
    return on_one_device(params, batch, microbatches)


WAYS = [on_one_device, on_pmap, on_vmap, on_shard_map, on_unchecked_shard_map, on_sharded_jit]


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_and_metrics_do_not_depend_on_the_split(way, microbatches):
    params, batch = some_params(0), ragged_batch(1)
    expected = oracle(params, batch)

    def objective(params):
        values = terms(params, batch)
        return sum(weight * values[name].sum / jnp.maximum(values[name].count, 1) for name, weight in WEIGHTS.items())

    grads, metrics = way(params, batch, microbatches)
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(
        lambda actual, wanted: np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=1e-6),
        grads,
        jax.grad(objective)(params),
    )


def test_gradient_equals_finite_differences_of_the_float64_loops():
    params, batch, step = some_params(2), ragged_batch(3), 1e-5
    grads, _ = on_one_device(params, batch, 4)
    for name, leaf in params.items():
        for index in np.ndindex(leaf.shape):
            values = []
            for sign in (1, -1):
                moved = {n: np.asarray(p, np.float64).copy() for n, p in params.items()}
                moved[name][index] += sign * step
                means = oracle(moved, batch)
                values.append(sum(weight * means[term] for term, weight in WEIGHTS.items()))
            np.testing.assert_allclose(grads[name][index], (values[0] - values[1]) / (2 * step), rtol=1e-4, atol=1e-5)


def test_averages_of_micro_batches_would_be_wrong():
    """The batch is ragged enough for the test above to mean something."""
    params, batch = some_params(0), ragged_batch(1)
    parts = split_rows(batch, 4)
    means = [oracle(params, {name: x[i] for name, x in parts.items()}) for i in (0, 2, 3)]
    assert abs(np.mean([m["token"] for m in means]) - oracle(params, batch)["token"]) > 0.01


def test_the_first_pass_for_the_counts_costs_no_model_work():
    """XLA counts a scan body once, so k micro-batches show (1/k of the model) + (what the counts cost)."""
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones(64)}
    batch = {"x": jnp.ones((B, T, 64)), "mask": jnp.ones((B, T), bool)}

    def flops(microbatches):
        step = functools.partial(loss_and_gradients, terms, weights=WEIGHTS, microbatches=microbatches)
        return jax.jit(step).lower(params, batch).compile().cost_analysis()["flops"]

    def forward_flops(rows):
        part = jax.tree.map(lambda x: x[:rows], batch)
        return jax.jit(lambda p, b: terms(p, b)["token"].sum).lower(params, part).compile().cost_analysis()["flops"]

    assert flops(4) < flops(1) / 4 + 0.1 * forward_flops(B // 4) + 2 * 64 * 65  # the last: adding up gradients


def test_micro_batches_keep_fewer_activations():
    params = {"w": jnp.ones((64, 4096)), "v": jnp.ones(4096)}
    batch = {"x": jnp.ones((64, T, 64)), "mask": jnp.ones((64, T), bool)}

    def bytes_alive(microbatches):
        step = functools.partial(loss_and_gradients, terms, weights=WEIGHTS, microbatches=microbatches)
        return jax.jit(step).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert bytes_alive(8) < bytes_alive(1) / 2


@pytest.mark.parametrize("microbatches", [1, 4])
def test_narrow_parameters_get_gradients_of_their_type_summed_in_float32(microbatches):
    def linear(w, x):
        return {"mean": Totals(jnp.sum(w.astype(jnp.float32) * x), jnp.float32(x.size))}

    x = jnp.array([1024.0, 4.0, 4.0, 4.0])  # in bfloat16, 256 + 1 = 256
    grads, _ = loss_and_gradients(linear, jnp.bfloat16(1), x, weights={"mean": 1.0}, microbatches=microbatches)
    assert grads.dtype == jnp.bfloat16
    assert float(grads) == float(jnp.bfloat16(259.0)) != 256.0


def test_counts_are_constants_to_the_gradient():
    def weighed(w, x):
        return {"mean": Totals(jnp.sum(x) * w, jnp.sum(x) * w)}

    grads, metrics = loss_and_gradients(weighed, jnp.float32(2), jnp.ones(4), weights={"mean": 1.0})
    assert float(metrics["mean"]) == 1.0
    assert float(grads) == 0.5  # the derivative of the sum alone: 4 / 8


def test_weights_are_traced():
    params, batch = some_params(0), ragged_batch(1)

    def token_gradient(weight):
        return loss_and_gradients(terms, params, batch, weights={"token": weight}, microbatches=2)[0]["v"]

    swept = jax.jit(jax.vmap(token_gradient))(jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(swept, np.outer([0, 1, 3], token_gradient(1.0)), rtol=1e-5, atol=1e-6)


def test_strided_micro_batches_stay_on_their_devices():
    """A sharded batch is split without communication: the compiled split has no collective."""
    x = jax.device_put(jnp.arange(B * 2.0).reshape(B, 2), NamedSharding(mesh(), P("batch")))
    split = jax.jit(functools.partial(split_rows, microbatches=4))
    text = split.lower(x).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    np.testing.assert_array_equal(split(x)[1], np.arange(B * 2.0).reshape(B, 2)[1::4])


@pytest.mark.parametrize(("norm", "limit"), [(5.0, 1.0), (5.0, 5.0), (5.0, 7.0), (0.0, 1.0), (1e30, 1e-3)])
def test_clipped_gradients_are_those_of_optax(norm, limit):
    grads = {"a": jnp.array([0.6 * norm, 0.0]), "b": [jnp.array(0.8 * norm), jnp.zeros(2)]}
    clipped, _ = clip_by_global_norm(limit).update(grads, optax.EmptyState())
    expected, _ = optax.clip_by_global_norm(limit).update(grads, optax.EmptyState())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), clipped, expected)
    if norm <= limit:
        jax.tree.map(np.testing.assert_array_equal, clipped, grads)
    narrow, _ = clip_by_global_norm(limit).update(jnp.array([0.1, 300.0], jnp.bfloat16), optax.EmptyState())
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), np.array([0.1, 300.0]) * limit / 300.0, rtol=1e-2)


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="the compiler of JAX 0.8 plans memory otherwise")
def test_clipping_keeps_no_second_copy_of_the_gradients():
    """An Adam step of many leaves: what optax divides is kept beside the gradients until the last leaf is done."""
    params = {f"layer_{index}": jnp.ones((64, 64)) for index in range(16)}

    def step(params, moments, x, *, clip):
        grads = jax.grad(lambda p: sum(jnp.sum(jnp.tanh(x @ w)) for w in p.values()))(params)
        updates, moments = optax.chain(clip, optax.adam(1e-3)).update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    def temporary(clip):
        moments = optax.chain(clip, optax.adam(1e-3)).init(params)
        program = jax.jit(functools.partial(step, clip=clip), donate_argnums=(0, 1))
        return program.lower(params, moments, jnp.ones((2, 64))).compile().memory_analysis().temp_size_in_bytes

    whole = sum(leaf.nbytes for leaf in params.values())
    assert whole <= temporary(clip_by_global_norm(1.0)) < 1.3 * whole


@pytest.mark.parametrize(
    ("batch", "microbatches", "words"),
    [
        (jnp.ones((6, 2)), 4, ["microbatches=4", "B=6"]),
        (jnp.ones((6, 2)), 0, ["at least 1", "got 0"]),
        ({"x": jnp.ones((6, 2)), "y": jnp.ones(4)}, 2, ["'x'", "6", "'y'", "4"]),
        ({"x": jnp.ones((6, 2)), "y": jnp.ones(())}, 1, ["'y'", "none"]),
    ],
)
def test_rows_that_cannot_be_split_are_refused(batch, microbatches, words):
    def count_rows(params, rows):
        return {"mean": Totals(params, jnp.float32(1))}

    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        loss_and_gradients(count_rows, jnp.float32(1), batch, weights={"mean": 1.0}, microbatches=microbatches)
    assert all(word in str(refusal.value) for word in words)


def test_a_weight_without_its_term_is_refused():
    with pytest.raises(ValueError, match=r"\['entropy'\].*\['metric', 'never', 'sequence', 'token'\]"):
        loss_and_gradients(terms, some_params(0), ragged_batch(1), weights={"token": 1.0, "entropy": 0.1})
