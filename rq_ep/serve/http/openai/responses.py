"""Response bodies, whole and streamed, in the form of OpenAI's API."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from starlette.responses import JSONResponse, Response

from rq_ep.engine.requests import Request
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.choices import best
from rq_ep.serve.http.openai.chunks import Chunk, ScoredToken
from rq_ep.serve.http.openai.logprobs import chat_logprobs, completion_logprobs
from rq_ep.serve.http.openai.schemas import StreamOptions
from rq_ep.serve.http.openai.tool_parsers.answer_text import Part
from rq_ep.serve.http.openai.tool_parsers.message_parser import MessageParser

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the response to one body: a chat completion, with a parser for the answer to each request, or a plain one.

    Of `requests` there are `num_tries` in a row for each prompt. The best `num_choices` of them are its choices.
    """

    requests: Sequence[Request]
    model: str
    parsers: Sequence[MessageParser] = ()
    num_choices: int = 1
    num_tries: int = 1
    shows_logprobs: bool = False
    shows_routed_experts: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return bool(self.parsers)

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        id_ = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.requests[0].id}"
        return {"id": id_, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.shows_logprobs:
            return None
        return (chat_logprobs if self.is_chat else completion_logprobs)(tokens)

    def _usage(self, num_tokens: int, choice: int | None = None) -> dict[str, int]:
        """Of all choices, or of one."""
        asked = self.requests[:: self.num_tries] if choice is None else [self.requests[choice]]
        num_prompt = sum(len(request.prompt_ids) for request in asked)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
        }

    async def whole(self, chunks: AsyncIterator[tuple[int, Chunk]]) -> Response:
        """The response that is sent at once."""
        answers: list[list[Chunk]] = [[] for _ in self.requests]
        parts: list[list[Part]] = [[] for _ in self.requests]
        async for number, chunk in chunks:
            answers[number].append(chunk)
            if self.is_chat:
                parts[number] += self.parsers[number].parts(chunk.text, chunk.finish_reason is not None)
        if not (self.shows_logprobs or self.shows_routed_experts):
            return JSONResponse(self._body(answers, parts))
        return await asyncio.to_thread(
            lambda: Response(_json_in_parts(self._body(answers, parts)), media_type="application/json")
        )

    def _body(self, answers: Sequence[Sequence[Chunk]], parts: Sequence[Sequence[Part]]) -> dict[str, Any]:
        chosen: Sequence[int] = range(len(answers))
        if self.num_tries > self.num_choices:
            chosen = [
                at + number
                for at in range(0, len(answers), self.num_tries)
                for number in best(answers[at : at + self.num_tries], self.num_choices)
            ]
        choices = [
            self._whole_choice(index, number, answers[number], parts[number]) for index, number in enumerate(chosen)
        ]
        kind = "chat.completion" if self.is_chat else "text_completion"
        num_tokens = sum(chunk.num_tokens for chunks in answers for chunk in chunks)
        return self._frame(kind, choices, usage=self._usage(num_tokens))

    def _whole_choice(self, index: int, number: int, all_: Sequence[Chunk], parts: Sequence[Part]) -> dict[str, Any]:
        reason = all_[-1].finish_reason
        more = {"stop_reason": all_[-1].stop_reason}
        logprobs = self._logprobs([token for chunk in all_ for token in chunk.tokens])
        if self.shows_routed_experts:
            more["routed_experts"] = all_[-1].routed_experts
        if not self.is_chat:
            text = "".join(chunk.text for chunk in all_)
            return {"index": index, "finish_reason": reason, "logprobs": logprobs, "text": text, **more}
        message, reason = self.parsers[number].message(parts, reason)
        return {"index": index, "finish_reason": reason, "logprobs": logprobs, "message": message, **more}

    async def stream(self, chunks: AsyncIterator[tuple[int, Chunk]], options: StreamOptions) -> AsyncIterator[str]:
        """Server-sent events of a response: its chunks, its usage as asked for, and the end mark.

        An error on the way becomes an event of its own, and the end mark is left out.
        """
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        num_tokens = [0] * len(self.requests)

        def usage(number: int) -> dict[str, Any]:
            if options.continuous_usage_stats:
                return {"usage": self._usage(num_tokens[number], number)}
            return {"usage": None} if options.include_usage else {}

        if self.is_chat:
            for number in range(len(self.requests)):
                choice = self._choice(number, {"delta": {"role": "assistant", "content": ""}}, None, ())
                yield _event(self._frame(kind, [choice], **usage(number)))
        try:
            async for number, chunk in chunks:
                num_tokens[number] += chunk.num_tokens
                added, reason = self._added(number, chunk)
                if any(added.values()) or chunk.tokens or reason is not None:
                    if reason is not None:
                        added["stop_reason"] = chunk.stop_reason
                    if chunk.routed_experts is not None:
                        added["routed_experts"] = chunk.routed_experts
                    yield _event(
                        self._frame(kind, [self._choice(number, added, reason, chunk.tokens)], **usage(number))
                    )
        except ApiError as error:
            yield _event(error.body())
            return
        if options.include_usage:
            yield _event(self._frame(kind, [], usage=self._usage(sum(num_tokens))))
        yield "data: [DONE]\n\n"

    def _added(self, number: int, chunk: Chunk) -> tuple[dict[str, Any], str | None]:
        """What a chunk adds to a choice, and the reason of its end."""
        if not self.is_chat:
            return {"text": chunk.text}, chunk.finish_reason
        parser = self.parsers[number]
        parts = parser.parts(chunk.text, chunk.finish_reason is not None)
        delta, reason = parser.delta(parts, chunk.finish_reason)
        return {"delta": delta}, reason

    def _choice(
        self, index: int, added: dict[str, Any], finish_reason: str | None, tokens: Sequence[ScoredToken]
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "logprobs": logprobs, "finish_reason": finish_reason, **added}


def _json_in_parts(body: dict[str, Any]) -> bytes:
    """JSON, written a value at a time: the encoder would let no other thread run until the whole body is written."""
    text = StringIO()
    for part in ENCODER.iterencode(body):
        text.write(part)
    return text.getvalue().encode()


# Clients that split a stream by `str.splitlines` (httpx) would take these for ends of lines.
LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def _event(body: dict[str, Any]) -> str:
    return f"data: {ENCODER.encode(body).translate(LINE_ENDS)}\n\n"
