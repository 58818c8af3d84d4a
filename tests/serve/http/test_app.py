"""The routes, in process, over ranks that answer from a script."""

import asyncio
import base64
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest

from rq_ep.engine.progress import Progress
from rq_ep.engine.requests import Output, Request, RoutedExperts, Sampling, Score
from rq_ep.model.checkpoint.generation_defaults import SamplingDefaults
from rq_ep.serve.http.app import make_app
from rq_ep.serve.http.metrics import Metrics
from rq_ep.serve.http.openai.api_errors import TYPES, ApiError
from rq_ep.serve.http.recording_controller import RecordingController
from rq_ep.serve.http.served_model import ModelLimits, ServedModel
from rq_ep.serve.http.service import Service
from rq_ep.serve.messages import LoadSums, PlacementServed, RankStats, Recorded, RecordingFailed
from tests.serve.http.openai.small_tokenizers import small_tokenizer

MODEL = "org/tiny"
EOS = 0


class ByteTokenizer:
    """Bytes are tokens, and 0 ends a text."""

    chat_template = "yes"

    def get_vocab(self) -> dict[str, int]:
        return {"<end>": EOS, **{chr(byte): byte for byte in range(1, 256)}}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return bytes(token_ids).decode(errors="replace")

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        if conversation[0]["role"] == "assistant":
            raise ValueError("the user begins")
        shown = tools if tools and self.chat_template != "yes" else []
        return "".join(tool["function"]["name"] for tool in shown) + "".join(
            f"<{message['role']}>{message['content']}" for message in conversation
        )


def score(token_id: int) -> Score:
    """The likeliest token is always `!`; a token 255 is no number."""
    logprob = math.nan if token_id == 255 else -token_id / 64
    return Score(logprob, [33, token_id], [-0.25, logprob])


def routed_experts(request: Request, number: int) -> RoutedExperts:
    """Those before the answer's token of this number, of two layers: the token's place in each, and its place + 100."""
    end = len(request.prompt_ids) + number
    places = range(end - 1 if number else 0, end)
    data = bytes(place + more for place in places for more in (0, 100))
    return RoutedExperts([len(places), 2, 1], "|u1", base64.b64encode(data).decode())


LOADS: LoadSums = {  # as LoadTotals.take gives them
    "layers": [3, 4], "num_calls_L": [3, 3], "pairs_LR": [[30, 10], [20, 20]], "counts_LE": [[25, 10, 5], [20, 0, 20]],
    "formats_L": [{"bf16": 25, "int8": 15}, {"bf16": 40}], "imbalance_L": [1.5, 1.0],
    "seconds": {"gather": 0.1, "plan": 0.2, "dispatch": 0.5, "compute": 1.0, "combine": 0.3},
    "borrowed_experts": 2, "borrowed_bytes": 100,
}  # fmt: skip


class ScriptedRanks:
    """Answers every request with `answer`, a byte or a token at a time, then as `end` says."""

    def __init__(self, answer: str | list[int] = "hello", end: str = "length") -> None:
        self.answer, self.end = answer, end
        self.unavailable: str | None = None
        self.taken: list[Request] = []
        self.beside: list[str | None] = []
        self.cancelled: list[str] = []
        self.is_slow = False
        self.answer_of: Callable[[Request], bytes] | None = None
        self.marks: list[int] = []

    @property
    def num_unfinished(self) -> int:
        return 0

    def why_unavailable(self) -> str | None:
        return self.unavailable

    def mark(self, number: int) -> None:
        self.marks.append(number)

    async def generate(self, request: Request, beside: str | None = None) -> AsyncIterator[Output]:
        self.taken.append(request)
        self.beside.append(beside)
        is_done = False
        answer = list(self.answer.encode()) if isinstance(self.answer, str) else self.answer
        if self.answer_of is not None:
            answer = list(self.answer_of(request))
        token_ids = answer + ([EOS] if self.end == "stop" else [])
        try:
            if request.scores_prompt:
                is_done = request.max_tokens == 0
                scores = [score(token_id) for token_id in request.prompt_ids[1:]]
                if len(scores) >= 2:  # they come in parts, of which the last may be empty
                    yield Output(request.id, [], prompt_scores=scores[:2])
                    scores = scores[2:]
                yield Output(request.id, [], "length" if is_done else None, prompt_scores=scores)
                if is_done:
                    return
            for at, token_id in enumerate(token_ids):
                is_last = at == len(token_ids) - 1
                if is_last and self.end == "error":
                    raise ApiError(500, "rank 1: it broke")
                is_done = is_last
                scores = [] if request.num_logprobs is None else [score(token_id)]
                routed = None if request.routed_from is None else routed_experts(request, at)
                yield Output(request.id, [token_id], self.end if is_last else None, scores=scores, routed=routed)
                await asyncio.sleep(60 if self.is_slow else 0)
        finally:
            if not is_done:
                self.cancelled.append(request.id)


class Bench:
    """An app over scripted ranks, and one request at a time to it."""

    def __init__(self, is_loading: bool = False) -> None:
        self.ranks = ScriptedRanks()
        metrics = Metrics(MODEL, lambda: self.ranks.num_unfinished)
        self.service = Service(MODEL, 7, self.ranks, metrics, RecordingController(self.ranks.mark, None, 50))
        self.model = ServedModel(ByteTokenizer())
        self.limits = ModelLimits(max_model_len=64, vocab_size=256, max_queue_size=64)
        if not is_loading:
            self.change()
        self.app = make_app(self.service, max_body_bytes=2000)

    def change(self, limits: ModelLimits | None = None, **changes: Any) -> None:
        """Serve a model that is another one in some parts."""
        self.model, self.limits = replace(self.model, **changes), limits or self.limits
        self.service.take_model(self.model)
        self.service.begin(self.limits, {}, {})

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(work)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def complete(self, **body: Any) -> httpx.Response:
        return self.call("POST", "/v1/completions", json={"model": MODEL, "prompt": "abc", **body})

    def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        return self.call("POST", "/v1/chat/completions", json={"model": MODEL, "messages": messages, **body})


