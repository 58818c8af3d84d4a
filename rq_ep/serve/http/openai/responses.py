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

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the response to one body: a chat completion, or a plain one.

    Of `requests` there are `num_tries` in a row for each prompt. The best `num_choices` of them are its choices.
    """

    requests: Sequence[Request]
    model: str
    is_chat: bool
    num_choices: int = 1
    num_tries: int = 1
    shows_logprobs: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

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
        async for number, chunk in chunks:
            answers[number].append(chunk)
        if not self.shows_logprobs:
            return JSONResponse(self._body(answers))
        return await asyncio.to_thread(
            lambda: Response(_json_in_parts(self._body(answers)), media_type="application/json")
        )

    def _body(self, answers: Sequence[Sequence[Chunk]]) -> dict[str, Any]:
        chosen = list(answers)
        if self.num_tries > self.num_choices:
            tries = [answers[at : at + self.num_tries] for at in range(0, len(answers), self.num_tries)]
            chosen = [of_prompt[number] for of_prompt in tries for number in best(of_prompt, self.num_choices)]
        choices = [self._whole_choice(index, chunks) for index, chunks in enumerate(chosen)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        num_tokens = sum(chunk.num_tokens for chunks in answers for chunk in chunks)
        return self._frame(kind, choices, usage=self._usage(num_tokens))

    def _whole_choice(self, index: int, all_: Sequence[Chunk]) -> dict[str, Any]:
        text = "".join(chunk.text for chunk in all_)
        logprobs = self._logprobs([token for chunk in all_ for token in chunk.tokens])
        choice: dict[str, Any] = {"index": index, "finish_reason": all_[-1].finish_reason, "logprobs": logprobs}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice

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
                choice = self._choice(number, "", None, (), is_first=True)
                yield _event(self._frame(kind, [choice], **usage(number)))
        try:
            async for number, chunk in chunks:
                num_tokens[number] += chunk.num_tokens
                if chunk.text or chunk.tokens or chunk.finish_reason is not None:
                    choice = self._choice(number, chunk.text, chunk.finish_reason, chunk.tokens)
                    yield _event(self._frame(kind, [choice], **usage(number)))
        except ApiError as error:
            yield _event(error.body())
            return
        if options.include_usage:
            yield _event(self._frame(kind, [], usage=self._usage(sum(num_tokens))))
        yield "data: [DONE]\n\n"

    def _choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        tokens: Sequence[ScoredToken],
        *,
        is_first: bool = False,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish_reason}
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
