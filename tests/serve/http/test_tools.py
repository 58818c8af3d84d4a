"""Chats that call tools and reason, in process, over ranks that answer from a script; read by OpenAI's own client."""

from dataclasses import replace
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from rq_ep.engine.requests import ReasoningTokens
from rq_ep.serve.http.openai.bodies.chat_messages import ChatMessage
from rq_ep.serve.http.openai.tool_parsers.answer_parsers import AnswerParsers
from tests.serve.http.test_app import MODEL, Bench, error, events

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "does", "parameters": NUMBER, "strict": True}},
    {"type": "function", "function": {"name": "g"}},
]
NAMED = {"type": "function", "function": {"name": "f"}}
ANSWER = '<think>Hm.</think>\n\nYes.<tool_call>{"name": "f", "arguments": {"n": 1}}</tool_call>'


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.model.tokenizer.chat_template = "shows tools"
    bench.change(parsers=AnswerParsers.of(None, "hermes", "qwen3"))
    bench.ranks.answer, bench.ranks.end = ANSWER, "stop"
    return bench


def choice(bench: Bench, **body: Any) -> Any:
    response = bench.chat(**body)
    assert response.status_code == 200, response.text
    return ChatCompletion.model_validate(response.json()).choices[0]


def test_a_call_is_part_of_the_message(bench: Bench) -> None:
    made = choice(bench, tools=TOOLS)
    (call,) = made.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "f", '{"n": 1}')
    assert call.id
    assert (made.message.content, made.finish_reason) == ("\n\nYes.", "tool_calls")
    assert made.message.reasoning_content == made.message.reasoning == "Hm."
    assert bytes(bench.ranks.taken[0].prompt_ids) == b"fg<user>hi"
    assert bench.ranks.taken[0].grammar is None


def test_a_call_is_streamed_name_first(bench: Bench) -> None:
    *chunks, _ = events(bench.chat(tools=TOOLS, stream=True, n=2))
    for index in (0, 1):
        mine = [ChatCompletionChunk.model_validate(chunk).choices[0] for chunk in chunks]
        mine = [chunk for chunk in mine if chunk.index == index]
        calls = [call for chunk in mine for call in chunk.delta.tool_calls or ()]
        assert [call.function.name for call in calls] == ["f"] + [None] * (len(calls) - 1)
        assert (calls[0].type, calls[0].index, len(calls)) == ("function", 0, 8)
        assert "".join(call.function.arguments for call in calls) == '{"n": 1}'
        assert "".join(chunk.delta.content or "" for chunk in mine) == "\n\nYes."
        assert "".join(getattr(chunk.delta, "reasoning_content", "") for chunk in mine) == "Hm."
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["tool_calls"]


def test_reasoning_may_be_left_out(bench: Bench) -> None:
    body = {"tools": TOOLS, "include_reasoning": False}
    assert "reasoning" not in bench.chat(**body).text
    assert "reasoning" not in bench.chat(**body, stream=True).text


@pytest.mark.parametrize("body", [{"response_format": {"type": "json_object"}}, {"tool_choice": NAMED, "tools": TOOLS}])
def test_an_answer_of_a_given_form_may_reason_first(bench: Bench, body: dict[str, Any]) -> None:
    bench.change(parsers=replace(bench.model.parsers, reasoning_ids={"<think>": 1, "</think>": 2}))
    bench.ranks.answer = '<think>Hm.</think>{"n": 1}'
    message = choice(bench, **body).message
    call = message.tool_calls[0].function.arguments if message.tool_calls else None
    assert (message.reasoning_content, message.content or call) == ("Hm.", '{"n": 1}')
    assert bench.ranks.taken[-1].reasoning == ReasoningTokens(1, [2])
    choice(bench, **body, messages=[{"role": "user", "content": "<think>"}])
    assert bench.ranks.taken[-1].reasoning == ReasoningTokens(None, [2])
    choice(bench, **body, messages=[{"role": "user", "content": "</think>\n"}])
    assert bench.ranks.taken[-1].reasoning is None
    bench.change(parsers=AnswerParsers.of(None, "hermes", "qwen3", bench.model.tokenizer))  # bytes are tokens
    assert bench.model.parsers.reasoning_ids == {}
    choice(bench, **body)
    assert bench.ranks.taken[-1].reasoning is None


def test_reasoning_that_the_prompt_begins(bench: Bench) -> None:
    bench.ranks.answer = "Hm.</think>Yes."
    made = choice(bench, messages=[{"role": "user", "content": "<think>\n"}])
    assert (made.message.reasoning_content, made.message.content) == ("Hm.", "Yes.")


def test_without_a_choice_of_tools_a_call_is_text(bench: Bench) -> None:
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        made = choice(bench, **body)
        assert made.message.tool_calls is None
        assert (made.message.content, made.finish_reason) == (ANSWER.removeprefix("<think>Hm.</think>"), "stop")


def test_a_stop_string_and_a_limit_may_cut_a_call(bench: Bench) -> None:
    made = choice(bench, tools=TOOLS, stop="1")
    assert (made.message.tool_calls, made.finish_reason) == (None, "stop")
    assert made.message.content == '\n\nYes.<tool_call>{"name": "f", "arguments": {"n": '
    bench.ranks.end = "length"
    assert choice(bench, tools=TOOLS).finish_reason == "length"


