"""The process of a rank, as its supervisor holds it."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from rq_ep.config import child_environment
from rq_ep.serve.supervisor.rank_start import Command, RankStart, Report, from_line, to_line
from rq_ep.serve.supervisor.supervision import RankExited

RANK_PROCESS = (sys.executable, "-m", "rq_ep.serve.rank.rank_process")


class RankChild:
    """A process of a rank. Its end is noticed at once, after everything that it has reported.

    Args:
        start: how the rank begins.
        on_event: called with each report and, last, with the end, on a thread of its own.
        command: what to start.

    Raises:
        OSError: no process can be had.
    """

    def __init__(
        self, start: RankStart, on_event: Callable[[Report | RankExited], None], command: Sequence[str] = RANK_PROCESS
    ) -> None:
        self._socket, self._theirs = socket.socketpair()
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                stdin=self._theirs.fileno(),
                env=child_environment(),
                process_group=0,  # launchers signal the group of what they have started, which passes it on
            )
        except OSError:
            self._socket.close()
            self._theirs.close()
            raise
        self.send(start)
        threading.Thread(target=self._wait, name="rq_ep rank's end", daemon=True).start()
        threading.Thread(target=self._read, args=(on_event,), name="rq_ep rank's reports", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: RankStart | Command) -> None:
        """Tell the process; one that has ended is noticed elsewhere."""
        with suppress(OSError):
            self._socket.sendall(to_line(message))

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def _wait(self) -> None:
        self._process.wait()
        self._theirs.shutdown(socket.SHUT_WR)  # its children may hold the socket open

    def _read(self, on_event: Callable[[Report | RankExited], None]) -> None:
        with self._socket, self._theirs, self._socket.makefile("rb") as lines:
            for line in lines:
                on_event(from_line(line))
            on_event(RankExited(self._process.wait()))
