"""Examples of one kind to one batch: the arrays that losses take, and every error named by its row.

Prompts are padded on the left and responses on the right, so that in rows [P + R] every response starts at slot P. What
fits no row is refused and not cut. Rows whose `valid` is False only fill the batch up and weigh nothing. `names` are
what rows are called in errors, for instance `Rows.places` of `data.readers`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from rlhf_jax.data.batches import check_tokens, pad_right, preference_batch, token_batch
from rlhf_jax.data.encoding import begin_token, encode_pair, encode_prompt
from rlhf_jax.data.examples import Preference, PromptCompletion, Ranked, Rated, Side, Stepwise, Tools, Unpaired
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.types import PreferenceBatch, TokenBatch

__all__ = [
    "ResponsesBatch",
    "StepwiseBatch",
    "UnpairedBatch",
    "batch_completions",
    "batch_preferences",
    "batch_ranked",
    "batch_rated",
    "batch_stepwise",
    "batch_unpaired",
]

Valid = Sequence[bool] | np.ndarray | None


@struct.dataclass
class UnpairedBatch:
    """Responses that somebody found good or bad, for `losses.unpaired_preference`."""

    responses: TokenBatch  # [B, P + R]
    mismatched: TokenBatch  # [B, P + R], every prompt with the response of another row, for KTO's reference point
    desirable: Array  # [B] bool
    weight: Array  # [B] float32, 1 where valid, else 0
    mismatched_weight: Array  # [B] float32, 0 where there is no other row either


@struct.dataclass
class StepwiseBatch:
    """Solutions in steps, for `losses.rating.process_rewards`."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, real tokens
    step_mask: Array  # [B, T] bool, the last token of every step, where it is judged
    step_labels: Array  # [B, T] float32, 1 for a step that is right; 0 elsewhere


@struct.dataclass
class ResponsesBatch:
    """Several responses to each prompt, rated or ranked, for `losses.rating` and `losses.ranking`."""

    responses: TokenBatch  # [B, K, P + R]; what is not present repeats the first response and has no targets
    present: Array  # [B, K] bool, the mask of the loss; the best first, if they are ranked
    ratings: Array | None = None  # [B, K] float32, 0 where not present


def batch_completions(
    examples: Sequence[PromptCompletion],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    valid: Valid = None,
    names: Sequence[str] = (),
) -> TokenBatch:
    """Prompts with the response to learn: a TokenBatch [B, P + R] whose targets are the responses.

    Args:
      examples: B of them.
      tokenizer: a `ChatTokenizer` for messages.
      prompt_length: P, slots for prompts.
      response_length: R, slots for responses, their end token included.
      valid: [B] bool, rows that count. By default all do.
      names: what to call the rows in errors; by default their numbers.
    Raises: UserError that names the row which does not fit, begins twice, holds padding or has nothing to learn.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> batch = batch_completions([PromptCompletion("a", "b")], ByteTokenizer(), prompt_length=2, response_length=3)
    >>> batch.tokens.tolist(), batch.loss_mask.tolist()
    ([[256, 97, 98, 258, 256]], [[False, False, True, True, False]])
    """
    encoder = _Encoder(tokenizer, prompt_length, response_length, names)
    prompts, responses = encoder.pairs([(x.prompt, x.completion, x.tools) for x in examples])
    return token_batch(prompts, responses, **encoder.options, valid=valid, names=names)


def batch_preferences(
    examples: Sequence[Preference],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    valid: Valid = None,
    names: Sequence[str] = (),
) -> PreferenceBatch:
    """Two responses to each prompt, of which people preferred the first: a PreferenceBatch of TokenBatch [B, P + R].

    Arguments and errors are those of `batch_completions`.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> pair = Preference("a", "b", "c")
    >>> batch = batch_preferences([pair], ByteTokenizer(), prompt_length=1, response_length=2)
    >>> batch.chosen.tokens.tolist(), batch.rejected.tokens.tolist()
    ([[97, 98, 258]], [[97, 99, 258]])
    """
    encoder = _Encoder(tokenizer, prompt_length, response_length, names)
    prompts, chosen = encoder.pairs([(x.prompt, x.chosen, x.tools) for x in examples], "chosen")
    _, rejected = encoder.pairs([(x.prompt, x.rejected, x.tools) for x in examples], "rejected")
    return preference_batch(prompts, chosen, rejected, **encoder.options, valid=valid, names=names)


