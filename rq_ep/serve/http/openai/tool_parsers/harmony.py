"""Answers in Harmony, as gpt-oss writes them: messages in channels, of which one is the final answer.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{"a": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

The format is OpenAI's (https://cookbook.openai.com/articles/openai-harmony). Analysis is reasoning; commentary that
calls no function is for the user. Its own library loads its vocabulary from the network, so that text is parsed here.
"""

import re

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
from rq_ep.serve.http.openai.tool_parsers.json_calls import parse_object
from rq_ep.serve.http.openai.tool_parsers.message_parser import Reader

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
RECIPIENT = "to="
FUNCTION = re.compile(r"to=functions\.([\w.-]+)")
CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyReasoning:
    """Reasoning in the channel of analysis."""

    marks = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
    closing = (CHANNEL, "final", MESSAGE)

    def opening(self, prompt_end: str) -> str | None:
        return None if prompt_end.endswith(MESSAGE) else ""

    def reader(self, prompt_end: str, before_form: bool = False) -> Reader:
        return lambda text: _read(text, takes_calls=False, stops_at_final=before_form)


def read_harmony(text: AnswerText) -> Parsing[None]:
    """Read a whole answer, with calls and reasoning."""
    yield from _read(text, takes_calls=True)


def _read(text: AnswerText, takes_calls: bool, stops_at_final: bool = False) -> Parsing[None]:
    while mark := (yield from text.skip(CHANNEL, RECIPIENT, START)):
        header, end = yield from text.before(MESSAGE)
        header = mark + header
        channel = CHANNEL_NAME.search(header)
        function = FUNCTION.search(header)
        if not end:
            yield Content(header)
        elif function is not None and takes_calls:
            yield from _call(text, function[1], header + end)
        elif channel is None or channel[1] != "analysis":
            if stops_at_final and channel is not None and channel[1] == "final":
                return
            yield from text.until(Content, *ENDS)
        else:
            yield from text.until(Reasoning, *ENDS)


def _call(text: AnswerText, name: str, raw: str) -> Parsing[None]:
    pieces: list[str] = []

    def arguments(piece: str) -> Part:
        pieces.append(piece)
        return Arguments(piece)

    yield CallStart(name)
    end = yield from text.until(arguments, *ENDS)
    if parse_object("".join(pieces)) is None:
        yield MalformedCall("".join([raw, *pieces, end]))
