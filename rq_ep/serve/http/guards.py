"""ASGI middleware before the routes: API keys, pages of other sites, and HEAD."""

import hmac
from collections.abc import Collection
from hashlib import sha256
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from rq_ep.serve.http.openai.api_errors import ApiError

OPEN_PATHS = {"/health", "/livez", "/metrics", "/version", "/dashboard", "/openapi.json"}  # for probes and scrapers
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


class KeyGuard:
    """Lets requests through that carry a key as OpenAI's clients do, `Authorization: Bearer KEY`, or need none."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self.app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            text = "the API key is wrong or missing: send `Authorization: Bearer KEY` (--api-key)"
            refusal = ApiError(401, text, headers={"WWW-Authenticate": "Bearer"})
            await refusal.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = sha256(given.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, for equal time
        return scheme.lower() == b"bearer" and any(matches)


class OriginGuard:
    """Refuses requests with an effect that a page of another site has a browser send.

    Browsers name the origin of the page in them, other clients name none. The server's own page is one whose origin is
    the address that the request went to; a name in place of the address may be the other site's, made to point here.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS and not self._may_send(scope):
            text = "a page of another site may not send this: name its origin in --allowed-origins"
            await ApiError(403, text).response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _may_send(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        if b"origin" not in headers:
            return True
        origin = headers[b"origin"].decode("latin-1")
        if self._allowed & {origin, "*"}:
            return True
        try:
            url = urlsplit(origin)
            if url.hostname != "localhost":
                ip_address(url.hostname or "")
            return bool(url.netloc == headers.get(b"host", b"").decode("latin-1"))
        except ValueError:  # it is no URL, or has a name
            return False


class HeadAsGet:
    """Has HEAD answered as GET is; the server leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)
