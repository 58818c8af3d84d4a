"""What one client can do to the others: the app behind a real server, over ranks that answer from a script."""

import asyncio
import gc
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rq_ep.serve.http import connections
from rq_ep.serve.http.app import make_app
from rq_ep.serve.http.connections import NUM_REFUSED, ConnectionLimits, Server, choose_max_connections
from rq_ep.serve.process import RepeatFilter
from tests.serve.http.test_app import Bench
from tests.serve.running import until

MAX_BODY = 4 << 20
HEALTH_S = 1.0  # within which /health must be answered, whatever others send


class Live:
    """A server on a port of its own, in a thread."""

    def __init__(self, max_connections: int = 100, timeout_s: float = 60) -> None:
        self.bench = Bench()
        app = make_app(self.bench.service, MAX_BODY)
        self.server = Server(app, ConnectionLimits(max_connections, timeout_s))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = self.socket.getsockname()[:2]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def slowest_health_s(self, path: str, body: bytes) -> tuple[int, bytes, float]:
        """Post a body, and ask for /health until it is answered."""
        answers: list[tuple[int, bytes]] = []
        posting = threading.Thread(target=lambda: answers.append(self.call("POST", path, body)))
        posting.start()
        slowest_s = 0.0
        while posting.is_alive():
            start_s = time.monotonic()
            assert self.call("GET", "/health")[0] == 200
            slowest_s = max(slowest_s, time.monotonic() - start_s)
        return *answers[0], slowest_s


@contextmanager
def running(**limits: float) -> Iterator[Live]:
    live = Live(**limits)
    gc.freeze()  # as the HTTP process does
    live.thread.start()
    try:
        yield live
    finally:
        live.server.should_exit = True
        live.thread.join()
        gc.unfreeze()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running() as live:
        yield live


