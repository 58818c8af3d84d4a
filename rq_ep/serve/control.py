"""The control plane between the HTTP process and the ranks: one TCP connection for each rank.

Plain sockets, because a closed connection is the one notice of a rank's death that is prompt and says whose it was.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

from rq_ep.serve.frames import HEADER, Frames, make_greeting
from rq_ep.serve.messages import (
    Bye,
    FromRank,
    MessageError,
    MessageTooLong,
    Outputs,
    ToRank,
    decode_from_rank,
    decode_to_rank,
    encode,
    shorter_outputs,
)


async def read_messages(reader: asyncio.StreamReader, frames: Frames) -> AsyncIterator[FromRank]:
    """The messages of a rank, until it closes the connection or dies.

    Raises:
        MessageError: it sent something else.
    """
    while True:
        try:
            size, mac = frames.read_header(await reader.readexactly(HEADER.size))
            body = await reader.readexactly(size)
        except (OSError, asyncio.IncompleteReadError):  # the connection was reset, or the rank died
            return
        yield decode_from_rank(frames.verify(body, mac))


class ControlClient:
    """A rank's end of its connection: any thread may send; messages are read on a thread of their own.

    Args:
        address: host and port of the HTTP process's `RankConnections`.
        rank: the rank in this process.
        token: the secret of this run; a stranger who found the port does not know it.
    """

    def __init__(self, address: tuple[str, int], rank: int, token: str) -> None:
        self._socket = socket.create_connection(address, timeout=30)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A node that vanishes closes no connection: have the kernel ask.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._lock = threading.Lock()
        self._is_closing = False
        greeting, nonce = make_greeting(token, rank)
        self._sent = Frames(token, nonce, is_to_rank=False)
        self._received = Frames(token, nonce, is_to_rank=True)
        with suppress(OSError):  # the reading thread notices it
            self._socket.sendall(greeting)

    def send(self, message: FromRank) -> None:
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
        on_message: Callable[[ToRank], None],
        on_close: Callable[[], None],
        on_malformed: Callable[[MessageError], None],
    ) -> None:
        """Read messages on a thread from now on. An error of a callback ends the thread (`process.thread_errors_to`).

        Args:
            on_message: called with each message.
            on_close: called when the HTTP process has gone.
            on_malformed: called with what is wrong with a message; no more are read.
        """

        def read() -> None:
            try:
                for body in self._bodies():
                    on_message(decode_to_rank(body))
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