@pytest.fixture
def bench() -> Bench:
    return Bench()


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["code"], body["type"]) == (status, TYPES[status])
    assert "\n" not in body["message"]
    return body


def test_a_completion(bench: Bench) -> None:
    body = bench.complete().json()
    choice = {"index": 0, "text": "hello", "finish_reason": "length", "stop_reason": None, "logprobs": None}
    assert body["choices"] == [choice]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert (body["object"], body["model"]) == ("text_completion", MODEL)
    assert bench.ranks.taken[0].max_tokens == 16


def test_the_end_token_counts_but_is_not_shown(bench: Bench) -> None:
    bench.ranks.end = "stop"
    body = bench.complete().json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("hello", "stop")
    assert body["usage"]["completion_tokens"] == 6


def test_a_chat_completion(bench: Bench) -> None:
    body = bench.chat().json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    request = bench.ranks.taken[0]
    assert bytes(request.prompt_ids) == b"<user>hi"
    assert request.max_tokens == 64 - 8, "a chat may use what is left"


def test_text_parts_are_joined(bench: Bench) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    bench.chat(messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}])
    assert bytes(bench.ranks.taken[0].prompt_ids) == b"<system>be brief<user>ab"


def test_what_an_answer_contains_is_accepted_as_input(bench: Bench) -> None:
    nulls = {"audio": None, "function_call": None, "tool_calls": None, "name": None, "annotations": None}
    answer = bench.chat().json()["choices"][0]["message"]
    for sent in (
        answer,
        {**answer, **nulls},
        {**answer, "annotations": [], "of_tomorrow": {"x": [1]}, "tool_calls": []},
    ):
        messages = [{"role": "user", "content": "hi"}, sent, {"role": "user", "content": "and?"}]
        assert bench.chat(messages=messages).status_code == 200
        assert bytes(bench.ranks.taken[-1].prompt_ids) == b"<user>hi<assistant>hello<user>and?"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "refusal": "no", "content": "x"}, "messages.1.refusal: Input should be None"),
        ({"role": "assistant", "function_call": {"name": "f"}, "content": "x"}, "messages.1.function_call: "),
        ({"role": "assistant", "content": None}, "messages.1.content: Input should be text"),
        ({"role": "user"}, "messages.1.content: Input should be text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.1.content.0.image_url"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages.1.content.0: "),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
            "is served text-only: it takes no images",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            "tool_calls.0.function.arguments is required",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "messages.1.tool_calls.0: this model's chat template leaves it out",
        ),
    ],
)
def test_what_a_message_says_beyond_text_is_refused_by_name(bench: Bench, message: dict[str, Any], text: str) -> None:
    refusal = error(bench.chat(messages=[{"role": "user", "content": "hi"}, message]), 400)
    assert text in refusal["message"]
    assert refusal["param"] == "messages"
    assert bench.ranks.taken == []


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_completion(bench: Bench, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    *chunks, done = events(bench.complete(stream=True, **options))
    assert done == "[DONE]"
    if include_usage:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("call", ["complete", "chat"])
@pytest.mark.parametrize("include_usage", [False, True])
def test_usage_may_come_with_every_chunk(bench: Bench, call: str, include_usage: bool) -> None:
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    chunks = events(getattr(bench, call)(stream=True, stream_options=options))[:-1]
    usages = [(chunk["usage"]["completion_tokens"], chunk["usage"]["total_tokens"]) for chunk in chunks]
    num_prompt = 3 if call == "complete" else 8
    first = [0] if call == "chat" else []  # the role
    last = [5] if include_usage else []
    assert usages == [(count, num_prompt + count) for count in [*first, 1, 2, 3, 4, 5, *last]]
    assert [chunk["choices"] == [] for chunk in chunks].count(True) == include_usage


def test_a_streamed_chat(bench: Bench) -> None:
    *chunks, done = events(bench.chat(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert done == "[DONE]"
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "hello"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_and_cancels(bench: Bench, stream: bool) -> None:
    bench.ranks.answer = "one two three"
    response = bench.complete(stop=["tw", "zzz"], stream=stream)
    choices = [e["choices"][0] for e in events(response)[:-1]] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one "
    assert choices[-1]["finish_reason"] == "stop"
    assert bench.ranks.cancelled == [bench.ranks.taken[0].id]


def test_an_error_on_the_way_ends_the_stream(bench: Bench) -> None:
    bench.ranks.end = "error"
    *chunks, last = events(bench.complete(stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hell"
    assert last["error"]["message"] == "rank 1: it broke"
    assert error(bench.complete(), 500)["message"] == "rank 1: it broke"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(bench: Bench, stream: bool) -> None:
    bench.ranks.is_slow = True
    body = json.dumps({"model": MODEL, "prompt": "abc", "stream": stream}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "scheme": "http", "headers": [(b"content-type", b"application/json")], "server": ("server", 80),
    }  # fmt: skip
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    bench.run(asyncio.wait_for(bench.app(scope, receive, send), 10))
    assert bench.ranks.cancelled == [bench.ranks.taken[0].id]


def test_sampling_is_passed_on(bench: Bench) -> None:
    bench.complete(temperature=0.5, top_p=0.9, seed=11, max_tokens=3, ignore_eos=True)
    bench.complete()
    bench.complete()
    first, second, third = bench.ranks.taken
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.seed) == (0.5, 0.9, 11)
    assert (first.max_tokens, first.ignore_eos) == (3, True)
    assert (second.sampling.temperature, second.sampling.top_p) == (1.0, 1.0), "OpenAI's defaults"
    assert second.sampling.seed != third.sampling.seed


def test_both_names_of_the_limit_are_known(bench: Bench) -> None:
    bench.complete(max_tokens=7, max_completion_tokens=7)
    bench.chat(max_completion_tokens=6)
    bench.chat(max_tokens=5)
    assert [request.max_tokens for request in bench.ranks.taken] == [7, 6, 5]


def test_several_prompts_and_answers_come_in_order(bench: Bench) -> None:
    bench.ranks.answer_of = lambda request: bytes(request.prompt_ids[:2]) + bytes([48 + request.sampling.seed % 10])
    body = bench.complete(prompt=["ab", "xyz"], n=2, seed=10).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "ab0"), (1, "ab1"), (2, "xy0"), (3, "xy1"),
    ]  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    *chunks, usage, done = events(
        bench.complete(prompt=[[97, 98], [120]], n=2, seed=10, stream=True, stream_options={"include_usage": True})
    )
    assert (done, usage["usage"]["prompt_tokens"]) == ("[DONE]", 3)
    choices = [chunk["choices"][0] for chunk in chunks]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(4)]
    assert texts == ["ab0", "ab1", "x0", "x1"]
    ends = [choice["index"] for choice in choices if choice["finish_reason"] == "length"]
    assert sorted(ends) == [0, 1, 2, 3]


def test_several_answers_to_a_chat_each_begin_with_the_role(bench: Bench) -> None:
    choices = bench.chat(n=3).json()["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(at, "hello") for at in range(3)]
    *chunks, _ = events(bench.chat(n=3, stream=True))
    firsts = [chunk["choices"][0]["index"] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    assert firsts == [0, 1, 2]


def test_answers_to_one_prompt_follow_the_first_to_its_rank(bench: Bench) -> None:
    bench.complete(prompt=["ab", "xyz"], n=3)
    taken = {request.id: request for request in bench.ranks.taken}
    first = [request.id for request, beside in zip(taken.values(), bench.ranks.beside, strict=True) if beside is None]
    assert sorted(bytes(taken[id_].prompt_ids) for id_ in first) == [b"ab", b"xyz"]
    for request, beside in zip(taken.values(), bench.ranks.beside, strict=True):
        if beside is not None:
            assert taken[beside].prompt_ids == request.prompt_ids
            assert list(taken).index(beside) < list(taken).index(request.id), "the others wait until it has begun"


def test_the_best_answer_is_the_likeliest_per_token(bench: Bench) -> None:
    # A token's logprob is its id, negative: the answer of the lowest bytes is best, though it is the longest.
    bench.ranks.answer_of = lambda request: {0: b"zz", 1: b"!!!!!", 2: b"aaa"}[request.sampling.seed]
    body = bench.complete(best_of=3, n=2, seed=0).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "!!!!!"), (1, "aaa")]
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 10, "all that were made"


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_one_answer_ends_them_all(bench: Bench, stream: bool) -> None:
    bench.ranks.end, bench.ranks.answer_of = "error", lambda request: b"abc" * (1 + 9 * (request.sampling.seed % 2))
    response = bench.complete(n=2, seed=0, stream=stream)
    message = events(response)[-1]["error"]["message"] if stream else error(response, 500)["message"]
    assert message == "rank 1: it broke"
    assert sorted(bench.ranks.cancelled) == sorted(request.id for request in bench.ranks.taken)


def test_text_and_conversations_become_tokens_and_text_again(bench: Bench) -> None:
    bench.change(tokenizer=small_tokenizer("byte_level"))
    text = "ab c"
    body = bench.call("POST", "/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 64)
    assert body["tokens"] == bench.model.tokenizer.encode(text)
    assert body["token_strs"] == bench.model.tokenizer.convert_ids_to_tokens(body["tokens"])
    again = bench.call("POST", "/detokenize", json={"tokens": body["tokens"]}).json()
    assert again == {"prompt": text}


def test_a_conversation_is_tokenized_as_its_template_writes_it(bench: Bench) -> None:
    body = bench.call("POST", "/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert (bytes(body["tokens"]), body["token_strs"]) == (b"<user>hi", None)
    for wrong, param in (({}, "prompt"), ({"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}, "prompt")):
        assert error(bench.call("POST", "/tokenize", json=wrong), 400)["param"] == param
    assert "999 lies outside" in error(bench.call("POST", "/detokenize", json={"tokens": [1, 999]}), 400)["message"]
    assert error(bench.call("POST", "/detokenize", json={"model": "x", "tokens": []}), 404)["param"] == "model"


def test_the_form_of_an_answer_reaches_the_rank_as_a_grammar(bench: Bench) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}},
        {"structured_outputs": {"json": schema}},
        {"guided_json": json.dumps(schema)},
    ):
        bench.complete(**body)
        assert json.loads(bench.ranks.taken[-1].grammar or "")["grammars"] == [{"json_schema": schema}]
    bench.chat(response_format={"type": "json_object"})
    assert json.loads(bench.ranks.taken[-1].grammar or "")["grammars"] == [{"json_schema": {"type": "object"}}]
    bench.chat(response_format={"type": "text"})
    assert bench.ranks.taken[-1].grammar is None
    bench.complete(guided_choice=["yes", "no"])
    assert bench.ranks.taken[-1].grammar == 'start: "yes" | "no"'


def test_settings_of_sampling_reach_the_rank(bench: Bench) -> None:
    settings = {
        "top_k": 5, "min_p": 0.1, "presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.5,
        "min_tokens": 1,
    }  # fmt: skip
    bench.complete(**settings, logit_bias={"7": -3, "9": 1.5}, stop_token_ids=[4, 5], max_tokens=2)
    bench.complete(top_k=-1)
    full, plain = (request.sampling for request in bench.ranks.taken)
    assert {name: getattr(full, name) for name in settings} == settings
    assert (list(full.logit_bias), list(full.stop_token_ids)) == ([(7, -3), (9, 1.5)], [4, 5])
    assert plain == Sampling(1.0, 1.0, plain.seed)


def test_neutral_parameters_are_accepted(bench: Bench) -> None:
    body = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "logit_bias": {}}
    labels = {"user": "me", "safety_identifier": "me", "prompt_cache_key": "a", "metadata": {"a": "b"}}
    assert bench.complete(**body, **labels).status_code == 200
    of_vllm = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [], "skip_special_tokens": True}
    assert bench.complete(**of_vllm).status_code == 200
    assert bench.chat(add_generation_prompt=True, continue_final_message=False, top_logprobs=0).status_code == 200
    options = {"include_usage": None, "of_tomorrow": None, "include_obfuscation": False}
    assert bench.complete(stream=True, stream_options=options, ignore_eos=None, of_tomorrow=None).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 33, "prompt": ["a", "b"]}, "n", "66 answers in one request, but at most 64 are made at once"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format: Input tag 'xml'"),
        ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs", "regex parse error"),
        ({"structured_outputs": {"json": {"type": "frob"}}}, "structured_outputs", "Invalid type: frob"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "structured_outputs: "),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "give one of json"),
        ({"structured_outputs": {}}, "structured_outputs", "give one of json"),
        ({"structured_outputs": {"choice": ["a"]}, "guided_regex": "a"}, "structured_outputs", "give one of both"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos", "does not go with structured_outputs"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 1}, "min_tokens", "go with response_format"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown parameter 'stream_options.x'$"),
        ({"stream_options": {"include_usge": True}}, "stream_options", "include_usge': did you mean 'include_usage'"),
        ({"best_of": 2, "n": 3}, "best_of", "best_of is 2, but n=3 answers are asked for"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "only allowed with echo"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"min_tokens": 2, "max_tokens": 1}, "min_tokens", "min_tokens is 2, but at most 1 tokens are asked for"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "should match pattern"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "token id 999 lies outside the vocabulary of 256"),
        ({"stop_token_ids": [256]}, "stop_token_ids", "token id 256 lies outside the vocabulary of 256"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "valid integer"),
        ({"temprature": 1}, "temprature", "unknown parameter 'temprature': did you mean 'temperature'"),
        ({"of_tomorrow": 1}, "of_tomorrow", "unknown parameter 'of_tomorrow'$"),
        ({"t" * 1000: 1}, "t" * 97 + "...", "unknown parameter 't+'$"),
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": [1]}, "stop", "^stop.0: Input should be a valid string"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
        ({"prompt": ["a", 3]}, "prompt", "prompt 1: Input should be text or a list of token ids"),
        ({"prompt": [[1], [2, -1]]}, "prompt", "prompt 1: -1 at place 1 is no token id"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": [1, 999]}, "prompt", "token id 999 lies outside the vocabulary of 256"),
        ({"prompt": [1, -1]}, "prompt", "prompt: .*-1 at place 1 is no token id"),
        ({"prompt": "x" * 70}, "prompt", "the prompt has 70 tokens and max_tokens is 1, 71 in all, .*at most 64"),
        ({"prompt": "x" * 321}, "prompt", "321 characters, .* at most 64 tokens, which are at most 320 characters"),
        ({"prompt": "abc", "max_tokens": 62}, "prompt", "65 in all, but this server takes at most 64"),
    ],
)
def test_what_cannot_be_served_is_refused(bench: Bench, body: dict[str, Any], param: str, message: str) -> None:
    refusal = error(bench.complete(**body), 400)
    assert refusal["param"] == param
    assert re.search(message, refusal["message"]), refusal["message"]
    assert bench.ranks.taken == []


