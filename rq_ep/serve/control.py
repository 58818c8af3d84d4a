"""The control plane between the HTTP process, the ranks and their supervisors: one TCP connection for each of them.

Plain sockets, because a closed connection is the one notice of a rank's death that is prompt and says whose it was.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from rq_ep.serve.frames import HEADER, Frames, Role, make_greeting
from rq_ep.serve.messages import (
    FROM_RANK,
    FROM_SUPERVISOR,
    TO_RANK,
    TO_SUPERVISOR,
    Bye,
    FromRank,
    FromSupervisor,
    MessageError,
    MessageTooLong,
    Outputs,
    decode,
    encode,
    shorter_outputs,
)

SENT_BY: Mapping[Role, Mapping[str, type]] = {Role.RANK: FROM_RANK, Role.SUPERVISOR: FROM_SUPERVISOR}
SENT_TO: Mapping[Role, Mapping[str, type]] = {Role.RANK: TO_RANK, Role.SUPERVISOR: TO_SUPERVISOR}


async def read_messages(reader: asyncio.StreamReader, frames: Frames, role: Role = Role.RANK) -> AsyncIterator[Any]:
    """The messages of a rank or of a supervisor, until it closes the connection or dies.

    Raises:
        MessageError: it sent something else.
    """
    while True:
        try:
            size, mac = frames.read_header(await reader.readexactly(HEADER.size))
            body = await reader.readexactly(size)
        except (OSError, asyncio.IncompleteReadError):  # the connection was reset, or the other end died
            return
        yield decode(frames.verify(body, mac), SENT_BY[role])


class ControlClient:
    """A rank's or supervisor's end of its connection: any thread may send; messages are read on a thread of their own.

    Args:
        address: host and port of the HTTP process's `RankConnections`.
        rank: the rank in this process, or of this supervisor.
        token: the secret of this run; a stranger who found the port does not know it.
        role: which of the two this process is.
    """

    def __init__(self, address: tuple[str, int], rank: int, token: str, role: Role = Role.RANK) -> None:
        self._socket = socket.create_connection(address, timeout=30)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A node that vanishes closes no connection: have the kernel ask.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._lock = threading.Lock()
        self._is_closing = False
        self._kinds = SENT_TO[role]
        greeting, nonce = make_greeting(token, rank, role)
        self._sent = Frames(token, nonce, is_to_rank=False)
        self._received = Frames(token, nonce, is_to_rank=True)
        with suppress(OSError):  # the reading thread notices it
            self._socket.sendall(greeting)

    def send(self, message: FromRank | FromSupervisor) -> None:
        """Send a message. If the HTTP process is gone, the reading thread notices it.

        Outputs that make too long a message are sent one by one, and one that is too long by itself as an error of
        its request.
        """
        try:
            body = encode(message)
        except MessageTooLong as error:
            if not isinstance(message, Outputs):
                raise
            for outputs in shorter_outputs(message, error):
                self.send(outputs)
            return
        self._send(body)

    def _send(self, body: bytes) -> None:
        with self._lock, suppress(OSError):
            self._socket.sendall(self._sent.pack(body))

    def listen(
        self,
        on_message: Callable[[Any], None],
        on_close: Callable[[], None],
        on_malformed: Callable[[MessageError], None],
    ) -> None:
        """Read messages on a thread from now on. An error of a callback ends the thread (`process.thread_errors_to`).

        Args:
            on_message: called with each message: a `ToRank`, or a `ToSupervisor` at a supervisor.
            on_close: called when the HTTP process has gone.
            on_malformed: called with what is wrong with a message; no more are read.
        """

        def read() -> None:
            try:
                for body in self._bodies():
                    on_message(decode(body, self._kinds))
            except MessageError as error:
                on_malformed(error)
                return
            if not self._is_closing:
                on_close()

        threading.Thread(target=read, name="rq_ep control", daemon=True).start()

    def _bodies(self) -> Iterator[bytes]:
        """The messages as JSON, until the connection ends."""
        try:
            with self._socket.makefile("rb") as file:
                while len(header := file.read(HEADER.size)) == HEADER.size:
                    size, mac = self._received.read_header(header)
                    body = file.read(size)
                    if len(body) < size:
                        return
                    yield self._received.verify(body, mac)
        except MessageError:
            raise
        except (OSError, ValueError):  # the connection was reset; ValueError: closed here, meanwhile
            return

    def close(self) -> None:
        """Say good-bye, so that the end of the connection is not taken for a death. A second call does nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        self.send(Bye())
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # also ends the reading thread
        self._socket.close()
