"""data/folder_tokenizer.py: special tokens from whichever file names them, text that stays text, sizes that agree."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.folder_tokenizer import check_embedding, load_tokenizer
from rlhf_jax.data.tokenizer import ByteTokenizer
from rlhf_jax.errors import UserError

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"


def write(folder, *, control=CONTROL, begin=True, **files):
    folder.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=control,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello hello world, hello there"] * 5, trainer)
    if begin:
        backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_padding(length=50)
    backend.enable_truncation(2)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "chat_template": TEMPLATE}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write(
        tmp_path_factory.mktemp("model"), tokenizer_config=CONFIG, generation_config={"eos_token_id": [4, 2]}
    )
    return load_tokenizer(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.control_ids.values())
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text


def test_special_tokens_are_those_of_the_files(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, 5, (2, 4))
    assert tokenizer.begins_texts
    assert tokenizer.control_ids == {token: index for index, token in enumerate(CONTROL)}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_control_tokens_are_spelt_out_in_plain_text(tokenizer):
    assert not {2, 4} & set(tokenizer.encode("a</s><|im_end|>"))
    ids = tokenizer.encode("hello</s>", control_tokens=True)
    assert ids[-1] == 2
    assert tokenizer.decode(ids, control_tokens=True) == "hello</s>"
    assert tokenizer.encode_chat([{"role": "user", "content": "hello"}]) == [1, *tokenizer.encode("hello"), 2]
    found, places = tokenizer.encode_with_places("hello</s>é")
    assert found[: len(ids)] == ids
    assert places[len(ids) - 1] == (5, 9)
    assert set(places[len(ids) :]) == {(9, 10)}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "</s>", "pad_token": "</s>"}}, (2, 2, 5)),
        ({"special_tokens_map": {"bos_token": "<s>", "eos_token": "<|im_end|>"}}, (1, 4, 5)),
        ({"generation_config": {"bos_token_id": 1, "eos_token_id": [4, 2], "pad_token_id": 0}}, (1, 4, 0)),
        ({"config": {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 300}}, (1, 2, 5)),
    ],
)
def test_each_file_may_name_them_and_padding_is_never_the_end(tmp_path, files, expected):
    found = load_tokenizer(write(tmp_path / "model", begin=False, **files))
    assert (found.bos_id, found.eos_id, found.pad_id) == expected
    assert not found.begins_texts


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {}, "names no end token"),
        ({"tokenizer_config": {"eos_token": "<gone>"}}, {}, "eos_token '<gone>', which .* lacks"),
        ({"tokenizer_config": {"eos_token": "<s>"}, "control": ["<unk>", "<s>"]}, {"pad_token": "<s>"}, "begin or end"),
        ({"tokenizer_config": {"eos_token": "<s>"}, "control": ["<a>", "<s>"]}, {"pad_token": "<x>"}, "not in the voc"),
        ({"tokenizer_config": {"eos_token": "<s>", "bos_token": "<a>"}, "control": ["<a>", "<s>"]}, {}, "give pad_t"),
        ({"tokenizer_config": CONFIG, "config": {"vocab_size": 100}}, {}, r"at least \d+ rows was exp.*100 was"),
        ({"tokenizer_config": CONFIG}, {"vocab_size": 9}, "one of 9 was found"),
        ({"tokenizer_config": CONFIG}, {"template_name": "tools"}, "no chat template 'tools', only default"),
        ({"tokenizer_config": [1]}, {}, "must hold a JSON object, found a list"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(tmp_path, options, arguments, message):
    folder = write(tmp_path / "model", **options)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder, **arguments)


def test_templates_lie_in_several_places(tmp_path):
    folder = write(tmp_path / "model", tokenizer_config=CONFIG | {"chat_template": [{"name": "rag", "template": "R"}]})
    assert load_tokenizer(folder, template_name="rag").chat_template == "R"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert load_tokenizer(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("F")
    assert load_tokenizer(folder).chat_template == "F"


def test_missing_and_damaged_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist \(found there: nothing\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="at least 259 rows was expected, and one of 258"):
        check_embedding(ByteTokenizer(), 258)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"`tokenizers`.*rlhf_jax\[data\]"):
        load_tokenizer(tmp_path)
