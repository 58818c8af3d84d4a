"""The connections of ranks and supervisors to the HTTP process: who is let in, what each sends, and how it ends."""

import asyncio
import logging
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from rq_ep.serve.control import read_messages
from rq_ep.serve.frames import GREETING, Frames, Greeting, Role, read_greeting
from rq_ep.serve.messages import Bye, FromRank, FromSupervisor, MessageError, ToRank, ToSupervisor, encode

log = logging.getLogger(__name__)

GREETING_S = 5.0  # how long a connection may take to greet; a rank does it at once
DIED = "died"  # what is known of a rank whose connection has ended
MAX_UNGREETED = 64  # connections that have not greeted; one more ends the oldest


class RankState(Enum):
    """State of the connection to a rank, or to a supervisor."""

    CONNECTING = auto()
    CONNECTED = auto()
    LEAVING = auto()  # it has said good-bye
    GONE = auto()  # its connection ended after a good-bye
    LOST = auto()  # its connection ended without one


OPEN = (RankState.CONNECTED, RankState.LEAVING)


class RankListener(Protocol):
    """Is told what happens on the connections."""

    def on_connect(self, rank: int, role: Role) -> None:
        """A rank or its supervisor has connected."""

    def on_message(self, rank: int, message: FromRank) -> None:
        """A rank has sent a message."""

    def on_supervisor_message(self, rank: int, message: FromSupervisor) -> None:
        """The supervisor of a rank has sent a message."""

    def on_leave(self, rank: int, role: Role) -> None:
        """A rank or its supervisor has left, with a good-bye."""

    def on_loss(self, rank: int, text: str) -> None:
        """A rank is lost; the text names it, and says whether it died or sent what is no message."""

    def on_supervisor_loss(self, rank: int, text: str) -> None:
        """The supervisor of a rank is lost."""

    def on_bug(self, error: BaseException) -> None:
        """A message has raised an error of this process."""


@dataclass
class _Connection:
    state: RankState = RankState.CONNECTING
    writer: asyncio.StreamWriter | None = None
    frames: Frames | None = None  # to the other end


