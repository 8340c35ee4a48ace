"""Chat templates and assistant masks beside those of transformers, on templates of several styles."""

import dataclasses
import json

import pytest

transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")

from test_chat import CHAT, CHATML, LLAMA3, MISTRAL, TAGGED  # noqa: E402
from test_folder_tokenizer import CONFIG, write  # noqa: E402

from rlhf_jax.data.encoding import encode_conversation  # noqa: E402
from rlhf_jax.data.examples import Conversation  # noqa: E402
from rlhf_jax.data.folder_tokenizer import load_tokenizer  # noqa: E402

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>", "<|eot_id|>"]
TAGGED_MISTRAL = MISTRAL.replace(
    "{{ m.content }}{{ eos_token }}", "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
)
TAGGED_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
)
TOOLS = "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("model"), control=CONTROL, tokenizer_config=CONFIG | {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"})  # fmt: skip
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["truncation"] = backend["padding"] = None
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, TAGGED, TOOLS])
@pytest.mark.parametrize("opened", [True, False])
def test_conversations_have_the_same_text_and_ids(both, template, opened):
    ours, theirs = dataclasses.replace(both[0], chat_template=template), both[1]
    chat = CHAT[:4] if opened else CHAT
    options = {"chat_template": template, "add_generation_prompt": opened}
    assert ours.render_chat(chat, opened) == theirs.apply_chat_template(chat, tokenize=False, **options)
    assert ours.encode_chat(chat, opened) == theirs.apply_chat_template(chat, return_dict=False, **options)


@pytest.mark.parametrize("template", [TAGGED, TAGGED_MISTRAL, TAGGED_LLAMA3])
def test_assistant_masks_are_the_same(both, template):
    ours, theirs = dataclasses.replace(both[0], chat_template=template), both[1]
    row = encode_conversation(Conversation(tuple(CHAT)), ours)
    found = theirs.apply_chat_template(
        CHAT, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    assert row.tokens == found["input_ids"]
    assert [int(target) for target in row.targets] == found["assistant_masks"]
    assert 0 < sum(row.targets) < len(row.targets)


def test_tools_are_passed_through(both):
    from rlhf_jax.data.chat import render_chat

    tools = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]
    ours = render_chat(TOOLS, CHAT, tools=tools, variables=both[0].special_tokens)
    assert ours == both[1].apply_chat_template(CHAT, tools=tools, chat_template=TOOLS, tokenize=False)
