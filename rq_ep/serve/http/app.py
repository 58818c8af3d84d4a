"""The ASGI application: OpenAI's routes, health, metrics, and the errors of all."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp

from rq_ep.serve.http.ep_routes import ep_routes
from rq_ep.serve.http.guards import BodyLimit, KeyGuard
from rq_ep.serve.http.metrics import RequestMetrics
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.chunks import Chunk
from rq_ep.serve.http.openai.openapi import describe
from rq_ep.serve.http.openai.responses import ResponseBuilder
from rq_ep.serve.http.openai.schemas import ChatBody, CompletionBody, GenerationBody
from rq_ep.serve.http.service import Service

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody is there to read it


def make_app(service: Service, max_body_bytes: int, api_key: str | None = None) -> ASGIApp:
    """The ASGI application in front of a service.

    Args:
        service: answers the requests.
        max_body_bytes: longest request body.
        api_key: the key that requests under /v1 must carry; None: they need none.
    """
    app = FastAPI(title="rq_ep", version=version("rq_ep"), docs_url=None, redoc_url=None)
    created = int(time.time())

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        times = service.metrics.arrival()
        service.check(body)
        return await respond(http, body, await service.completion_prompt(body), times)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        times = service.metrics.arrival()
        service.check(body)
        return await respond(http, body, await service.chat_prompt(body), times)

    async def respond(http: Request, body: GenerationBody, prompt_ids: list[int], times: RequestMetrics) -> Response:
        request = service.request(prompt_ids, body)
        response = ResponseBuilder(request, service.model_name, isinstance(body, ChatBody), service.token_text)
        chunks = service.chunks(request, body, times)
        if not body.stream:
            return JSONResponse(await unless_disconnected(http, response.whole(chunks)))
        # The first chunk is awaited before the status is sent, so that a refusal is a status and not an event.
        first: Chunk = await unless_disconnected(http, anext(chunks))  # type: ignore[arg-type]
        events = response.stream(_chain(first, chunks), body.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model_name:
            raise ApiError(404, f"there is no model {name!r} here: this server serves {service.model_name!r}", "model")
        return card()

    def card() -> dict[str, Any]:
        limit = None if service.limits is None else service.limits.max_model_len
        about = {"id": service.model_name, "object": "model", "created": created, "owned_by": "rq_ep"}
        return {**about, "max_model_len": limit}

    @app.get("/health")
    async def health() -> dict[str, str]:
        if (reason := service.why_unavailable()) is not None:
            raise ApiError(503, reason)
        return {"status": "ok"}

    app.include_router(ep_routes(service))

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def get_version() -> dict[str, str]:
        return {"version": version("rq_ep")}

    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        return service.info

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        if error.status != CLIENT_CLOSED_REQUEST:
            service.metrics.refused(error.status)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return await on_api_error(_, _describe(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(http: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # of BodyLimit, met while FastAPI read the body
            return await on_api_error(http, error.__cause__)
        if error.status_code == 400:  # FastAPI could not read the body
            return await on_api_error(http, ApiError(400, "the body is not valid JSON in UTF-8"))
        text = f"{http.method} {http.url.path}: {error.detail}"
        return await on_api_error(http, ApiError(error.status_code, text, headers=error.headers))

    @app.exception_handler(Exception)
    async def on_bug(http: Request, error: Exception) -> Response:
        return await on_api_error(http, ApiError(500, f"internal error: {type(error).__name__}"))

    app.openapi = lambda: describe(app, service.model_name)  # type: ignore[method-assign]
    guarded = BodyLimit(app, max_body_bytes)
    return guarded if api_key is None else KeyGuard(guarded, api_key)


async def _chain(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for chunk in rest:
            yield chunk


async def unless_disconnected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client hangs up first; then it is cancelled, and with it the request on its rank."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection")
    finally:
        disconnected.cancel()
        task.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _describe(error: RequestValidationError) -> ApiError:
    """The first error of a body, in one sentence.

    A value that may have several types is compared with each: the errors of the types that it does not have come last.
    """
    first = min(error.errors(), key=lambda item: item["type"].endswith("_type"))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    param, *inside = first["loc"][1:] or (None,)
    place = ".".join(str(part) for part in (param, *inside) if part is not None and "[" not in str(part))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {place!r}", param)
    if first["type"] == "missing":
        return ApiError(400, f"{place or 'a JSON body'} is required", param)
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    return ApiError(400, f"{place}: {first['msg']}", param)
