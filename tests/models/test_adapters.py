"""models/adapters.py against float64 sums; merged, attached and quantised bases say the same."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from rlhf_jax.models.adapters import (
    apply_dora,
    apply_lora,
    attach_dora,
    attach_lora,
    init_dora,
    init_lora,
    lora_scale,
    rslora_scale,
    unmerge_lora,
)
from rlhf_jax.models.quantisation import int8, nf4, quantise
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.training.state import path_matches

CONFIG = TransformerConfig(
    vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=12, qkv_bias=True,
    num_experts=3, experts_per_token=2, expert_width=6, dense_layers=(0,),
)  # fmt: skip
MODEL = Transformer(CONFIG)
CHOSEN = path_matches(r"attention/(query|out)/kernel$", r"mlp/(up|down)/kernel$")
TOKENS = jnp.array([[0, 3, 5, 7], [1, 2, 9, 10]])
MASK = jnp.array([[False, True, True, True], [True, True, True, False]])
KINDS = [(init_lora, apply_lora, attach_lora), (init_dora, apply_dora, attach_dora)]
SCALES = {lora_scale: lambda alpha, rank: alpha / rank, rslora_scale: lambda alpha, rank: alpha / rank**0.5}


@pytest.fixture(scope="module")
def base():
    init = functools.partial(MODEL.init, method="initialise")
    shapes = jax.eval_shape(init, jax.random.key(0), TOKENS, MASK)["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[-2] ** -0.5 if x.ndim > 1 else 1.0), x.dtype)
    return jax.tree.map(draw, shapes)


def grown(adapters, seed=1):
    """Adapters as training leaves them: nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), adapters)


@jax.jit
def run(params):
    hidden = MODEL.apply({"params": params}, TOKENS, MASK).hidden
    return jnp.where(MASK[..., None], hidden, 0.0)


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def summed(kernel, adapter, alpha, scale):
    """Float64, one entry at a time."""
    kernel, down, up = (np.asarray(x, np.float64) for x in (kernel, adapter["down"], adapter["up"]))
    rank = up.shape[-2]
    out = np.array(kernel)
    for index in np.ndindex(*kernel.shape):
        *lead, i, j = index
        out[index] += SCALES[scale](alpha, rank) * sum(down[(*lead, i, r)] * up[(*lead, r, j)] for r in range(rank))
    return out


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_sums_equal_float64(base, kind, scale):
    init, apply = {"lora": (init_lora, apply_lora), "dora": (init_dora, apply_dora)}[kind]
    adapters = grown(init(jax.random.key(0), base, CHOSEN, 3))
    found = leaves(apply(base, adapters, alpha=5.0, scale=scale))
    before = leaves(base)
    parts = leaves(adapters)
    chosen = [path for path in before if CHOSEN(path)]
    assert len(chosen) == 8
    for path, kernel in before.items():
        if path not in chosen:
            assert found[path] is kernel
            continue
        adapter = {name: parts[f"{path}/{name}"] for name in ("down", "up")}
        expected = summed(kernel, adapter, 5.0, scale)
        if kind == "dora":
            lengths = np.sqrt((expected**2).sum(-2, keepdims=True))
            expected = expected / lengths * np.asarray(parts[f"{path}/magnitude"])[..., None, :]
        np.testing.assert_allclose(found[path], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("init", "apply", "attach"), KINDS)
def test_fresh_adapters_change_nothing_and_grown_ones_the_same_in_both_ways(base, init, apply, attach):
    fresh = init(jax.random.key(0), base, CHOSEN, 2)
    for way in (apply, attach):
        np.testing.assert_allclose(run(way(base, fresh)), run(base), rtol=1e-5, atol=1e-5)
    adapters = grown(fresh)
    merged = run(apply(base, adapters, alpha=3.0))
    assert float(jnp.abs(merged - run(base)).max()) > 0.1
    np.testing.assert_allclose(run(attach(base, adapters, alpha=3.0)), merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("init", "apply", "attach"), KINDS)
@pytest.mark.parametrize("to", [None, functools.partial(int8, block=2), functools.partial(nf4, block=2)])
def test_gradients_of_both_ways_agree_over_any_base(base, init, apply, attach, to):
    adapters = grown(init(jax.random.key(0), base, CHOSEN, 2))
    if to is not None:
        base = quantise(base, path_matches(r"(query|key|value|out|up|gate|down)/kernel$"), to=to)

    def gradient(way):
        loss = lambda adapters: jnp.sum(jnp.sin(run(way(base, adapters, alpha=3.0))))
        return jax.jit(jax.grad(loss))(adapters)

    found = gradient(attach)
    expected = gradient(apply)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = float(jnp.abs(b).max())
        assert size > 0
        np.testing.assert_allclose(a / size, b / size, atol=2e-4)


