"""Images of other servers, fetched in the HTTP process: within bounds, and from public addresses alone.

A name is resolved once, and the address that was checked is connected to, so that a name server cannot answer otherwise
the second time. Redirects are followed in the same way. Nothing of the environment is used: no proxy, no password.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2

from rq_ep.serve.http.openai.api_errors import ApiError

PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
MAX_CONNECTIONS = 64
MAX_FETCHING = 64  # requests, each of which may hold as many bytes as a body
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "rq_ep"}
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet at large; those of IPv6 that stand for one of IPv4 are not."""
    if isinstance(address, ipaddress.IPv6Address) and (address not in GLOBAL_UNICAST or address.sixtofour is not None):
        return False
    return address.is_global and not address.is_multicast


class ImageFetcher:
    """Fetches the images that requests name.

    Args:
        max_bytes: of all images of a request.
        timeout_s: for each of them, in seconds, redirects included.
        networks: that are not public and allowed all the same, such as 10.1.0.0/16.
    """

    def __init__(self, max_bytes: int, timeout_s: float, networks: Collection[str] = ()) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._num_fetching = 0
        self._resolver = ThreadPoolExecutor(8, "rq_ep names of image servers")
        # A connection is made for a name, whose certificate was checked: none is kept for the next name of its address.
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0)
        self._transport = httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)

    async def fetch(self, urls: Mapping[str, str]) -> dict[str, bytes]:
        """The bytes of the images of a request, by their places in it.

        Raises:
            ApiError: one may not or cannot be fetched, or they are too large.
        """
        if self._num_fetching >= MAX_FETCHING:
            raise ApiError(503, "images are fetched for too many requests at once: try later")
        self._num_fetching += 1
        room = _Room(self._max_bytes)
        tasks = [asyncio.ensure_future(self._fetch_one(url, place, room)) for place, url in urls.items()]
        try:
            return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
        finally:
            self._num_fetching -= 1
            for task in tasks:
                task.cancel()

    async def _fetch_one(self, url: str, place: str, room: "_Room") -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(httpx2.URL(url), room)
        except TimeoutError:
            reason = f"was not there after {self._timeout_s:g} s (--http-timeout)"
        except _Refusal as refusal:
            reason = str(refusal)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            reason = f"cannot be fetched ({type(error).__name__}: {' '.join(str(error).split()):.200})"
        raise ApiError(400, f"{place}: {url!r:.200} {reason}", "messages")

    async def _follow(self, url: httpx2.URL, room: "_Room") -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._transport.handle_async_request(await self._request(url))
            try:
                if response.has_redirect_location:
                    url = url.join(response.headers["Location"])
                    continue
                if response.status_code != 200:
                    raise _Refusal(f"cannot be fetched: {url.host} answers with status {response.status_code}")
                return await room.read(response)
            finally:
                await response.aclose()
        raise _Refusal(f"leads on more than {MAX_REDIRECTS} times")

    async def _request(self, url: httpx2.URL) -> httpx2.Request:
        """The request to the very address that was checked."""
        if url.scheme not in PORTS or not url.host:
            raise _Refusal("is no http:// or https:// URL" if url.host else "names no server")
        address = await self._resolve(url.raw_host.decode(), url.port or PORTS[url.scheme])
        headers = {**HEADERS, "Host": url.netloc.decode()}
        to_address = url.copy_with(host=str(address), userinfo=b"", fragment=None)
        name = {"sni_hostname": url.raw_host.decode()} if url.scheme == "https" else {}
        return httpx2.Request("GET", to_address, headers=headers, extensions=name)

    async def _resolve(self, host: str, port: int) -> Address:
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._resolver, look_up)
        except (OSError, UnicodeError):
            raise _Refusal(f"cannot be fetched: there is no server {host!r:.100}") from None
        addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
        for address in addresses:
            if is_public(address) or any(address in network for network in self._networks):
                return address
        raise _Refusal(f"may not be fetched: {host!r:.100} has no public address (--allowed-image-networks)")


class _Refusal(Exception):
    """Why an image is not fetched."""


class _Room:
    """The bytes that the images of a request may still have."""

    def __init__(self, num_bytes: int) -> None:
        self._limit = self._left = num_bytes

    async def read(self, response: httpx2.Response) -> bytes:
        """The body of an answer, as it is: nothing is unpacked."""
        length = response.headers.get("Content-Length", "0")
        if length.isdigit() and int(length) > self._left:
            raise self._too_large()
        parts = []
        async for part in response.aiter_raw():
            self._left -= len(part)
            if self._left < 0:
                raise self._too_large()
            parts.append(part)
        return b"".join(parts)

    def _too_large(self) -> _Refusal:
        return _Refusal(f"is too large: the images of a request have at most {self._limit} bytes (--max-body-bytes)")
