"""The hold on the HTTP process of who starts it: ports are bound first, the process starts next, loading comes last."""

import json
import logging
import os
import secrets
import socket
import subprocess
import sys

from rq_ep.config import Environment, ServeConfig, as_mapping, bind_for_ranks, child_environment
from rq_ep.core.errors import UserError
from rq_ep.serve.control import ControlClient
from rq_ep.serve.frames import Role
from rq_ep.serve.supervisor.rank_start import HubAddress

log = logging.getLogger("rq_ep.serve")

END_TIMEOUT_S = 10.0


class HttpProcess:
    """The HTTP process and how the ranks reach it.

    Args:
        config: what to serve, and where.
        environment: rank 0's; its address is where the other ranks reach the HTTP process.
        role: of this process: rank 0, or its supervisor.

    Raises:
        UserError: the port or the host cannot be had, or the file of API keys.
    """

    def __init__(self, config: ServeConfig, environment: Environment, role: Role = Role.RANK) -> None:
        config = config.with_api_keys()
        with bind_http(config.host, config.port) as http, bind_for_ranks(environment) as control:
            self.hub = HubAddress(control.getsockname()[:2], secrets.token_hex(16))
            # Connected before the process exists: should this one die now, the HTTP process will read the end of it.
            self.client = ControlClient(self.hub.address, 0, self.hub.token, role)
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
                "token": self.hub.token,
                "http_fd": http.fileno(),
                "control_fd": control.fileno(),
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(settings).encode())
            self._process.stdin.close()
            self.url = f"http://{config.host}:{http.getsockname()[1]}"
        log.info("listening on %s; the model is loading", self.url)
        if not environment.is_one_node:
            log.info("the ranks of all nodes connect to %s, port %d; nobody else needs to reach it", *self.hub.address)

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
