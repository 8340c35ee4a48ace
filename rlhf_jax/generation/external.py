"""Rollouts from another engine: any server of OpenAI-compatible completions that speaks in token ids.

Token-in, token-out: prompts are sent as ids and responses are read as ids, because a round trip through text changes
them. Ids are read from ``choices[].token_ids`` or from tokens written as ``token_id:123`` (vLLM gives them when asked;
the request asks for both).

The engine computes log-probs in its own precision and with its own, perhaps older, parameters. They are returned as
they come, so that `rlhf_jax.losses.importance` can correct the loss for the difference to the trainer's:

    weights = importance.truncated_weights(log_probs, rollout.log_probs)

This module runs on the host, between compiled programs. It uses the standard library only.
"""

import concurrent.futures
import dataclasses
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout

__all__ = ["CompletionServer"]

WARPING = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
NO_IDS = "it must return token ids: start one that knows `return_token_ids` or `return_tokens_as_token_ids`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionServer:
    """Where completions come from.

    Attributes:
      url: base address, for instance http://127.0.0.1:8000/v1.
      model: name of the model as the server knows it.
      api_key: sent as a bearer token; None for none.
      timeout: seconds to wait for one request.
      attempts: how often a request is tried before giving up; a refusal of the request itself is not tried again.
      parallel: requests under way at a time, one prompt in each.
      reports_warped: whether the server's log-probs belong to the distribution it samples from (vLLM:
        --logprobs-mode processed_logprobs) or to the model before temperature and truncation.
    """

    url: str
    model: str
    api_key: str | None = None
    timeout: float = 600.0
    attempts: int = 3
    parallel: int = 16
    reports_warped: bool = False

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {self.url!r}")
        for name in ("attempts", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def generate(
        self,
        prompts: ArrayLike | Array,
        prompt_mask: ArrayLike | Array,
        seeds: Sequence[int],
        *,
        length: int,
        end_token: int,
        pad_token: int,
        temperature: float = 1.0,
        options: Mapping[str, Any] | None = None,
    ) -> Rollout:
        """Continues every prompt by up to `length` tokens, as `sampler.generate` does.

        Args:
          prompts: [B, P] int, left-padded; padding is not sent.
          prompt_mask: [B, P] bool.
          seeds: one per row, so that a row does not depend on its neighbours where the server honours seeds.
          length: R, most tokens to generate.
          end_token: sent as the token to stop at; a response that holds it ends there.
          pad_token: fills the slots behind the end.
          temperature: of sampling.
          options: further fields of the request, for instance {"top_p": 0.9}.
        Returns:
          `Rollout` of NumPy arrays. If nothing is warped (temperature 1, no options that warp) both log-probs are the
          server's. Otherwise the one that the server does not report is NaN in the response, never a guess. A server
          that drops the end token leaves a response without it.
        Raises:
          ValueError: seeds or length do not fit. UserError: the server cannot be reached, refuses, or does not return
          token ids and log-probs.
        """
        tokens, mask = np.asarray(prompts), np.asarray(prompt_mask)
        if len(seeds) != len(tokens):
            raise ValueError(f"seeds must be one per row, {len(tokens)}, got {len(seeds)}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        further = dict(options or {})

        def ask(row: int) -> tuple[list[int], list[float]]:
            body = {
                "model": self.model,
                "prompt": tokens[row][mask[row]].tolist(),
                "max_tokens": length,
                "temperature": temperature,
                "seed": int(seeds[row]),
                "logprobs": 1,
                "stop_token_ids": [end_token],
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            } | further
            return self._read(self._post(body), length, end_token)

        with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
            answers = list(pool.map(ask, range(len(tokens))))

        responses = np.full((len(tokens), length), pad_token, np.int32)
        response_mask = np.zeros(responses.shape, bool)
        reported = np.zeros(responses.shape, np.float32)
        for row, (ids, log_probs) in enumerate(answers):
            responses[row, : len(ids)], response_mask[row, : len(ids)] = ids, True
            reported[row, : len(ids)] = log_probs
        warps = temperature != 1.0 or any(name in further for name in WARPING)
        unknown = np.where(response_mask, np.float32(np.nan), np.float32(0.0)) if warps else reported
        return Rollout(
            tokens=np.concatenate([tokens, responses], axis=1),  # type: ignore[arg-type]
            mask=np.concatenate([mask, response_mask], axis=1),  # type: ignore[arg-type]
            response_mask=response_mask,  # type: ignore[arg-type]
            log_probs=reported if self.reports_warped else unknown,  # type: ignore[arg-type]
            raw_log_probs=unknown if self.reports_warped else reported,  # type: ignore[arg-type]
        )

    def _post(self, body: dict[str, Any]) -> Any:
        address = self.url.rstrip("/") + "/completions"
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(1, self.attempts + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:200]
                if error.code < 500 and error.code != 429:
                    raise UserError(f"{address} refused the request with status {error.code}: {said}") from None
                reason = f"status {error.code}: {said}"
            except (OSError, ValueError) as error:  # unreachable, timed out, or not JSON
                reason = str(error)
            if attempt < self.attempts:
                time.sleep(min(0.1 * 2**attempt, 5.0))
        raise UserError(f"{address} gave no answer in {self.attempts} attempts ({reason}); is the server running?")

    def _read(self, answer: Any, length: int, end_token: int) -> tuple[list[int], list[float]]:
        """Ids and log-probs up to and including the end token."""
        try:
            choice = answer["choices"][0]
            listed = choice["logprobs"]
            log_probs = [float(x) for x in listed["token_logprobs"]]
            ids = choice.get("token_ids")
            if ids is None:
                ids = [_written_id(token) for token in listed["tokens"]]
            ids = [int(x) for x in ids]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"The answer of {self.url} cannot be read ({problem}); {NO_IDS}, with log-probs") from None
        if len(ids) != len(log_probs) or not 1 <= len(ids) <= length or not all(map(math.isfinite, log_probs)):
            raise UserError(
                f"{self.url} returned {len(ids)} token ids and {len(log_probs)} log-probs where 1 to {length} of each "
                "were asked for, all finite"
            )
        stop = ids.index(end_token) + 1 if end_token in ids else len(ids)
        return ids[:stop], log_probs[:stop]


def _written_id(token: str) -> int:
    """The id in "token_id:123"."""
    prefix, _, number = token.partition(":")
    if prefix != "token_id":
        raise ValueError(f"the token {token!r} is text")
    return int(number)
