"""The control plane between the HTTP process and the ranks: one TCP connection for each rank, a JSON object a line.

Plain sockets, because a closed connection is the one notice of a rank's death that is prompt and says whose it was.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
MAX_LINE_BYTES = 64 << 20


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """What the other side sends, until it closes the connection or dies."""
    while True:
        try:
            line = await reader.readline()
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):  # reset, or no line of ours
            return
        if not isinstance(message, dict):
            return
        yield message


class Link:
    """A rank's end: messages are sent from any thread, and read on a thread of their own.

    Args:
        address: host and port of the HTTP process's hub.
        rank: who we are.
        token: the secret of this group; a stranger who found the port does not know it.
    """

    def __init__(self, address: tuple[str, int], rank: int, token: str) -> None:
        self._socket = socket.create_connection(address, timeout=30)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A node that vanishes closes no connection: have the kernel ask.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._lock = threading.Lock()
        self._is_closing = False
        self.send({"kind": "hello", "rank": rank, "token": token})

    def send(self, message: Message) -> None:
        """Send a message; if the HTTP process is gone, the reading thread says so."""
        with self._lock:
            try:
                self._socket.sendall(encode(message))
            except OSError:
                return

    def listen(self, on_message: Callable[[Message], None], on_close: Callable[[], None]) -> None:
        """Read messages on a thread from now on; `on_close` is called when the HTTP process has gone."""

        def read() -> None:
            try:
                with self._socket.makefile("rb") as file:
                    for line in file:
                        on_message(json.loads(line))
            except (OSError, ValueError):  # ValueError: closed here, meanwhile
                pass
            if not self._is_closing:
                on_close()

        threading.Thread(target=read, name="rq_ep link", daemon=True).start()

    def close(self) -> None:
        """Say good-bye, so that the end of the connection is not taken for a death. A second call does nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        self.send({"kind": "bye"})
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # also ends the reading thread
        self._socket.close()
