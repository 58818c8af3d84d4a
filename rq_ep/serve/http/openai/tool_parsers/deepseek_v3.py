"""Calls as DeepSeek writes them: V3 and R1 with the arguments in a block of code, V3.1 behind the name."""

import re

from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Content, Parsing
from rq_ep.serve.http.openai.tool_parsers.json_calls import named_call


def _mark(words: str) -> str:
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


CALLS, END_OF_CALLS = _mark("tool calls begin"), _mark("tool calls end")
CALL, SEPARATOR, END_OF_CALL = _mark("tool call begin"), _mark("tool sep"), _mark("tool call end")
MARKS = (CALLS, END_OF_CALLS, CALL, SEPARATOR, END_OF_CALL)

BLOCK = "```json"
V3_HEAD = re.compile(rf"\s*function{re.escape(SEPARATOR)}([^\s{{]+)\s*{BLOCK}\s*\{{")
V31_HEAD = re.compile(rf"\s*([^\s{{]+?)\s*{re.escape(SEPARATOR)}\s*\{{")


def read_deepseek_v3(text: AnswerText) -> Parsing[None]:
    yield from _read(text, V3_HEAD)


def read_deepseek_v31(text: AnswerText) -> Parsing[None]:
    yield from _read(text, V31_HEAD)


def _read(text: AnswerText, head: re.Pattern[str]) -> Parsing[None]:
    while opening := (yield from text.until(Content, CALLS)):
        while mark := (yield from text.skip(CALL)):
            yield from named_call(text, opening + mark, head, END_OF_CALL)
            opening = ""
        end = yield from text.skip(END_OF_CALLS)
        if opening:
            yield Content(opening + end)
