"""The connections of the ranks to the HTTP process: who is let in, what each sends, and how its connection ends."""

import asyncio
import logging
import socket
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from rq_ep.serve.control import read_messages
from rq_ep.serve.frames import GREETING, Frames, Role, read_greeting
from rq_ep.serve.messages import Bye, FromRank, MessageError, ToRank, encode

log = logging.getLogger(__name__)

GREETING_S = 5.0  # how long a connection may take to greet; a rank does it at once
MAX_UNGREETED = 64  # connections that have not greeted; one more ends the oldest


class RankState(Enum):
    """State of the connection to a rank."""

    CONNECTING = auto()
    CONNECTED = auto()
    LEAVING = auto()  # it has said good-bye
    GONE = auto()  # its connection ended after a good-bye
    LOST = auto()  # its connection ended without one


OPEN = (RankState.CONNECTED, RankState.LEAVING)


class RankListener(Protocol):
    """Is told what happens on the connections."""

    def on_connect(self, rank: int) -> None:
        """A rank has connected."""

    def on_message(self, rank: int, message: FromRank) -> None:
        """A rank has sent a message."""

    def on_leave(self) -> None:
        """A rank has left, with a good-bye."""

    def on_loss(self, rank: int, text: str) -> None:
        """A rank is lost; the text names it, and says whether it died or sent what is no message."""

    def on_bug(self, error: BaseException) -> None:
        """A message of a rank has raised an error of this process."""


@dataclass
class _Connection:
    state: RankState = RankState.CONNECTING
    writer: asyncio.StreamWriter | None = None
    frames: Frames | None = None  # to the rank


class RankConnections:
    """The connections of all ranks of a group; each rank connects once.

    Args:
        num_ranks: size of the group.
        token: the secret of this run, which the ranks prove that they know.
        listener: is told of messages and ends.
    """

    def __init__(self, num_ranks: int, token: str, listener: RankListener) -> None:
        self._token = token
        self._listener = listener
        self._connections = [_Connection() for _ in range(num_ranks)]
        self._ungreeted: list[asyncio.Timeout] = []  # oldest first
        self._num_strangers = 0

    @property
    def num_open(self) -> int:
        return sum(connection.state in OPEN for connection in self._connections)

    def in_state(self, state: RankState) -> list[int]:
        """The ranks whose connection is in a state, in order."""
        return [rank for rank, connection in enumerate(self._connections) if connection.state is state]

    def send(self, rank: int, message: ToRank) -> None:
        """Send a message to a rank, if it is connected."""
        self._write(self._connections[rank], encode(message))

    def send_all(self, message: ToRank) -> None:
        body = encode(message)
        for connection in self._connections:
            self._write(connection, body)

    def _write(self, connection: _Connection, body: bytes) -> None:
        if connection.state in OPEN and connection.writer is not None and not connection.writer.is_closing():
            assert connection.frames is not None
            connection.writer.write(connection.frames.pack(body))

    async def listen(self, sock: socket.socket) -> asyncio.Server:
        """Accept connections on a bound socket."""
        return await asyncio.start_server(self._serve, sock=sock)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one connection, from its greeting to its end."""
        with suppress(asyncio.CancelledError):  # this process ends; asyncio would log it as an error
            try:
                greeted = await self._read_greeting(reader)
                # A rank connects once, so that a greeting which was overheard is of no use.
                if greeted is None or self._connections[greeted[0]].state is not RankState.CONNECTING:
                    self._log_stranger(writer)
                else:
                    await self._read_rank(*greeted, reader, writer)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _read_rank(
        self, rank: int, nonce: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        connection = self._connections[rank]
        connection.state, connection.writer = RankState.CONNECTED, writer
        connection.frames = Frames(self._token, nonce, is_to_rank=True)
        self._listener.on_connect(rank)
        try:
            async for message in read_messages(reader, Frames(self._token, nonce, is_to_rank=False)):
                if isinstance(message, Bye):
                    connection.state = RankState.LEAVING
                self._listener.on_message(rank, message)
        except MessageError as error:
            self._listener.on_loss(rank, f"rank {rank}: sent {error}")
        except Exception as error:
            self._listener.on_bug(error)
            with suppress(OSError):
                while await reader.read(1 << 16):  # no more is heard of this rank, but it has yet to be sent the reason
                    pass
        if connection.state is RankState.LEAVING:
            connection.state = RankState.GONE
            self._listener.on_leave()
        else:
            connection.state = RankState.LOST
            self._listener.on_loss(rank, f"rank {rank} died (its process was killed or crashed)")

    async def _read_greeting(self, reader: asyncio.StreamReader) -> tuple[int, bytes] | None:
        """Rank and nonce of a connection; None: it is of a stranger, or of one who does not greet in time."""
        if len(self._ungreeted) >= MAX_UNGREETED:
            self._ungreeted.pop(0).reschedule(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(GREETING_S) as deadline:
                self._ungreeted.append(deadline)
                try:
                    greeting = await reader.readexactly(GREETING.size)
                finally:
                    with suppress(ValueError):  # it was the oldest
                        self._ungreeted.remove(deadline)
        except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
            return None
        greeted = read_greeting(self._token, greeting)
        if greeted is None or greeted.role is not Role.RANK or greeted.rank >= len(self._connections):
            return None
        return greeted.rank, greeted.nonce

    def _log_stranger(self, writer: asyncio.StreamWriter) -> None:
        self._num_strangers += 1
        log.warning(  # at most once a minute, as `http_process` sets up the log
            "turned away %d connections at the port of the ranks that came from none of them, the last one from %s",
            self._num_strangers, writer.get_extra_info("peername"),
        )  # fmt: skip
