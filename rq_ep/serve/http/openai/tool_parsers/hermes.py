"""Calls as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Content, Parsing
from rq_ep.serve.http.openai.tool_parsers.json_calls import json_call

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def read_hermes(text: AnswerText) -> Parsing[None]:
    while (yield from text.until(Content, OPENING)) == OPENING:
        yield from json_call(text, OPENING, CLOSING)
