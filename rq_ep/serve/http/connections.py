"""Connections of clients: how many there may be, and how long each may keep the server waiting."""

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rq_ep.serve.http.openai.api_errors import ApiError

log = logging.getLogger(__name__)

EXTRA_CONNECTIONS = 1024  # beyond the requests that the server takes: probes, and clients between two requests
NUM_REFUSED = 64  # connections beyond the limit that are answered 503 at once; one more is closed without an answer
RESERVED_DESCRIPTORS = 256  # for files, for libraries, and for connections that are about to be closed
ACCEPTED_AT_ONCE = 32  # connections, before the server looks at those that it has
BACKLOG = 2048  # connections that wait to be accepted
TICKS_PER_S = 10  # of uvicorn
GRACE_S = 2.0  # at the end of the server, for clients to read what is left
YOUNG_S = 0.1  # the first bytes of a new connection may be on their way


class ConnectionLimits:
    """What the connections of a server share.

    Args:
        max_connections: a connection beyond so many takes the place of an idle one or, where none is idle, gets 503.
        timeout_s: how long a client may take to send the head of a request, to send its body, and to read a part of
            the answer.
    """

    def __init__(self, max_connections: int, timeout_s: float) -> None:
        self.max_connections = max_connections
        self.timeout_s = timeout_s
        self._idle_since_s: dict[ClientConnection, float] = {}  # the oldest first

    def sweep(self, connections: Iterable["ClientConnection"]) -> None:
        """End the connections that are beyond their time. Called about once a second."""
        now_s = time.monotonic()
        for connection in list(connections):
            if connection.wait_s(now_s) > self.timeout_s:
                connection.end()

    def note(self, connection: "ClientConnection") -> None:
        """Something has happened to a connection that may have made it idle or busy."""
        if connection.is_idle:
            self._idle_since_s.setdefault(connection, time.monotonic())
        else:
            self._idle_since_s.pop(connection, None)

    def close_an_idle_one(self) -> bool:
        """Make room for another connection, if there is one that has had no request under way for a while."""
        oldest = next(iter(self._idle_since_s.items()), None)
        if oldest is None or time.monotonic() - oldest[1] < YOUNG_S:
            return False
        oldest[0].transport.abort()
        self.note(oldest[0])
        return True


class ClientConnection(H11Protocol):
    """A connection of a client: uvicorn's, with deadlines, a limit, and a proper answer to what is no request."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._phase: object = None
        self._phase_start_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        num_others = len(self.connections)
        super().connection_made(transport)
        excess = num_others - self._limits.max_connections
        is_taken = excess < 0 or self._limits.close_an_idle_one()
        self._limits.note(self)
        if is_taken:
            return
        log.warning("%d connections of clients are open: one more is refused", num_others)
        if excess < NUM_REFUSED:
            self.app = _refuse_connection
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._limits.note(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limits.note(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._limits.note(self)

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        is_read = self.transport.get_write_buffer_size() == 0
        return self.conn.their_state is h11.IDLE and is_read and not self.transport.is_closing()

    def wait_s(self, now_s: float) -> float:
        """How long the server has waited for this client since it first saw so; 0: it does not wait."""
        num_unread = self.transport.get_write_buffer_size()
        is_waiting = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) or num_unread > 0
        phase = (self.cycle, self.conn.their_state, num_unread) if is_waiting else None
        if phase is None or phase != self._phase:
            self._phase, self._phase_start_s = phase, now_s
        return now_s - self._phase_start_s

    def end(self) -> None:
        """End the connection of a client that has taken too long."""
        if self.conn.their_state is h11.SEND_BODY:
            self._answer(ApiError(408, f"the body has not come within {self._limits.timeout_s:g} s (--http-timeout)"))
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        """The server ends: a request whose body has not come is not waited for."""
        if self.conn.their_state is h11.SEND_BODY:
            self._answer(ApiError(503, "the server has ended"))
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request at all. uvicorn's own raises if an answer is under way."""
        self._answer(ApiError(400, "this is not a valid HTTP/1.1 request"))

    def _answer(self, error: ApiError) -> None:
        """Answer with an error, if no answer is under way, and close the connection."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        response = error.response()
        headers = b"".join(b"%s: %s\r\n" % header for header in (*response.raw_headers, (b"connection", b"close")))
        status = f"{error.status} {HTTPStatus(error.status).phrase}".encode()
        self.transport.write(b"HTTP/1.1 %s\r\n%s\r\n%s" % (status, headers, response.body))
        self.transport.close()


async def _refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    text = "too many connections of clients are open: try later"
    await ApiError(503, text, headers={"Connection": "close"}).response()(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn with limits for its connections, and without its signal handlers: rank 0 says when to end."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits) -> None:
        config = uvicorn.Config(
            app, http=partial(ClientConnection, limits=limits), ws="none", lifespan="off",  # type: ignore[arg-type]
            log_level="warning", access_log=False, backlog=ACCEPTED_AT_ONCE,
        )  # fmt: skip
        super().__init__(config)
        self._limits = limits

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)  # asyncio has made it as short as the number that it accepts at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn's own timeout would cancel the answers, and log a traceback of each.
        asyncio.get_running_loop().call_later(GRACE_S, self._abort_connections)
        await super().shutdown(sockets)

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_PER_S == 0:
            self._limits.sweep(self.server_state.connections)  # type: ignore[arg-type]
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def choose_max_connections(max_queue_size: int, num_others: int) -> int:
    """How many clients may be connected: more than can have a request, within what this process may open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    wanted = max_queue_size + EXTRA_CONNECTIONS
    possible = max(most - RESERVED_DESCRIPTORS - NUM_REFUSED - num_others, 16)
    if most != resource.RLIM_INFINITY and possible < wanted:
        log.warning("only %d clients can be connected at once, as `ulimit -n` is %d: raise it", possible, most)
        return possible
    return wanted
