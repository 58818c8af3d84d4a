"""The control plane between the HTTP process and the ranks: one TCP connection for each rank.

Plain sockets, because a closed connection is the one notice of a rank's death that is prompt and says whose it was.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

from rq_ep.serve.messages import (
    MAX_LINE_BYTES,
    Bye,
    FromRank,
    Hello,
    MessageError,
    ToRank,
    decode_from_rank,
    decode_to_rank,
    encode,
)


async def read_messages(reader: asyncio.StreamReader) -> AsyncIterator[FromRank]:
    """The messages of a rank, until it closes the connection or dies.

    Raises:
        MessageError: it sent something else.
    """
    while True:
        try:
            line = await reader.readline()
        except OSError:  # the connection was reset
            return
        except ValueError:
            raise MessageError(f"a line of more than {MAX_LINE_BYTES} bytes") from None
        if not line.endswith(b"\n"):  # cut short, as the rank died
            return
        yield decode_from_rank(line)


class ControlClient:
    """A rank's end of its connection: any thread may send; messages are read on a thread of their own.

    Args:
        address: host and port of the HTTP process's `RankRouter`.
        rank: the rank in this process.
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
        self.send(Hello(rank, token))

    def send(self, message: FromRank) -> None:
        """Send a message. If the HTTP process is gone, the reading thread notices it."""
        with self._lock:
            try:
                self._socket.sendall(encode(message))
            except OSError:
                return

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
            on_malformed: called with what is wrong with a line; no more are read.
        """

        def read() -> None:
            try:
                for line in self._lines():
                    on_message(decode_to_rank(line))
            except MessageError as error:
                on_malformed(error)
                return
            if not self._is_closing:
                on_close()

        threading.Thread(target=read, name="rq_ep control", daemon=True).start()

    def _lines(self) -> Iterator[bytes]:
        try:
            with self._socket.makefile("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield line
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