def test_a_long_conversation_is_refused_before_it_is_tokenized(bench: Bench) -> None:
    message = error(bench.chat(messages=[{"role": "user", "content": "x" * 400}]), 400)["message"]
    assert "406 characters" in message


def test_an_open_end_takes_what_room_there_is(bench: Bench) -> None:
    assert bench.complete(prompt="x" * 60).status_code == 200
    assert bench.ranks.taken[0].max_tokens == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": "m", ', "the body is not valid JSON"),
        (b"[1, 2]", "the body must be a JSON object"),
        (b"{}", "model is required"),
        (b'{"model": "org/tiny"}', "prompt is required"),
        (b'{"model": "org/tiny", "prompt": "a\\ud800"}', "hex escape"),
        (b'{"model": "org/tiny", "prompt": "a", "\\ud800": 1}', "the body is not"),
        (b'{"model": "org/tiny", "prompt": "\xff"}', "the body is not"),
        (b"[" * 1900, "the body is not"),
    ],
)
def test_bodies_that_are_no_request(bench: Bench, content: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert message in error(bench.call("POST", "/v1/completions", content=content, headers=headers), 400)["message"]


def test_chat_errors(bench: Bench) -> None:
    assert "at least 1 item" in error(bench.chat(messages=[]), 400)["message"]
    assert error(bench.chat(messages=[{"role": "robot", "content": "x"}]), 400)["param"] == "messages"
    refused = error(bench.chat(messages=[{"role": "assistant", "content": "x"}]), 400)
    assert "the user begins" in refused["message"]
    bench.model.tokenizer.chat_template = None
    assert "no chat template" in error(bench.chat(), 400)["message"]


def test_logprobs_of_a_completion(bench: Bench) -> None:
    logprobs = bench.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list("hello")
    assert logprobs["token_logprobs"] == [-byte / 64 for byte in b"hello"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["top_logprobs"][0] == {"!": -0.25, "h": -104 / 64}
    assert bench.ranks.taken[0].num_logprobs == 2


def test_logprobs_of_a_chat(bench: Bench) -> None:
    logprobs = bench.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs["content"]] == list("hello")
    top = [{"token": "!", "logprob": -0.25, "bytes": [33]}, {"token": "h", "logprob": -104 / 64, "bytes": [104]}]
    assert logprobs["content"][0] == {**top[1], "top_logprobs": top}
    assert error(bench.chat(top_logprobs=2), 400)["param"] == "top_logprobs"


@pytest.mark.parametrize("call", ["complete", "chat"])
def test_a_stream_loses_no_logprobs(bench: Bench, call: str) -> None:
    bench.ranks.answer = "h\u00e9llo"  # the first half of the second character has no text yet
    options = {"logprobs": 1} if call == "complete" else {"logprobs": True, "top_logprobs": 1}
    whole = getattr(bench, call)(**options).json()["choices"][0]["logprobs"]
    chunks = events(getattr(bench, call)(**options, stream=True))[:-1]
    streamed = [logprobs for chunk in chunks if (logprobs := chunk["choices"][0]["logprobs"])]
    key = "token_logprobs" if call == "complete" else "content"
    assert [entry for logprobs in streamed for entry in logprobs[key]] == whole[key]
    assert len(whole[key]) == 6


def test_logprobs_end_where_a_stop_string_cuts(bench: Bench) -> None:
    choice = bench.complete(logprobs=0, stop="lo").json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("hel", ["h", "e", "l"])


@pytest.mark.parametrize("call", ["complete", "chat"])
@pytest.mark.parametrize(
    ("settings", "reason"), [({"stop": ["x", "lo"]}, "lo"), ({"stop_token_ids": [7, EOS]}, EOS), ({}, None)]
)
def test_the_stop_string_or_token_that_ended_an_answer_is_named(
    bench: Bench, call: str, settings: dict[str, Any], reason: str | int | None
) -> None:
    bench.ranks.end = "length" if "stop" in settings else "stop"
    (choice,) = getattr(bench, call)(**settings).json()["choices"]
    *chunks, last = [event["choices"][0] for event in events(getattr(bench, call)(**settings, stream=True))[:-1]]
    assert choice["stop_reason"] == last["stop_reason"] == reason
    assert not any("stop_reason" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt(bench: Bench, stream: bool) -> None:
    response = bench.complete(echo=True, stop="bc", stream=stream)
    choices = [e["choices"][0] for e in events(response)[:-1]] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "abchello"
    assert not bench.ranks.taken[0].scores_prompt


def test_echo_with_logprobs_scores_the_prompt(bench: Bench) -> None:
    body = bench.complete(echo=True, logprobs=1, max_tokens=1).json()
    logprobs = body["choices"][0]["logprobs"]
    assert bench.ranks.taken[0].scores_prompt
    assert logprobs["tokens"] == list("abchello")
    assert logprobs["token_logprobs"][:3] == [None, -98 / 64, -99 / 64]
    assert logprobs["top_logprobs"][:2] == [None, {"!": -0.25, "b": -98 / 64}]
    assert logprobs["text_offset"] == list(range(8))
    assert body["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_prompt_may_be_scored_without_an_answer(bench: Bench, logprobs: int | None) -> None:
    body = bench.complete(echo=True, logprobs=logprobs, max_tokens=0).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("abc", "length")
    assert len(bench.ranks.taken) == (logprobs is not None)
    assert body["usage"]["completion_tokens"] == 0


def test_the_scores_of_a_long_prompt_are_written_in_parts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_ep.serve.http.service.MAX_ECHOED_TOKENS", 4)
    prompt = "caf\u00e9 \u4f60\u597d"
    options = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1}
    whole = bench.complete(**options).json()["choices"][0]
    *chunks, _ = [event["choices"][0] for event in events(bench.complete(**options, stream=True))[:-1]]
    assert whole["text"] == prompt + "hello"
    assert len(chunks) == 4 + 4
    for key, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][key]] == values[:-1]


