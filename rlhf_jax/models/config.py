"""The shape of a decoder: one frozen record that spans the published families.

The defaults describe a Llama; every other family is a handful of fields away from it. `rlhf_jax.models.huggingface`
fills the record from a `config.json`.
"""

import dataclasses

from rlhf_jax.models.layers import ACTIVATIONS, NORMS
from rlhf_jax.models.rotary import RotaryScaling

__all__ = ["TransformerConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a decoder-only transformer; the defaults are Llama's."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int

    # Positions: rotary, or a learned table of max_length rows.
    learned_positions: bool = False
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None  # base for layers with a window; they are not scaled (Gemma 3)
    rope_scaling: RotaryScaling | None = None
    rotary_fraction: float = 1.0  # part of each head that is rotated (Phi-4-mini: 0.75)
    max_length: int = 2048

    # Norms.
    norm: str = "rms"  # "rms", or "layer" with a bias (GPT-2)
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0  # the norm multiplies by offset + scale (Gemma: 1)
    post_norms: bool = False  # norms behind attention and MLP too (Gemma 2)

    # Attention.
    qkv_bias: bool = False
    out_bias: bool = False
    query_key_norm: bool = False  # an RMS norm over each head of queries and keys (Qwen3, Gemma 3)
    query_scale: float | None = None  # scores are query · key · query_scale; None is head_dim^-0.5
    attention_soft_cap: float | None = None  # scores become cap · tanh(score / cap) (Gemma 2)
    windows: tuple[int | None, ...] = (None,)  # layer i sees the last windows[i % len] tokens; None sees all

    # MLP.
    activation: str = "silu"
    gated: bool = True  # down(activation(gate(x)) · up(x)) as opposed to down(activation(up(x)))
    mlp_bias: bool = False

    # Mixture of experts; num_experts=0 is a dense model.
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    normalise_expert_weights: bool = True  # the weights of the chosen experts sum to 1
    dense_layers: tuple[int, ...] = ()  # layers with an ordinary MLP of mlp_width

    # Embeddings.
    tie_embeddings: bool = True
    embedding_scale: float = 1.0  # multiplies embeddings, not the output table (Gemma: width^0.5)
    logit_soft_cap: float | None = None  # logits become cap · tanh(logit / cap) (Gemma 2)

    family: str | None = None  # the architecture that `save_pretrained` writes; None finds one that fits

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2 and not self.learned_positions:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} must lie in (0, 1] and rotate an even number of the "
                f"{self.head_dim} dimensions of a head"
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not self.windows or any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows must hold positive lengths or None, got {self.windows}")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie in 1..num_experts={self.num_experts}"
            )
        if self.num_experts and self.expert_width < 1:
            raise ValueError(f"expert_width must be at least 1 for {self.num_experts} experts, got {self.expert_width}")

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of each head."""
        return 0 if self.learned_positions else int(self.head_dim * self.rotary_fraction)

    def window(self, layer: int) -> int | None:
        """How many tokens layer `layer` sees, itself included; None for all."""
        return self.windows[layer % len(self.windows)]

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` holds experts."""
        return bool(self.num_experts) and layer not in self.dense_layers