class RankConnections:
    """The connections of all ranks of a group, and of their supervisors. Each end has one at a time.

    Args:
        num_ranks: size of the group.
        token: the secret of this run, which the ranks prove that they know.
        listener: is told of messages and ends.
    """

    def __init__(self, num_ranks: int, token: str, listener: RankListener) -> None:
        self._token = token
        self._listener = listener
        self._num_ranks = num_ranks
        self._connections = {(role, rank): _Connection() for role in Role for rank in range(num_ranks)}
        self._nonces: set[bytes] = set()  # of all greetings, so that one which was overheard is of no use
        self._ungreeted: list[asyncio.Timeout] = []  # oldest first
        self._num_strangers = 0

    def num_open(self, *roles: Role) -> int:
        """Connections of these roles that are open."""
        return sum(role in roles and self._connections[role, rank].state in OPEN for role, rank in self._connections)

    def in_state(self, state: RankState, role: Role = Role.RANK) -> list[int]:
        """The ranks whose connection, or that of whose supervisor, is in a state; in order."""
        return [rank for rank in range(self._num_ranks) if self._connections[role, rank].state is state]

    def send(self, rank: int, message: ToRank) -> None:
        """Send a message to a rank, if it is connected."""
        self._write(self._connections[Role.RANK, rank], encode(message))

    def send_all(self, message: ToRank, ranks: Iterable[int] | None = None) -> None:
        """Send a message to ranks; None: to all."""
        body = encode(message)
        for rank in range(self._num_ranks) if ranks is None else ranks:
            self._write(self._connections[Role.RANK, rank], body)

    def send_supervisor(self, rank: int, message: ToSupervisor) -> None:
        """Send a message to the supervisor of a rank, if it is connected."""
        self._write(self._connections[Role.SUPERVISOR, rank], encode(message))

    def _write(self, connection: _Connection, body: bytes) -> None:
        if connection.state in OPEN and connection.writer is not None and not connection.writer.is_closing():
            assert connection.frames is not None
            connection.writer.write(connection.frames.pack(body))

    def mute(self, rank: int, role: Role = Role.RANK) -> asyncio.StreamWriter | None:
        """Hear no more of a rank, or of its supervisor, not even the end of its connection, which stays open."""
        connection = self._connections[role, rank]
        if connection.state not in OPEN:
            return None
        connection.state = RankState.LOST
        return connection.writer

    def drop(self, rank: int, role: Role = Role.RANK) -> None:
        """Close the connection of a rank, or of its supervisor, and hear no more of it, not even the end."""
        if (writer := self.mute(rank, role)) is not None:
            writer.transport.abort()

    async def listen(self, sock: socket.socket) -> asyncio.Server:
        """Accept connections on a bound socket."""
        return await asyncio.start_server(self._serve, sock=sock)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one connection, from its greeting to its end."""
        with suppress(asyncio.CancelledError):  # this process ends; asyncio would log it as an error
            try:
                greeting = await self._read_greeting(reader)
                if greeting is None:
                    self._log_stranger(writer)
                else:
                    await self._read(greeting, reader, writer)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _read(self, greeting: Greeting, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read the messages of a rank, or of a supervisor."""
        role, rank, nonce = greeting
        _ask_now_and_then(writer)
        connection = self._connections[role, rank] = _Connection(
            RankState.CONNECTED, writer, Frames(self._token, nonce, is_to_rank=True)
        )
        text = f"rank {rank} {DIED} (its process was killed or crashed)"
        if role is Role.SUPERVISOR:
            text = f"the supervisor of rank {rank} died"
        try:
            self._listener.on_connect(rank, role)
            async for message in read_messages(reader, Frames(self._token, nonce, is_to_rank=False), role):
                if connection.state not in OPEN:  # it was dropped
                    return
                if isinstance(message, Bye):
                    connection.state = RankState.LEAVING
                if role is Role.RANK:
                    self._listener.on_message(rank, message)
                else:
                    self._listener.on_supervisor_message(rank, message)
        except MessageError as error:
            text = f"rank {rank}: {'its supervisor ' * (role is Role.SUPERVISOR)}sent {error}"
        except Exception as error:
            self._listener.on_bug(error)
            with suppress(OSError):
                while await reader.read(1 << 16):  # no more is heard of this rank, but it has yet to be sent the reason
                    pass
        if connection.state is RankState.LEAVING:
            connection.state = RankState.GONE
            self._listener.on_leave(rank, role)
        elif connection.state is RankState.CONNECTED:
            connection.state = RankState.LOST
            (self._listener.on_loss if role is Role.RANK else self._listener.on_supervisor_loss)(rank, text)

    async def _read_greeting(self, reader: asyncio.StreamReader) -> Greeting | None:
        """Who has connected; None: it is a stranger, or one who does not greet in time."""
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
        if greeted is None or greeted.rank >= self._num_ranks or greeted.nonce in self._nonces:
            return None
        self._nonces.add(greeted.nonce)
        if self._connections[greeted.role, greeted.rank].state in OPEN:
            if greeted.role is Role.RANK:
                return None
            # A node that has vanished closes no connection, and the launcher has replaced the supervisor.
            self.drop(greeted.rank, greeted.role)
            self._listener.on_supervisor_loss(greeted.rank, f"the supervisor of rank {greeted.rank} was replaced")
        return greeted

    def _log_stranger(self, writer: asyncio.StreamWriter) -> None:
        self._num_strangers += 1
        log.warning(  # at most once a minute, as `http_process` sets up the log
            "turned away %d connections at the port of the ranks that came from none of them, the last one from %s",
            self._num_strangers, writer.get_extra_info("peername"),
        )  # fmt: skip


def _ask_now_and_then(writer: asyncio.StreamWriter) -> None:
    """Have the kernel ask whether the other end is there: a node that vanishes closes no connection."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
