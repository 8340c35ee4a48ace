"""generation/external.py against a small server on this machine that runs our own sampler."""

import functools
import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import assert_close_where, decoder, ragged_prompts, score

from rlhf_jax.errors import UserError
from rlhf_jax.generation.external import CompletionServer
from rlhf_jax.generation.sampler import generate
from rlhf_jax.losses.importance import truncated_weights

R, END, PAD, WIDTH = 6, 4, -1, 8
SEEDS = [11, 12, 13, 14]


@pytest.fixture(scope="module")
def sampler():
    model, params = decoder()
    return jax.jit(functools.partial(generate, model, params, length=R, end_token=END, pad_token=PAD))


class Engine:
    """A server whose answers a test may bend; it remembers the requests."""

    def __init__(self, sampler):
        self.sampler, self.requests, self.bend, self.failures = sampler, [], lambda choice: choice, []
        self.lock = threading.Lock()
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with engine.lock:
                    engine.requests.append((self.path, self.headers.get("Authorization"), body))
                    status = engine.failures.pop(0) if engine.failures else 200
                    content = engine.answer(body) if status == 200 else {"error": "as asked"}
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body):
        prompt = np.zeros((1, WIDTH), np.int32)
        prompt[0, WIDTH - len(body["prompt"]) :] = body["prompt"]
        mask = np.arange(WIDTH)[None] >= WIDTH - len(body["prompt"])
        rollout = self.sampler(jnp.asarray(prompt), jnp.asarray(mask), jax.random.key(body["seed"])[None])
        real = np.asarray(rollout.response_mask[0])
        ids, log_probs = (np.asarray(x[0])[real].tolist() for x in (rollout.responses, rollout.raw_log_probs))
        names = [f"token_id:{i}" for i in ids]
        return {"choices": [self.bend({"token_ids": ids, "logprobs": {"tokens": names, "token_logprobs": log_probs}})]}


@pytest.fixture
def engine(sampler):
    running = Engine(sampler)
    yield running
    running.server.shutdown()
    running.server.server_close()


def ask(engine, options=None, server=None, **knobs):
    client = CompletionServer(url=engine.url, model="small", **(server or {}))
    knobs = {"length": R, "end_token": END, "pad_token": PAD} | knobs
    return client.generate(*ragged_prompts(garbage=99), SEEDS, options=options, **knobs)


def test_the_same_rollout_as_from_the_sampler_itself(engine, sampler):
    rollout = ask(engine, server={"api_key": "key"})
    prompts = ragged_prompts(width=WIDTH)
    expected = sampler(*prompts, jnp.stack([jax.random.key(s) for s in SEEDS]))
    np.testing.assert_array_equal(rollout.responses, expected.responses)
    np.testing.assert_array_equal(rollout.response_mask, expected.response_mask)
    np.testing.assert_allclose(rollout.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rollout.log_probs, rollout.raw_log_probs)
    sent = {tuple(body["prompt"]): (path, bearer, body) for path, bearer, body in engine.requests}
    for row, (tokens, mask) in enumerate(zip(*ragged_prompts(), strict=True)):
        path, bearer, body = sent[tuple(tokens[mask].tolist())]
        assert (path, bearer, body["seed"]) == ("/v1/completions", "Bearer key", SEEDS[row])
        assert (body["max_tokens"], body["stop_token_ids"], body["temperature"]) == (R, [END], 1.0)


def test_importance_weights_correct_for_the_engine(engine):
    def off_by_a_tenth(choice):
        choice["logprobs"]["token_logprobs"] = [x - 0.1 for x in choice["logprobs"]["token_logprobs"]]
        return choice

    engine.bend = off_by_a_tenth
    rollout = ask(engine)
    trainer = score(*decoder(), jax.tree.map(jnp.asarray, rollout)).log_probs
    weights = truncated_weights(trainer, jnp.asarray(rollout.log_probs))
    assert_close_where(rollout.response_mask, weights, np.full(weights.shape, np.exp(0.1)))


def test_ids_may_be_written_in_the_tokens(engine):
    expected = ask(engine)
    engine.bend = lambda choice: {"logprobs": choice["logprobs"]}
    np.testing.assert_array_equal(ask(engine).tokens, expected.tokens)


@pytest.mark.parametrize("knobs", [{"temperature": 0.7}, {"options": {"top_p": 0.9}}])
@pytest.mark.parametrize("warped", [False, True])
def test_unreported_log_probs_are_nan_and_not_a_guess(engine, knobs, warped):
    rollout = ask(engine, server={"reports_warped": warped}, **knobs)
    known, unknown = rollout.log_probs, rollout.raw_log_probs
    if not warped:
        known, unknown = unknown, known
    assert np.isfinite(known).all()
    np.testing.assert_array_equal(np.isnan(unknown), rollout.response_mask)


def test_what_follows_the_end_is_cut(engine):
    engine.bend = lambda choice: {
        "token_ids": [7, END, 8],
        "logprobs": {"tokens": [], "token_logprobs": [-1.0, -2.0, -3.0]},
    }
    rollout = ask(engine)
    assert rollout.responses.tolist() == [[7, END, *[PAD] * (R - 2)]] * 4
    assert rollout.log_probs.sum(axis=1).tolist() == [-3.0] * 4


def test_a_busy_server_is_asked_again(engine):
    engine.failures = [503, 429]
    assert ask(engine).response_mask.any(axis=1).all()
    assert len(engine.requests) == len(SEEDS) + 2


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (lambda c: {"text": "hello"}, "must return token ids"),
        (lambda c: {"logprobs": {"tokens": ["hello"], "token_logprobs": [-1.0]}}, "the token 'hello' is text"),
        (lambda c: {**c, "logprobs": None}, "cannot be read"),
        (lambda c: {**c, "token_ids": [1] * (R + 1)}, "token ids and"),
        (lambda c: {"token_ids": [1], "logprobs": {"token_logprobs": [float("nan")]}}, "all finite"),
    ],
)
def test_answers_that_cannot_be_used_are_named(engine, bend, message):
    engine.bend = bend
    with pytest.raises(UserError, match=message):
        ask(engine)


def test_a_refusal_is_not_tried_again(engine):
    engine.failures = [400] * 4
    with pytest.raises(UserError, match=r"refused the request with status 400: .*as asked"):
        ask(engine, server={"parallel": 1})
    assert len({json.dumps(body) for _, _, body in engine.requests}) == len(engine.requests)


def test_no_server(engine):
    engine.server.shutdown()
    engine.server.server_close()
    with pytest.raises(UserError, match="gave no answer in 1 attempts"):
        ask(engine, server={"attempts": 1, "timeout": 5.0})


def test_mistakes_are_named(engine):
    with pytest.raises(ValueError, match="url must start with http"):
        CompletionServer(url="localhost:8000", model="small")
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        CompletionServer(url=engine.url, model="small", attempts=0)
    client = CompletionServer(url=engine.url, model="small")
    with pytest.raises(ValueError, match="seeds must be one per row, 4, got 1"):
        client.generate(*ragged_prompts(), [1], length=R, end_token=END, pad_token=PAD)
