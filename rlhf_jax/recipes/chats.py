"""Replies in chats: sizes of a run, prompts and replies as token rows, policies and what they say."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.feedback.dialogues import (
    Dialogue,
)
from rlhf_jax.generation.sampler import generate
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.training.state import merge_params
from rlhf_jax.types import Rollout

__all__ = ["Config", "Policy", "World", "exchanges", "left", "misheard", "reply", "right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All numbers of a run, and its flags."""

    synthetic: bool = False  # made-up dialogues of rated words and bytes as tokens, without a download
    vocabulary: int = 2048
    prompt_length: int = 16  # tokens; the end of what was said last
    response_length: int = 32
    width: int = 128
    layers: int = 4
    trunk: int = 2  # actor, critic and reward models read the activations entering this layer
    judge_layer: int = 1
    base_steps: int = 500
    base_batch: int = 64
    base_rate: float = 2e-3
    dialogue_tokens: int = 192  # of a chat that a reward model reads
    comparisons: int = 4096
    turns: int = 40
    batch: int = 64
    minibatches: int = 4
    actor_rate: float = 5e-4
    kl_coefficient: float = 0.05
    kl_target: float = 8.0  # nats per reply
    student_steps: int = 80  # of the common start, and again of each student
    teacher_samples: int = 1024
    human_beta: float = 0.5
    eval_prompts: int = 256
    noise: float = 0.15


class World(NamedTuple):
    """What one seed works with."""

    config: Config
    tokenizer: Tokenizer
    model: Transformer
    train: list[Dialogue]
    held_out: list[Dialogue]  # of the judge; nothing that is judged is trained on them

    def key(self, seed: int, *path: int) -> Array:
        key = jax.random.key(seed)
        for step in path:
            key = jax.random.fold_in(key, step)
        return key


class Policy(NamedTuple):
    """A model with its parameters in two parts."""

    model: Transformer
    trained: Any
    frozen: Any


def left(world: World, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """[N, P] prompts, left-padded: the end of what was said last, and the end token that makes it the other's turn."""
    length, end = world.config.prompt_length, world.tokenizer.eos_id
    rows = [[*world.tokenizer.encode(text), end][-length:] for text in texts]
    tokens = np.array([[end] * (length - len(row)) + row for row in rows], np.int32)
    return tokens, np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])


def right(world: World, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N, length] texts with their end token, right-padded and cut, and [N] how long they were before."""
    rows = [[*world.tokenizer.encode(text), world.tokenizer.eos_id] for text in texts]
    tokens = np.array([(row + [world.tokenizer.eos_id] * length)[:length] for row in rows], np.int32)
    lengths = np.array([len(row) for row in rows])
    return tokens, np.arange(length) < lengths[:, None], lengths


def exchanges(chats: list[Dialogue]) -> list[tuple[str, str]]:
    return [pair for chat in chats for pair in zip(chat.turns, chat.turns[1:], strict=False)]


def reply(world: World, policy: Policy, prompts: tuple[Any, Any], keys: Array, *, tap: int | None) -> Rollout:
    end = world.tokenizer.eos_id
    return generate(policy.model, merge_params(policy.trained, policy.frozen), *prompts, keys,
                    length=world.config.response_length, end_token=end, pad_token=end, tap=tap)  # fmt: skip


def misheard(texts: list[str], rng: np.random.Generator, rate: float) -> list[str]:
    """Scripted noise: a word is dropped or becomes another one with the same first letter."""
    heap: dict[str, list[str]] = {}
    for word in (word for text in texts for word in text.split()):
        heap.setdefault(word[0].lower(), []).append(word)

    def hear(word: str) -> str:
        if rng.random() >= rate:
            return word
        return "" if rng.random() < 0.5 else str(rng.choice(heap[word[0].lower()]))

    return [" ".join(filter(None, map(hear, text.split()))) for text in texts]
