"""Conversations under chat templates of every kind: all of it is in the prompt, or the request is refused by name."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.chat_messages import ChatMessage
from rq_ep.serve.http.openai.bodies.tools import FunctionTool
from rq_ep.serve.http.openai.chat_template import render_chat

USER = {"role": "user", "content": "What is a list?"}
CALL = {"id": "call_0001", "type": "function", "function": {"name": "look", "arguments": '{"word": "list", "n": 2}'}}
CALLS = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "a sequence"}]

# The ways in which templates of published models read messages, without their special tokens.
TEXT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS = """{% for m in messages %}<{{ m.role }}>{% for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"""
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] }}{% endfor %}"
TEXT_OR_PARTS = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"""
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
ONE_SYSTEM = "{% set system = messages | selectattr('role', 'equalto', 'system') | list %}{{ system[-1].content }}" + (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEXT
THINKING = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
DEVELOPER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{# system, developer #}{% endfor %}"
CHAT_ONLY = (
    "{% for m in messages if m.role in ('system', 'user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
# Calls: arguments as an object (most), as JSON behind a content that must be there (DeepSeek).
OBJECT_CALLS = """{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}
{{- c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}"""
XML_CALLS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}
{{- c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}
{%- endfor %}{% endfor %}"""
JSON_CALLS = """{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}
{{- m.content + c.function.name + c.function.arguments }}{% else %}{{ m.content }}{% endfor %}{% endfor %}"""
NO_CONTENT_CALLS = """{% for m in messages %}<{{ m.role }}>{% if m.content is defined %}{{ m.content }}{% else %}
{%- for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}{% endfor %}"""
PRINTED_CALLS = """{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}
{{- c.function.name }}({{ c.function.arguments }}){% endfor %}{% endfor %}"""


def prompt(
    template: str, *messages: dict[str, Any], tools: Sequence[dict[str, Any]] = (), effort: Any = None, **settings: Any
) -> str:
    tokenizer = byte_tokenizer(100)
    tokenizer.chat_template = template
    return render_chat(
        tokenizer,
        [ChatMessage.model_validate(message) for message in messages],
        [FunctionTool.model_validate(tool) for tool in tools],
        settings,
        effort,
    )


@pytest.mark.parametrize("template", [TEXT, PARTS, FIRST_PART, TEXT_OR_PARTS, TRIMMED])
@pytest.mark.parametrize(
    "content", ["What is it?", [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]]
)
def test_text_and_parts_reach_templates_of_either_kind(template: str, content: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": ""}]
    text = prompt(template, *messages, {"role": "user", "content": content})
    assert text == "<system>Be brief.<user>What is a list?<assistant><user>What is it?"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OBJECT_CALLS, 'look({"word": "list", "n": 2})'),
        (XML_CALLS, "look<word>list<n>2"),
        (JSON_CALLS, 'look{"word": "list", "n": 2}'),
        (NO_CONTENT_CALLS, '{"name": "look", "arguments": {"word": "list", "n": 2}}'),
        (PRINTED_CALLS, 'look({"word": "list", "n": 2})'),
    ],
)
def test_calls_of_tools_reach_templates_in_the_form_they_read(template: str, expected: str) -> None:
    assert prompt(template, *CALLS) == f"<user>What is a list?<assistant>{expected}<tool>a sequence"


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (CHAT_ONLY, [USER, USER, {"role": "tool", "content": "x"}], "messages.2.role: the content of .* role 'tool'"),
        (TEXT, CALLS[:2], r"messages.1.tool_calls.0: "),
        (ONE_SYSTEM, [{"role": "system", "content": text} for text in "ab"], "messages.0.role: "),
        ("{{ messages | length }}", [USER], "messages.0.role: "),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(template: str, messages: Any, named: str) -> None:
    with pytest.raises(ApiError, match=named):
        prompt(template, *messages)


def test_tools_reach_the_template_as_they_came_or_are_refused_by_name() -> None:
    look = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}, "of_tomorrow": 1}}
    assert prompt("{{ tools | tojson }}" + TEXT, USER, tools=[look]) == f"{json.dumps([look])}<user>What is a list?"
    for template in (TEXT, "{{ tools[0].function.name }}" + TEXT):
        with pytest.raises(ApiError, match=r"tools\.[01]: this model's chat template leaves it out"):
            prompt(template, USER, tools=[look, {"type": "function", "function": {"name": "n"}}])


def test_settings_reach_a_template_that_reads_them_or_are_refused_by_name() -> None:
    template = TEXT + "{% if not enable_thinking %}<think></think>{% endif %}"
    assert prompt(template, USER, enable_thinking=True) == "<user>What is a list?"
    assert prompt(template, USER, enable_thinking=False).endswith("<think></think>")
    for name in ("", "thinking", "messages", "chat_template", "tokenize"):
        with pytest.raises(ApiError, match=f"chat_template_kwargs: .* no setting '{name}'"):
            prompt(template + "{# messages chat_template tokenize #}", USER, **{name: "x"})


def test_an_effort_reaches_a_template_that_reads_it_or_is_refused_by_name() -> None:
    reads = "Reasoning: {{ reasoning_effort }}" + TEXT
    assert prompt(reads, USER, effort="max").startswith("Reasoning: max<user>")
    thinks = TEXT + "{{ enable_thinking }}"
    assert prompt(thinks, USER, effort="none").endswith("False")
    assert prompt(reads + thinks, USER, effort="low").endswith("True")
    harmony = reads + "{# <|channel|>analysis #}"
    assert prompt(harmony, USER, effort="low").startswith("Reasoning: low<user>")
    for template, effort in ((TEXT, "low"), (thinks, "low"), (harmony, "none")):
        with pytest.raises(ApiError, match=f"reasoning_effort='{effort}': .* knows no such effort"):
            prompt(template, USER, effort=effort)
    with pytest.raises(ApiError, match="reasoning_effort: chat_template_kwargs has 'reasoning_effort'"):
        prompt(reads, USER, effort="low", reasoning_effort="high")


def test_a_template_may_refuse_and_may_cut_out_earlier_thinking() -> None:
    with pytest.raises(Exception, match="System role not supported"):
        prompt(NO_SYSTEM, {"role": "system", "content": "Be brief."}, USER)
    thought = {"role": "assistant", "content": "<think>Hm.</think>A sequence."}
    assert prompt(THINKING, USER, thought) == "<user>What is a list?<assistant>A sequence."


@pytest.mark.parametrize(("template", "role"), [(DEVELOPER, "developer"), (TEXT, "system"), (CHAT_ONLY, "system")])
def test_a_developer_message_is_a_system_message_where_the_template_knows_no_other(template: str, role: str) -> None:
    assert prompt(template, {"role": "developer", "content": "Be brief."}) == f"<{role}>Be brief."


def test_names_and_identifiers_are_there_for_templates_that_show_them() -> None:
    template = (
        "{% for m in messages %}{{ m.content or '' }} {{ m.name }} {{ m.tool_call_id }} {% for c in m.tool_calls %}"
    )
    template += "{{ c.id }} {{ c.function | tojson }}{% endfor %}{% endfor %}"
    message = {"role": "tool", "content": "", "name": "look", "tool_call_id": "call_0001", "tool_calls": [CALL]}
    expected = ' look call_0001 call_0001 {"name": "look", "arguments": {"word": "list", "n": 2}}'
    assert prompt(template, message) == expected


@pytest.mark.parametrize("arguments", ["", "{}", "not JSON", "[1]", "[" * 9999])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    call = {"function": {"name": "look", "arguments": arguments}}
    text = prompt(PRINTED_CALLS, USER, {"role": "assistant", "tool_calls": [call]})
    assert text == f"<user>What is a list?<assistant>look({arguments})"