def batch_unpaired(
    examples: Sequence[Unpaired],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    valid: Valid = None,
    names: Sequence[str] = (),
) -> UnpairedBatch:
    """Responses with a thumb up or down, and the same prompts with the responses of the valid rows before them.

    Arguments and errors are those of `batch_completions`.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> examples = [Unpaired("a", "b", True), Unpaired("c", "d", False)]
    >>> batch = batch_unpaired(examples, ByteTokenizer(), prompt_length=1, response_length=2)
    >>> batch.responses.tokens.tolist(), batch.mismatched.tokens.tolist()
    ([[97, 98, 258], [99, 100, 258]], [[97, 100, 258], [99, 98, 258]])
    """
    encoder = _Encoder(tokenizer, prompt_length, response_length, names)
    prompts, responses = encoder.pairs([(x.prompt, x.completion, x.tools) for x in examples])
    own = token_batch(prompts, responses, **encoder.options, valid=valid, names=names)
    counts = np.ones(len(examples), np.bool_) if valid is None else np.asarray(valid)
    rows, others = np.flatnonzero(counts), np.arange(len(examples))
    others[rows] = np.roll(rows, 1)
    mixed = counts & (others != np.arange(len(examples)))
    mismatched = token_batch(prompts, [responses[i] for i in others], **encoder.options, valid=mixed, names=names)
    return UnpairedBatch(
        responses=own,
        mismatched=mismatched,
        desirable=jnp.asarray(np.array([x.label for x in examples], np.bool_)),
        weight=jnp.asarray(counts, jnp.float32),
        mismatched_weight=jnp.asarray(mixed, jnp.float32),
    )


def batch_stepwise(
    examples: Sequence[Stepwise],
    tokenizer: Tokenizer,
    *,
    length: int,
    separator: str = "\n",
    valid: Valid = None,
    names: Sequence[str] = (),
) -> StepwiseBatch:
    """Solutions in steps, each step judged at its last token.

    Args:
      examples: B of them.
      tokenizer: any.
      length: T, slots for a prompt and all its steps.
      separator: text that follows every step and belongs to it; its last token is where the step is judged.
      valid, names: as in `batch_completions`; a row that is not valid has an empty `step_mask`.
    Raises: UserError that names the row which does not fit, or the step that has no token.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> batch = batch_stepwise([Stepwise("q", ("a", "bc"), (True, False))], ByteTokenizer(), length=7)
    >>> batch.step_mask.astype(int).tolist(), batch.step_labels.tolist()
    ([[0, 0, 1, 0, 0, 1, 0]], [[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    """
    counts = np.ones(len(examples), np.bool_) if valid is None else np.asarray(valid)
    step_mask = np.zeros((len(examples), length), np.bool_)
    labels = np.zeros((len(examples), length), np.float32)
    rows = []
    for index, example in enumerate(examples):
        name = _name(names, index)
        tokens, ends = list(encode_prompt(example.prompt, tokenizer)), []
        for number, step in enumerate(example.completions):
            own = tokenizer.encode(step + separator)
            if not own:
                raise UserError(f"{name}: step {number} has no token")
            tokens += own
            ends.append(len(tokens) - 1)
        _check_room(name, "solution", tokens, length)
        targets = [place in ends for place in range(len(tokens))]
        check_tokens(tokens, targets, name, pad_id=tokenizer.pad_id, bos_id=begin_token(tokenizer))
        rows.append(tokens)
        step_mask[index, ends] = counts[index]
        labels[index, ends] = np.where(counts[index], example.labels, 0.0)
    tokens, mask = pad_right(rows, pad_id=tokenizer.pad_id, length=length)
    return StepwiseBatch(tokens=tokens, mask=mask, step_mask=jnp.asarray(step_mask), step_labels=jnp.asarray(labels))