def fill(unit: bytes, num_bytes: int = MAX_BODY - 400) -> bytes:
    """As many repetitions of a unit as a body has room for, with commas between them."""
    return b",".join([unit] * (num_bytes // (len(unit) + 1)))


TEXT = b'"' + b"x" * (MAX_BODY - 400) + b'"'
KEYS = b",".join(b'"%d":1' % number for number in range(300_000))
PROMPTS = {
    "wrong ids": b"[" + fill(b"-1") + b"]",
    "right ids": b"[" + fill(b"1") + b"]",
    "ids, then a text": b"[" + fill(b"1") + b',""]',
    "null": b"[" + fill(b"null") + b"]",
    "objects": b"[" + fill(b"{}") + b"]",
    "nested ids": b"[" + fill(b"[1]") + b"]",
    "one nested list": b"[[" + fill(b"1") + b",-1]]",
    "texts": b"[" + fill(b'""') + b"]",
    "a deep list": b"[" * (MAX_BODY // 2 - 200) + b"]" * (MAX_BODY // 2 - 200),
    "a long text": TEXT,
    "escapes": b'"' + b"\\u0041" * 600_000 + b'"',
    "a long integer": b"[" + b"9" * 1_000_000 + b"]",
    "long integers": b"[" + fill(b"9" * 4000) + b"]",
    "exponents": b"[" + fill(b"1e999999999") + b"]",
}
MESSAGES = {
    "messages": fill(b'{"role":"user","content":"a"}'),
    "as many messages as are taken": b",".join([b'{"role":"user","content":"%s"}' % (b"x" * 300)] * 10_000),
    "wrong messages": fill(b"{}"),
    "null messages": fill(b"null"),
    "parts": b'{"role":"user","content":[' + fill(b'{"type":"text","text":"a"}') + b"]}",
    "wrong parts": b'{"role":"user","content":[' + fill(b"{}") + b"]}",
    "unknown keys of a message": b'{"role":"user","content":"a",' + KEYS + b"}",
    "a long role": b'{"role":%s,"content":"a"}' % TEXT,
}
FIELDS = {
    "unknown keys": KEYS,
    "a long unknown key": TEXT + b":1",
    "unknown keys of stream_options": b'"stream":true,"stream_options":{' + KEYS + b"}",
    "one key": fill(b'"seed":1'),
    "stop strings": b'"stop":[' + fill(b'"a"') + b"]",
    "a long stop string": b'"stop":' + TEXT,
    "tools": b'"tools":[' + fill(b"[]") + b"]",
    "a long number": b'"temperature":' + b"9" * 1_000_000,
}
LONG_FIELDS = ("model", "n", "seed", "stream", "stream_options", "best_of", "response_format", "logprobs", "max_tokens")


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """Name, path and bytes of the bodies that cost the most."""
    for name, value in PROMPTS.items():
        yield name, "/v1/completions", b'{"model":"org/tiny","prompt":%s}' % value
    for name, value in MESSAGES.items():
        yield name, "/v1/chat/completions", b'{"model":"org/tiny","messages":[%s]}' % value
    for name, value in FIELDS.items():
        yield name, "/v1/completions", b'{"model":"org/tiny","prompt":"a",%s}' % value
    for name in LONG_FIELDS:
        yield f"a long {name}", "/v1/completions", b'{"model":"org/tiny","prompt":"a","%s":%s}' % (name.encode(), TEXT)


@pytest.mark.parametrize(("path", "body"), [pytest.param(*case, id=name) for name, *case in bodies()])
def test_health_answers_at_once_whatever_body_is_read(live: Live, path: str, body: bytes) -> None:
    assert len(body) <= MAX_BODY
    for _ in range(3):  # the machine may be busy with something else; a body that blocks the loop does so every time
        status, content, slowest_s = live.slowest_health_s(path, body)
        if slowest_s < HEALTH_S:
            break
    assert slowest_s < HEALTH_S
    assert status in (200, 400, 404)
    assert len(content) < 1200, "an error quotes no more than a few words"


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 80\r\n"


def read_until_closed(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def connect_without_reading(live: Live) -> socket.socket:
    """A client that asks for a stream and does not read it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(live.address)
    body = b'{"model":"org/tiny","prompt":"a","stream":true}'
    client.sendall(HEAD.replace(b"80", b"%d" % len(body)) + b"\r\n" + body)
    return client


def test_clients_that_take_too_long_are_disconnected() -> None:
    """Silent ones, ones that send half a request or a byte at a time, and ones that do not read their answer."""
    with running(timeout_s=0.5) as live:
        silent, half_a_head, half_a_body, by_bytes = (socket.create_connection(live.address, 10) for _ in range(4))
        half_a_head.sendall(HEAD)
        half_a_body.sendall(HEAD + b"\r\n{")
        live.bench.ranks.answer = [120] * 1_000_000
        no_reader = connect_without_reading(live)
        sent = iter(HEAD * 9)

        def is_disconnected() -> bool:
            try:
                return by_bytes.send(bytes([next(sent)])) == 0
            except OSError:
                return True

        until(is_disconnected, 8)
        assert read_until_closed(silent) == read_until_closed(half_a_head) == b""
        head, _, content = read_until_closed(half_a_body).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert "--http-timeout" in json.loads(content)["error"]["message"]
        until(lambda: len(live.bench.ranks.cancelled) == 1, 8)
        until(lambda: not live.server.server_state.connections, 8)
        for connection in (silent, half_a_head, half_a_body, by_bytes, no_reader):
            connection.close()


def test_idle_connections_give_way_to_new_ones() -> None:
    with running(max_connections=4) as live:
        idle = [socket.create_connection(live.address) for _ in range(4)]
        idle[0].sendall(b"GET /hea")
        time.sleep(0.3)
        for _ in range(8):
            assert live.call("GET", "/health")[0] == 200
        for connection in idle:
            connection.close()


def test_silent_connections_by_the_hundred_leave_room_for_a_probe() -> None:
    with running(max_connections=4) as live:
        silent = [socket.create_connection(live.address, 10) for _ in range(400)]
        time.sleep(0.2)
        start_s = time.monotonic()
        assert live.call("GET", "/health")[0] == 200
        assert time.monotonic() - start_s < HEALTH_S
        assert len(live.server.server_state.connections) <= 4 + NUM_REFUSED
        for connection in silent:
            connection.close()


@pytest.mark.parametrize(("hard", "expected"), [(1024, 1024 - 256 - 64 - 2), (1 << 20, 1000 + 1024), (100, 16)])
def test_the_limit_of_connections_is_within_the_open_files(
    monkeypatch: pytest.MonkeyPatch, hard: int, expected: int
) -> None:
    raised = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: raised.append(limits))
    assert choose_max_connections(max_queue_size=1000, num_others=2) == expected
    assert raised == [(hard, hard)]


def test_a_connection_too_many_is_answered_503() -> None:
    with running(max_connections=2) as live:
        live.bench.ranks.is_slow = True
        body = b'{"model":"org/tiny","prompt":"a","stream":true}'
        busy = [socket.create_connection(live.address) for _ in range(2)]
        for connection in busy:
            connection.sendall(HEAD.replace(b"80", b"%d" % len(body)) + b"\r\n" + body)
            connection.recv(1)
        for _ in range(5):
            status, content = live.call("GET", "/health")
            assert (status, json.loads(content)["error"]["type"]) == (503, "service_unavailable_error")
        for connection in busy:
            connection.close()
        until(lambda: live.call("GET", "/health")[0] == 200, 10)


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01 TLS?\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"G" * 70_000]
)
def test_what_is_no_http_is_answered_400(live: Live, garbage: bytes) -> None:
    with socket.create_connection(live.address, 10) as connection:
        connection.sendall(garbage)
        head, _, body = read_until_closed(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_message_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    repeats = RepeatFilter()

    def is_logged(text: str, *arguments: object) -> bool:
        return repeats.filter(logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, text, arguments, None))

    assert [is_logged("%d connections", number) for number in range(3)] == [True, False, False]
    assert is_logged("Invalid HTTP request received.")
    now_s[0] += 60
    assert is_logged("%d connections", 3)


def test_the_end_of_the_server_waits_little_for_clients_and_logs_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GRACE_S", 0.5)
    with running() as live:
        live.bench.ranks.answer = [120] * 1_000_000
        half_a_body, half_a_head, silent = (socket.create_connection(live.address, 10) for _ in range(3))
        half_a_body.sendall(HEAD + b"\r\n{")
        half_a_head.sendall(HEAD)
        no_reader = connect_without_reading(live)
        time.sleep(0.5)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 2
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert len(live.bench.ranks.cancelled) == 1
    assert read_until_closed(half_a_body).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert read_until_closed(half_a_head) == read_until_closed(silent) == b""
    for connection in (half_a_body, half_a_head, silent, no_reader):
        connection.close()
