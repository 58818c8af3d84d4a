"""Calls as Qwen3-Coder writes them: `<tool_call><function=name><parameter=key>value</parameter></function>...`."""

import json

from rq_ep.serve.http.openai.tool_parsers.answer_text import (
    AnswerText,
    Arguments,
    CallStart,
    Content,
    MalformedCall,
    Parsing,
)
from rq_ep.serve.http.openai.tool_parsers.tagged_arguments import Schemas, argument

OPENING, CLOSING = "<tool_call>", "</tool_call>"
FUNCTION, END_OF_FUNCTION = "<function=", "</function>"
PARAMETER, END_OF_PARAMETER = "<parameter=", "</parameter>"


def read_qwen3_coder(text: AnswerText, schemas: Schemas) -> Parsing[None]:
    """The opening `<tool_call>` may be missing, as the model forgets it at times."""
    while opening := (yield from text.until(Content, OPENING, FUNCTION)):
        if opening == OPENING:
            opening += yield from text.skip(FUNCTION)
        if opening == OPENING:
            yield Content(opening)
        else:
            yield from _call(text, opening, schemas)


def _call(text: AnswerText, raw: str, schemas: Schemas) -> Parsing[None]:
    name, mark = yield from text.before(">", CLOSING)
    raw += name + mark
    if mark != ">" or not name:
        yield Content(raw)
        return
    yield CallStart(name)
    before = "{"  # an argument
    mark = yield from text.skip(PARAMETER, END_OF_FUNCTION)
    while (raw := raw + mark).endswith(PARAMETER):
        key, mark = yield from text.before(">", CLOSING)
        raw += key + mark
        if mark != ">":
            yield MalformedCall(raw)
            return
        value, mark = yield from text.before(END_OF_PARAMETER, PARAMETER, END_OF_FUNCTION, CLOSING)
        if mark in ("", CLOSING):
            yield MalformedCall(raw + value + mark)
            return
        raw += value
        typed = argument(schemas, name, key, value.removeprefix("\n").removesuffix("\n"))
        yield Arguments(f"{before}{json.dumps(key)}: {json.dumps(typed, ensure_ascii=False)}")
        before = ", "
        if mark == END_OF_PARAMETER:
            raw += mark
            mark = yield from text.skip(PARAMETER, END_OF_FUNCTION)
    if mark.endswith(END_OF_FUNCTION):
        yield Arguments("{}" if before == "{" else "}")
        yield from text.skip(CLOSING)
    else:
        rest, mark = yield from text.before(CLOSING)
        yield MalformedCall(raw + rest + mark)
