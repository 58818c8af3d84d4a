"""Binding ports before anything slow happens."""

import os
import socket

from rq_ep.core.errors import UserError


def bind_http(host: str, port: int) -> socket.socket:
    """Bind and listen; connections wait until the HTTP process accepts them.

    Raises:
        UserError: the port is taken or not allowed, or the host is no address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # The resolver's errors are numbered below zero, and only their text says something.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise UserError(f"cannot listen on {host}:{port} ({reason}): choose another --port or --host") from None


def bind_hub(master_addr: str) -> socket.socket:
    """Bind a free port that the other ranks can reach: on the address under which they meet rank 0."""
    try:
        address = socket.gethostbyname(master_addr)
        return socket.create_server((address, 0), backlog=1024)
    except OSError:  # a name that only other machines resolve to this one
        return socket.create_server(("", 0), backlog=1024)