def test_a_streamed_prompt_without_text_has_its_scores(bench: Bench) -> None:
    tokenizer = small_tokenizer("llama")
    bench.change(ModelLimits(max_model_len=64, vocab_size=len(tokenizer)), tokenizer=tokenizer)
    bench.ranks.answer = [tokenizer.convert_tokens_to_ids("\u2581Lox")]
    stream = bench.complete(prompt=[1, 2], echo=True, logprobs=0, max_tokens=1, stream=True)
    choices = [event["choices"][0] for event in events(stream)[:-1]]
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == ["", "", "Lox"]


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_shows_an_end_within_a_character(bench: Bench, logprobs: int | None, max_tokens: int) -> None:
    bench.ranks.answer = [*"\u4f60".encode()[1:]]
    prompt = [97, *"\u4f60".encode()[:1]]
    choice = bench.complete(prompt=prompt, echo=True, logprobs=logprobs, max_tokens=max_tokens).json()["choices"][0]
    assert choice["text"] == ("a\u4f60" if max_tokens else "a\ufffd")
    if logprobs is not None:
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_where_the_prompt_ends(bench: Bench, stream: bool) -> None:
    tokenizer = small_tokenizer("llama")
    bench.change(ModelLimits(max_model_len=64, vocab_size=len(tokenizer)), tokenizer=tokenizer)
    bench.ranks.answer = tokenizer.convert_tokens_to_ids(["\u2581Lox", "\u2581cat"])
    for options, text in (({}, " Lox cat"), ({"echo": True}, "the cat Lox cat"), ({"stop": " c"}, " Lox")):
        response = bench.complete(prompt="the cat", logprobs=0, stream=stream, **options)
        choices = [e["choices"][0] for e in events(response)[:-1]] if stream else response.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == text
        tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
        assert "".join(tokens).startswith(text)


