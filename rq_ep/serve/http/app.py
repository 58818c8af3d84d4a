"""The ASGI application: the routes of the model and of expert parallelism, health, metrics, and errors."""

from collections.abc import Collection
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import ASGIApp

from rq_ep.core.errors import nearest
from rq_ep.serve.http.ep_routes import add_ep_routes
from rq_ep.serve.http.guards import HeadAsGet, KeyGuard, OriginGuard
from rq_ep.serve.http.model_routes import add_model_routes
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.openapi import describe
from rq_ep.serve.http.openai.request_body import CLIENT_CLOSED_REQUEST, BodyReader
from rq_ep.serve.http.service import Service


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
    bodies = BodyReader(max_body_bytes)
    add_model_routes(app, service, bodies)
    add_ep_routes(app, service, bodies)
    _add_status(app, service)
    _answer_errors(app, service)

    def document() -> dict[str, Any]:
        return describe(app, service.model_name, None if service.limits is None else service.limits.vocab_size)

    app.openapi = document  # type: ignore[method-assign]
    guarded: ASGIApp = OriginGuard(HeadAsGet(app), allowed_origins)
    if api_keys:
        guarded = KeyGuard(guarded, api_keys)
    if allowed_origins:
        guarded = CORSMiddleware(guarded, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"])
    return guarded


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        if (reason := service.why_unavailable()) is not None:
            raise ApiError(503, reason)
        degradation, stall = service.members.degradation(), service.rebalancing.stall()
        status = {"status": "ok"} if degradation is None else {"status": "degraded", "reason": degradation}
        return status if stall is None else {**status, "rebalance": stall}

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


def _answer_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        if error.status != CLIENT_CLOSED_REQUEST:
            service.metrics.refused(error.status)
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(http: Request, error: HTTPException) -> Response:
        text, headers = f"{http.method} {http.url.path}: {error.detail}", error.headers
        if error.status_code == 404:
            paths = [path for route in app.routes if "{" not in (path := getattr(route, "path", "{"))]
            near = nearest(http.url.path, paths, likeness=0.8)
            text += ": /openapi.json has the routes" if near is None else f": did you mean {near}?"
        elif error.status_code == 405:
            methods = ", ".join(allowed_methods(http))
            text, headers = f"{text}: use {methods}", {"Allow": methods}
        return await on_api_error(http, ApiError(error.status_code, text, headers=headers))

    def allowed_methods(http: Request) -> list[str]:
        """Of all routes that have the path: Starlette would name those of the first."""
        matching = [route for route in app.routes if route.matches(http.scope)[0] is not Match.NONE]
        methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
        return sorted(methods | ({"HEAD"} if "GET" in methods else set()))

    @app.exception_handler(Exception)
    async def on_bug(http: Request, error: Exception) -> Response:
        return await on_api_error(http, ApiError(500, f"internal error: {type(error).__name__}"))
