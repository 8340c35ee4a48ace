"""data/chat.py: what templates render, who wrote which characters, and when that cannot be said."""

import datetime

import pytest

from rlhf_jax.data.chat import assistant_spans, render_chat
from rlhf_jax.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]{% set ns.system = '' %}"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{% endfor %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_ONLY = TAGGED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '' }}")
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def message(role, content):
    return {"role": role, "content": content}


CHAT = [
    message("system", "Be kind."),
    message("user", "Hi"),
    message("assistant", "Hello"),
    message("user", "Bye"),
    message("assistant", "So long"),
]


def written(template, messages=CHAT, **options):
    text, spans = assistant_spans(template, messages, variables=NAMES, **options)
    return text, [text[start:end] for _, start, end in spans]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Hello<|im_end|>\n", "So long<|im_end|>\n"]),
        (LLAMA3, ["Hello<|eot_id|>", "So long<|eot_id|>"]),
        (MISTRAL, [" Hello</s>", " So long</s>"]),
        (TAGGED, ["Hello<|im_end|>", "So long<|im_end|>"]),
    ],
)
def test_the_assistant_wrote_its_turns_and_nothing_else(template, expected):
    text, found = written(template)
    assert found == expected
    assert text == render_chat(template, CHAT, variables=NAMES)


def test_the_system_message_joins_the_first_user():
    text, _ = written(MISTRAL)
    assert text == "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST] So long</s>"


def test_marks_change_no_text():
    assert written(TAGGED)[0] == written(CHATML)[0]
    assert written(TAGGED, [message("user", "\ufdd0"), message("assistant", "\ufdd1")])[1] == ["\ufdd1<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        (LAST_ONLY, CHAT, "message 2 is the assistant's"),
        (LAST_ONLY, [message("assistant", "yes"), message("user", "?"), message("assistant", "yes")], "message 0 is"),
        (FORGETFUL, CHAT[1:], "message 1: .*further mess"),
        (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", CHAT, "message 2: .*opens the turn differently"),
        (CHATML, CHAT[:2], "None of the 2 messages"),
        ("{% if messages|length < 5 %}{{ raise_exception('short') }}{% endif %}" + CHATML, CHAT, "message 2: .*short"),
        (MISTRAL, [message("tool", "1")], "None of the 1"),
        (CHATML + "{% endif %}", CHAT, "not valid"),
        (TAGGED.replace("{% generation %}{{ m.content }}", "{% filter upper %}{% generation %}{{ m.content }}")
         .replace("{% endgeneration %}", "{% endgeneration %}{% endfilter %}"), CHAT, None),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_an_error_that_names_the_message(template, messages, error):
    if error is None:  # a filter around the marks leaves them where they are
        assert written(template, messages)[1] == ["HELLO<|IM_END|>", "SO LONG<|IM_END|>"]
        return
    with pytest.raises(UserError, match=error):
        assistant_spans(template, messages, variables=NAMES)


def test_templates_see_tools_json_and_a_given_day():
    render = lambda template, **options: render_chat(template, [], **options)
    assert render("{{ tools | tojson }}", tools=[{"name": "<é>"}]) == '[{"name": "<é>"}]'
    assert render("{{ strftime_now('%Y-%m') }}", now=datetime.datetime(2024, 5, 6)) == "2024-05"
    assert render("{% for i in [1, 2] %}{% break %}{% endfor %}{{ tools is none }}") == "True"
    assert render_chat("{{ messages[0].x is defined }}", [{"role": "user", "x": None}]) == "False"
    for template in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ messages[3].x.y }}"):
        with pytest.raises(UserError, match="does not accept"):
            render(template)
    with pytest.raises(UserError, match="message 0 holds a object"):
        render_chat("", [{"role": object()}])
