"""The OpenAPI document: the one that FastAPI derives from the routes, with our responses in place of its own."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from rq_ep.serve.http.openai.api_errors import TYPES
from rq_ep.serve.http.openai.bodies.answer_schemas import ANSWERS, BODIES, EVENTS
from rq_ep.serve.http.openai.bodies.body import Body
from rq_ep.serve.http.openai.bodies.ep_bodies import RanksBody, RebalanceBody
from rq_ep.serve.http.openai.bodies.ep_schemas import EP_ANSWERS, EP_BODIES
from rq_ep.serve.http.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

SCHEMA_REF = "#/components/schemas/{model}"

# Which errors a route can answer with, by the beginning of its path; 401 is the guard's.
STATUSES = {
    "/v1/completions": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/v1/chat/completions": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/tokenize": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/detokenize": (400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
    "/v1/ep/record": (401, 403, 409, 500, 503),
    "/v1/ep/rebalance": (400, 401, 403, 408, 409, 413, 415, 500, 503),
    "/v1/ep/ranks": (400, 401, 403, 404, 408, 409, 413, 415, 500, 503),
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


def describe(app: FastAPI, model_name: str, vocab_size: int | None) -> dict[str, Any]:
    """The OpenAPI document of the app, which names the one model there is and, once it is known, its last token."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    kinds = (CompletionBody, ChatBody, RebalanceBody, RanksBody, TokenizeBody, DetokenizeBody)
    _, bodies = models_json_schema([(kind, "validation") for kind in kinds], ref_template=SCHEMA_REF)
    schemas = {**bodies["$defs"], **ANSWERS, **EP_ANSWERS}
    document["components"] = {"schemas": schemas}
    for name in ("CompletionBody", "ChatBody"):
        schemas[name]["properties"]["model"]["enum"] = [model_name]
    document["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"]["enum"] = [model_name]
    if vocab_size is not None:
        schemas["TokenId"]["maximum"] = vocab_size - 1
    for path, operations in document["paths"].items():
        statuses = next((codes for start, codes in STATUSES.items() if path.startswith(start)), ())
        for method, operation in operations.items():
            name = f"{method.upper()} {path}"
            answers = operation["responses"]
            answers.pop("422", None)
            answers |= {str(status): _error(TYPES[status]) for status in statuses}
            if (body := BODIES.get(name) or EP_BODIES.get(name)) is not None:
                answers["200"]["content"]["application/json"] = {"schema": {"$ref": SCHEMA_REF.format(model=body)}}
            if (chunk := EVENTS.get(name)) is not None:
                answers["200"]["content"]["text/event-stream"] = {"schema": _event(chunk)}
            if path == "/metrics":
                answers["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return document


def _event(chunk: str) -> dict[str, Any]:
    """An event of a stream: a chunk, or an error, after which there is no other; the last one is the end mark."""
    shown = {"anyOf": [{"$ref": SCHEMA_REF.format(model=name)} for name in (chunk, "Error")]}
    data = [{"type": "string", "contentMediaType": "application/json", "contentSchema": shown}, {"const": "[DONE]"}]
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": data}}}


def _error(kind: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {"description": kind.replace("_", " "), "content": {"application/json": schema}}