def batch_rated(
    examples: Sequence[Rated],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    slots: int = 1,
    valid: Valid = None,
    names: Sequence[str] = (),
) -> ResponsesBatch:
    """Responses with a number each: [B, K] ratings beside [B, K, P + R] tokens.

    Args:
      examples, tokenizer, prompt_length, response_length, valid, names: as in `batch_completions`.
      slots: K, how many responses to a prompt there may be. Default 1.
    Raises: UserError as in `batch_completions`, also for a prompt with more responses than slots.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> example = Rated("a", ("b", "c"), (4.0, 1.0))
    >>> batch = batch_rated([example], ByteTokenizer(), prompt_length=1, response_length=2, slots=3)
    >>> batch.ratings.tolist(), batch.present.tolist(), batch.responses.tokens.shape
    ([[4.0, 1.0, 0.0]], [[True, True, False]], (1, 3, 3))
    """
    encoder = _Encoder(tokenizer, prompt_length, response_length, names)
    batch = encoder.lists(examples, slots, valid)
    ratings = np.zeros(batch.present.shape, np.float32)
    for index, example in enumerate(examples):
        ratings[index, : len(example.ratings)] = example.ratings
    return dataclasses.replace(batch, ratings=jnp.where(batch.present, ratings, 0.0))


def batch_ranked(
    examples: Sequence[Ranked],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    slots: int,
    valid: Valid = None,
    names: Sequence[str] = (),
) -> ResponsesBatch:
    """Responses in order, the best first: [B, K, P + R] tokens; arguments and errors as in `batch_rated`.

    `losses.ranking.plackett_luce` takes the scores of `responses` as [B, K], with `present` as its mask.

    >>> from rlhf_jax.data.tokenizer import ByteTokenizer
    >>> example = Ranked("a", ("b", "c"))
    >>> batch = batch_ranked([example], ByteTokenizer(), prompt_length=1, response_length=2, slots=2)
    >>> batch.responses.tokens.tolist()
    [[[97, 98, 258], [97, 99, 258]]]
    """
    return _Encoder(tokenizer, prompt_length, response_length, names).lists(examples, slots, valid)


class _Encoder:
    """A tokenizer with the slots that rows have and the names that errors use."""

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, response_length: int, names: Sequence[str]) -> None:
        self.tokenizer, self.names = tokenizer, names
        self.options: Any = {
            "pad_id": tokenizer.pad_id,
            "bos_id": begin_token(tokenizer),
            "prompt_length": prompt_length,
            "response_length": response_length,
        }

    def pair(self, name: str, prompt: Side, response: Side, tools: Tools, what: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and a response that fit."""
        try:
            tokens, answer = encode_pair(prompt, response, self.tokenizer, tools=tools)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        _check_room(name, "prompt", tokens, self.options["prompt_length"])
        _check_room(name, what, answer, self.options["response_length"])
        return tokens, answer

    def pairs(
        self, sides: Sequence[tuple[Side, Side, Tools]], what: str = "response"
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Those of all rows: ([B] prompts, [B] responses)."""
        found = [self.pair(_name(self.names, i), *side, what) for i, side in enumerate(sides)]
        return [prompt for prompt, _ in found], [response for _, response in found]

    def lists(self, examples: Sequence[Rated | Ranked], slots: int, valid: Valid) -> ResponsesBatch:
        """Those of lists of responses."""
        present = np.zeros((len(examples), slots), np.bool_)
        counts = np.ones(len(examples), np.bool_) if valid is None else np.asarray(valid)
        prompts, responses, names = [], [], []
        for index, example in enumerate(examples):
            name = _name(self.names, index)
            if len(example.responses) > slots:
                raise UserError(f"{name} has {len(example.responses)} responses but only {slots} slots; use more slots")
            own = [
                self.pair(name, example.prompt, each, example.tools, f"response {number}")
                for number, each in enumerate(example.responses)
            ]
            present[index, : len(own)] = counts[index]
            own += own[:1] * (slots - len(own))
            prompts += [prompt for prompt, _ in own]
            responses += [response for _, response in own]
            names += [f"{name}, response {number}," for number in range(slots)]
        flat = token_batch(prompts, responses, **self.options, valid=present.reshape(-1), names=names)
        rows = jax.tree.map(lambda x: x.reshape(len(examples), slots, -1), flat)
        return ResponsesBatch(responses=rows, present=jnp.asarray(present))


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if names else f"row {index}"


def _check_room(name: str, what: str, tokens: Sequence[int], slots: int) -> None:
    if len(tokens) > slots:
        raise UserError(
            f"{name}: the {what} has {len(tokens)} tokens but only {slots} slots; shorten it, leave it out or use more"
        )
