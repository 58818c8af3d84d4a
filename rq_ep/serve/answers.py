"""Bodies of answers, whole and streamed, as OpenAI's clients read them."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from rq_ep.engine.request import Request
from rq_ep.serve.errors import ApiError
from rq_ep.serve.service import Piece


@dataclass(frozen=True)
class Answer:
    """The frame of one answer: a chat completion, or a plain one."""

    request: Request
    model: str
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        id_ = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.request.id}"
        return {"id": id_, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        num_prompt = len(self.request.prompt_ids)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
        }

    async def whole(self, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        """The body of an answer that is sent at once."""
        all_ = [piece async for piece in pieces]
        text = "".join(piece.text for piece in all_)
        choice: dict[str, Any] = {"index": 0, "finish_reason": all_[-1].finish_reason, "logprobs": None}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._frame(kind, [choice], usage=self._usage(sum(piece.num_tokens for piece in all_)))

    async def stream(self, pieces: AsyncIterator[Piece], include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events of an answer: its pieces, its usage if asked for, and the end mark.

        An error on the way becomes an event of its own, and the end mark is left out.
        """
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        num_tokens = 0
        if self.is_chat:
            yield _event(self._frame(kind, [self._delta({"role": "assistant", "content": ""}, None)], **usage))
        try:
            async for piece in pieces:
                num_tokens += piece.num_tokens
                if not piece.text and piece.finish_reason is None:
                    continue
                if self.is_chat:
                    choice = self._delta({"content": piece.text} if piece.text else {}, piece.finish_reason)
                else:
                    choice = {"index": 0, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}
                yield _event(self._frame(kind, [choice], **usage))
        except ApiError as error:
            yield _event(error.body())
            return
        if include_usage:
            yield _event(self._frame(kind, [], usage=self._usage(num_tokens)))
        yield "data: [DONE]\n\n"

    @staticmethod
    def _delta(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
