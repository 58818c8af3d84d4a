"""JSON schemas of the bodies of answers, field by field, for the OpenAPI document."""

from collections.abc import Collection
from typing import Any

from rq_ep.serve.http.openai.api_errors import TYPES

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def list_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def record(_optional: Collection[str] = (), **fields: Schema) -> Schema:
    """An object of these fields and no others, of which the optional ones may be missing."""
    required = [name for name in fields if name not in _optional]
    return {"type": "object", "required": required, "properties": fields, "additionalProperties": False}


ERROR = record(
    error=record(
        message=TEXT, type={"enum": sorted(set(TYPES.values()))}, param=or_null(TEXT), code={"enum": sorted(TYPES)}
    )
)

USAGE = record(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
FINISH_REASON: Schema = {"enum": ["stop", "length", "tool_calls"]}

COMPLETION_LOGPROBS = record(
    tokens=list_of(TEXT),
    token_logprobs=list_of(or_null(NUMBER)),
    top_logprobs=list_of(or_null({"type": "object", "additionalProperties": NUMBER})),
    text_offset=list_of(COUNT),
)
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": list_of({"type": "integer", "minimum": 0, "maximum": 255})}
CHAT_LOGPROBS = record(
    content=list_of(record(**_TOKEN, top_logprobs=list_of(record(**_TOKEN)))), refusal={"type": "null"}
)
_FUNCTION = {"name": TEXT, "arguments": TEXT}
_REASONING = {"reasoning_content": TEXT, "reasoning": TEXT}
MESSAGE = record(
    (*_REASONING, "tool_calls"),
    role={"const": "assistant"},
    content=or_null(TEXT),
    refusal={"type": "null"},
    **_REASONING,
    tool_calls=list_of(record(id=TEXT, type={"const": "function"}, function=record(**_FUNCTION))),
)
DELTA = record(
    ("role", "content", *_REASONING, "tool_calls"),
    role={"const": "assistant"},
    content=TEXT,
    **_REASONING,
    tool_calls=list_of(
        record(
            ("id", "type"), index=COUNT, id=TEXT, type={"const": "function"}, function=record(("name",), **_FUNCTION)
        )
    ),
)


def _answer(kind: str, usage: Schema, logprobs: Schema, finish_reason: Schema, **added: Schema) -> Schema:
    """A whole answer or a chunk of one, whose choices have these fields."""
    shared = {"index": COUNT, "finish_reason": finish_reason, "logprobs": or_null(logprobs)}
    at_end = {"stop_reason": {"anyOf": [TEXT, COUNT, {"type": "null"}]}, "routed_experts": TEXT}
    choice = record(tuple(at_end), **shared, **added, **at_end)
    optional = ("usage",) if usage is not USAGE else ()
    return record(
        optional, id=TEXT, object={"const": kind}, created=COUNT, model=TEXT, choices=list_of(choice), usage=usage
    )  # fmt: skip


MODEL = record(
    id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, root=TEXT, parent={"type": "null"},
    max_model_len=or_null(COUNT),
)  # fmt: skip

# By name, as the document has them.
ANSWERS = {
    "Error": ERROR,
    "Completion": _answer("text_completion", USAGE, COMPLETION_LOGPROBS, FINISH_REASON, text=TEXT),
    "CompletionChunk": _answer(
        "text_completion", or_null(USAGE), COMPLETION_LOGPROBS, or_null(FINISH_REASON), text=TEXT
    ),
    "ChatCompletion": _answer("chat.completion", USAGE, CHAT_LOGPROBS, FINISH_REASON, message=MESSAGE),
    "ChatCompletionChunk": _answer(
        "chat.completion.chunk", or_null(USAGE), CHAT_LOGPROBS, or_null(FINISH_REASON), delta=DELTA
    ),
    "Tokens": record(
        count=COUNT, max_model_len=COUNT, tokens=list_of(COUNT), token_strs=or_null(list_of(TEXT))
    ),
    "Text": record(prompt=TEXT),
    "Models": record(object={"const": "list"}, data=list_of(MODEL)),
    "Model": MODEL,
}  # fmt: skip

# Operation -> name of the body of status 200,
BODIES = {
    "POST /v1/completions": "Completion",
    "POST /v1/chat/completions": "ChatCompletion",
    "POST /tokenize": "Tokens",
    "POST /detokenize": "Text",
    "GET /v1/models": "Models",
    "GET /v1/models/{name}": "Model",
}
# and of an event of a stream.
EVENTS = {"POST /v1/completions": "CompletionChunk", "POST /v1/chat/completions": "ChatCompletionChunk"}
