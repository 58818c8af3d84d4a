"""The TCP connections of gloo's groups, and how they are ended under those that wait for them.

gloo's own `abort` wakes nobody. Once a connection is shut down, whatever waits for it fails at once, on both ends.
"""

import os
import socket
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

SOCKETS = Path("/proc/self/fd")  # Linux; where there is none, waiting ends only with processes and timeouts

Endpoint = tuple[str, int]  # host and port
Ends = tuple[Endpoint, Endpoint]  # of a connection: here, and at the peer


def open_sockets() -> dict[str, int]:
    """The sockets of this process: the kernel's name of each, which is never used again, and its file descriptor."""
    found = {}
    for entry in SOCKETS.iterdir() if SOCKETS.is_dir() else ():
        with suppress(OSError):  # it has been closed meanwhile
            name = os.readlink(entry)
            if name.startswith("socket:"):
                found[name] = int(entry.name)
    return found


class PeerConnections:
    """Handles of connections that belong to gloo, each a file descriptor of its own.

    So nothing else is hit when gloo has closed a connection and its descriptor's number is in use again. The listening
    sockets are not among them: gloo ends the process when one of those is shut down.
    """

    def __init__(self, before: Collection[str] = ()) -> None:
        """Take a handle of each TCP connection that was opened since `before`, names of `open_sockets`."""
        self._lock = threading.Lock()
        self._handles: list[socket.socket] = []
        for name, descriptor in open_sockets().items():
            if name not in before:
                with suppress(OSError):  # closed meanwhile
                    self._take(socket.socket(fileno=os.dup(descriptor)))

    def _take(self, handle: socket.socket) -> None:
        try:
            is_tcp = handle.family in (socket.AF_INET, socket.AF_INET6) and handle.type == socket.SOCK_STREAM
            if is_tcp and handle.getpeername():
                self._handles.append(handle)
                return
        except OSError:  # not connected
            pass
        handle.close()

    def ends(self) -> list[Ends]:
        """The two ends of each."""
        return [_ends(handle) for handle in self._handles]

    def keep_between(self, ends_of_all: Sequence[Sequence[Ends]]) -> None:
        """Keep those that lead to another member, which has the same connection from its side; forget the others.

        Args:
            ends_of_all: `ends` of every member.
        """
        reverse = {(there, here) for ends in ends_of_all for here, there in ends}
        handles, self._handles = self._handles, []
        for handle in handles:
            if _ends(handle) in reverse:
                self._handles.append(handle)
            else:
                handle.close()

    def shut_down(self) -> None:
        """End them under those that wait, on any thread."""
        with self._lock:
            for handle in self._handles:
                with suppress(OSError):  # the peer has ended it
                    handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the handles up."""
        with self._lock:
            for handle in self._handles:
                handle.close()
            self._handles.clear()


def _ends(handle: socket.socket) -> Ends:
    try:
        return handle.getsockname()[:2], handle.getpeername()[:2]
    except OSError:  # the peer has ended it
        return ("", 0), ("", 0)
