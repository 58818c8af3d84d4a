"""Calls as Llama 3 writes them: the answer is `{"name": ..., "parameters": {...}}`, or several with `;` between."""

from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Content, Parsing
from rq_ep.serve.http.openai.tool_parsers.json_calls import json_call

TAG = "<|python_tag|>"


def read_llama3_json(text: AnswerText) -> Parsing[None]:
    opening = yield from text.skip(TAG)
    while (yield from text.follows("{")):
        is_call = yield from json_call(text, opening)
        opening = (yield from text.skip(";")) if is_call else ""
        if not is_call:
            break
    if opening:
        yield Content(opening)
    yield from text.until(Content)
