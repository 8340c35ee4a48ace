"""models/stacked.py: the numbers of the plain decoder from stacked layers, with and without remat, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation.sampler import generate
from rlhf_jax.models.adapters import attach_lora, init_lora
from rlhf_jax.models.policies import token_policy
from rlhf_jax.models.quantisation import int8, quantise, stored_bytes
from rlhf_jax.models.stacked import StackedTransformer, stack_layers, unstack_layers
from rlhf_jax.models.transformer import Transformer, TransformerConfig, init_cache
from rlhf_jax.training.state import path_matches
from rlhf_jax.types import TokenInputs

SIZES = {
    "vocab_size": 23,
    "width": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 24,
}
CONFIGS = {
    "windows": {"windows": (3, None), "local_rope_theta": 50.0, "query_key_norm": True, "post_norms": True},
    "experts": {"num_experts": 3, "experts_per_token": 2, "expert_width": 8, "tie_embeddings": False},
    "learned": {"learned_positions": True, "norm": "layer", "qkv_bias": True, "gated": False, "num_kv_heads": 4},
}
EVERYTHING, DOTS = jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.dots_saveable
B, T = 4, 9


def random_params(config):
    ones = jnp.ones((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, method="initialise")
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[-2] ** -0.5 if x.ndim > 1 else 1.0), x.dtype)
    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0), ones, ones > 0)["params"])


def texts():
    """Tokens with padding on either side, and the text that each belongs to."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, SIZES["vocab_size"], (B, T)), jnp.int32)
    slots = jnp.arange(T)[None]
    mask = (slots >= jnp.array([[0], [3], [5], [1]])) & (slots < jnp.array([[T], [T], [T], [6]]))
    return tokens, mask, jnp.broadcast_to(slots // 5 + 1, mask.shape)


def loss(model, params, tokens, mask, segments=None):
    hidden = model.apply({"params": params}, tokens, mask, segments=segments).hidden
    return jnp.sum(jnp.where(mask[..., None], jnp.sin(hidden), 0.0))


def assert_close(left, right):
    """To 1e-5 of each array's largest number: sums over all tokens, rounded in another order."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(b)))))

    jax.tree.map(close, left, right)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_the_plain_decoder(name):
    config = TransformerConfig(**SIZES | CONFIGS[name])
    params, model = random_params(config), Transformer(config)
    given = texts() if name == "windows" else texts()[:2]

    @jax.jit
    def both(params):
        stacked = jax.value_and_grad(functools.partial(loss, StackedTransformer(model)))(stack_layers(params), *given)
        return jax.value_and_grad(functools.partial(loss, model))(params, *given), stacked

    (value, gradient), (stacked_value, stacked_gradient) = both(params)
    assert abs(float(value)) > 0.1
    np.testing.assert_allclose(stacked_value, value, rtol=1e-5)
    assert_close(unstack_layers(stacked_gradient), gradient)


@pytest.mark.parametrize("kept", [EVERYTHING, DOTS], ids=["nothing kept", "products kept"])
def test_remat_changes_no_number(kept):
    config = TransformerConfig(**SIZES)
    params, given = random_params(config), texts()[:2]

    @jax.jit
    def all_of_them(params):
        differentiated = lambda model, tree: jax.value_and_grad(functools.partial(loss, model))(tree, *given)
        stacked = differentiated(StackedTransformer(Transformer(config, kept)), stack_layers(params))
        plain, remat = (differentiated(Transformer(config, policy), params) for policy in (None, kept))
        return plain, remat, (stacked[0], unstack_layers(stacked[1]))

    plain, *others = all_of_them(params)
    for other in others:
        assert_close(other, plain)


def test_quantised_layers_with_adapters_stack():
    config = TransformerConfig(**SIZES)
    params, kernels = random_params(config), path_matches("attention/(query|out)/kernel$")
    adapters = jax.tree.map(lambda x: x + 0.1, init_lora(jax.random.key(0), params, kernels, 2))
    base = quantise(params, kernels, to=functools.partial(int8, block=8))
    model, given = Transformer(config), texts()[:2]

    @jax.jit
    def both(adapters):
        plain = lambda adapters: loss(model, attach_lora(base, adapters), *given)
        stacked = lambda adapters: loss(StackedTransformer(model), stack_layers(attach_lora(base, adapters)), *given)
        return jax.value_and_grad(plain)(adapters), jax.value_and_grad(stacked)(adapters)

    plain, stacked = both(adapters)
    assert np.any(plain[1]["layer_2"]["attention"]["out"]["kernel"]["up"])
    assert_close(stacked, plain)


def test_slices_and_taps_are_those_of_the_plain_decoder():
    config = TransformerConfig(**SIZES)
    params, (tokens, mask, _) = random_params(config), texts()

    @functools.partial(jax.jit, static_argnums=0)
    def slices(model, params):
        whole = model.apply({"params": params}, tokens, mask, tap=1)
        lower = model.apply({"params": params}, tokens, mask, last=2)
        upper = model.apply({"params": params}, lower.hidden, mask, first=2)
        policy = token_policy(model, prompt_length=4, first=2)
        return whole, lower, upper, policy(params, TokenInputs(tokens, mask, lower.hidden))

    plain = slices(Transformer(config), params)
    stacked = slices(StackedTransformer(Transformer(config)), stack_layers(params))
    assert_close(stacked, plain)
    whole, lower, upper, _ = stacked
    assert lower.tap is None
    assert_close(upper.hidden, whole.hidden)


def test_a_stack_keeps_every_leaf_and_comes_apart_again():
    params = random_params(TransformerConfig(**SIZES | {"num_layers": 12}))  # layer_10 does not stand behind layer_1
    stacked = stack_layers(params)
    assert set(stacked) == {"embed", "final_norm", "layers"}
    assert stacked["embed"]["embedding"] is params["embed"]["embedding"]
    assert stacked["layers"]["mlp"]["up"]["kernel"].shape == (12, 16, 24)
    assert stored_bytes(stacked) == stored_bytes(params)
    back = unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_what_cannot_be_stacked_is_said():
    sparse = random_params(TransformerConfig(**SIZES | CONFIGS["experts"], dense_layers=(1,)))
    with pytest.raises(ValueError, match="layer_1 differ from layer_0"):
        stack_layers(sparse)
    with pytest.raises(ValueError, match=r"layer_0, layer_1, \.\.\. to stack, got \['layer_0', 'layer_2'\]"):
        stack_layers({"layer_0": {}, "layer_2": {}})
    with pytest.raises(ValueError, match="to stack, got"):
        stack_layers({"embed": {}})


def test_stacked_layers_do_not_generate():
    config = TransformerConfig(**SIZES)
    params, model, (tokens, mask, _) = random_params(config), Transformer(config), texts()
    refusal = r"stacked layers take no cache; generate with the plain Transformer, on unstack_layers\(params\)"
    with pytest.raises(ValueError, match=refusal):
        StackedTransformer(model).apply({}, tokens, mask, cache=init_cache(config, B, T))
    keys = jax.random.split(jax.random.key(0), B)
    run = lambda model, tree: generate(model, tree, tokens, mask, keys, length=2, end_token=0, pad_token=0)
    with pytest.raises(ValueError, match=refusal):
        jax.eval_shape(functools.partial(run, StackedTransformer(model)), stack_layers(params))
    jax.eval_shape(functools.partial(run, model), unstack_layers(stack_layers(params)))


def test_a_recomputed_stack_keeps_one_layer_alive():
    """Twelve layers need little more than the states between them; without remat, twelve times one layer."""

    def temporary(policy, layers):
        config = TransformerConfig(**SIZES | {"num_layers": layers})
        model, (tokens, mask, _) = StackedTransformer(Transformer(config, policy)), texts()
        shapes = jax.eval_shape(lambda: stack_layers(random_params(config)))
        rows = [jnp.tile(x, (16, 16)) for x in (tokens, mask)]
        program = jax.jit(jax.grad(functools.partial(loss, model))).lower(shapes, *rows).compile()
        return program.memory_analysis().temp_size_in_bytes, rows[0].size * config.width * 4

    (one, states), (twelve, _) = temporary(EVERYTHING, 2), temporary(EVERYTHING, 12)
    assert twelve - one < 10 * states * 1.2
    assert temporary(None, 12)[0] > 3 * twelve
