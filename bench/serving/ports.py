"""Ports for servers that are about to start."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def free_port() -> Iterator[int]:
    """A TCP port of this machine that nobody else is given while this is open, and on which a server may listen.

    It is held by a socket that does not listen: a server that names the port and sets SO_REUSEADDR, as those of Python,
    uvicorn and torch do, binds beside it, whereas whoever asks for any port gets another one.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
