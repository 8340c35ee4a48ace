"""What fewer bits cost a real language model: ``python -m benchmarks.quantised`` prints one row per way.

    RLHF_JAX_CACHE=... python -m benchmarks.quantised --texts 64

The kernels of SmolLM2-135M-Instruct go into 8 and 4 bits (`rlhf_jax.models.quantisation`), its embedding and norms stay
in float32, and it reads the first texts of the product reviews. Columns: ``MiB`` of all parameters; ``bits`` per number
of the kernels; ``error`` of the kernels, ‖W - W'‖ / ‖W‖; ``loss`` in nats per token; ``KL`` from the float32 model to
this one in nats per token; ``same token``, how often the most likely token is that of the float32 model.

The file itself has weights of about 4 bits, which are read as float32: the errors are those of rounding once more.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import masking
from rlhf_jax.data.batches import pad_right
from rlhf_jax.data.fetch import MODEL, RATINGS, fetch
from rlhf_jax.data.tokenizer import load_gguf_tokenizer
from rlhf_jax.feedback.ratings import load_ratings
from rlhf_jax.models.gguf import load_gguf, open_gguf
from rlhf_jax.models.quantisation import dequantise, int8, nf4, quantise, stored_bytes
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.training.state import path_matches

ROWS = 8
WAYS: dict[str, Any] = {
    "float32": None,
    "`int8`": int8,
    "`nf4`, `block=32`": functools.partial(nf4, block=32),
    "`nf4`": nf4,
}


def batches(tokenizer: Any, count: int, length: int) -> Iterator[tuple[Array, Array]]:
    """Tokens and mask [ROWS, length] of the first texts that fit."""
    rows = [tokenizer.encode(item.text) for item in load_ratings(fetch(RATINGS), ["amazon"])]
    rows = [row for row in rows if 2 < len(row) <= length][:count]
    for start in range(0, len(rows), ROWS):
        yield pad_right(rows[start : start + ROWS], pad_id=tokenizer.pad_id, length=length)


def main() -> None:
    """One row per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    reader = open_gguf(fetch(MODEL))
    fields, params = load_gguf(reader)
    params = jax.tree.map(jnp.asarray, params)
    model = Transformer(TransformerConfig(**fields))
    kernels = path_matches("kernel$")
    texts = list(batches(load_gguf_tokenizer(reader), args.texts, args.length))

    def log_probs(params: Any, tokens: Array, mask: Array) -> Array:
        hidden = model.apply({"params": params}, tokens, mask).hidden[:, :-1]
        return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))

    @jax.jit
    def compare(params: Any, quantised: Any, tokens: Array, mask: Array) -> masking.Totals:
        """Loss, KL and whether the best token is the same: totals over the tokens that follow another."""
        exact, found = log_probs(params, tokens, mask), log_probs(quantised, tokens, mask)
        loss = -jnp.take_along_axis(found, tokens[:, 1:, None], -1)[..., 0]
        kl = jnp.sum(jnp.exp(exact) * (exact - found), axis=-1)
        same = (jnp.argmax(exact, -1) == jnp.argmax(found, -1)).astype(loss.dtype)
        return jax.tree.map(lambda *x: jnp.stack(x), *(masking.token_totals(x, mask[:, 1:]) for x in (loss, kl, same)))

    def distance(params: Any, quantised: Any) -> tuple[float, float]:
        """Norms of the difference and of the kernels."""
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(dequantise(quantised)), strict=True)
        squares = [(jnp.sum((a - b) ** 2), jnp.sum(a**2)) for a, b in pairs if a is not b]
        return float(sum(x for x, _ in squares)) ** 0.5, float(sum(x for _, x in squares)) ** 0.5 or 1.0

    print("| kernels | MiB | bits | error | loss | KL | same token |")
    print(f"|{' --- |' * 7}")
    numbers = sum(
        leaf.size for path, leaf in jax.tree.leaves_with_path(params) if "kernel" in jax.tree_util.keystr(path)
    )
    rest = stored_bytes(params) - 4 * numbers
    for name, way in WAYS.items():
        small = params if way is None else quantise(params, kernels, to=way)
        total = jax.tree.map(lambda *x: sum(x), *(compare(params, small, *batch) for batch in texts))
        loss, kl, same = (float(x) for x in masking.mean_of_totals(total))
        size = stored_bytes(small)
        bits = 8 * (size - rest) / numbers
        off, norm = distance(params, small)
        told = (f"{size / 2**20:.0f}", f"{bits:.1f}", f"{off / norm:.4f}", f"{loss:.3f}", f"{kl:.4f}")
        print(f"| {name} | {' | '.join(told)} | {100 * same:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
