"""Chat templates, as Hugging Face renders them and as callers may break them."""

from __future__ import annotations

import datetime
from typing import Any, cast

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import ModelLoadError, RequestError
from engine.tokenization.chat_template import ChatTemplate
from tests.engine.tokenization.vocabularies import smollm2

USER = [{"role": "user", "content": 'Hi <b> "ü"'}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a < b & 'c'", "parameters": {}}}]


def test_smollm2_writes_chatml_with_its_system_prompt() -> None:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    question = "<|im_start|>user\nHi<|im_end|>\n"
    messages = [{"role": "user", "content": "Hi"}]
    assert smollm2().apply_chat_template(messages) == f"{system}{question}<|im_start|>assistant\n"
    assert smollm2().apply_chat_template(messages, add_generation_prompt=False) == f"{system}{question}"
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert smollm2().apply_chat_template(own) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{question}<|im_start|>assistant\n"
    )


GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""


def test_gemma_3_puts_the_system_prompt_before_the_first_question() -> None:
    """The template of its instruction-tuned checkpoints."""
    template = ChatTemplate(GEMMA3, {"bos_token": "<bos>"})
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hi "}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]
    assert template.render(messages, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render(messages[2:], add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}|\n  {% endif %}\n{% endfor %}\nend",
        "{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ messages[0] | tojson }}",
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{% if add_generation_prompt %}>{% endif %}",
        "{{ bos_token }}{% if tools is none %}none{% endif %}{{ documents is none }}{{ flag }}",
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.n }}",
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers(source: str, tools: Any) -> None:
    (rendered,), _ = cast(
        "tuple[list[str], list[object]]",
        render_jinja_template(
            conversations=[USER],
            tools=tools,
            chat_template=source,
            add_generation_prompt=True,
            bos_token="<s>",
            flag=3,
        ),
    )
    ours = ChatTemplate(source, {"bos_token": "<s>"}).render(USER, True, tools=tools, flag=3)
    assert ours == rendered


def test_the_date_is_todays() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(USER, True)
    assert abs(int(rendered) - datetime.datetime.now().year) <= 1


def test_named_templates_choose_by_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "with tools"}, {})
    assert template.render(USER, True) == "plain"
    assert template.render(USER, True, tools=TOOLS) == "with tools"
    with pytest.raises(ModelLoadError, match="none is named 'default' among tool_use"):
        ChatTemplate({"tool_use": "x"}, {})


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", USER, "roles must alternate"),
        ("{{ messages[0].content + 'x' }}", [{"role": "user", "content": None}], "NoneType"),
        ("{{ messages[0].content.text }}{{ messages[0].a.b }}", USER, "has no attribute 'a'"),
        ("{{ messages[0].__class__.__mro__ }}", USER, "unsafe"),
        ("{{ messages.append(1) }}", USER, "unsafe"),
    ],
)
def test_a_failing_template_is_a_request_error(source: str, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        ChatTemplate(source, {}).render(messages, True)
    assert raised.value.param == "messages"


def test_a_template_that_does_not_compile_stops_the_start() -> None:
    with pytest.raises(ModelLoadError, match="chat template: line 2: "):
        ChatTemplate("ok\n{% if %}", {})
