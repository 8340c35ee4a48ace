"""Attention without its scores in memory: cuDNN's kernel on a GPU, the splash kernel on a TPU.

A kernel serves tokens that attend among themselves, in training and scoring; `Transformer` takes it as its attribute
`kernel`. Decoding from a cache has one query per row, whose scores are small, and always runs `attention.attend`. Every
kernel has the arguments of `by_backend`, so one of your own fits as well; `functools.partial` sets options.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from rlhf_jax.models.attention import attend

__all__ = ["Kernel", "by_backend", "cudnn", "splash"]

Kernel = Callable[..., Array]

LANES = 128  # tokens are padded to a multiple of this by the splash kernel
BLOCKS = (512, 256, LANES)  # tokens that it handles at once: the largest that divides the padded number
ROWS, HEADS = ("data", "fsdp"), "tensor"  # axes of a mesh that cut rows, and heads


def by_backend(
    query: Array,
    key: Array,
    value: Array,
    allowed: Array,
    text: Array,
    *,
    window: int | None,
    scale: float,
    cap: float | None = None,
) -> Array:
    """The fastest attention that is exact here: `cudnn` on a GPU, `splash` on a TPU, otherwise `attention.attend`.

    cuDNN takes float16 and bfloat16, heads of at most 128 dimensions (a multiple of 8), an even number of tokens, and
    no soft cap. The splash kernel takes 128 tokens or more without a window (with one it is exact only for texts in one
    piece, so that has to be asked for), where it is known on which chip every row lies: on a single device, inside
    `pmap` or `shard_map`, and under `jax.set_mesh(mesh)`.

    Args:
      query: [B, T, N, H].
      key, value: [B, K, T, H] where K divides N.
      allowed: [B, T, T] bool, as `attention.visible` gives it.
      text: [B, T] int, the text that each token belongs to, 0 for padding: the same sight in the splash kernel's form.
      window: how many tokens are seen, the query's own included; None for all.
      scale, cap: as in `attention.attend`.
    Returns:
      [B, T, N, H] in the query's dtype; what padding gets is finite and meaningless.
    """
    sight = {"window": window, "scale": scale, "cap": cap}
    tokens, head_dim, backend = query.shape[1], query.shape[-1], jax.default_backend()
    half = query.dtype in (jnp.float16, jnp.bfloat16)
    if backend == "gpu" and half and cap is None and head_dim <= 128 and head_dim % 8 == 0 and tokens % 2 == 0:
        return cudnn(query, key, value, allowed, text, **sight)
    placed = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
    whole = window is None or window >= tokens
    if backend == "tpu" and tokens >= LANES and whole and placed:
        return splash(query, key, value, allowed, text, **sight)
    return attend(query, key, value, allowed, scale=scale, cap=cap)


def cudnn(
    query: Array,
    key: Array,
    value: Array,
    allowed: Array,
    text: Array,
    *,
    window: int | None,
    scale: float,
    cap: float | None = None,
) -> Array:
    """cuDNN's flash attention, for NVIDIA GPUs; arguments and result as in `by_backend`.

    Raises:
      ValueError: there is a soft cap, which cuDNN does not know. For other limits the message is JAX's.
    """
    del text, window  # allowed says it all
    if cap is not None:
        raise ValueError(f"cuDNN's attention has no soft cap, got cap={cap}; attention.attend has one")
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return jax.nn.dot_product_attention(query, key, value, mask=allowed[:, None], scale=scale, implementation="cudnn")


def splash(
    query: Array,
    key: Array,
    value: Array,
    allowed: Array,
    text: Array,
    *,
    window: int | None,
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
) -> Array:
    """JAX's splash kernel, for TPUs; arguments and result as in `by_backend`.

    Neither scores nor a mask are formed: a token sees earlier ones of its text, and blocks that no token sees are
    skipped. A window counts slots, so a text has to stand in one piece, as left and right padding and packed rows
    leave it.

    Under `jax.set_mesh(mesh)` rows are cut by the axes "data" and "fsdp" and heads by "tensor", where they divide.
    `interpret` runs the kernel's program on any backend, slowly.
    """
    del allowed
    one_device = functools.partial(_splash, window=window, cap=cap, interpret=interpret)
    query = query * jnp.asarray(scale, query.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    size = {name: mesh.shape[name] for name in mesh.axis_names if name not in mesh.manual_axes}
    rows = tuple(name for name in ROWS if name in size)
    rows = rows if query.shape[0] % math.prod(size[name] for name in rows) == 0 else None
    heads = HEADS if HEADS in size and key.shape[1] % size[HEADS] == 0 else None
    if size:
        where = P(rows, heads), P(rows, heads), P(rows, heads), P(rows)
        one_device = jax.shard_map(one_device, in_specs=where, out_specs=where[0], check_vma=False)
    mixed = one_device(jnp.swapaxes(query, 1, 2), key, value, text)
    return jnp.swapaxes(mixed, 1, 2)


def _splash(
    query: Array, key: Array, value: Array, text: Array, *, window: int | None, cap: float | None, interpret: bool
) -> Array:
    """The rows and heads of one device: query [B, N, T, H], key and value [B, K, T, H], text [B, T]."""
    tokens = query.shape[2]
    size = -(-tokens // LANES) * LANES
    grown = lambda x, axis: jnp.pad(x, [(0, size - tokens if i == axis else 0) for i in range(x.ndim)])
    square = (size, size)
    if window is None or window >= tokens:
        mask = splash_attention.CausalMask(square)
    else:
        mask = splash_attention.LocalMask(square, (window - 1, 0), offset=0)
    block = next(block for block in BLOCKS if size % block == 0)
    attention = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=splash_attention.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    row = lambda query, key, value, text: attention(query, key, value, splash_attention.SegmentIds(text, text))
    mixed: Any = jax.vmap(row)(grown(query, 2), grown(key, 2), grown(value, 2), grown(text, 1))
    return mixed[:, :, :tokens]
