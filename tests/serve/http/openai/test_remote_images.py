"""Images of other servers: which are fetched, and which are refused before anything is asked."""

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any, Self

import pytest

from rq_ep.serve.http.openai import remote_images
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.images import ImageProcessor, read_image
from rq_ep.serve.http.openai.remote_images import ImageFetcher, is_public
from tests.serve.http.openai.test_images import png

PLACE = "messages.0.content.1.image_url"
LOOPBACK = ("127.0.0.0/8",)


class ImageServer:
    """Answers each path in its own way; `asked` has the path and the Host of every request."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.end = Event()
        images = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                images.asked.append((self.path, self.headers["Host"]))
                images.answer(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        status = {"/missing": 404, "/loop": 302, "/inside": 301, "/moved": 307, "/file": 302}.get(request.path, 200)
        targets = {"/loop": "/loop", "/inside": "http://169.254.169.254/", "/moved": "/a.png", "/file": "file:///etc"}
        request.send_response(status)
        if status // 100 == 3:
            request.send_header("Location", targets[request.path])
        if request.path == "/claims-much":
            request.send_header("Content-Length", "1000000")
        request.end_headers()
        try:
            if request.path == "/endless":
                while not self.end.is_set():
                    request.wfile.write(b"x" * 4096)
            elif request.path == "/slow":
                self.end.wait(60)
            else:
                request.wfile.write(png())
        except OSError:
            return

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    with ImageServer() as server:
        yield server


def fetch(*urls: str, max_bytes: int = 100_000, timeout_s: float = 30, networks: tuple[str, ...] = LOOPBACK) -> Any:
    fetcher = ImageFetcher(max_bytes, timeout_s, networks)
    return asyncio.run(fetcher.fetch({f"messages.0.content.{at + 1}.image_url": url for at, url in enumerate(urls)}))


def refusal(url: str, **options: Any) -> str:
    with pytest.raises(ApiError) as caught:
        fetch(url, **options)
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert caught.value.message.startswith(f"{PLACE}: {url!r:.200} ")
    return caught.value.message


def test_images_of_a_message_are_fetched_in_their_order_and_read_like_others(server: ImageServer) -> None:
    fetched = fetch(f"{server.url}/moved", f"{server.url}/a.png?b=%20#c")
    assert list(fetched) == [PLACE, "messages.0.content.2.image_url"]
    assert [read_image(raw, place).size for place, raw in fetched.items()] == [(40, 30)] * 2
    assert ("/a.png?b=%20", f"127.0.0.1:{server.port}") in server.asked
    with pytest.raises(ApiError, match=rf"^{PLACE}: not a readable image/png or image/jpeg"):
        read_image(b"nothing", PLACE)


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("/missing", {}, "answers with status 404"),
        ("/loop", {}, "leads on more than 3 times"),
        ("/inside", {}, "'169.254.169.254' has no public address"),
        ("/file", {}, "is no http:// or https:// URL|names no server"),
        ("/claims-much", {}, r"at most 100000 bytes \(--max-body-bytes\)"),
        ("/endless", {}, r"at most 100000 bytes \(--max-body-bytes\)"),
        ("/slow", {"timeout_s": 0.2}, r"was not there after 0.2 s \(--http-timeout\)"),
        ("/a.png", {"networks": ()}, r"has no public address \(--allowed-image-networks\)"),
    ],
)
def test_what_a_server_may_not_do_is_refused_by_the_place_of_the_image(
    server: ImageServer, path: str, options: Any, reason: str
) -> None:
    before = len(server.asked)
    message = refusal(server.url + path, **options)
    assert re.search(reason, message), message
    if options.get("networks") == ():
        assert len(server.asked) == before


def test_images_of_a_request_share_its_bytes(server: ImageServer) -> None:
    size = len(png())
    assert len(fetch(*[f"{server.url}/a.png"] * 3, max_bytes=3 * size)) == 3
    with pytest.raises(ApiError, match="is too large"):
        fetch(*[f"{server.url}/a.png"] * 3, max_bytes=3 * size - 1)


@pytest.mark.parametrize(
    "url", ["http://", "ftp://127.0.0.1/a", "http:///a", "http://[::1", f"http://{'a' * 300}/", "file:///a", "a.png"]
)
def test_what_is_no_address_of_the_web_is_refused(url: str) -> None:
    refusal(url)


def test_a_name_is_resolved_once_and_its_address_connected_to(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["10.0.0.1"], ["127.0.0.1"], ["10.0.0.1"]]
    asked = []

    def look_up(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(remote_images.socket, "getaddrinfo", look_up)
    url = f"http://images.example:{server.port}/a.png"
    assert "'images.example' has no public address" in refusal(url)
    assert fetch(url) == {PLACE: png()}
    assert asked == ["images.example"] * 2
    assert server.asked[-1] == ("/a.png", f"images.example:{server.port}")


PRIVATE = """
127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
:: ::1 fe80::1 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1::
2001:0:7f00:1::
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_of_this_machine_and_its_networks_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_other_ways_to_write_a_loopback_address_are_seen_through(server: ImageServer) -> None:
    for host in ("2130706433", "0x7f.1", "127.1", "[::ffff:7f00:1]"):
        refusal(f"http://{host}:{server.port}/a.png", networks=())


def test_only_so_many_requests_are_fetched_for_at_once(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "MAX_FETCHING", 1)
    fetcher = ImageFetcher(100_000, 30, LOOPBACK)

    async def run() -> None:
        slow = asyncio.ensure_future(fetcher.fetch({PLACE: f"{server.url}/slow"}))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="too many requests at once") as caught:
            await fetcher.fetch({PLACE: f"{server.url}/a.png"})
        assert caught.value.status == 503
        slow.cancel()  # its client left
        await asyncio.wait([slow])
        assert await fetcher.fetch({PLACE: f"{server.url}/a.png"}) == {PLACE: png()}

    start_s = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - start_s < 20


def test_without_the_flag_nothing_is_fetched_and_the_flag_is_named(server: ImageServer) -> None:
    before = len(server.asked)
    with pytest.raises(ApiError, match=rf"^{PLACE}: .* fetches no others \(--allow-remote-images\)"):
        asyncio.run(ImageProcessor(None, 10).fetch({PLACE: f"{server.url}/a.png"}))
    assert len(server.asked) == before
