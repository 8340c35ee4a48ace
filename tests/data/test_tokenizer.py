"""data/tokenizer.py: any text survives, control tokens are only control tokens when asked, padding is never the end."""

import dataclasses

import gguf
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_jax.data.tokenizer import ByteTokenizer, load_gguf_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.gguf import open_gguf

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }}\n{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def byte_alphabet():
    """The 256 letters that byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


CONTROL = ["<pad>", "<start>", "<end>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]


def write(path, *, tokens=None, types=None, merges=MERGES, kind="gpt2", pre="smollm", eos=2, pad=2, template=TEMPLATE):
    default = [*CONTROL, *byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    tokens = default if tokens is None else tokens
    types = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)) if types is None else types
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    if tokens:
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if pad is not None:
        writer.add_pad_token_id(pad)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_gguf_tokenizer(write(tmp_path_factory.mktemp("gguf") / "tokens.gguf"))


@given(text=TEXT)
@example(text="Grüße\n\n  aus 1990 \t😀 <end>")
def test_any_text_survives_both_tokenizers(tokenizer, text):
    for each in (tokenizer, ByteTokenizer()):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert all(0 <= i < each.vocab_size for i in ids)
        assert not {each.pad_id, each.bos_id, each.eos_id} & set(ids)
        assert each.decode([each.pad_id, each.bos_id, *ids, each.eos_id, each.pad_id]) == text


def test_special_ids_differ(tokenizer):
    for each in (tokenizer, ByteTokenizer()):
        assert len({each.pad_id, each.bos_id, each.eos_id}) == 3
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.vocab_size == 3 + 256 + len(MERGES)


def test_merges_apply_in_order(tokenizer):
    token = lambda text: [*CONTROL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)].index(text)
    assert tokenizer.encode("hello hello") == [token("hello"), token("Ġhello")]
    assert tokenizer.encode("hell") == [token("hell")]


def test_digits_stand_alone_only_where_the_model_was_trained_so(tokenizer, tmp_path):
    plain = load_gguf_tokenizer(write(tmp_path / "plain.gguf", pre="gpt-2"))
    assert len(tokenizer.encode("12")) == 2
    assert len(plain.encode("12")) == 1


def test_control_tokens_in_text_are_letters_unless_asked(tokenizer):
    text = "<start>hello<end>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.control_ids.values())
    ids = tokenizer.encode(text, control_tokens=True)
    assert ids == [1, *tokenizer.encode("hello"), 2]
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, control_tokens=True) == text


def test_half_a_character_is_shown_as_such(tokenizer):
    for each in (tokenizer, ByteTokenizer()):
        assert each.decode(each.encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_chats_are_rendered_by_the_models_template(tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.render_chat(messages) == "<start>user\nhello<end>\n<start>assistant\n"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<start>user\nhello<end>\n"
    ids = tokenizer.encode_chat(messages)
    assert [ids.count(i) for i in (0, 1, 2)] == [0, 2, 1]
    assert tokenizer.decode(ids, control_tokens=True) == tokenizer.render_chat(messages)


def test_templates_are_sandboxed(tmp_path):
    refusing = load_gguf_tokenizer(write(tmp_path / "a.gguf", template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UserError, match="does not accept these messages: roles must alternate"):
        refusing.render_chat([])
    escaping = load_gguf_tokenizer(write(tmp_path / "b.gguf", template="{{ messages.__class__.__mro__ }}"))
    with pytest.raises(UserError, match="unsafe"):
        escaping.render_chat([])
    changing = load_gguf_tokenizer(write(tmp_path / "c.gguf", template="{{ messages.append(1) }}"))
    with pytest.raises(UserError, match="unsafe"):
        changing.render_chat([])
    without = load_gguf_tokenizer(write(tmp_path / "d.gguf", template=None))
    with pytest.raises(UserError, match="no chat template"):
        without.render_chat([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "llama"}, r"tokenizer of kind 'llama' with splitting 'smollm'; only 'gpt2'"),
        ({"pre": "qwen2"}, r"splitting 'qwen2'"),
        ({"tokens": []}, r"lacks the header field tokenizer\.ggml\.tokens"),
        ({"eos": None}, r"lacks the header field tokenizer\.ggml\.eos_token_id"),
        ({"types": [1] * (259 + len(MERGES))}, r"no control token to pad with"),
    ],
)
def test_other_tokenizers_are_refused_in_words(tmp_path, options, message):
    path = write(tmp_path / "other.gguf", **options)
    with pytest.raises(UserError, match=message) as caught:
        load_gguf_tokenizer(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("pad", "expected"), [(0, 0), (2, 0), (1, 0), (None, 0), (5, 5)])
def test_a_pad_token_of_its_own_is_kept_and_otherwise_found(tmp_path, pad, expected):
    assert load_gguf_tokenizer(open_gguf(write(tmp_path / "pad.gguf", pad=pad))).pad_id == expected


def test_missing_packages_name_the_extra(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "tokens.gguf")
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UserError, match=r"`jinja2`.*pip install 'rlhf_jax\[data\]'"):
        dataclasses.replace(tokenizer, chat_template="never compiled before").render_chat([])
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"`tokenizers`.*pip install 'rlhf_jax\[quickstart\]'"):
        load_gguf_tokenizer(path)
