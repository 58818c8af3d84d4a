"""Calls as Mistral writes them: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}`."""

import re

from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Content, Parsing
from rq_ep.serve.http.openai.tool_parsers.json_calls import json_calls, named_call

OPENING = "[TOOL_CALLS]"
CALL_ID, ARGUMENTS = "[CALL_ID]", "[ARGS]"
HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*\{")


def read_mistral(text: AnswerText) -> Parsing[None]:
    while opening := (yield from text.until(Content, OPENING)):
        if bracket := (yield from text.skip("[")):
            yield from json_calls(text, opening + bracket)
        else:
            yield from named_call(text, opening, HEAD)
