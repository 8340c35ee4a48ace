"""fused_attention.py: the splash kernel, interpreted, against `attend`; programs for TPU and GPU; which is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import fused_attention
from rlhf_jax.models.attention import attend, visible
from rlhf_jax.models.fused_attention import by_backend, cudnn, splash
from rlhf_jax.models.stacked import StackedTransformer, stack_layers
from rlhf_jax.models.transformer import Transformer, TransformerConfig, texts, within, written
from rlhf_jax.training.sharding import make_mesh

B, T, N, K, H = 2, 300, 4, 2, 16  # three blocks of 128 tokens
interpreted = functools.partial(splash, interpret=True)


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return normal(B, T, N, H), normal(B, K, T, H), normal(B, K, T, H)


def sight(packed, window):
    """Rows padded left and right, or packed: their mask, and what is seen as `attend` and as kernels take it."""
    slot = jnp.arange(T)
    mask = jnp.stack([slot >= 40, slot < 170])
    segments = jnp.stack([1 + (slot >= 150), 1 + (slot >= 20)]) if packed else None
    mask = within(mask, segments)
    return mask, visible(*written(mask, None, segments), window), texts(mask, segments)


def agree(one, other, mask, *arguments):
    """Values at real tokens and gradients of a weighted sum of them, in one program each."""
    weights = jnp.where(mask[:, :, None, None], jax.random.normal(jax.random.key(1), (B, T, N, H)), 0.0)
    loss = lambda attention: lambda *x: (jnp.sum((out := attention(*x)) * weights), jnp.where(weights != 0, out, 0.0))
    both = [jax.jit(jax.grad(loss(each), (0, 1, 2), has_aux=True))(*arguments) for each in (one, other)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), *both)


@pytest.mark.parametrize(("packed", "window", "cap"), [(False, None, None), (True, 7, 2.0), (True, 140, None)])
def test_splash_equals_attend(packed, window, cap):
    mask, allowed, text = sight(packed, window)
    kernel = lambda *x: interpreted(*x, allowed, text, window=window, scale=0.3, cap=cap)
    agree(kernel, lambda *x: attend(*x, allowed, scale=0.3, cap=cap), mask, *inputs())


def test_splash_is_finite_at_padding_and_ignores_what_stands_there():
    mask, allowed, text = sight(False, None)
    run = jax.jit(functools.partial(interpreted, window=None, scale=0.3))
    query, key, value = inputs()
    hidden = mask[:, None, :, None]
    out = run(query, key, value, allowed, text)
    other = run(query, jnp.where(hidden, key, 3.0), jnp.where(hidden, value, -5.0), allowed, text)
    assert jnp.all(jnp.isfinite(out))
    real = mask[:, :, None, None]
    np.testing.assert_array_equal(jnp.where(real, out, 0.0), jnp.where(real, other, 0.0))


@pytest.mark.parametrize(("rows", "shard"), [(2, (1, T, N // 2, H)), (1, (1, T, N // 2, H))])
def test_splash_on_a_mesh_cuts_rows_and_heads_where_they_divide(rows, shard):
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    mask, allowed, text = jax.tree.map(lambda x: x[:rows], sight(True, None))
    arguments = *(x[:rows] for x in inputs()), allowed, text
    with jax.set_mesh(mesh):
        out = jax.jit(functools.partial(interpreted, window=None, scale=0.3))(*arguments)
    assert out.addressable_shards[0].data.shape == shard
    expected = attend(*arguments[:4], scale=0.3)
    real = mask[:, :, None, None]
    np.testing.assert_allclose(jnp.where(real, out, 0.0), jnp.where(real, expected, 0.0), atol=2e-5)


def model_of(kernel, windows=(None,), **options):
    config = TransformerConfig(
        vocab_size=31, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, windows=windows
    )
    return Transformer(config, kernel=kernel, **options)


@pytest.mark.parametrize("form", ["windows", "stacked"])
def test_a_model_with_the_kernel_is_the_model(form):
    tokens = jax.random.randint(jax.random.key(0), (2, 60), 0, 31)
    mask = jnp.arange(60)[None] >= jnp.array([[20], [0]])
    windows = (None, 9) if form == "windows" else (9,)
    remat = None if form == "windows" else jax.checkpoint_policies.nothing_saveable
    plain = model_of(None, windows)
    params = plain.init(jax.random.key(1), tokens, mask, method="initialise")["params"]

    def gradient(model, params):
        hidden = lambda params: model.apply({"params": params}, tokens, mask).hidden
        loss = lambda params: jnp.mean(jnp.where(mask[..., None], jnp.sin(hidden(params)), 0.0))
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradient(plain, params)
    fused = model_of(interpreted, windows, remat=remat)
    if form == "stacked":
        value, slope = gradient(StackedTransformer(fused), stack_layers(params))
        expected = expected[0], stack_layers(expected[1])
    else:
        value, slope = gradient(fused, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), (value, slope), expected)


def lowered(model, platform, tokens=256):
    """The text of a gradient step, lowered for another platform."""
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(lambda key: model.init(key, one, one == 0, method="initialise"), jax.random.key(0))
    loss = lambda params, tokens, mask: jnp.sum(model.apply(params, tokens, mask).hidden)
    row = jax.ShapeDtypeStruct((2, tokens), jnp.int32), jax.ShapeDtypeStruct((2, tokens), bool)
    return jax.jit(jax.grad(loss)).trace(params, *row).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("form", [lambda model: model, StackedTransformer])
def test_on_a_tpu_nothing_of_the_size_of_the_scores_is_formed(form):
    model = form(model_of(splash))
    if isinstance(model, StackedTransformer):
        one = jnp.zeros((1, 1), jnp.int32)
        start = lambda key: stack_layers(model.model.init(key, one, one == 0, method="initialise")["params"])
        shapes = jax.eval_shape(start, jax.random.key(0))
        loss = lambda params, tokens, mask: jnp.sum(model.apply({"params": params}, tokens, mask).hidden)
        row = jax.ShapeDtypeStruct((2, 256), jnp.int32), jax.ShapeDtypeStruct((2, 256), bool)
        text = jax.jit(jax.grad(loss)).trace(shapes, *row).lower(lowering_platforms=("tpu",)).as_text()
    else:
        text = lowered(model, "tpu")
    assert "tpu_custom_call" in text
    assert "256x256xf32" not in text
    assert "256x256xf32" in lowered(model_of(None), "tpu")


def test_cudnn_gets_the_mask_and_forms_no_scores(monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    query, key, value = inputs(jnp.bfloat16)
    _, allowed, text = sight(True, 7)
    loss = lambda *x: jnp.sum(cudnn(*x, allowed, text, window=7, scale=0.3).astype(jnp.float32))
    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, value).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in program
    assert f"{N}x{T}x{T}x" not in program
    assert f"{T}x{T}xf32" not in program


@pytest.mark.parametrize("window", [None, 7])
def test_what_cudnn_is_asked_for_is_attend(monkeypatch, window):
    ask = jax.nn.dot_product_attention
    xla = lambda *x, implementation, **options: ask(*x, **options, implementation="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    mask, allowed, text = sight(True, window)
    kernel = lambda *x: cudnn(*x, allowed, text, window=window, scale=0.3)
    agree(kernel, lambda *x: attend(*x, allowed, scale=0.3), mask, *inputs())


def test_cudnn_has_no_soft_cap():
    with pytest.raises(ValueError, match=r"no soft cap, got cap=2\.0"):
        cudnn(*inputs(jnp.bfloat16), None, None, window=None, scale=1.0, cap=2.0)


@pytest.mark.parametrize(
    ("backend", "dtype", "devices", "change", "chosen"),
    [
        ("cpu", jnp.bfloat16, 1, {}, "attend"),
        ("gpu", jnp.bfloat16, 4, {}, "cudnn"),
        ("gpu", jnp.float16, 1, {}, "cudnn"),
        ("gpu", jnp.float32, 1, {}, "attend"),
        ("gpu", jnp.bfloat16, 1, {"cap": 2.0}, "attend"),
        ("gpu", jnp.bfloat16, 1, {"tokens": 299}, "attend"),
        ("tpu", jnp.float32, 1, {}, "splash"),
        ("tpu", jnp.float32, 1, {"cap": 2.0}, "splash"),
        ("tpu", jnp.float32, 1, {"tokens": 127}, "attend"),
        ("tpu", jnp.float32, 1, {"window": T - 1}, "attend"),  # padding inside a text would be counted
        ("tpu", jnp.float32, 1, {"window": T}, "splash"),
        ("tpu", jnp.float32, 4, {}, "attend"),
        ("tpu", jnp.float32, 4, {"mesh": True}, "splash"),
    ],
)
def test_the_backend_decides(monkeypatch, backend, dtype, devices, change, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    for name in ("attend", "cudnn", "splash"):
        monkeypatch.setattr(fused_attention, name, lambda *_, name=name, **__: name)
    query, key, value = (x[:, : change.get("tokens", T)] for x in inputs(dtype))
    sight = {"window": change.get("window"), "cap": change.get("cap")}
    run = lambda: by_backend(query, key, value, None, None, scale=1.0, **sight)
    if change.get("mesh"):
        with jax.set_mesh(make_mesh(data=2, devices=jax.devices()[:2])):
            assert run() == chosen
    else:
        assert run() == chosen


def test_the_tpu_compiler_takes_the_kernel(monkeypatch):
    pytest.importorskip("libtpu", reason="jax[tpu] brings the compiler, which needs no TPU")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(size, dtype, sharding=place)
    arguments = shape(2, 4096, 4, 64), *(shape(2, 2, 4096, 64),) * 2, shape(2, 4096, dtype=jnp.int32)

    def peak(attention):
        loss = lambda query, key, value, text: jnp.sum(attention(query, key, value, text).astype(jnp.float32))
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    def plain(query, key, value, text):
        allowed = visible(*written(text > 0, None, text), None)
        return attend(query, key, value, allowed, scale=0.125)

    fused = peak(lambda *x: splash(*x[:3], None, x[3], window=None, scale=0.125))
    scores = 2 * 4 * 4096 * 4096 * 2  # bytes, bfloat16
    assert fused < scores < peak(plain)
