"""ASGI middleware before the routes: the API key."""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

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
