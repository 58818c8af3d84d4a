"""A client of a server on this machine."""

import httpx


def local_client(url: str, timeout_s: float = 5) -> httpx.Client:
    """A client of the server at `url` that reads no certificates and no proxies.

    Certificates are read anew for every client otherwise: 50 ms of a core that the server beside it could use.
    """
    limits = httpx.Limits(max_keepalive_connections=0)  # a server that was started anew is met without an error
    return httpx.Client(base_url=url, timeout=timeout_s, limits=limits, verify=False, trust_env=False)
