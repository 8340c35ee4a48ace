"""Adapters beside PEFT: theirs in our model, ours in their model."""

import jax
import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")
torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
peft = pytest.importorskip("peft", reason="the extra `parity` is not installed")

from rlhf_jax.models.adapters import apply_dora, apply_lora, attach_dora, attach_lora, init_dora, init_lora  # noqa: E402
from rlhf_jax.models.huggingface import load_peft, load_pretrained, save_peft  # noqa: E402
from rlhf_jax.models.transformer import Transformer  # noqa: E402
from rlhf_jax.training.state import path_matches  # noqa: E402

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SHAPE = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)), ["q_proj", "down_proj"]),
    "phi3": (lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHAPE)), ["qkv_proj", "gate_up_proj"]),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
        ["c_attn", "c_fc"],
    ),
}
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both": {"use_rslora": True, "use_dora": True},
}
TOKENS = np.random.default_rng(0).integers(3, 31, (2, 7))


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """(folder of a random model, layers to adapt)."""
    make, targets = MODELS[request.param]
    model = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1) * 0.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, targets


def read(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS), use_cache=False).logits.numpy()


def our_logits(config, params):
    model = Transformer(config)

    @jax.jit
    def run(params):
        hidden = model.apply({"params": params}, TOKENS, TOKENS >= 0).hidden
        return model.apply({"params": params}, hidden, method="logits")

    return np.asarray(run(params))


@pytest.mark.parametrize("kind", KINDS)
def test_their_adapters_in_our_model(base, kind, tmp_path):
    folder, targets = base
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out="c_attn" in targets,
        **KINDS[kind],
    )
    adapted = peft.get_peft_model(read(folder), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(tmp_path)
    expected = their_logits(adapted.eval())
    config, params = load_pretrained(folder)
    found = load_peft(tmp_path, config)
    ways = (apply_dora, attach_dora) if found.has_magnitudes else (apply_lora, attach_lora)
    assert np.abs(expected - their_logits(read(folder))).max() > 0.1
    for way in ways:
        logits = our_logits(config, way(params, found.adapters, alpha=found.alpha, scale=found.scale))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("init", [init_lora, init_dora])
@pytest.mark.parametrize("chosen", ["kernel$", "(query|up)/kernel$"])
def test_our_adapters_in_their_model(base, init, chosen, tmp_path):
    folder, _ = base
    config, params = load_pretrained(folder)
    if init is init_dora and chosen != "kernel$" and config.family != "llama":
        return  # DoRA adapts the whole of a fused layer
    rng = np.random.default_rng(0)
    adapters = init(jax.random.key(0), params, path_matches(chosen), 2)
    adapters = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) * 0.2, adapters)
    save_peft(tmp_path, config, adapters, alpha=5.0, base=str(folder))
    theirs = peft.PeftModel.from_pretrained(read(folder), tmp_path).eval()
    apply = apply_dora if init is init_dora else apply_lora
    logits = our_logits(config, apply(params, adapters, alpha=5.0))
    np.testing.assert_allclose(logits, their_logits(theirs), rtol=0, atol=5e-5)
