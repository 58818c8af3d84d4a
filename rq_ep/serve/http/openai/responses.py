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
from rq_ep.serve.http.openai.chunks import Chunk, ScoredToken
from rq_ep.serve.http.openai.logprobs import chat_logprobs, completion_logprobs
from rq_ep.serve.http.openai.schemas import StreamOptions

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the response to one request: a chat completion, or a plain one."""

    request: Request
    model: str
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        id_ = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.request.id}"
        return {"id": id_, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if self.request.num_logprobs is None:
            return None
        return (chat_logprobs if self.is_chat else completion_logprobs)(tokens)

    def _usage(self, num_tokens: int) -> dict[str, int]:
        num_prompt = len(self.request.prompt_ids)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
        }

    async def whole(self, chunks: AsyncIterator[Chunk]) -> Response:
        """The response that is sent at once."""
        all_ = [chunk async for chunk in chunks]
        if self.request.num_logprobs is None:
            return JSONResponse(self._body(all_))
        return await asyncio.to_thread(
            lambda: Response(_json_in_parts(self._body(all_)), media_type="application/json")
        )

    def _body(self, all_: Sequence[Chunk]) -> dict[str, Any]:
        text = "".join(chunk.text for chunk in all_)
        logprobs = self._logprobs([token for chunk in all_ for token in chunk.tokens])
        choice: dict[str, Any] = {"index": 0, "finish_reason": all_[-1].finish_reason, "logprobs": logprobs}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._frame(kind, [choice], usage=self._usage(sum(chunk.num_tokens for chunk in all_)))

    async def stream(self, chunks: AsyncIterator[Chunk], options: StreamOptions) -> AsyncIterator[str]:
        """Server-sent events of a response: its chunks, its usage as asked for, and the end mark.

        An error on the way becomes an event of its own, and the end mark is left out.
        """
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        num_tokens = 0

        def usage() -> dict[str, Any]:
            if options.continuous_usage_stats:
                return {"usage": self._usage(num_tokens)}
            return {"usage": None} if options.include_usage else {}

        if self.is_chat:
            yield _event(self._frame(kind, [self._choice("", None, (), is_first=True)], **usage()))
        try:
            async for chunk in chunks:
                num_tokens += chunk.num_tokens
                if chunk.text or chunk.tokens or chunk.finish_reason is not None:
                    choice = self._choice(chunk.text, chunk.finish_reason, chunk.tokens)
                    yield _event(self._frame(kind, [choice], **usage()))
        except ApiError as error:
            yield _event(error.body())
            return
        if options.include_usage:
            yield _event(self._frame(kind, [], usage=self._usage(num_tokens)))
        yield "data: [DONE]\n\n"

    def _choice(
        self, text: str, finish_reason: str | None, tokens: Sequence[ScoredToken], *, is_first: bool = False
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        if not self.is_chat:
            return {**choice, "text": text}
        role = {"role": "assistant"} if is_first else {}
        return {**choice, "delta": {**role, "content": text} if text or is_first else {}}


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
