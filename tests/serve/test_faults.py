"""Ranks that die or stop, where that ends the group: clients learn of it by name, and the launcher brings all back.

One launcher for all: every fault ends a group, and the next test finds a new one.
"""

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serve.running import Server, restarting, running, until

MODEL = "tiny"
NUM_RANKS = 2
ERROR_WITHIN_S = 60  # long before the collectives of the other ranks time out

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("faults") / "log"
    arguments = ["--model", str(tiny_checkpoint), "--served-model-name", MODEL, "--device", "cpu"]
    arguments += ["--max-num-batched-tokens", "4", "--max-body-bytes", "100000", "--stall-timeout", "15"]
    arguments += ["--on-rank-failure", "stop"]
    with running(log, NUM_RANKS, *arguments, launcher=restarting) as server:
        yield server


def ask(server: Server, **body: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
    return server.client.post("/v1/completions", json=body)


def answered(server: Server) -> None:
    """Both ranks answer."""
    with ThreadPoolExecutor(4) as pool:
        assert [answer.status_code for answer in pool.map(lambda _: ask(server), range(4))] == [200] * 4


def unfinished(server: Server) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("rq_ep_num_requests_unfinished{"))


def fault(server: Server, rank: int, number: signal.Signals, bodies: list[dict[str, Any]]) -> list[str]:
    """The errors of clients after a rank got a signal; afterwards the old group is gone and a new one serves."""
    server.wait_until_ready()
    old = server.rank(rank)
    with ThreadPoolExecutor(8) as pool:
        answers: list[Future[httpx.Response]] = [pool.submit(ask, server, **body) for body in bodies]
        until(lambda: unfinished(server) == len(bodies))
        old.send_signal(number)
        hit_s = time.monotonic()
        errors = [answer.result().json()["error"] for answer in answers]
        assert time.monotonic() - hit_s < ERROR_WITHIN_S
        assert {error["code"] for error in errors} <= {500}
    if number == signal.SIGSTOP:
        old.kill()  # the launcher would do so itself, after half a minute
    until(lambda: not healthy(server), ERROR_WITHIN_S)
    until(lambda: healthy(server), 240)
    answered(server)
    return [error["message"] for error in errors]


def healthy(server: Server) -> bool:
    try:
        return server.client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_poisoned_request_harms_only_itself(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    good = ThreadPoolExecutor(1).submit(ask, server, max_tokens=300)
    assert ask(server, prompt="a" * 5000).status_code == 400
    assert ask(server, prompt=[5] * 20_000).status_code == 400
    assert ask(server, max_tokens=10**9).status_code == 400
    assert ask(server, prompt="x" * 10_000_000).status_code == 413
    for content in (
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b"[" * 90_000,
    ):
        assert server.client.post("/v1/completions", content=content, headers=headers).status_code == 400
    assert ask(server, stop=["\U0001f600"], seed=-(2**63)).status_code == 200
    assert good.result().json()["usage"]["completion_tokens"] == 300


def test_a_slow_client_harms_nobody(server: Server) -> None:
    """It sends half of its request, and another reads nothing of its stream."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half, socket.create_connection((host, int(port))) as deaf:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        body = b'{"model": "tiny", "prompt": "a", "max_tokens": 400, "stream": true, "ignore_eos": true}'
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        deaf.sendall(head.encode() + b"\r\n\r\n" + body)
        answered(server)
    until(lambda: unfinished(server) == 0)


def test_a_rank_killed_while_idle(server: Server) -> None:
    assert fault(server, 1, signal.SIGKILL, []) == []
    assert "the group has failed: rank 1 died" in server.log.read_text()


def test_a_rank_killed_in_prefill(server: Server) -> None:
    messages = fault(server, 1, signal.SIGKILL, [{"prompt": [5] * 500, "max_tokens": 12}] * 6)
    assert all("rank 1 died" in message for message in messages)


def test_rank_0_killed_in_decode(server: Server) -> None:
    messages = fault(server, 0, signal.SIGKILL, [{"max_tokens": 500}] * 4)
    assert all("rank 0 died" in message for message in messages)


def test_a_stalled_rank_is_named(server: Server) -> None:
    messages = fault(server, 1, signal.SIGSTOP, [{"max_tokens": 500}] * 4)
    for message in messages:
        assert "rank 1 has not been heard for" in message
        assert "rank 0 waits in step" in message


def test_a_rank_killed_in_a_drain_is_named(server: Server) -> None:
    """The launcher then signals the other rank, for which this is the second SIGTERM."""
    server.wait_until_ready()
    rank_1, num_requests = server.rank(1), 24  # more than are answered until it is killed
    with ThreadPoolExecutor(num_requests) as pool:
        answers = [pool.submit(ask, server, max_tokens=500) for _ in range(num_requests)]
        until(lambda: unfinished(server) == num_requests)
        server.signal(0, signal.SIGTERM)
        until(lambda: "draining" in server.client.get("/health").text)
        rank_1.kill()
        errors = [error for answer in answers if (error := answer.result().json().get("error"))]
    assert errors
    assert all("the server failed: rank 1 died" in error["message"] for error in errors)


def test_nobody_survives_the_launcher(server: Server) -> None:
    """Nothing keeps the port or the memory when it was killed by force; the last test of this server."""
    server.wait_until_ready()
    launcher, *others = server.tree()
    launcher.kill()
    _, left = psutil.wait_procs(others, 15)
    assert left == []
    assert f"its launcher (process {launcher.pid}) has died" in server.log.read_text()
    host, port = server.url.removeprefix("http://").split(":")
    socket.create_server((host, int(port))).close()
