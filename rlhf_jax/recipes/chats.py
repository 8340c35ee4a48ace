"""Replies in chats: sizes of a run, the model that answers, prompts and replies as token rows, and what is said."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.data.fetch import MODEL, fetch
from rlhf_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_gguf_tokenizer
from rlhf_jax.feedback.dialogues import CHITCHAT, Dialogue, load_dialogues
from rlhf_jax.feedback.ratings import load_lexicon
from rlhf_jax.generation.sampler import generate
from rlhf_jax.generation.warpers import temperature
from rlhf_jax.models.gguf import load_gguf, open_gguf
from rlhf_jax.models.transformer import Transformer, TransformerConfig
from rlhf_jax.training.state import merge_params
from rlhf_jax.types import Rollout

__all__ = ["Config", "Policy", "World", "exchanges", "left", "misheard", "open_world", "read_part", "reply", "right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All numbers of a run, and its flags."""

    synthetic: bool = False  # made-up chats and a random model of bytes, without a download
    prompt_length: int = 32  # tokens; the end of what was said last, as the model's chat template has it
    response_length: int = 40
    temperature: float = 0.8  # of all samples
    trunk: int = 20  # layers below are never trained; actor and critic read the activations entering this one
    reward_layer: int = 6  # the reward models read those entering this one
    judge_layer: int = 4
    base_from: int = 20
    base_steps: int = 20
    base_batch: int = 32
    base_rate: float = 1e-4
    chat_tokens: int = 48  # of a chat that is read for its features
    comparisons: int = 4096
    turns: int = 12
    batch: int = 24
    minibatches: int = 4
    actor_rate: float = 1e-4
    kl_coefficient: float = 0.3
    teacher_samples: int = 96
    student_steps: int = 12
    student_batch: int = 16
    student_rate: float = 2e-4
    human_beta: float = 0.3  # in standard deviations of the base's replies
    eval_prompts: int = 64
    noise: float = 0.15  # of the words of misheard prompts, where no recogniser mishears them
    speak: int = 4  # exchanges of the first seed that espeak-ng speaks, if it is there


class World(NamedTuple):
    """What all seeds work with."""

    config: Config
    tokenizer: Tokenizer
    model: Transformer
    params: Any  # of the model as it came
    template: tuple[list[int], list[int]]  # tokens before and after what was said last
    chats: list[Dialogue]  # without a rating: the base learns from them to answer
    rated: list[Dialogue]

    def halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the rated chats that the reward models learn from, and of those for the judge and its prompts."""
        first, second = np.array_split(np.random.default_rng((seed, 0)).permutation(len(self.rated)), 2)
        return first, second


class Policy(NamedTuple):
    """The model with its parameters in two parts."""

    trained: Any
    frozen: Any

    @property
    def params(self) -> Any:
        """All of them."""
        return merge_params(self.trained, self.frozen)


def made_up(rng: np.random.Generator) -> list[Dialogue]:
    """Made-up chats: words that people rated, a turn each; the rating grows with their mean and their number."""
    words = [item for item in load_lexicon() if item.text.isalpha() and item.text.isascii()]
    chats = [[words[i] for i in rng.integers(len(words), size=rng.integers(3, 9))] for _ in range(200)]
    rated = lambda chat: 5 + sum(word.mean for word in chat) / len(chat) + len(chat) / 2
    return [Dialogue(tuple(w.text for w in c), rated(c) if i % 2 else None) for i, c in enumerate(chats)]


def random_params(model: Transformer, rng: np.random.Generator) -> Any:
    """Normal kernels and tables, scales of 1: parameters without a program that draws them."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool)
    init = partial(model.init, method="initialise")
    shapes = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), *one)["params"]
    draw = lambda x: (0.1 * rng.standard_normal(x.shape) if x.ndim > 1 else np.ones(x.shape)).astype(np.float32)
    return jax.tree.map(draw, shapes)


def open_world(config: Config) -> World:
    """SmolLM2-135M-Instruct and the chats of chitchat-dataset, fetched once; made-up ones if `config.synthetic`."""
    if config.synthetic:
        chats, tokenizer = made_up(np.random.default_rng(0)), ByteTokenizer()
        network = TransformerConfig(vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=4,
                                    num_kv_heads=2, head_dim=4, mlp_width=48)  # fmt: skip
        params, template = random_params(Transformer(network), np.random.default_rng(0)), ([], [tokenizer.eos_id])
    else:
        chats, reader = load_dialogues(fetch(CHITCHAT)), open_gguf(fetch(MODEL))
        tokenizer, (fields, params) = load_gguf_tokenizer(reader), load_gguf(reader)
        network = TransformerConfig(**fields)
        marks = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        before, after = (tokenizer.encode(mark, control_tokens=True) for mark in marks)
        template = before, after
    rated = [chat for chat in chats if chat.rating is not None]
    unrated = [chat for chat in chats if chat.rating is None]
    return World(config, tokenizer, Transformer(network), jax.device_put(params), template, unrated, rated)


def left(world: World, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """[N, P] prompts, left-padded: the end of what was said last, in the model's chat template."""
    (before, after), length, pad = world.template, world.config.prompt_length, world.tokenizer.pad_id
    rows = [[*before, *_end(world, text), *after] for text in texts]
    tokens = np.array([[pad] * (length - len(row)) + row for row in rows], np.int32)
    return tokens, np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])


def read_part(world: World, text: str) -> str:
    """The end of what was said last, as far as the model reads it."""
    return world.tokenizer.decode(_end(world, text))


def _end(world: World, text: str) -> list[int]:
    room = world.config.prompt_length - sum(map(len, world.template))
    return world.tokenizer.encode(text)[-room:]


def right(world: World, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N, length] texts with their end token, right-padded and cut, and [N] how long they were before."""
    rows = [[*world.tokenizer.encode(text), world.tokenizer.eos_id] for text in texts]
    tokens = np.array([(row + [world.tokenizer.pad_id] * length)[:length] for row in rows], np.int32)
    lengths = np.array([len(row) for row in rows])
    return tokens, np.arange(length) < lengths[:, None], lengths


def exchanges(chats: list[Dialogue]) -> list[tuple[str, str]]:
    """What was said, and what was answered."""
    return [pair for chat in chats for pair in zip(chat.turns, chat.turns[1:], strict=False)]


def reply(
    world: World, policy: Policy, prompts: tuple[Any, Any], keys: Array, *, tap: bool = False, keep_hidden: bool = False
) -> Rollout:
    """Answers to prompts; `tap` keeps the activations that actor and critic read."""
    config, tokenizer = world.config, world.tokenizer
    fixed = (config.response_length, tokenizer.eos_id, tokenizer.pad_id, config.temperature)
    return _reply(world.model, fixed, config.trunk if tap else None, keep_hidden, policy, *prompts, keys)


@partial(jax.jit, static_argnums=range(4))
def _reply(
    model: Transformer,
    fixed: tuple[int, int, int, float],
    tap: int | None,
    keep_hidden: bool,
    policy: Policy,
    tokens: Array,
    mask: Array,
    keys: Array,
) -> Rollout:
    length, end, pad, cool = fixed
    return generate(model, policy.params, tokens, mask, keys, length=length, end_token=end, pad_token=pad,
                    warp=partial(temperature, value=cool), tap=tap, keep_hidden=keep_hidden)  # fmt: skip


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