def test_scores_that_are_no_numbers_are_a_named_error(bench: Bench) -> None:
    bench.ranks.answer = [97, 255]
    for answer in (bench.complete(logprobs=1), bench.chat(logprobs=True, top_logprobs=1)):
        assert "log-probabilities are not finite" in error(answer, 500)["message"]
    *_, last = events(bench.complete(logprobs=1, stream=True))
    assert "log-probabilities are not finite" in last["error"]["message"]


def test_a_stream_has_only_its_own_ends_of_lines(bench: Bench) -> None:
    bench.ranks.answer = "a\u2028b\u2029c\x85d"
    lines = bench.complete(stream=True).text.splitlines()  # as httpx splits a stream
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == bench.ranks.answer


def test_an_api_key_is_asked_for(bench: Bench) -> None:
    bench.app = make_app(bench.service, max_body_bytes=2000, api_keys=("secret", "other"))
    for path in ("/v1/models", "/v1/ep/load", "/server_info", "/nowhere"):
        for given in (None, "Bearer wrong", "Bearer ", "secret", "Basic secret", "Bearer secretother"):
            headers = {} if given is None else {"Authorization": given}
            assert "--api-key" in error(bench.call("GET", path, headers=headers), 401)["message"]
    for given in ("Bearer secret", "bearer secret", "BEARER  other"):
        assert bench.call("GET", "/v1/models", headers={"Authorization": given}).status_code == 200
    for path in ("/health", "/livez", "/metrics", "/version", "/dashboard"):
        assert bench.call("GET", path).status_code == 200


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "any.name", 200),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 200),
        ("http://[::1]:8000", "[::1]:8000", 200),
        ("http://localhost:8000", "localhost:8000", 200),
        ("http://evil.example", "127.0.0.1:8000", 403),
        ("http://127.0.0.1:3000", "127.0.0.1:8000", 403),
        ("http://evil.example:8000", "evil.example:8000", 403),  # a name that was made to point here
        ("null", "127.0.0.1:8000", 403),
        ("http://[", "[", 403),
        ("https://good.example", "127.0.0.1:8000", 200),
    ],
)
def test_a_page_of_another_site_may_not_post(bench: Bench, origin: str | None, host: str, status: int) -> None:
    bench.app = make_app(bench.service, max_body_bytes=2000, allowed_origins=("https://good.example",))
    headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
    response = bench.call("POST", "/v1/completions", headers=headers, json={"model": MODEL, "prompt": "abc"})
    assert response.status_code == status
    assert bench.call("GET", "/health", headers=headers).status_code == 200
    if status == 403:
        assert "--allowed-origins" in error(response, 403)["message"]


