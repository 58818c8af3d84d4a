"""Answers with the experts of their tokens, whole and streamed, and the requests that cannot have them."""

import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from rq_ep.engine.requests import RoutedExperts
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.routing_collector import RoutingCollector
from tests.serve.http.test_app import MODEL, Bench

ASK = {"model": MODEL, "return_routed_experts": True}
PROMPT = {**ASK, "prompt": "abc", "max_tokens": 5}
CHAT = {**ASK, "messages": [{"role": "user", "content": "a"}]}


def experts(choice: dict[str, Any]) -> Any:
    return np.load(BytesIO(base64.b64decode(choice["routed_experts"])))


def expected(num_tokens: int) -> Any:
    return np.arange(num_tokens - 1)[:, None, None] + np.array([0, 100])[:, None]


def test_each_choice_has_the_experts_of_all_its_tokens_but_the_last() -> None:
    bench = Bench()
    for path, body, num_prompt in (("/v1/completions", PROMPT, 3), ("/v1/chat/completions", CHAT, 7)):
        whole = bench.call("POST", path, json={**body, "n": 2}).json()
        assert whole["usage"]["prompt_tokens"] == num_prompt
        for choice in whole["choices"]:
            assert experts(choice).dtype == np.int32
            np.testing.assert_array_equal(experts(choice), expected(num_prompt + 5))
        lines = bench.call("POST", path, json={**body, "stream": True}).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
        assert [chunk["finish_reason"] for chunk in chunks if "routed_experts" in chunk] == ["length"]
        np.testing.assert_array_equal(experts(chunks[-1]), expected(num_prompt + 5))
    plain = bench.call("POST", "/v1/completions", json={**PROMPT, "return_routed_experts": False}).json()
    assert "routed_experts" not in plain["choices"][0]


def test_an_answer_that_a_stop_string_cuts_has_as_many_as_its_usage_says() -> None:
    answer = Bench().call("POST", "/v1/completions", json={**PROMPT, "stop": "ll"}).json()
    assert answer["usage"]["total_tokens"] == 7
    assert len(experts(answer["choices"][0])) == 6


def test_what_has_no_experts_is_refused() -> None:
    bench = Bench()
    answer = bench.call("POST", "/v1/completions", json={**PROMPT, "max_tokens": 0, "echo": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "return_routed_experts")
    bench.change(replace(bench.limits, routes_evenly=False))
    answer = bench.call("POST", "/v1/completions", json=PROMPT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "return_routed_experts")


def test_a_server_holds_a_bounded_number_of_bytes() -> None:
    collector = RoutingCollector(max_bytes=6)
    four = RoutedExperts([2, 2, 1], "|u1", base64.b64encode(bytes(4)).decode())
    with collector.answer() as first:
        first.add(four)
        with collector.answer() as second, pytest.raises(ApiError, match="6 bytes"):
            second.add(four)
    with collector.answer() as third:
        third.add(four)
