"""Rank 0's hold on the HTTP process: ports are bound first, the process starts next, and loading comes last."""

import json
import logging
import os
import secrets
import socket
import subprocess
import sys

from rq_ep.config import Environment, ServeConfig, as_mapping, child_environment
from rq_ep.core.errors import UserError
from rq_ep.serve.control import ControlClient

log = logging.getLogger("rq_ep.serve")

END_TIMEOUT_S = 10.0


class HttpProcess:
    """The HTTP process and how the ranks reach it.

    Args:
        config: what to serve, and where.
        environment: rank 0's; its address is where the other ranks reach the HTTP process.

    Raises:
        UserError: the port or the host cannot be had, or the file of API keys.
    """

    def __init__(self, config: ServeConfig, environment: Environment) -> None:
        config = config.with_api_keys()
        with bind_http(config.host, config.port) as http, bind_control(environment.master_addr) as control:
            self.address: tuple[str, int] = control.getsockname()[:2]
            if self.address[0] in ("0.0.0.0", "::"):
                self.address = (environment.master_addr, self.address[1])
            self.token = secrets.token_hex(16)
            # Connected before the process exists: should this rank die now, the process will read the end of it.
            self.client = ControlClient(control.getsockname()[:2], 0, self.token)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rq_ep.serve.http.http_process"],
                stdin=subprocess.PIPE,
                pass_fds=(http.fileno(), control.fileno()),
                env=child_environment(),
                process_group=0,  # Ray ends a dead worker's group: this process has yet to answer the clients
            )
            settings = {
                "config": as_mapping(config),
                "num_ranks": environment.world_size,
                "token": self.token,
                "http_fd": http.fileno(),
                "control_fd": control.fileno(),
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(settings).encode())
            self._process.stdin.close()
            self.url = f"http://{config.host}:{http.getsockname()[1]}"
        log.info("listening on %s; the model is loading", self.url)

    def close(self) -> None:
        """Part from the HTTP process and wait for its end, which comes with that of the last connection."""
        self.client.close()
        try:
            self._process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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


def bind_control(master_addr: str) -> socket.socket:
    """Bind a free port that the other ranks can reach: on the address under which they meet rank 0."""
    try:
        found = [
            (family, where[:2]) for family, *_, where in socket.getaddrinfo(master_addr, 0, type=socket.SOCK_STREAM)
        ]
        family, (host, _) = min(found, key=lambda pair: pair[0] != socket.AF_INET)  # IPv4 where there are both
        return socket.create_server((host, 0), family=family, backlog=1024)
    except OSError:  # a name that only other machines resolve to this one
        if socket.has_dualstack_ipv6():
            return socket.create_server(("::", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", 0), backlog=1024)