def test_a_browser_may_ask_first_for_an_allowed_origin(bench: Bench) -> None:
    bench.app = make_app(bench.service, 2000, api_keys=("secret",), allowed_origins=("https://good.example",))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    response = bench.call("OPTIONS", "/v1/completions", headers={"Origin": "https://good.example", **asked})
    assert response.headers["Access-Control-Allow-Origin"] == "https://good.example"
    refused = bench.call("OPTIONS", "/v1/completions", headers={"Origin": "https://evil.example", **asked})
    assert "Access-Control-Allow-Origin" not in refused.headers


def test_head_is_answered_where_get_is(bench: Bench) -> None:
    for path in ("/health", "/livez", "/v1/models", "/metrics", "/version"):
        response = bench.call("HEAD", path)
        assert (response.status_code, response.content) == (200, b"")
    assert bench.call("HEAD", "/v1/completions").headers["Allow"] == "POST"
    assert bench.call("PUT", "/health").headers["Allow"] == "GET, HEAD"


def test_an_encoded_body_is_refused_by_name(bench: Bench) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = bench.call("POST", "/v1/completions", content=b"x", headers=headers)
    assert "'gzip'" in error(response, 415)["message"]


def test_unknown_things_are_not_found(bench: Bench) -> None:
    assert error(bench.complete(model="gpt-5"), 404)["param"] == "model"
    message = error(bench.call("POST", "/v1/embeddings", json={}), 404)["message"]
    assert message == "POST /v1/embeddings: Not Found: /openapi.json has the routes"
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completion"):
        message = error(bench.call("POST", path, json={}), 404)["message"]
        assert message == f"POST {path}: Not Found: did you mean /v1/chat/completions?"
    wrong_method = bench.call("GET", "/v1/completions")
    assert "Method Not Allowed: use POST" in error(wrong_method, 405)["message"]
    assert wrong_method.headers["Allow"] == "POST"
    error(bench.call("GET", "/v1/models/gpt-5"), 404)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused(bench: Bench, declared: bool) -> None:
    content = json.dumps({"model": MODEL, "prompt": "x" * 3000}).encode()

    async def parts() -> AsyncIterator[bytes]:
        yield content[:100]
        yield content[100:]

    headers = {"Content-Type": "application/json"}
    sent = content if declared else parts()
    refusal = error(bench.call("POST", "/v1/completions", content=sent, headers=headers), 413)
    assert "2000 bytes" in refusal["message"]