def test_scores_of_a_call_are_those_of_its_tokens(bench: Bench) -> None:
    whole = bench.chat(tools=TOOLS, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    *chunks, _ = events(bench.chat(tools=TOOLS, logprobs=True, stream=True))
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
    assert "".join(entry["token"] for entry in whole) == ANSWER
    assert streamed == whole


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_follow_a_grammar_and_need_no_parser(bench: Bench, parallel: bool) -> None:
    bench.change(parsers=AnswerParsers.of(None, "none", "qwen3"))
    bench.ranks.answer = '[{"name": "f", "parameters": {"n": 1}}, {"name": "g", "parameters": {}}]'
    made = choice(bench, tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel)
    calls = [(call.function.name, call.function.arguments) for call in made.message.tool_calls]
    assert calls == [("f", '{"n": 1}'), ("g", "{}")][: 2 if parallel else 1]
    assert (made.message.content, made.finish_reason) == (None, "tool_calls")
    assert allows(bench, '[{"name": "f", "parameters": {"n": 1}}]')
    assert not allows(bench, '[{"name": "f", "parameters": {"n": "x"}}]')
    assert not allows(bench, '[{"name": "h", "parameters": {}}]')
    assert not allows(bench, "[]")
    assert allows(bench, bench.ranks.answer) == parallel


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call_is_its_arguments(bench: Bench, stream: bool) -> None:
    bench.ranks.answer = '{"n": 1}'
    if stream:
        *chunks, _ = events(bench.chat(tools=TOOLS, tool_choice=NAMED, stream=True))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        functions = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
        assert functions[0]["name"] == "f"
        assert "".join(function["arguments"] for function in functions) == '{"n": 1}'
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        made = choice(bench, tools=TOOLS, tool_choice=NAMED)
        assert [call.function.arguments for call in made.message.tool_calls] == ['{"n": 1}']
        assert (made.message.content, made.finish_reason) == (None, "stop"), "as OpenAI's"
    assert allows(bench, '{"n": 12}')
    assert not allows(bench, '{"m": 12}')


def allows(bench: Bench, text: str) -> bool:
    """Whether the grammar of the last request allows an answer, which then ends."""
    matcher = LLMatcher(LLTokenizer("byte"), bench.ranks.taken[-1].grammar)
    data = list(text.encode())
    return matcher.validate_tokens(data) == len(data) and matcher.consume_tokens(data) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools.0.function is required"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools", "tools.0.type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "there are two of the name 'f'"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": NAMED}, "tool_choice", "there is no tool 'f' in tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {**NAMED, "x": 1}}, "tool_choice", "unknown parameter 'tool_choice.x'"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, "tool_choice", "tool_choice.type: Input should be"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "rules out calls of tools"),
        ({"tools": TOOLS, "tool_choice": NAMED, "ignore_eos": True}, "ignore_eos", "does not go with tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "frob"}}}],
             "tool_choice": NAMED},
            "tool_choice", "Invalid type: frob",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused(bench: Bench, body: dict[str, Any], param: str, message: str) -> None:
    refusal = error(bench.chat(**body), 400)
    assert refusal["param"] == param
    assert message in refusal["message"]
    assert bench.ranks.taken == []


def test_a_model_that_cannot_take_tools_says_why(bench: Bench) -> None:
    bench.change(parsers=AnswerParsers())
    refusal = error(bench.chat(tools=TOOLS), 400)
    assert (refusal["param"], "--tool-call-parser" in refusal["message"]) == ("tool_choice", True)
    bench.model.tokenizer.chat_template = "yes"
    refusal = error(bench.chat(tools=TOOLS, tool_choice="required"), 400)
    assert refusal["message"] == "tools.0: this model's chat template leaves it out of the prompt"


def test_the_openapi_document_describes_tools(bench: Bench) -> None:
    schemas = bench.call("GET", "/openapi.json").json()["components"]["schemas"]
    assert {"tools", "tool_choice", "parallel_tool_calls", "include_reasoning"} <= set(
        schemas["ChatBody"]["properties"]
    )
    assert "tools" not in schemas["CompletionBody"]["properties"]
    assert {"FunctionTool", "FunctionDefinition", "NamedToolChoice"} <= set(schemas)


class Number(BaseModel):
    n: int


def test_openais_client_parses_calls_and_forms_and_takes_the_answer_back(bench: Bench) -> None:
    async def talk() -> Any:
        transport = httpx.ASGITransport(bench.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = AsyncOpenAI(base_url="http://server/v1", api_key="x", http_client=http)
            messages: list[Any] = [{"role": "user", "content": "hi"}]
            async with client.chat.completions.stream(model=MODEL, messages=messages, tools=TOOLS[:1]) as stream:
                kinds = {event.type async for event in stream}
                answer = await stream.get_final_completion()
            bench.ranks.answer = '{"n": 2}'
            form = await client.chat.completions.parse(model=MODEL, messages=messages, response_format=Number)
            return kinds, answer.choices[0].message, form.choices[0].message.parsed

    kinds, message, parsed = bench.run(talk())
    assert parsed == Number(n=2)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done", "content.delta"} <= kinds
    assert message.tool_calls[0].function.parsed_arguments == {"n": 1}
    assert ChatMessage.model_validate(message.model_dump()).reasoning == "Hm."
