"""The ASGI application: OpenAI's routes, health, metrics, and the errors of all."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Match
from starlette.types import ASGIApp

from rq_ep.core.errors import nearest
from rq_ep.serve.http.ep_routes import ep_routes
from rq_ep.serve.http.guards import HeadAsGet, KeyGuard, OriginGuard
from rq_ep.serve.http.metrics import RequestMetrics
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.choices import merged
from rq_ep.serve.http.openai.chunks import Chunk
from rq_ep.serve.http.openai.openapi import body_schema, describe
from rq_ep.serve.http.openai.request_body import CLIENT_CLOSED_REQUEST, BodyReader, unless_disconnected
from rq_ep.serve.http.openai.responses import ResponseBuilder
from rq_ep.serve.http.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from rq_ep.serve.http.prompt_reader import EncodedPrompt
from rq_ep.serve.http.service import Service

Body = TypeVar("Body", bound=GenerationBody)
TokenBody = TypeVar("TokenBody", TokenizeBody, DetokenizeBody)


def make_app(
    service: Service, max_body_bytes: int, api_keys: Collection[str] = (), allowed_origins: Collection[str] = ()
) -> ASGIApp:
    """The ASGI application in front of a service.

    Args:
        service: answers the requests.
        max_body_bytes: longest request body.
        api_keys: requests must carry one of them, if there are any.
        allowed_origins: of pages of other sites that may send requests; `*`: all of them.
    """
    app = FastAPI(title="rq_ep", version=version("rq_ep"), docs_url=None, redoc_url=None)
    created = int(time.time())
    bodies = BodyReader(max_body_bytes)

    @app.post("/v1/completions", openapi_extra=body_schema(CompletionBody))
    async def completions(http: Request) -> Response:
        return await respond(http, CompletionBody, lambda body: service.prompts.of_completion(body))

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody))
    async def chat_completions(http: Request) -> Response:
        return await respond(http, ChatBody, lambda body: service.prompts.of_chat(body))

    async def respond(
        http: Request, kind: type[Body], prompts: Callable[[Body], Awaitable[list[EncodedPrompt]]]
    ) -> Response:
        times = service.metrics.arrival()
        service.check_available()
        body = await bodies.read(http, kind)
        service.check_model(body)
        return await unless_disconnected(http, answer(body, prompts(body), times))

    async def answer(body: GenerationBody, prompts: Awaitable[list[EncodedPrompt]], times: RequestMetrics) -> Response:
        requests = await service.request_factory.make(await prompts, body)
        response = ResponseBuilder(
            requests, service.model_name, service.message_parsers(requests, body), body.n, body.num_tries,
            body.num_logprobs is not None, body.return_routed_experts,
        )  # fmt: skip
        chunks = merged(service.answers(requests, body, times))
        if not body.stream:
            return await response.whole(chunks)
        # The first chunk is awaited before the status is sent, so that a refusal is a status and not an event.
        events = response.stream(_chain(await anext(chunks), chunks), body.usage_options)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold tokens back
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    @app.post("/tokenize", openapi_extra=body_schema(TokenizeBody))
    async def tokenize(http: Request) -> dict[str, Any]:
        return await convert(http, TokenizeBody, lambda body: service.prompts.tokenize(body))

    @app.post("/detokenize", openapi_extra=body_schema(DetokenizeBody))
    async def detokenize(http: Request) -> dict[str, Any]:
        return await convert(http, DetokenizeBody, lambda body: service.prompts.detokenize(body))

    async def convert(
        http: Request, kind: type[TokenBody], work: Callable[[TokenBody], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        service.check_available()
        body = await bodies.read(http, kind)
        service.check_model(body)
        return await unless_disconnected(http, work(body))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model_name:
            raise service.no_such_model(name)
        return card()

    def card() -> dict[str, Any]:
        limit = None if service.limits is None else service.limits.max_model_len
        about = {"id": service.model_name, "object": "model", "created": created, "owned_by": "rq_ep"}
        return {**about, "root": service.model_root, "parent": None, "max_model_len": limit}  # as vLLM's

    @app.get("/health")
    async def health() -> dict[str, str]:
        if (reason := service.why_unavailable()) is not None:
            raise ApiError(503, reason)
        degradation, stall = service.members.degradation(), service.rebalancing.stall()
        status = {"status": "ok"} if degradation is None else {"status": "degraded", "reason": degradation}
        return status if stall is None else {**status, "rebalance": stall}

    about_ep = ep_routes(service, bodies)
    app.include_router(about_ep)

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

    @app.exception_handler(HTTPException)
    async def on_http_error(http: Request, error: HTTPException) -> Response:
        text, headers = f"{http.method} {http.url.path}: {error.detail}", error.headers
        if error.status_code == 404:
            paths = [path for route in routes() if "{" not in (path := getattr(route, "path", "{"))]
            near = nearest(http.url.path, paths, likeness=0.8)
            text += ": /openapi.json has the routes" if near is None else f": did you mean {near}?"
        elif error.status_code == 405:
            methods = ", ".join(allowed_methods(http))
            text, headers = f"{text}: use {methods}", {"Allow": methods}
        return await on_api_error(http, ApiError(error.status_code, text, headers=headers))

    def routes() -> list[Any]:
        return [*app.routes, *about_ep.routes]

    def allowed_methods(http: Request) -> list[str]:
        """Of all routes that have the path: Starlette would name those of the first."""
        matching = [route for route in routes() if route.matches(http.scope)[0] is not Match.NONE]
        methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
        return sorted(methods | ({"HEAD"} if "GET" in methods else set()))

    @app.exception_handler(Exception)
    async def on_bug(http: Request, error: Exception) -> Response:
        return await on_api_error(http, ApiError(500, f"internal error: {type(error).__name__}"))

    def document() -> dict[str, Any]:
        return describe(app, service.model_name, None if service.limits is None else service.limits.vocab_size)

    app.openapi = document  # type: ignore[method-assign]
    guarded: ASGIApp = OriginGuard(HeadAsGet(app), allowed_origins)
    if api_keys:
        guarded = KeyGuard(guarded, api_keys)
    if allowed_origins:
        guarded = CORSMiddleware(guarded, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"])
    return guarded


async def _chain(first: tuple[int, Chunk], rest: AsyncIterator[tuple[int, Chunk]]) -> AsyncIterator[tuple[int, Chunk]]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for chunk in rest:
            yield chunk
