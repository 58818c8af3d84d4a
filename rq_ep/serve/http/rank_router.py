"""The HTTP process's view of the ranks: where requests go, tokens come from, and deaths are noticed."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from rq_ep.engine.least_loaded import least_loaded
from rq_ep.engine.progress import Progress
from rq_ep.engine.requests import Output, Request, output_from
from rq_ep.serve.control import MAX_LINE_BYTES, Message, encode, messages
from rq_ep.serve.http.blame import Report, verdict
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.watchdog import TICK_S, Watchdog

log = logging.getLogger("rq_ep.serve")

GRACE_S = 0.3  # how long to listen for other ranks' words before one is blamed


@dataclass
class Running:
    """A request between its arrival and its end."""

    request: Request
    rank: int
    news: asyncio.Queue[Output | ApiError] = field(default_factory=asyncio.Queue)


class Hub:
    """Spreads requests over the ranks and brings their tokens back.

    Args:
        num_ranks: size of the group.
        token: the secret that ranks show when they connect.
        max_queue_size: requests that may be unfinished at once.
        stall_s: seconds after which a rank that is silent, or does not get on, ends the group.
        on_checked: called when rank 0 has found the checkpoint in order and begins to load it.
        on_ready: told what rank 0 says of the model, once every rank can serve.
        on_stats: told what the ranks count.
        on_recorded: told what rank 0 says of a recording that has ended.
        on_end: called once when serving is over, in whatever way.
    """

    def __init__(
        self,
        num_ranks: int,
        token: str,
        *,
        max_queue_size: int,
        stall_s: float,
        on_checked: Callable[[], None],
        on_ready: Callable[[Message], None],
        on_stats: Callable[[int, Message], None],
        on_recorded: Callable[[Message], None],
        on_end: Callable[[], None],
    ) -> None:
        self.num_ranks = num_ranks
        self._token = token
        self._max_queue_size = max_queue_size
        self._on_checked = on_checked
        self._on_ready = on_ready
        self._on_stats = on_stats
        self._on_recorded = on_recorded
        self._on_end = on_end
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._running: dict[str, Running] = {}
        self._reports: dict[int, Report] = {}
        self._gone: set[int] = set()
        self._bye: set[int] = set()
        self._unavailable: str | None = "the model is loading"
        self._dead = False
        self._is_stopping = False
        self._aborted: str | None = None
        self._stalled: str | None = None
        self.watchdog = Watchdog(stall_s)
        self._num_announced = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # What the app asks

    @property
    def num_unfinished(self) -> int:
        return len(self._running)

    def why_unavailable(self) -> str | None:
        """Why no request can be taken now; None if one can."""
        return self._unavailable

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Send a request to the rank with the least to do, and yield its news until it ends or nobody listens.

        Raises:
            ApiError: the server is not taking requests, or the group failed.
        """
        if (reason := self.why_unavailable()) is not None:
            raise ApiError(503, f"not serving: {reason}")
        if len(self._running) >= self._max_queue_size:
            raise ApiError(429, f"{len(self._running)} requests are waiting or running (--max-queue-size): try later")
        loads_R = [0] * self.num_ranks
        for other in self._running.values():
            loads_R[other.rank] += other.request.num_tokens
        running = Running(request, least_loaded(loads_R))
        self._running[request.id] = running
        self._announce(running)
        try:
            while True:
                output = await running.news.get()
                if isinstance(output, ApiError):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if self._running.pop(request.id, None) is not None:
                self._send(running.rank, {"kind": "cancel", "id": request.id})

    def mark(self, number: int) -> None:
        """Have every rank told a number between the same two steps, asleep or not."""
        self._send(0, {"kind": "mark", "number": number})
        for rank in self._writers:
            self._send(rank, {"kind": "wake", "num_announced": self._num_announced})

    def _announce(self, running: Running) -> None:
        """Hand over a request, and rouse the other ranks: they may all be asleep."""
        self._num_announced += 1
        for rank in self._writers:
            message: Message = {"kind": "wake"}
            if rank == running.rank:
                message = {"kind": "add", "request": asdict(running.request)}
            self._send(rank, {**message, "num_announced": self._num_announced})

    # What the ranks say

    async def serve_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Listen to one connection, from a rank's greeting to its end."""
        with suppress(asyncio.CancelledError):  # this process ends; asyncio would log it as an error
            await self._listen(reader, writer)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = messages(reader)
        hello: Message = await anext(stream, {})
        if hello.get("token") != self._token:
            writer.close()
            return
        rank = int(hello["rank"])
        self._writers[rank] = writer
        if self._dead:  # a rank that arrives at the funeral
            self._send(rank, {"kind": "abort", "reason": self._unavailable})
        async for message in stream:
            self._hear(rank, message)
        self._writers.pop(rank, None)
        writer.close()
        self._gone.add(rank)
        if rank not in self._bye:
            self._fail_soon()
        elif 0 in self._gone and not self._writers:  # rank 0 is the first to come: nobody is left, nobody will come
            self._on_end()

    def _hear(self, rank: int, message: Message) -> None:
        match message["kind"]:
            case "outputs":
                for fields in message["outputs"]:
                    self._pass_on(output_from(*fields))
            case "stats":
                self.watchdog.hear(rank, Progress(**message["place"]))
                self._on_stats(rank, message)
            case "recorded":
                self._on_recorded(message)
            case "checked":
                self._on_checked()
            case "ready":
                self._unavailable = None
                self._on_ready(message)
            case "drain":
                self._start(self._drain(message["timeout_s"]))
            case "failed":
                self._reports[rank] = Report(message["text"], message["is_consequence"])
                self._fail_soon()
            case "aborted":
                self._aborted = f"the server was shut down by a second {message['signal']}"
                self._fail_soon()
            case "bye":
                self._bye.add(rank)
                self.watchdog.forget(rank)

    def _pass_on(self, output: Output) -> None:
        running = self._running.get(output.request_id)
        if running is None:  # cancelled meanwhile
            return
        if output.finish_reason is not None:
            del self._running[output.request_id]
        error = output.finish_reason == "error"
        running.news.put_nowait(ApiError(500, f"rank {running.rank}: {output.error}") if error else output)

    async def watch(self) -> None:
        """End the group when a rank is silent or does not get on."""
        while not self._dead:
            await asyncio.sleep(TICK_S)
            if not self._is_stopping and (found := self.watchdog.look()) is not None:
                self._stalled = found
                self._fail_soon()

    # How it ends

    async def _drain(self, timeout_s: float) -> None:
        """Take no more requests, let the running ones finish, then stop every rank."""
        if self._unavailable == "draining" or self._dead:
            return
        self._unavailable = "draining"
        log.info("draining: %d unfinished requests get %g s", len(self._running), timeout_s)
        end_s = time.monotonic() + timeout_s
        while self._running and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        for running in list(self._running.values()):
            self._send(running.rank, {"kind": "cancel", "id": running.request.id})
            running.news.put_nowait(ApiError(503, "the server was shut down before this request had finished"))
        self._running.clear()
        self._is_stopping = True
        for rank in list(self._writers):
            self._send(rank, {"kind": "stop"})

    def _fail_soon(self) -> None:
        if not self._dead:
            self._dead = True
            self._start(self._fail())

    async def _fail(self) -> None:
        """Find out who is to blame; tell the clients and every rank that is left."""
        self._unavailable = "a rank failed"
        await asyncio.sleep(GRACE_S)
        reason = self._aborted or self._stalled or verdict(self.num_ranks, self._reports, self._gone - self._bye)
        error = ApiError(503, reason) if self._aborted else ApiError(500, f"the server failed: {reason}")
        self._unavailable = reason
        log.error("the group has failed: %s", reason)
        for running in list(self._running.values()):
            running.news.put_nowait(error)
        self._running.clear()
        for rank in list(self._writers):
            self._send(rank, {"kind": "abort", "reason": reason})
        self._on_end()

    def _send(self, rank: int, message: Message) -> None:
        writer = self._writers.get(rank)
        if writer is not None and not writer.is_closing():
            writer.write(encode(message))

    def _start(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def listen(hub: Hub, sock: Any) -> asyncio.Server:
    """Accept the ranks' connections on a bound socket."""
    return await asyncio.start_server(hub.serve_rank, sock=sock, limit=MAX_LINE_BYTES)
