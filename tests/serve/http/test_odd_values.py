"""Odd values in every field of a request, in process: each is answered or refused by name, and none breaks anything."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from rq_ep.serve.http.openai.bodies.chat_messages import ChatMessage
from rq_ep.serve.http.openai.schemas import NEUTRAL, ChatBody, CompletionBody, StreamOptions
from tests.serve.http.test_app import MODEL, Bench, error

# As JSON.
ODD = [
    "null", "true", "false", "0", "1", "-1", "1.0", "0.5", "-0.0", "5e-324", "1e30", "1e308", "-1e308", "1e400",
    str(2**31), str(2**63), str(-(2**63) - 1), str(2**70), "1" + "0" * 400, "NaN", "Infinity", "-Infinity",
    '""', '"1"', '"NaN"', '"text"', '"\\u0000"', '"\\ud800"', '"\\uffff"', '"' + "x" * 500 + '"',
    "[]", "[[]]", "[null]", "[1]", "[true]", "[1.0]", '[""]', '["a", 1]', '[{"type": "text"}]', "[" * 150 + "]" * 150,
    "{}", '{"a": 1}', '{"": null}', '{"type": "text"}', '{"type": "text", "text": null}', '{"1": {"2": {"3": []}}}',
]  # fmt: skip
NUMBERS = {"n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "top_logprobs", "best_of"}
FIRST = {"role": '"user"', "content": '"hi"'}


def as_json(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


def bodies(field: str, value: str) -> Iterator[tuple[str, str]]:
    """The routes and bodies that have an odd value in a field, which may be one of a message's or of an option's."""
    completion = {"model": f'"{MODEL}"', "prompt": '"abc"'}
    chat = {"model": f'"{MODEL}"', "messages": f"[{as_json(FIRST)}]"}
    outer, _, inner = field.partition(".")
    if outer == "messages" and inner:
        yield "/v1/chat/completions", as_json({**chat, outer: f"[{as_json({**FIRST, inner: value})}]"})
    elif inner:
        yield "/v1/completions", as_json({**completion, "stream": "true", outer: as_json({inner: value})})
    else:
        if field != "messages":
            yield "/v1/completions", as_json({**completion, field: value})
        if field not in ("prompt", "echo"):
            yield "/v1/chat/completions", as_json({**chat, field: value})


FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *NEUTRAL, "of_tomorrow"})
FIELDS += [f"messages.{name}" for name in (*ChatMessage.model_fields, "of_tomorrow")]
FIELDS += [f"stream_options.{name}" for name in (*StreamOptions.model_fields, "of_tomorrow")]


@pytest.mark.parametrize("field", FIELDS)
def test_an_odd_value_is_answered_or_refused_by_name(field: str) -> None:
    bench = Bench()

    async def post_all() -> dict[tuple[str, str], httpx.Response]:
        transport = httpx.ASGITransport(bench.app)
        headers = {"Content-Type": "application/json"}
        async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers) as client:
            return {
                (path, value): await client.post(path, content=body)
                for value in ODD
                for path, body in bodies(field, value)
            }

    for (path, value), response in asyncio.run(post_all()).items():
        case = (path, field, value)
        if response.status_code == 200:
            assert value not in ("NaN", "Infinity", "-Infinity", '"\\ud800"'), case
            assert field not in NUMBERS or value not in ("true", "false", '"1"', '"NaN"', "1e400"), case
            assert '"error"' not in response.text, case
            continue
        refusal = error(response, 404 if "there is no model" in response.text else 400)
        assert value != "null" or field in ("model", "prompt", "messages", "messages.role", "messages.content"), case
        named = refusal["param"] or refusal["message"]  # the parser's refusals name the place in the body
        assert field.partition(".")[0] in named or "not valid JSON" in named, case
        assert len(refusal["message"]) < 400, case


def test_of_two_values_of_a_field_the_last_counts() -> None:
    """As OpenAI's server and most parsers of JSON do."""
    bench = Bench()
    content = f'{{"model": "{MODEL}", "prompt": "abc", "max_tokens": 2, "max_tokens": 3}}'
    headers = {"Content-Type": "application/json"}
    assert bench.call("POST", "/v1/completions", content=content, headers=headers).status_code == 200
    assert bench.ranks.taken[0].max_tokens == 3
