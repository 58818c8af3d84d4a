"""The message that an answer is: content, reasoning, and calls of tools; whole, or as deltas."""

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rq_ep.serve.http.openai.tool_parsers.answer_text import (
    AnswerText,
    Arguments,
    CallStart,
    Content,
    MalformedCall,
    Parsing,
    Part,
    Reasoning,
)

CALL_ID_LENGTH = 9  # letters and digits: what Mistral's templates insist on

Reader = Callable[[AnswerText], Parsing[None]]


class MessageParser:
    """Parses one answer.

    Args:
        readers: of the parts of the answer, one after another; what they leave is content.
        max_calls: calls beyond are dropped; None: there is no limit.
        shows_reasoning: else reasoning is dropped.
        is_named: whether the answer is a call that was asked for by name, which OpenAI's servers call no reason to end.
    """

    def __init__(
        self,
        readers: Sequence[Reader] = (),
        max_calls: int | None = None,
        shows_reasoning: bool = True,
        is_named: bool = False,
    ) -> None:
        self._text = AnswerText()
        self._parsing = self._parse(readers)
        self._max_calls = max_calls
        self._shows_reasoning = shows_reasoning
        self._is_named = is_named
        self._num_calls = 0
        self._is_in_content = not readers
        self._space = ""  # before and between calls space is no content, where nothing else is
        self._num_started = 0  # calls, in deltas

    def parts(self, text: str, is_end: bool) -> list[Part]:
        """The parts that become certain by new text."""
        self._text.push(text)
        if is_end:
            self._text.end()
        parts: list[Part] = []
        for part in self._parsing:
            if part is None:
                return parts
            parts += self._shown(part)
        if self._space and not self._num_calls:
            parts.append(Content(self._space))
        return parts

    def finish_reason(self, reason: str | None, has_calls: bool) -> str | None:
        """The reason of the end that a client is given."""
        return "tool_calls" if reason == "stop" and has_calls and not self._is_named else reason

    def delta(self, parts: Iterable[Part], reason: str | None) -> tuple[dict[str, Any], str | None]:
        """What parts add to a streamed message, and the reason of its end.

        A call that turns out to be none cannot be taken back: it has the arguments that the model wrote.
        """
        content, reasoning = "", ""
        calls: dict[int, dict[str, Any]] = {}
        for part in parts:
            match part:
                case Content(text):
                    content += text
                case Reasoning(text):
                    reasoning += text
                case CallStart(name):
                    calls[self._num_started] = {"index": self._num_started, **_call(name)}
                    self._num_started += 1
                case Arguments(text):
                    at = self._num_started - 1
                    call = calls.setdefault(at, {"index": at, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
        fields: dict[str, Any] = {**({"content": content} if content else {}), **_reasoning_fields(reasoning)}
        if calls:
            fields["tool_calls"] = list(calls.values())
        return fields, self.finish_reason(reason, self._num_started > 0)

    def message(self, parts: Iterable[Part], reason: str | None) -> tuple[dict[str, Any], str | None]:
        """The whole message that all parts make, and the reason of its end. A malformed call is content."""
        content, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case Content(text):
                    content += text
                case Reasoning(text):
                    reasoning += text
                case CallStart(name):
                    calls.append(_call(name))
                case Arguments(text):
                    calls[-1]["function"]["arguments"] += text
                case MalformedCall(text):
                    calls.pop()
                    content += text
        is_empty = not content and bool(calls or reasoning)
        fields: dict[str, Any] = {"role": "assistant", "content": None if is_empty else content, "refusal": None}
        fields |= _reasoning_fields(reasoning)
        if calls:
            fields["tool_calls"] = calls
        return fields, self.finish_reason(reason, bool(calls))

    def _parse(self, readers: Sequence[Reader]) -> Parsing[None]:
        for read in readers:
            yield from read(self._text)
        yield from self._text.until(Content)

    def _shown(self, part: Part) -> list[Part]:
        is_dropped = self._max_calls is not None and self._num_calls > self._max_calls
        if isinstance(part, MalformedCall):
            self._num_calls -= 1
            return [Content(part.text)] if is_dropped else [part]
        match part:
            case Content(text) if not self._is_in_content and not text.strip():
                self._space += text
                return []
            case Content(text):
                part = Content(self._space + text)
                self._space, self._is_in_content = "", True
            case CallStart():
                self._num_calls += 1
                self._space, self._is_in_content = "", False
                return [] if self._max_calls is not None and self._num_calls > self._max_calls else [part]
            case Arguments() if is_dropped:
                return []
            case Reasoning() if not self._shows_reasoning:
                return []
        return [part]


def _reasoning_fields(text: str) -> dict[str, str]:
    """Reasoning, under the name that clients know and under vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _call(name: str) -> dict[str, Any]:
    id_ = secrets.token_hex(CALL_ID_LENGTH)[:CALL_ID_LENGTH]
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": ""}}
