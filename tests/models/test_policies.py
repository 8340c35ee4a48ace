"""models/policies.py against logits row by row: index t is response token t, from tokens or from a kept trunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import policies
from rlhf_jax.models.heads import ScalarHead
from rlhf_jax.models.transformer import Transformer, TransformerConfig, output_table
from rlhf_jax.types import TokenInputs

SIZES = {
    "vocab_size": 17,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "mlp_width": 24,
}
MODELS = {
    "tied": Transformer(TransformerConfig(**SIZES)),
    "untied": Transformer(TransformerConfig(**SIZES, tie_embeddings=False)),
    "soft cap": Transformer(TransformerConfig(**SIZES, logit_soft_cap=1.5)),
}
V, B, P, R = SIZES["vocab_size"], 6, 5, 4
CRITIC = ScalarHead(hidden=8)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def random_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 1.0), x.dtype)
    return jax.tree.map(draw, shapes)


@functools.cache
def params_of(name, seed=0):
    """Every parameter random, norms included."""
    one = jnp.ones((1, 1), jnp.int32)
    init = functools.partial(MODELS[name].init, method="initialise")
    return random_tree(jax.eval_shape(init, jax.random.key(0), one, one > 0)["params"], seed)


def critic_params():
    return random_tree(jax.eval_shape(CRITIC.init, jax.random.key(0), jnp.zeros((1, SIZES["width"])))["params"], 1)


def ragged_inputs(seed=0):
    """Left-padded prompts of 1..P tokens, right-padded responses of 0..R tokens."""
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, P + 1, B), rng.integers(1, R + 1, B)
    prompts[:2], responses[:3] = (P, 1), (R, 1, 0)
    slots = np.arange(P + R)
    mask = (slots >= P - prompts[:, None]) & (slots < P + responses[:, None])
    return TokenInputs(jnp.asarray(rng.integers(0, V, (B, P + R)), jnp.int32), jnp.asarray(mask))


INPUTS = ragged_inputs()
RESPONSE = np.asarray(INPUTS.mask)[:, P:]


def texts(inputs):
    """Each row without its padding, and the slot of each of its tokens."""
    for row, (tokens, mask) in enumerate(zip(np.asarray(inputs.tokens), np.asarray(inputs.mask), strict=True)):
        yield row, tokens[mask], np.flatnonzero(mask)


@functools.cache
def logits_alone(name, seed=0):
    """{(row, t): float64 logits that predict response token t}, from every row run alone without padding."""
    model, found = MODELS[name], {}
    run = jax.jit(functools.partial(model.apply, method="initialise"))
    for row, text, slots in texts(INPUTS):
        filled = np.zeros((1, P + R), np.int32)
        filled[0, : len(text)] = text
        logits = np.asarray(run({"params": params_of(name, seed)}, filled, filled >= 0), np.float64)[0]
        for place, slot in enumerate(slots):
            if slot >= P:
                found[row, slot - P] = logits[place - 1]
    return found


def log_softmax(logits, temperature=1.0):
    scaled = logits / temperature
    return scaled - scaled.max() - np.log(np.sum(np.exp(scaled - scaled.max())))


def oracle(quantity):
    """[B, R] of quantity(row, t), 0 in padding."""
    return np.array([[quantity(b, t) if RESPONSE[b, t] else 0.0 for t in range(R)] for b in range(B)])


def real(x):
    return np.where(RESPONSE, x, 0.0)


@functools.cache
def trunk_of(name):
    """Inputs that carry what enters layer 1."""
    run = jax.jit(functools.partial(MODELS[name].apply, last=1))
    return INPUTS.replace(trunk=run({"params": params_of(name)}, INPUTS.tokens, INPUTS.mask).hidden)


@functools.cache
def teacher_states(name):
    """[B, R, D] final hidden states of a teacher that shares nothing with the student."""
    look = functools.partial(policies.response_hidden, MODELS[name], prompt_length=P)
    return jax.jit(look)(params_of(name, 5), INPUTS)


def upper_layers(params):
    return {key: part for key, part in params.items() if key != "layer_0"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_gives_the_log_probs_of_the_logits(name, first, temperature):
    tokens = np.asarray(INPUTS.tokens)
    expected = oracle(lambda b, t: log_softmax(logits_alone(name)[b, t], temperature)[tokens[b, P + t]])
    apply = policies.token_policy(MODELS[name], prompt_length=P, first=first, temperature=temperature)
    inputs, params = (trunk_of(name), upper_layers(params_of(name))) if first else (INPUTS, params_of(name))
    np.testing.assert_allclose(real(jax.jit(apply)(params, inputs)), expected, **CLOSE)


def test_with_a_prompt_of_one_token_a_text_is_its_own_response():
    """How plain texts are learnt, right-padded; index t is token t + 1."""
    model, params = MODELS["tied"], params_of("tied")
    tokens = INPUTS.tokens[:, : P + 1]
    mask = jnp.arange(P + 1)[None] < jnp.array([1, 2, 3, 4, 5, 6])[:, None]
    found = jax.jit(policies.token_policy(model, prompt_length=1))(params, TokenInputs(tokens, mask))
    logits = jax.jit(functools.partial(model.apply, method="initialise"))({"params": params}, tokens, mask)
    logits = np.asarray(logits, np.float64)
    for b, t in zip(*np.nonzero(np.asarray(mask)[:, 1:]), strict=True):
        np.testing.assert_allclose(found[b, t], log_softmax(logits[b, t])[tokens[b, t + 1]], **CLOSE)


def test_actor_and_critic_share_a_trunk_and_the_value_stands_before_its_token():
    inputs, params = trunk_of("tied"), {"actor": upper_layers(params_of("tied")), "critic": critic_params()}
    apply = policies.actor_critic(MODELS["tied"], CRITIC, prompt_length=P, first=1)
    found = jax.jit(apply)(params, inputs)
    alone = jax.jit(policies.token_policy(MODELS["tied"], prompt_length=P))(params_of("tied"), INPUTS)
    np.testing.assert_allclose(real(found.log_probs), real(alone), **CLOSE)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["critic"])

    def value(b, t):
        x = np.asarray(inputs.trunk, np.float64)[b, P + t - 1]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
        x = np.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
        return float((x @ p["out"]["kernel"] + p["out"]["bias"])[0])

    np.testing.assert_allclose(real(found.values), oracle(value), **CLOSE)
    assert found.entropy is None


@pytest.mark.parametrize("changed", range(R))
def test_a_token_changes_its_own_log_prob_and_later_values_only(changed):
    """Row 0 is full. Its token t has no say in the value before it, nor in earlier log-probs."""
    params = {"actor": params_of("tied"), "critic": critic_params()}
    apply = policies.actor_critic(MODELS["tied"], CRITIC, prompt_length=P, first=1)

    @jax.jit
    def look(tokens):
        trunk = MODELS["tied"].apply({"params": params["actor"]}, tokens, INPUTS.mask, last=1).hidden
        return apply(params, TokenInputs(tokens, INPUTS.mask, trunk))

    other = (INPUTS.tokens[0, P + changed] + 1) % V
    before, after = look(INPUTS.tokens), look(INPUTS.tokens.at[0, P + changed].set(other))
    moved = lambda x, y: (np.abs(np.asarray(x - y)[0]) > 1e-6).tolist()
    assert moved(before.log_probs, after.log_probs) == [t >= changed for t in range(R)]
    assert moved(before.values, after.values) == [t > changed for t in range(R)]


@pytest.mark.parametrize(
    ("name", "teacher", "first"), [("tied", "untied", 0), ("tied", "untied", 1), ("soft cap",) * 2 + (0,)]
)
def test_a_student_stands_beside_its_teacher(name, teacher, first):
    temperature, tokens = 1.3, np.asarray(INPUTS.tokens)
    params = {"student": params_of(name), "teacher_table": output_table(params_of(teacher, 5))}
    apply = policies.student(MODELS[name], prompt_length=P, first=first, temperature=temperature)
    inputs = trunk_of(name) if first else INPUTS
    found = jax.jit(apply)(params, policies.TeacherInputs(inputs, teacher_states(teacher)))
    ours = lambda b, t: log_softmax(logits_alone(name)[b, t], temperature)
    theirs = lambda b, t: log_softmax(logits_alone(teacher, 5)[b, t], temperature)
    cross = oracle(lambda b, t: -np.exp(theirs(b, t)) @ ours(b, t))
    np.testing.assert_allclose(real(found.soft_cross_entropy), cross, **CLOSE)
    np.testing.assert_allclose(real(found.log_probs), oracle(lambda b, t: ours(b, t)[tokens[b, P + t]]), **CLOSE)
    own = oracle(lambda b, t: -np.exp(theirs(b, t)) @ theirs(b, t))
    np.testing.assert_allclose(real(found.teacher_entropy), own, **CLOSE)


def garbage(inputs):
    """Ids far outside the vocabulary and NaN activations wherever there is no token."""
    dirty = inputs.replace(tokens=jnp.where(inputs.mask, inputs.tokens, 2**31 - 1))
    if inputs.trunk is not None:
        dirty = dirty.replace(trunk=jnp.where(inputs.mask[..., None], inputs.trunk, jnp.nan))
    return dirty


def summed(outputs):
    return sum(jnp.sum(jnp.where(RESPONSE, x, 0.0) * (1.0 + i)) for i, x in enumerate(outputs) if x is not None)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["tied", "soft cap"])
def test_what_padding_holds_changes_neither_values_nor_gradients(name, first):
    model = MODELS[name]
    inputs = trunk_of(name) if first else INPUTS
    critic = policies.actor_critic(model, CRITIC, prompt_length=P, first=1)
    pupil = policies.student(model, prompt_length=P, first=first)
    params = {
        "actor": params_of(name),
        "student": params_of(name),
        "critic": critic_params(),
        "teacher_table": output_table(params_of(name, 5)),
    }

    @jax.jit
    @jax.value_and_grad
    def look(params, inputs, hidden):
        found = pupil(params, policies.TeacherInputs(inputs, hidden))
        return summed(found) + (summed(critic(params, inputs)) if first else 0.0)

    hidden = teacher_states(name)
    clean = look(params, inputs, hidden)
    dirty = look(params, garbage(inputs), jnp.where(RESPONSE[..., None], hidden, jnp.nan))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), dirty, clean)


def test_a_missing_trunk_is_named():
    apply = policies.token_policy(MODELS["tied"], prompt_length=P, first=1)
    with pytest.raises(ValueError, match="trunk is missing"):
        apply(params_of("tied"), INPUTS)
    with pytest.raises(ValueError, match="trunk is missing"):
        policies.actor_critic(MODELS["tied"], CRITIC, prompt_length=P, first=1)({}, INPUTS)
    with pytest.raises(ValueError, match="first must be at least 1"):
        policies.actor_critic(MODELS["tied"], CRITIC, prompt_length=P, first=0)
