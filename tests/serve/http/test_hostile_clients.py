"""What one client can do to the others: the app behind a real server, over ranks that answer from a script."""

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from rq_ep.serve.http.app import make_app
from rq_ep.serve.http.http_process import Server
from tests.serve.http.test_app import Bench

MAX_BODY = 4 << 20
HEALTH_S = 1.0  # within which /health must be answered, whatever others send


class Live:
    """A server on a port of its own, in a thread."""

    def __init__(self) -> None:
        self.bench = Bench()
        app = make_app(self.bench.service, MAX_BODY)
        self.server = Server(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False))
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


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    live = Live()
    live.thread.start()
    yield live
    live.server.should_exit = True
    live.thread.join()


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
    status, content, slowest_s = live.slowest_health_s(path, body)
    assert slowest_s < HEALTH_S
    assert status in (200, 400, 404)
    assert len(content) < 1200, "an error quotes no more than a few words"
