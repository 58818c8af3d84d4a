"""ASGI middleware before the routes: the API key, and the size of bodies."""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rq_ep.serve.http.openai.api_errors import ApiError


class KeyGuard:
    """Lets requests under /v1 through that carry the key as OpenAI's clients do: `Authorization: Bearer KEY`.

    Health, metrics and version stay open, for probes and scrapers.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                text = "the API key is wrong or missing: send `Authorization: Bearer KEY` (--api-key)"
                refusal = ApiError(401, text, headers={"WWW-Authenticate": "Bearer"})
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies beyond a size, by their header or, without one, while they are read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = ApiError(413, f"the body is longer than {self.max_bytes} bytes (--max-body-bytes)")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await too_large.response()(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise too_large
            return message

        await self.app(scope, counted, send)