@pytest.mark.parametrize("reason", ["the model is loading", "draining", "rank 1 died"])
def test_health_says_why_not(bench: Bench, reason: str) -> None:
    assert bench.call("GET", "/health").json() == {"status": "ok"}
    bench.ranks.unavailable = reason
    assert error(bench.call("GET", "/health"), 503)["message"] == reason
    assert reason in error(bench.complete(), 503)["message"]
    assert bench.call("GET", "/metrics").status_code == 200
    assert bench.call("GET", "/livez").json() == {"status": "alive"}, "the process lives, whatever the group does"


def test_models_are_listed(bench: Bench) -> None:
    card = bench.call("GET", "/v1/models").json()["data"][0]
    assert (card["id"], card["root"], card["object"], card["max_model_len"]) == (MODEL, MODEL, "model", 64)
    assert bench.call("GET", f"/v1/models/{MODEL}").json() == card


def test_metrics_count(bench: Bench) -> None:
    bench.complete()
    bench.complete(n=0)
    metrics = bench.service.metrics
    metrics.weights([{"bf16": 10, "int8": 5}, {"bf16": 20}])
    metrics.loads(LOADS)
    metrics.rank(1, RankStats(2, 3, 0.25, Progress(5, None, None, 0.0), num_steps=5, steps_s=0.5))
    text = bench.call("GET", "/metrics").text
    for line in (
        'rq_ep_request_success_total{finished_reason="length",model_name="org/tiny"} 1.0',
        'rq_ep_request_failure_total{model_name="org/tiny",status="400"} 1.0',
        'rq_ep_prompt_tokens_total{model_name="org/tiny"} 3.0',
        'rq_ep_generation_tokens_total{model_name="org/tiny"} 5.0',
        'rq_ep_time_to_first_token_seconds_count{model_name="org/tiny"} 1.0',
        'rq_ep_inter_token_latency_seconds_count{model_name="org/tiny"} 4.0',
        'rq_ep_e2e_request_latency_seconds_count{model_name="org/tiny"} 1.0',
        'rq_ep_expert_weight_bytes{ep_rank="0",model_name="org/tiny",precision="int8"} 5.0',
        'rq_ep_tokens_routed_total{ep_rank="0",layer="3",model_name="org/tiny"} 30.0',
        'rq_ep_layer_imbalance_ratio{layer="3",model_name="org/tiny"} 1.5',
        f'rq_ep_balancedness{{model_name="org/tiny"}} {(1 / 1.5 + 1) / 2}',
        'rq_ep_replica_tokens_total{layer="3",model_name="org/tiny",precision="int8"} 15.0',
        'rq_ep_dispatch_seconds_total{model_name="org/tiny"} 0.5',
        'rq_ep_rearrangements_total{model_name="org/tiny"} 2.0',
        'rq_ep_num_requests_waiting{ep_rank="1",model_name="org/tiny"} 3.0',
        'rq_ep_kv_cache_usage_perc{ep_rank="1",model_name="org/tiny"} 0.25',
        'rq_ep_engine_steps_total{ep_rank="1",model_name="org/tiny"} 5.0',
        'rq_ep_request_decode_time_seconds_count{model_name="org/tiny"} 1.0',
    ):
        assert line in text


def test_load_is_told_since_the_start_and_lately(bench: Bench) -> None:
    conforms = conforming(bench)
    idle = bench.call("GET", "/v1/ep/load").json()
    assert idle["total"] is None
    assert conforms(idle, "Load")
    bench.service.load_view.add(LOADS)
    bench.service.load_view.add(LOADS)
    bench.complete()
    bench.service.history.sample(3)
    body = bench.call("GET", "/v1/ep/load").json()
    assert (body["layers"], body["total"]["pairs_LR"]) == ([3, 4], [[60, 20], [40, 40]])
    assert body["total"]["num_calls_L"] == [6, 6]
    assert body["recent"]["counts_LE"] == [[50, 20, 10], [40, 0, 40]]
    assert body["recent"]["balancedness"] == pytest.approx((1 / 1.5 + 1) / 2)
    sample = body["history"][-1]
    assert sample["num_unfinished"] == 3
    assert sample["generation_tokens_per_s"] > 0
    assert sample["itl_ms_p50"] <= sample["itl_ms_p99"]
    assert conforms(body, "Load")
    assert not conforms({**body, "history": [{**sample, "more": 1}]}, "Load")


def test_the_placement_is_the_file(bench: Bench) -> None:
    error(Bench(is_loading=True).call("GET", "/v1/ep/placement"), 503)
    bench.service.placement.take(PlacementServed(0, {"format": "rq_ep.placement/1"}, []))
    assert bench.call("GET", "/v1/ep/placement").json() == {"format": "rq_ep.placement/1"}


