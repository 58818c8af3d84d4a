"""The hub and the ranks' links, over real sockets: who gets what, and who hears of an end."""

import asyncio
import queue
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import astuple
from typing import Any

import pytest

from rq_ep.engine.requests import Output, Request, Score
from rq_ep.serve.control import Link, Message
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.rank_router import Hub, listen

TOKEN = "secret"
NUM_RANKS = 3


class FakeRank:
    """A rank that writes down what it hears."""

    def __init__(self, address: tuple[str, int], rank: int, token: str = TOKEN) -> None:
        self.heard: queue.Queue[Message] = queue.Queue()
        self.link = Link(address, rank, token)
        self.link.listen(self.heard.put, lambda: self.heard.put({"kind": "closed"}))

    async def hear(self, kind: str) -> Message:
        """The next message, which is of this kind."""
        message = await asyncio.to_thread(self.heard.get, timeout=5)
        assert message["kind"] == kind, message
        return message

    def tell(self, *outputs: tuple[Any, ...]) -> None:
        self.link.send({"kind": "outputs", "outputs": outputs})

    def die(self) -> None:
        """End without a good-bye, as a killed process does."""
        self.link._is_closing = True
        self.link._socket.shutdown(socket.SHUT_RDWR)


class Stage:
    """A hub that serves, and its ranks."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.ready: list[Message] = []
        self.hub = Hub(
            NUM_RANKS, TOKEN, max_queue_size=4, stall_s=1.0,
            on_checked=lambda: None, on_ready=self.ready.append, on_stats=lambda *_: None,
            on_recorded=lambda _: None, on_end=self.ended.set,
        )  # fmt: skip
        self.address = ("", 0)
        self.ranks: list[FakeRank] = []

    def ask(self, name: str, num_tokens: int = 10) -> asyncio.Task[list[Output]]:
        async def ask() -> list[Output]:
            return [output async for output in self.hub.generate(Request(name, [1], num_tokens - 1))]

        return asyncio.ensure_future(ask())


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    it = Stage()
    sock = socket.create_server(("127.0.0.1", 0))
    it.address = sock.getsockname()
    server = await listen(it.hub, sock)
    it.ranks = [FakeRank(it.address, rank) for rank in range(NUM_RANKS)]
    while len(it.hub._writers) < NUM_RANKS:
        await asyncio.sleep(0.01)
    it.ranks[0].link.send({"kind": "ready"})
    while it.hub.why_unavailable() is not None:
        await asyncio.sleep(0.01)
    try:
        yield it
    finally:
        for rank in it.ranks:
            rank.link.close()
        server.close()


def play(scene: Callable[[Stage], Awaitable[None]]) -> None:
    async def run() -> None:
        async with stage() as it:
            await scene(it)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_requests_are_spread_and_everyone_is_woken() -> None:
    async def scene(it: Stage) -> None:
        tasks = []
        for number, rank in enumerate([0, 1, 2, 2]):  # the third is short, so its rank gets the fourth
            tasks.append(it.ask(f"{number}", 4 if number == 2 else 10))
            added = await it.ranks[rank].hear("add")
            assert (added["request"]["id"], added["num_announced"]) == (f"{number}", number + 1)
            for other in {0, 1, 2} - {rank}:
                assert (await it.ranks[other].hear("wake"))["num_announced"] == number + 1
        it.ranks[0].tell(("0", [5], None, None), ("0", [6, 7], "length", None))
        assert await tasks[0] == [Output("0", [5]), Output("0", [6, 7], "length")]
        for task in tasks[1:]:
            task.cancel()

    play(scene)


def test_scores_arrive_as_they_were_sent() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].hear("add")
        scored = Output("0", [5], "length", None, [Score(-0.5, [5, 2], [-0.5, -1.5])], [Score(-1.0, [], [])])
        it.ranks[0].tell(astuple(scored))
        assert await task == [scored]

    play(scene)


def test_a_full_server_says_so_and_recovers() -> None:
    async def scene(it: Stage) -> None:
        tasks = [it.ask(f"{number}") for number in range(4)]
        await it.ranks[0].hear("add")
        with pytest.raises(ApiError, match="4 requests are waiting or running") as caught:
            await it.ask("one too many")
        assert caught.value.status == 429
        it.ranks[0].tell(("0", [5], "stop", None))
        await tasks[0]
        late = it.ask("late")
        await asyncio.sleep(0.05)
        for task in [*tasks[1:], late]:
            assert not task.done()
            task.cancel()

    play(scene)


def test_who_stops_listening_cancels() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].hear("add")
        task.cancel()
        assert (await it.ranks[0].hear("cancel"))["id"] == "0"
        assert it.hub.num_unfinished == 0

    play(scene)


def test_a_request_that_fails_on_its_rank_is_an_error() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].hear("add")
        it.ranks[0].tell(("0", [], "error", "no room"))
        with pytest.raises(ApiError, match="rank 0: no room"):
            await task

    play(scene)


PLACE = {"step": 7, "layer": 1, "operation": "gather of counts", "stuck_s": 0.0}
STATS = {"kind": "stats", "num_running": 0, "num_waiting": 0, "place": PLACE}


def test_a_silent_rank_ends_the_group_and_is_named() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        watching = asyncio.ensure_future(it.hub.watch())
        for _ in range(16):
            for rank in it.ranks[:2] if _ else it.ranks:
                rank.link.send(STATS)
            await asyncio.sleep(0.1)
        with pytest.raises(ApiError, match=r"rank 2 has not been heard .* rank 0 waits in step 7, MoE layer 1, gather"):
            await task
        await it.ended.wait()
        await watching

    play(scene)


def test_an_abort_is_no_death() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].hear("add")
        it.ranks[1].link.send({"kind": "aborted", "signal": "SIGINT"})
        it.ranks[1].die()
        with pytest.raises(ApiError, match="shut down by a second SIGINT") as caught:
            await task
        assert caught.value.status == 503

    play(scene)


@pytest.mark.parametrize("in_time", [True, False])
def test_draining_waits_for_what_runs_and_then_stops_all(in_time: bool) -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].hear("add")
        it.ranks[1].link.send({"kind": "drain", "timeout_s": 5 if in_time else 0.1})
        it.ranks[2].link.send({"kind": "drain", "timeout_s": 5})  # every rank got the signal
        await asyncio.sleep(0.05)
        assert it.hub.why_unavailable() == "draining"
        with pytest.raises(ApiError, match="draining") as refused:
            await it.ask("late")
        assert refused.value.status == 503
        if in_time:
            it.ranks[0].tell(("0", [5], "length", None))
            await task
        else:
            with pytest.raises(ApiError, match="shut down before this request had finished"):
                await task
            await it.ranks[0].hear("cancel")
        await it.ranks[0].hear("stop")
        for rank in it.ranks:
            assert not it.ended.is_set()
            rank.link.close()
        await it.ended.wait()

    play(scene)


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_failure_is_told_to_clients_and_ranks(how: str) -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[2].hear("wake")
        it.ranks[0].link.send({"kind": "failed", "text": "connection lost", "is_consequence": True})
        if how == "raised":
            it.ranks[1].link.send({"kind": "failed", "text": "KeyError: 3", "is_consequence": False})
        it.ranks[1].die()
        blame = "rank 1 died" if how == "killed" else "rank 1: KeyError: 3"
        with pytest.raises(ApiError, match=blame) as caught:
            await task
        assert caught.value.status == 500
        assert blame in (await it.ranks[2].hear("abort"))["reason"]
        await it.ended.wait()
        assert blame in str(it.hub.why_unavailable())

    play(scene)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"{}\n", b"\xff\n", b""])
def test_what_is_no_rank_is_turned_away(words: bytes) -> None:
    async def scene(it: Stage) -> None:
        reader, writer = await asyncio.open_connection(*it.address)
        writer.write(words)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert it.hub.why_unavailable() is None

    play(scene)


def test_strangers_are_turned_away() -> None:
    async def scene(it: Stage) -> None:
        stranger = FakeRank(it.address, 1, token="guess")
        await stranger.hear("closed")
        assert it.hub.why_unavailable() is None
        assert len(it.hub._writers) == NUM_RANKS

    play(scene)


def test_rank_0_leaving_before_the_others_came_ends_the_wait() -> None:
    async def run() -> None:
        it: Any = Stage()
        sock = socket.create_server(("127.0.0.1", 0))
        server = await listen(it.hub, sock)
        FakeRank(sock.getsockname(), 0).link.close()
        await it.ended.wait()
        server.close()

    asyncio.run(asyncio.wait_for(run(), 10))
