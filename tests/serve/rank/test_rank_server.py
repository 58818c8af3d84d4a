"""A rank whose hearing thread fails: nothing may go on that no longer takes requests."""

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from rq_ep.config import ServeConfig
from rq_ep.engine.requests import Request
from rq_ep.parallel import single_group
from rq_ep.serve.control import ControlClient
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks.rank_router import RankRouter
from rq_ep.serve.messages import Ready
from rq_ep.serve.process import thread_errors_to
from rq_ep.serve.rank import early_end, rank_server
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.rank.rank_inbox import RankInbox
from rq_ep.serve.rank.rank_server import RankServer, fail
from rq_ep.serve.supervisor.rank_start import HubAddress


class DamagedEngine:
    """An engine that cannot take a request."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def submit(self, request: Request) -> None:
        raise self._error


class Observer:
    """An observer of a router that does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.mark.parametrize("error", [TypeError("None is no token"), ValueError("no such token")])
def test_an_error_on_the_thread_that_hears_requests_ends_the_server_by_name(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exit_failed(reason: str | None) -> None:
        raise SystemExit

    async def run() -> None:
        observer: Any = Observer()
        router = RankRouter(1, "token", observer, max_queue_size=4, stall_s=60)
        sock = socket.create_server(("127.0.0.1", 0))
        listening = await router.listen(sock)
        end = EarlyEnd(0)
        client = end.client = await asyncio.to_thread(ControlClient, sock.getsockname(), 0, "token")
        group: Any = single_group()
        engine: Any = DamagedEngine(error)
        rank = RankServer(ServeConfig(), group, client, HubAddress(sock.getsockname(), "token"), end)
        loaded: Any = SimpleNamespace(inbox=RankInbox(engine))
        rank._rank = loaded
        with thread_errors_to(lambda error: fail(end, error)):
            client.listen(rank._handle, rank._on_close, rank._on_malformed)
            client.send(Ready(100, 256, [{}], {}, {}))
            while router.why_unavailable() is not None:
                await asyncio.sleep(0.01)
            expected = f"rank 0: {type(error).__name__}: {error}"
            with pytest.raises(ApiError, match=f"the server failed: {expected}"):
                async for _ in router.generate(Request("0", [1], 1)):
                    pass
            while router.state.name != "FAILED":
                await asyncio.sleep(0.01)
            assert router.why_unavailable() == expected
        client.close()
        listening.close()

    for module in (early_end, rank_server):
        monkeypatch.setattr(module, "exit_failed", exit_failed)
    monkeypatch.setattr(early_end, "ABORT_TIMEOUT_S", 0.0)
    asyncio.run(asyncio.wait_for(run(), 30))
