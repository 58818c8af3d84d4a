"""A rank's end of the socket between it and its supervisor."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

from rq_ep.serve.supervisor.rank_start import Command, RankStart, Report, from_line, to_line


class SupervisorLink:
    """Reads what the supervisor says, and reports to it.

    Args:
        sock: connected to the supervisor.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lines = sock.makefile("rb")
        self._lock = threading.Lock()

    @classmethod
    def of_stdin(cls) -> "SupervisorLink":
        """The link of a process whose input is the socket; what it starts in turn gets no input."""
        link = cls(socket.socket(fileno=os.dup(0)))  # which is not inherited
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        return link

    def read_start(self) -> RankStart:
        """What comes first; waits for it."""
        start: RankStart = from_line(self._lines.readline())
        return start

    def commands(self) -> Iterator[Command]:
        """What comes next, until the supervisor has died."""
        with suppress(OSError):
            for line in self._lines:
                yield from_line(line)

    def report(self, report: Report) -> None:
        """Tell the supervisor; one that has died is noticed by `commands`."""
        with suppress(OSError), self._lock:
            self._socket.sendall(to_line(report))