def test_recording_starts_stops_and_names_its_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--record-dir" in error(bench.call("POST", "/v1/ep/record/start"), 409)["message"]
    bench.service.recording = controller = RecordingController(bench.ranks.mark, "traces", 50)
    error(bench.call("POST", "/v1/ep/record/stop"), 409)
    assert bench.call("POST", "/v1/ep/record/start").json() == {"recording": True, "max_tokens": 50}
    assert "under way" in error(bench.call("POST", "/v1/ep/record/start"), 409)["message"]

    def answer(number: int) -> None:
        bench.ranks.marks.append(number)
        controller.end(Recorded("traces/t", 3, 9, is_full=False))

    monkeypatch.setattr(controller, "_mark", answer)
    stopped = bench.call("POST", "/v1/ep/record/stop").json()
    assert stopped == {"recording": False, "path": "traces/t", "num_steps": 3, "num_tokens": 9, "is_full": False}
    assert bench.ranks.marks == [1, 2]
    bench.call("POST", "/v1/ep/record/start")
    monkeypatch.setattr(controller, "_mark", lambda _: controller.end(RecordingFailed("the disk is full")))
    assert error(bench.call("POST", "/v1/ep/record/stop"), 409)["message"] == "the disk is full"


def test_the_openapi_document_names_every_error(bench: Bench) -> None:
    document = bench.call("GET", "/openapi.json").json()
    answers = document["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503"} == set(answers)
    assert "422" not in json.dumps(document)
    fields = document["components"]["schemas"]["CompletionBody"]["properties"]
    assert {"echo", "logprobs", "ignore_eos", "seed", "stop", "n", "stream_options"} <= set(fields)


def conforming(bench: Bench) -> Callable[[Any, str], bool]:
    """Tells whether a value is what a schema of the server's document says."""
    document = bench.call("GET", "/openapi.json").json()
    return lambda value, name: is_described(value, name, document)


def is_described(value: Any, name: str, document: Mapping[str, Any]) -> bool:
    """Whether a value is what a schema of an OpenAPI document says."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


BODIES = [
        {"n": 2.0, "max_tokens": 1.0, "temperature": 1}, {"n": 2.5}, {"n": True}, {"n": None}, {"n": "2"},
        {"prompt": [97.0, 98]}, {"prompt": [[97.0], [98]]}, {"prompt": [97.5]}, {"prompt": []}, {"prompt": [256]},
        {"prompt": ["a", [98]]}, {"stop_token_ids": [3.0]}, {"stop_token_ids": [256]},
        {"logit_bias": {"97": 1.5}}, {"logit_bias": {"a": 1}}, {"logit_bias": {"9\u0663": 1}},
        {"max_tokens": 0}, {"max_tokens": 0, "echo": True}, {"max_tokens": None},
        {"stream_options": {}}, {"stream_options": {}, "stream": True}, {"stream_options": None},
        {"structured_outputs": {"regex": "a", "json": None}}, {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"guided_regex": "a"}, {"guided_regex": "a", "structured_outputs": {"regex": "a"}},
        {"store": False}, {"store": True}, {"store": None}, {"unknown": None}, {"unknown": 1},
    ]  # fmt: skip


def test_the_openapi_document_and_the_server_take_the_same_bodies(bench: Bench) -> None:
    conforms = conforming(bench)
    for fields in BODIES:
        body = {"model": MODEL, "prompt": "abc", **fields}
        status = bench.call("POST", "/v1/completions", json=body).status_code
        assert status == (200 if conforms(body, "CompletionBody") else 400), fields


def test_answers_are_what_the_openapi_document_says(bench: Bench) -> None:
    conforms = conforming(bench)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for call, name, fields in ((bench.complete, "Completion", {"logprobs": 2, "echo": True}),
                               (bench.chat, "ChatCompletion", {"logprobs": True, "top_logprobs": 2})):  # fmt: skip
        for settings in ({}, fields):
            assert conforms(call(**settings).json(), name)
            lines = call(**settings, **usage).text.split("\n\n")
            assert lines[-2:] == ["data: [DONE]", ""]
            assert all(conforms(json.loads(line.removeprefix("data: ")), f"{name}Chunk") for line in lines[:-2])
    assert conforms(bench.complete(n=0).json(), "Error")
    assert conforms(bench.call("GET", "/v1/models").json(), "Models")
    assert not conforms({**bench.complete().json(), "more": 1}, "Completion")


def test_images_are_not_tokenized_as_if_they_were_text(bench: Bench) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    answer = bench.call("POST", "/tokenize", json={"messages": [{"role": "user", "content": [image]}]})
    assert "images are not tokenized here" in error(answer, 400)["message"]


def test_a_wrong_method_is_told_those_of_all_routes_of_the_path(bench: Bench) -> None:
    assert bench.call("PUT", "/v1/ep/ranks").headers["Allow"] == "GET, HEAD, POST"


def test_version_and_server_info(bench: Bench) -> None:
    bench.service.begin(bench.limits, {}, {"num_ranks": 2})
    assert bench.call("GET", "/version").json()["version"]
    assert bench.call("GET", "/server_info").json() == {"num_ranks": 2}


def test_a_request_that_does_not_say_is_sampled_as_the_model_says(bench: Bench) -> None:
    bench.change(defaults=SamplingDefaults(temperature=0.6, top_p=0.9))
    bench.complete()
    bench.chat(temperature=0, top_p=1)
    bench.complete(temperature=None, top_p=0.5)
    drawn = [(request.sampling.temperature, request.sampling.top_p) for request in bench.ranks.taken]
    assert drawn == [(0.6, 0.9), (0.0, 1.0), (0.6, 0.5)]
