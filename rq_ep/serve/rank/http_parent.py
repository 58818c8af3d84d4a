"""Rank 0's hold on the HTTP process: ports are bound first, the process starts next, and loading comes last."""

import json
import logging
import secrets
import subprocess
import sys

from rq_ep.config import Environment, ServeConfig, as_mapping, child_environment
from rq_ep.serve.control import Link
from rq_ep.serve.rank.sockets import bind_http, bind_hub

log = logging.getLogger("rq_ep.serve")

END_TIMEOUT_S = 10.0


class Front:
    """The HTTP process and how the ranks reach it.

    Args:
        config: what to serve, and where.
        environment: rank 0's; its address is where the other ranks find the hub.

    Raises:
        UserError: the port or the host cannot be had.
    """

    def __init__(self, config: ServeConfig, environment: Environment) -> None:
        with bind_http(config.host, config.port) as http, bind_hub(environment.master_addr) as hub:
            self.address: tuple[str, int] = hub.getsockname()[:2]
            if self.address[0] == "0.0.0.0":
                self.address = (environment.master_addr, self.address[1])
            self.token = secrets.token_hex(16)
            # Connected before the process exists: should this rank die now, the process will read the end of it.
            self.link = Link(hub.getsockname()[:2], 0, self.token)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rq_ep.serve.http.http_process"],
                stdin=subprocess.PIPE,
                pass_fds=(http.fileno(), hub.fileno()),
                env=child_environment(),
                process_group=0,  # Ray ends a dead worker's group: this process has yet to tell the clients
            )
            told = {
                "config": as_mapping(config),
                "num_ranks": environment.world_size,
                "token": self.token,
                "http_fd": http.fileno(),
                "hub_fd": hub.fileno(),
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(told).encode())
            self._process.stdin.close()
            self.url = f"http://{config.host}:{http.getsockname()[1]}"
        log.info("listening on %s; the model is loading", self.url)

    def close(self) -> None:
        """Part from the HTTP process and wait for its end, which comes with that of the last connection."""
        self.link.close()
        try:
            self._process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
