"""What the stages of a run share: the run itself, policies, and how a policy continues prefixes.

Steps are functions of (state, index): rows and keys are drawn from the seed, the stage and the index, so a resumed run
sees what an uninterrupted one would have seen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.generation.sampler import generate
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.quickstart.material import Material, Tokens
from rlhf_jax.quickstart.settings import Settings
from rlhf_jax.training.sharding import shard_batch
from rlhf_jax.training.state import merge_params
from rlhf_jax.types import Rollout

__all__ = ["Policy", "Run", "adam", "continuations", "continue_with", "layers_from"]

ROWS = 128  # rows of a batch that is not trained on


class Policy(NamedTuple):
    """A language model at work: its network, its parameters in two parts, on the mesh."""

    model: Transformer
    trained: dict
    frozen: dict


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage works with."""

    settings: Settings
    material: Material
    mesh: Mesh
    loop: Callable[..., Any]  # (stage, step, state, total) -> state, resumable; see quickstart.run

    @property
    def model(self) -> Transformer:
        """The decoder."""
        return Transformer(self.material.config)

    def key(self, *path: int) -> Array:
        """A key for one purpose: the seed folded with the path."""
        return functools.reduce(jax.random.fold_in, path, jax.random.key(self.settings.seed))

    def rng(self, *path: int) -> np.random.Generator:
        """A NumPy generator for one purpose."""
        return np.random.default_rng((self.settings.seed, *path))

    def copy_everywhere(self, tree: Any) -> Any:
        """Replicates a pytree on the mesh."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split_rows(self, tree: Any) -> Any:
        """Deals rows to the devices."""
        return shard_batch(tree, self.mesh)


def layers_from(first: int) -> Callable[[str], bool]:
    """Predicate: the final norm and the layers from `first` on; everything if first == 0."""

    def chosen(path: str) -> bool:
        name = path.split("/")[0]
        return first == 0 or name == "final_norm" or (name.startswith("layer_") and int(name[6:]) >= first)

    return chosen


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with clipping, a short warm-up and a linear descent to a tenth."""
    warm_up = max(1, steps // 20)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(rate / warm_up, rate, warm_up),
            optax.linear_schedule(rate, 0.1 * rate, steps - warm_up),
        ],
        [warm_up],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))


def continue_with(
    run: Run, policy: Policy, tap: int | None = None, *, keep_hidden: bool = False
) -> Callable[..., Rollout]:
    """(trained, frozen, prompts, mask, keys) -> Rollout; policies of one network share its compiled program."""
    tokenizer, length = run.material.tokenizer, run.settings.response_length
    return functools.partial(_generate, policy.model, length, tokenizer.eos_id, tap, keep_hidden)


@functools.partial(jax.jit, static_argnums=range(5))
def _generate(
    model: Transformer,
    length: int,
    end_token: int,
    tap: int | None,
    keep_hidden: bool,
    trained: dict,
    frozen: dict,
    tokens: Array,
    mask: Array,
    keys: Array,
) -> Rollout:
    params = merge_params(trained, frozen)
    return generate(
        model,
        params,
        tokens,
        mask,
        keys,
        length=length,
        end_token=end_token,
        pad_token=end_token,
        tap=tap,
        keep_hidden=keep_hidden,
    )


def continuations(
    run: Run, policy: Policy, beginnings: Tokens, key: Array, *, tap: int | None = None, keep_hidden: bool = False
) -> list[Rollout]:
    """Continues every beginning once; batches of ROWS rows, the last one filled up with repetitions."""
    program = continue_with(run, policy, tap, keep_hidden=keep_hidden)
    keys = jax.random.split(key, len(beginnings.tokens))
    batches = []
    for start in range(0, len(beginnings.tokens), ROWS):
        rows = np.resize(np.arange(start, min(start + ROWS, len(beginnings.tokens))), ROWS)
        inputs = run.split_rows((beginnings.tokens[rows], beginnings.mask[rows], keys[rows]))
        batches.append(program(policy.trained, policy.frozen, *inputs))
    return batches
