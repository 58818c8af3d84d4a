"""The grammar that a body wants its answers to follow: a JSON schema, a regular expression, a choice of texts.

`response_format` is OpenAI's, `structured_outputs` vLLM's. llguidance writes grammars, and says what it does not know.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from llguidance import LLMatcher, grammar_from
from pydantic import ConfigDict, Field, model_validator

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.body import Body, exactly_one

ANY_OBJECT: dict[str, Any] = {"type": "object"}
MAX_GUIDE_CHARS = 1 << 18


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedJsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedJsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """One of vLLM's ways to say what an answer is to look like."""

    model_config = ConfigDict(json_schema_extra=exactly_one("json", "regex", "choice", "grammar", "json_object"))
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=1000)
    grammar: str | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def check_there_is_one(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of json, regex, choice, grammar, json_object")
        return self


Guide = ResponseFormat | StructuredOutputs | Mapping[str, Any]


def answer_grammar(wanted: Guide, param: str) -> str | None:
    """The grammar in llguidance's form; None: any text will do. Takes time for a large one.

    Args:
        wanted: what a body says, or a JSON schema.
        param: where it says so.

    Raises:
        ApiError: it makes no grammar.
    """
    kind: Literal["json_schema", "regex", "choice", "grammar"]
    match wanted:
        case TextFormat():
            return None
        case JsonObjectFormat():
            kind, text = "json_schema", json.dumps(ANY_OBJECT)
        case JsonSchemaFormat():
            kind, text = "json_schema", json.dumps(wanted.json_schema.schema_)
        case StructuredOutputs(regex=str() as regex):
            kind, text = "regex", regex
        case StructuredOutputs(choice=list() as choice):
            kind, text = "choice", json.dumps(choice)
        case StructuredOutputs(grammar=str() as grammar):
            kind, text = "grammar", grammar
        case StructuredOutputs(json_=str() as schema):
            kind, text = "json_schema", schema
        case StructuredOutputs():
            kind, text = "json_schema", json.dumps(wanted.json_ or ANY_OBJECT)
        case Mapping():
            kind, text = "json_schema", json.dumps(wanted)
    if len(text) > MAX_GUIDE_CHARS:
        raise ApiError(400, f"{param}: {len(text)} characters, at most {MAX_GUIDE_CHARS} are taken", param)
    try:
        made: str = grammar_from(kind, text)
        problem = LLMatcher.validate_grammar(made)
    except (ValueError, RecursionError) as error:  # it is not JSON, or not GBNF
        problem = str(error)
    if problem:
        raise ApiError(400, f"{param}: {' '.join(problem.split())[:300]}", param)
    return made
