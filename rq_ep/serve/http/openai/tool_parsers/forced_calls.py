"""Calls that `tool_choice` demands: their form is a grammar's, the same for every model."""

from collections.abc import Mapping
from typing import Any

from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Arguments, CallStart, Content, Parsing
from rq_ep.serve.http.openai.tool_parsers.json_calls import json_calls


def calls_schema(schemas: Mapping[str, Mapping[str, Any]], max_calls: int | None) -> dict[str, Any]:
    """The JSON schema of a list of calls, in vLLM's form.

    Args:
        schemas: of the parameters of each function.
        max_calls: at most so many.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "parameters": _moved(schema, f"/items/anyOf/{number}/properties/parameters"),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, (name, schema) in enumerate(schemas.items())
    ]
    bound = {} if max_calls is None else {"maxItems": max_calls}
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **bound}


def read_named(text: AnswerText, name: str) -> Parsing[None]:
    """The answer is the arguments of one function."""
    yield CallStart(name)
    yield from text.until(Arguments)


def read_required(text: AnswerText) -> Parsing[None]:
    """The answer is a list of calls."""
    if opening := (yield from text.skip("[")):
        yield from json_calls(text, opening)
    yield from text.until(Content)


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts lead there from the schema at whose `place` it stands."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: f"#{place}{value[1:]}"
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }
