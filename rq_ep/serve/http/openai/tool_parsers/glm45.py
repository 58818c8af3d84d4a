"""Calls as GLM-4.5 writes them: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>`."""

import json

from rq_ep.serve.http.openai.tool_parsers.answer_text import (
    AnswerText,
    Arguments,
    CallStart,
    Content,
    MalformedCall,
    Parsing,
)
from rq_ep.serve.http.openai.tool_parsers.hermes import CLOSING, OPENING
from rq_ep.serve.http.openai.tool_parsers.tagged_arguments import Schemas, argument

KEY, END_OF_KEY = "<arg_key>", "</arg_key>"
VALUE, END_OF_VALUE = "<arg_value>", "</arg_value>"


def read_glm45(text: AnswerText, schemas: Schemas) -> Parsing[None]:
    while (yield from text.until(Content, OPENING)) == OPENING:
        written, mark = yield from text.before(KEY, CLOSING)
        name = written.strip()
        if mark and name and not set(name) & set(" \n{<"):
            yield CallStart(name)
            yield from _arguments(text, OPENING + written, mark, name, schemas)
        else:
            yield Content(OPENING + written + mark)


def _arguments(text: AnswerText, raw: str, mark: str, name: str, schemas: Schemas) -> Parsing[None]:
    before = "{"  # an argument
    while (raw := raw + mark).endswith(KEY):
        key, mark = yield from text.before(END_OF_KEY, CLOSING)
        raw += key + mark
        value_tag = (yield from text.skip(VALUE)) if mark == END_OF_KEY else ""
        raw += value_tag
        value, mark = (yield from text.before(END_OF_VALUE, CLOSING)) if value_tag else ("", "")
        raw += value + mark
        if mark != END_OF_VALUE:
            mark = ""
            break
        typed = argument(schemas, name, key.strip(), value)
        yield Arguments(f"{before}{json.dumps(key.strip())}: {json.dumps(typed, ensure_ascii=False)}")
        before = ", "
        mark = yield from text.skip(KEY, CLOSING)
    if mark.endswith(CLOSING):
        yield Arguments("{}" if before == "{" else "}")
    else:
        yield MalformedCall(raw)
