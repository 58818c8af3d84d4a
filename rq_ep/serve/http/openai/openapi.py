"""The OpenAPI document: the one that FastAPI derives from the routes, with our responses in place of its own."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from rq_ep.serve.http.openai.api_errors import TYPES
from rq_ep.serve.http.openai.bodies.body import Body
from rq_ep.serve.http.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    RanksBody,
    RebalanceBody,
    TokenizeBody,
)

SCHEMA_REF = "#/components/schemas/{model}"

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": sorted(set(TYPES.values()))},
                "param": {"type": ["string", "null"]},
                "code": {"enum": sorted(TYPES)},
            },
        }
    },
}

EVENTS = "where `stream` is true: events whose data is a chunk of the answer as JSON, the last one `[DONE]`"

# Which errors a route can answer with, by the beginning of its path; 401 is the guard's.
STATUSES = {
    "/v1/completions": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/v1/chat/completions": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/tokenize": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/detokenize": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/v1/ep/record": (400, 401, 403, 409, 500, 503),
    "/v1/ep/rebalance": (400, 401, 403, 408, 409, 413, 415, 500, 503),
    "/v1/ep/ranks": (400, 401, 403, 408, 409, 413, 415, 500, 503),
    "/v1/ep": (401, 503),
    "/v1/models/": (401, 404),
    "/v1/models": (401,),
    "/server_info": (401,),
    "/health": (503,),
}


def body_schema(kind: type[Body]) -> dict[str, Any]:
    """What a route says of its body, which it reads itself."""
    content = {"application/json": {"schema": {"$ref": SCHEMA_REF.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, model_name: str) -> dict[str, Any]:
    """The OpenAPI document of the app, which names the one model there is."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    kinds = (CompletionBody, ChatBody, RebalanceBody, RanksBody, TokenizeBody, DetokenizeBody)
    _, bodies = models_json_schema([(kind, "validation") for kind in kinds], ref_template=SCHEMA_REF)
    schemas = {**bodies["$defs"], "Error": ERROR}
    document["components"] = {"schemas": schemas}
    for name in ("CompletionBody", "ChatBody"):
        schemas[name]["properties"]["model"]["enum"] = [model_name]
    for path, operations in document["paths"].items():
        statuses = next((codes for start, codes in STATUSES.items() if path.startswith(start)), ())
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)
            answers |= {str(status): _error(TYPES[status]) for status in statuses}
            if path.endswith("completions"):
                answers["200"]["content"]["text/event-stream"] = {"schema": {"description": EVENTS}}
            if path == "/metrics":
                answers["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return document


def _error(kind: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {"description": kind.replace("_", " "), "content": {"application/json": schema}}