def test_gradients_equal_finite_differences():
    """All but DoRA's lengths, which are constants: there the oracle holds them still."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        kernel = {"kernel": jnp.asarray(rng.normal(size=(4, 3)))}
        lora = {"kernel": {"down": jnp.asarray(rng.normal(size=(4, 2))), "up": jnp.asarray(rng.normal(size=(2, 3)))}}
        function = lambda a, alpha: jnp.sin(apply_lora(kernel, a, alpha=alpha)["kernel"])
        assert function(lora, 2.0).dtype == jnp.float64
        jax.test_util.check_grads(function, (lora, 2.0), order=1, modes=["fwd", "rev"])
        dora = {"kernel": lora["kernel"] | {"magnitude": jnp.asarray(rng.normal(size=3) + 2)}}
        lengths = jnp.sqrt(jnp.sum(apply_lora(kernel, lora)["kernel"] ** 2, 0))
        total = lambda f: jax.grad(lambda a: jnp.sum(jnp.sin(f(a))))(dora)
        found = total(lambda a: apply_dora(kernel, a)["kernel"])
        expected = total(lambda a: apply_lora(kernel, a)["kernel"] / lengths[None] * a["kernel"]["magnitude"][None])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_unmerging_gives_the_base_back_up_to_one_rounding(base, scale):
    adapters = grown(init_lora(jax.random.key(0), base, CHOSEN, 4))
    merged = apply_lora(base, adapters, scale=scale)
    back = unmerge_lora(merged, adapters, scale=scale)
    for path, kernel in leaves(base).items():
        rounding = np.spacing(np.abs(leaves(merged)[path])) + np.spacing(np.abs(kernel))
        assert (np.abs(leaves(back)[path] - kernel) <= rounding).all()


def test_small_updates_of_a_narrow_base_are_not_rounded_away():
    kernel = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    adapters = {"kernel": {"down": jnp.ones((2, 1)), "up": jnp.full((1, 2), 1e-4)}}
    found = apply_lora(kernel, adapters, alpha=1.0)["kernel"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1.0001, rtol=1e-6)


def test_a_kernel_starts_the_same_whatever_else_is_chosen(base):
    few = init_lora(jax.random.key(0), base, path_matches("layer_0/attention/query/kernel$"), 2)
    many = init_lora(jax.random.key(0), base, CHOSEN, 2)
    query = few["layer_0"]["attention"]["query"]["kernel"]["down"]
    np.testing.assert_array_equal(query, many["layer_0"]["attention"]["query"]["kernel"]["down"])
    other = init_lora(jax.random.key(1), base, CHOSEN, 2)["layer_0"]["attention"]["query"]["kernel"]["down"]
    assert not np.array_equal(query, other)
    assert not np.array_equal(query, many["layer_1"]["attention"]["query"]["kernel"]["down"])
    bound = CONFIG.width**-0.5
    wide = init_lora(jax.random.key(2), {"kernel": jnp.ones((8, 3))}, lambda path: True, 500)["kernel"]["down"]
    assert float(jnp.abs(wide).max()) <= bound
    assert float(jnp.abs(wide).max()) > 0.99 * bound
    assert abs(float(wide.mean())) < 0.02


def test_alpha_is_traced():
    kernel = {"kernel": jnp.eye(2)}
    adapters = {"kernel": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}
    found = jax.vmap(lambda alpha: apply_lora(kernel, adapters, alpha=alpha)["kernel"])(jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(found, jnp.stack([jnp.eye(2), jnp.eye(2) + 2.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda base: init_lora(jax.random.key(0), base, CHOSEN, 0), "rank must be at least 1, got 0"),
        (lambda base: init_lora(jax.random.key(0), base, lambda path: False, 1), "predicate chooses none of the"),
        (lambda base: init_lora(jax.random.key(0), base, path_matches("bias$"), 1), "only kernels .* take an adapter"),
        (
            lambda base: apply_lora(base, {"lost": {"kernel": {"down": 1, "up": 1}}}),
            "paths .* do not have: .'lost/kernel'",
        ),
    ],
)
def test_mistakes_are_explained(base, call, message):
    with pytest.raises(ValueError, match=message):
        call(base)
