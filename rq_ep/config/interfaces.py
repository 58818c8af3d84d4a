"""Network interfaces of this machine at which ranks listen, so that as few others as possible can reach them."""

import os
import socket

from rq_ep.config.environment import Environment
from rq_ep.core.errors import UserError


def keep_gloo_on_loopback() -> None:
    """Have gloo listen on the loopback interface alone, unless the environment names another one."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def bind_for_ranks(environment: Environment) -> socket.socket:
    """Bind a free port of this machine for the ranks, which as few others as possible can reach.

    On one node it is at the loopback interface; on several, at the interface of this machine that leads to MASTER_ADDR.

    Raises:
        UserError: there is none.
    """
    name = "127.0.0.1" if environment.is_one_node else environment.master_addr
    try:
        found = [(family, where[:2]) for family, *_, where in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)]
        family, (host, _) = min(found, key=lambda pair: pair[0] != socket.AF_INET)  # IPv4 where there are both
        return socket.create_server((_own_address(family, str(host)), 0), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={name}: no interface of this machine leads there ({error.strerror or error}): set it to an "
            "address of the machine of rank 0"
        ) from None


def _own_address(family: int, host: str) -> str:
    """The address of this machine in packets to a host: the host itself, where it is this machine."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address: str = probe.getsockname()[0]
    return address
