"""The TCP connections of gloo's groups, and how they are ended under those that wait for them.

gloo's own `abort` wakes nobody. Once a connection is shut down, whatever waits for it fails at once, on both ends.
"""

import os
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SOCKETS = Path("/proc/self/fd")  # Linux; where there is none, waiting ends only with processes and timeouts

Endpoint = tuple[str, int]  # host and port
Ends = tuple[Endpoint, Endpoint]  # of a connection: here, and at the peer


def open_sockets() -> dict[str, int]:
    """The sockets of this process: the kernel's name of each, which no other one ever gets, and its descriptor."""
    found = {}
    for entry in SOCKETS.iterdir() if SOCKETS.is_dir() else ():
        with suppress(OSError):  # it has been closed meanwhile
            name = os.readlink(entry)
            if name.startswith("socket:"):
                found[name] = int(entry.name)
    return found


class PeerConnections:
    """Connections that gloo has made: those of this process that were opened since `before`, a key of `open_sockets`.

    The listening sockets are not among them: gloo ends the process when one of those is shut down.
    """

    def __init__(self, before: Collection[str] = ()) -> None:
        self._ends: dict[str, Ends] = {}
        for name, descriptor in open_sockets().items():
            if name not in before:
                with suppress(OSError), _handle(name, descriptor) as handle:
                    if handle.family in (socket.AF_INET, socket.AF_INET6) and handle.type == socket.SOCK_STREAM:
                        self._ends[name] = (handle.getsockname()[:2], handle.getpeername()[:2])

    @property
    def ends(self) -> list[Ends]:
        """The two ends of each."""
        return list(self._ends.values())

    def keep_between(self, ends_of_all: Sequence[Sequence[Ends]]) -> None:
        """Keep those that lead to another member, which has the same connection from its side; forget the others.

        Args:
            ends_of_all: `ends` of every member.
        """
        reverse = {(there, here) for ends in ends_of_all for here, there in ends}
        self._ends = {name: ends for name, ends in self._ends.items() if ends in reverse}

    def shut_down(self) -> None:
        """End them under those that wait, on any thread."""
        for name, descriptor in open_sockets().items():
            if name in self._ends:
                with suppress(OSError), _handle(name, descriptor) as handle:
                    handle.shutdown(socket.SHUT_RDWR)


@contextmanager
def _handle(name: str, descriptor: int) -> Iterator[socket.socket]:
    """A socket by a descriptor of its own, so that nothing else is hit once the other one's number is in use again.

    Raises:
        OSError: it has been closed.
    """
    with socket.socket(fileno=os.dup(descriptor)) as handle:
        if name != f"socket:[{os.fstat(handle.fileno()).st_ino}]":
            raise OSError(f"{name} has been closed")
        yield handle
