"""The HTTP process's view of the ranks: routes requests to them, brings their tokens back, and notices their deaths.

A group goes through these states; it may fail in each of the first four:

    LOADING -> SERVING -> DRAINING -> STOPPING -> ENDED
                                      FAILING  -> FAILED
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol, assert_never

from rq_ep.engine.requests import Output, Request
from rq_ep.serve.control import read_messages
from rq_ep.serve.frames import GREETING, Frames, read_greeting
from rq_ep.serve.http.blame import FailureReport, blame
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.watchdog import TICK_S, Watchdog
from rq_ep.serve.messages import (
    Abort,
    Aborted,
    AddRequest,
    Bye,
    Cancel,
    Checked,
    DrainRequest,
    Failed,
    FromRank,
    Mark,
    MessageError,
    Outputs,
    RankStats,
    Ready,
    Recorded,
    RecordingFailed,
    Stop,
    ToRank,
    Wake,
    encode,
    request_in_parts,
)
from rq_ep.serve.process import BackgroundTasks

log = logging.getLogger("rq_ep.serve")

MAX_UNREAD_OUTPUTS = 4096  # of a request; some megabytes
GRACE_S = 0.3  # how long the other ranks may report their errors before one is blamed
GREETING_S = 5.0  # how long a connection may take to greet; a rank does it at once
MAX_UNGREETED = 64  # connections that have not greeted; one more ends the oldest
MAX_PROMPT_LOGPROBS = 1 << 23  # of the unfinished requests together; each takes some 70 bytes here until it is answered
STRANGERS_LOG_S = 60.0


class GroupState(Enum):
    """State of the ranks together."""

    LOADING = auto()  # until rank 0 says that every rank can serve
    SERVING = auto()
    DRAINING = auto()  # no new requests; the unfinished ones may finish
    STOPPING = auto()  # no request is left, and every rank was sent `Stop`
    ENDED = auto()  # every rank has left
    FAILING = auto()  # a rank has failed, and the reports of the others are awaited
    FAILED = auto()  # the clients and the ranks know the reason


class RankState(Enum):
    """State of the connection to a rank."""

    CONNECTING = auto()
    CONNECTED = auto()
    LEAVING = auto()  # it has said good-bye
    GONE = auto()  # its connection ended after a good-bye
    LOST = auto()  # its connection ended without one


OPEN = (RankState.CONNECTED, RankState.LEAVING)
UNAVAILABLE = {
    GroupState.LOADING: "the model is loading",
    GroupState.DRAINING: "draining",
    GroupState.STOPPING: "draining",
    GroupState.ENDED: "draining",
    GroupState.FAILING: "a rank failed",
}


class GroupObserver(Protocol):
    """Receives what the ranks report."""

    def on_checked(self) -> None:
        """Rank 0 begins to load a checkpoint that is in order."""

    def on_ready(self, ready: Ready) -> None:
        """Every rank can serve."""

    def on_stats(self, rank: int, stats: RankStats) -> None:
        """Figures of a rank have come."""

    def on_recorded(self, result: Recorded | RecordingFailed) -> None:
        """A recording has ended."""

    def on_end(self) -> None:
        """Serving is over, in whatever way; called once."""


@dataclass
class RankConnection:
    """A rank as this process sees it."""

    state: RankState = RankState.CONNECTING
    writer: asyncio.StreamWriter | None = None
    frames: Frames | None = None  # to the rank


@dataclass
class RoutedRequest:
    """A request between its arrival and its end."""

    request: Request
    rank: int
    outputs: asyncio.Queue[Output | ApiError] = field(default_factory=asyncio.Queue)


def least_loaded(loads_R: Sequence[int]) -> int:
    """The rank whose unfinished requests may come to the fewest tokens; the lowest number among equals.

    Args:
        loads_R: [R] tokens (prompt and allowed answer) of the unfinished requests of each rank.
    """
    return min(range(len(loads_R)), key=lambda rank: loads_R[rank])


class RankRouter:
    """Routes requests to the ranks and brings their tokens back.

    Args:
        num_ranks: size of the group.
        token: the secret of this run, which the ranks prove that they know.
        observer: receives what the ranks report.
        max_queue_size: requests that may be unfinished at once.
        stall_s: seconds after which a rank that is silent, or makes no progress, ends the group.
    """

    def __init__(
        self, num_ranks: int, token: str, observer: GroupObserver, *, max_queue_size: int, stall_s: float
    ) -> None:
        self._token = token
        self._observer = observer
        self._max_queue_size = max_queue_size
        self._watchdog = Watchdog(stall_s)
        self.state = GroupState.LOADING
        self._ranks = [RankConnection() for _ in range(num_ranks)]
        self._requests: dict[str, RoutedRequest] = {}
        self._num_announced = 0
        self._reports: list[FailureReport] = []  # in the order in which they came
        self._failure = ""  # why the group has failed
        self._has_ended = asyncio.Event()
        self.tasks = BackgroundTasks(self._on_bug)
        self._ungreeted: list[asyncio.Timeout] = []  # oldest first
        self._num_strangers = 0
        self._strangers_logged_s = -STRANGERS_LOG_S

    # For the routes

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    @property
    def num_connected(self) -> int:
        """Ranks whose connection is open."""
        return sum(connection.state in OPEN for connection in self._ranks)

    def why_unavailable(self) -> str | None:
        """Why no request can be taken now; None if one can."""
        if self.state is GroupState.SERVING:
            return None
        return UNAVAILABLE.get(self.state, self._failure)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Send a request to the least loaded rank, and yield its outputs until it ends; leaving early cancels it.

        Raises:
            ApiError: the server is not taking requests, or the group failed.
        """
        if (reason := self.why_unavailable()) is not None:
            raise ApiError(503, f"not serving: {reason}")
        if len(self._requests) >= self._max_queue_size:
            raise ApiError(429, f"{len(self._requests)} requests are waiting or running (--max-queue-size): try later")
        self._check_prompt_logprobs(request)
        loads_R = [0] * len(self._ranks)
        for other in self._requests.values():
            loads_R[other.rank] += other.request.num_tokens
        routed = RoutedRequest(request, least_loaded(loads_R))
        self._requests[request.id] = routed
        try:
            await self._announce(routed)
            while True:
                output = await routed.outputs.get()
                if isinstance(output, ApiError):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if self._requests.pop(request.id, None) is not None:
                self._send(routed.rank, Cancel(request.id))

    def _check_prompt_logprobs(self, request: Request) -> None:
        """Refuse a request that asks for more log-probabilities of prompts than this process should hold at once."""
        if not (wanted := request.num_prompt_logprobs):
            return
        how = f"{len(request.prompt_ids)} prompt tokens with logprobs {request.num_logprobs}"
        if wanted > MAX_PROMPT_LOGPROBS:
            text = f"{how} are {wanted} log-probabilities, at most {MAX_PROMPT_LOGPROBS} can be had: score it in parts"
            raise ApiError(400, text, "logprobs")
        held = sum(routed.request.num_prompt_logprobs for routed in self._requests.values())
        if held + wanted > MAX_PROMPT_LOGPROBS:
            raise ApiError(429, f"{how}: other requests score {held} of {MAX_PROMPT_LOGPROBS} at once: try later")

    def mark(self, number: int) -> None:
        """Have every rank receive a number between the same two steps, asleep or not."""
        self._send(0, Mark(number))
        self._send_all(Wake(self._num_announced))

    async def _announce(self, routed: RoutedRequest) -> None:
        """Hand over a request, and wake the other ranks: they may all be asleep."""
        parts, last = request_in_parts(routed.request)
        for part in parts:
            self._send(routed.rank, part)
            await asyncio.sleep(0)  # writing them down takes time, in which other requests go on
        if routed.request.id not in self._requests:  # the group has failed meanwhile, or drains
            return
        self._num_announced += 1
        for rank in range(len(self._ranks)):
            is_its_rank = rank == routed.rank
            self._send(rank, AddRequest(last, self._num_announced) if is_its_rank else Wake(self._num_announced))

    # The connections of the ranks

    async def serve_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one connection, from its greeting to its end."""
        with suppress(asyncio.CancelledError):  # this process ends; asyncio would log it as an error
            try:
                await self._read_connection(reader, writer)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _read_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeted = await self._read_greeting(reader)
        # A rank connects once, so that a greeting which was overheard is of no use.
        if greeted is None or self._ranks[greeted[0]].state is not RankState.CONNECTING:
            self._log_stranger(writer)
            return
        rank, nonce = greeted
        connection = self._ranks[rank]
        connection.state, connection.writer = RankState.CONNECTED, writer
        connection.frames = Frames(self._token, nonce, is_to_rank=True)
        messages = read_messages(reader, Frames(self._token, nonce, is_to_rank=False))
        if self.state in (GroupState.FAILING, GroupState.FAILED):  # it comes late
            self._send(rank, Abort(self.why_unavailable() or ""))
        try:
            async for message in messages:
                self._handle(rank, message)
        except MessageError as error:
            self._report(FailureReport(rank, f"rank {rank}: sent {error}"))
        except Exception as error:
            self._on_bug(error)
            await self._has_ended.wait()  # until this rank, too, has been sent the reason
        connection.state = RankState.GONE if connection.state is RankState.LEAVING else RankState.LOST
        if connection.state is RankState.LOST:
            self._report(FailureReport(rank, f"rank {rank} died (its process was killed or crashed)"))
        elif self._have_all_left() and self.state is not GroupState.FAILING:  # which ends once the clients know of it
            self._end(GroupState.ENDED)

    async def _read_greeting(self, reader: asyncio.StreamReader) -> tuple[int, bytes] | None:
        """Rank and nonce of a connection; None: it is of a stranger, or of one who does not greet in time."""
        if len(self._ungreeted) >= MAX_UNGREETED:
            self._ungreeted.pop(0).reschedule(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(GREETING_S) as deadline:
                self._ungreeted.append(deadline)
                try:
                    greeting = await reader.readexactly(GREETING.size)
                finally:
                    with suppress(ValueError):  # it was the oldest
                        self._ungreeted.remove(deadline)
        except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
            return None
        greeted = read_greeting(self._token, greeting)
        return greeted if greeted is not None and greeted[0] < len(self._ranks) else None

    def _log_stranger(self, writer: asyncio.StreamWriter) -> None:
        """Count a connection that is turned away; log one line a minute."""
        self._num_strangers += 1
        if time.monotonic() - self._strangers_logged_s >= STRANGERS_LOG_S:
            self._strangers_logged_s = time.monotonic()
            log.warning(
                "turned away %d connections at the port of the ranks that came from none of them, the last one from %s",
                self._num_strangers, writer.get_extra_info("peername"),
            )  # fmt: skip

    def _have_all_left(self) -> bool:
        """Whether no rank is connected, and none will be: rank 0 is the first to connect."""
        return self._ranks[0].state is RankState.GONE and self.num_connected == 0

    def _handle(self, rank: int, message: FromRank) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    self._deliver(output)
            case RankStats():
                self._watchdog.report(rank, message.progress)
                self._observer.on_stats(rank, message)
            case Recorded() | RecordingFailed():
                self._observer.on_recorded(message)
            case Checked():
                self._observer.on_checked()
            case Ready():
                if self.state is GroupState.LOADING:
                    self.state = GroupState.SERVING
                self._observer.on_ready(message)
            case DrainRequest():
                self._start_draining(message.timeout_s)
            case Failed():
                self._report(FailureReport(rank, f"rank {rank}: {message.text}", message.is_consequence))
            case Aborted():
                self._report(FailureReport(rank, self._shutdown_text(rank, message), status=503))
            case Bye():
                self._ranks[rank].state = RankState.LEAVING
                self._watchdog.forget(rank)
            case _:
                assert_never(message)

    def _deliver(self, output: Output) -> None:
        routed = self._requests.get(output.request_id)
        if routed is None:  # cancelled meanwhile
            return
        if routed.outputs.qsize() >= MAX_UNREAD_OUTPUTS:
            del self._requests[output.request_id]
            self._send(routed.rank, Cancel(output.request_id))
            text = f"the client has left {MAX_UNREAD_OUTPUTS} parts of the answer unread: the request was cancelled"
            routed.outputs.put_nowait(ApiError(408, text))
            return
        if output.finish_reason is not None:
            del self._requests[output.request_id]
        is_error = output.finish_reason == "error"
        if is_error:
            self._send(routed.rank, Cancel(output.request_id))  # the rank may go on with it: if its output was too long
        routed.outputs.put_nowait(ApiError(500, f"rank {routed.rank}: {output.error}") if is_error else output)

    def _send(self, rank: int, message: ToRank) -> None:
        connection = self._ranks[rank]
        if connection.state in OPEN and connection.writer is not None and not connection.writer.is_closing():
            assert connection.frames is not None
            connection.writer.write(connection.frames.pack(encode(message)))

    def _send_all(self, message: ToRank) -> None:
        for rank in range(len(self._ranks)):
            self._send(rank, message)

    # The end

    async def watch(self) -> None:
        """End the group when a rank is silent or makes no progress."""
        while self.state not in (GroupState.FAILING, GroupState.FAILED):
            await asyncio.sleep(TICK_S)
            if self.state is not GroupState.STOPPING and (stall := self._watchdog.check()) is not None:
                self._report(FailureReport(None, stall))

    def _start_draining(self, timeout_s: float) -> None:
        if self.state in (GroupState.LOADING, GroupState.SERVING):  # every rank may get the signal
            self.state = GroupState.DRAINING
            self.tasks.start(self._drain(timeout_s))

    async def _drain(self, timeout_s: float) -> None:
        """Let the unfinished requests finish, then stop every rank."""
        log.info("draining: %d unfinished requests get %g s", len(self._requests), timeout_s)
        end_s = time.monotonic() + timeout_s
        while self._requests and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        if self.state is not GroupState.DRAINING:  # a rank has failed meanwhile
            return
        for routed in self._requests.values():
            self._send(routed.rank, Cancel(routed.request.id))
        self._end_requests(ApiError(503, "the server was shut down before this request had finished"))
        self.state = GroupState.STOPPING
        self._send_all(Stop())

    def _shutdown_text(self, rank: int, message: Aborted) -> str:
        """Why the group ends when a signal has ended a rank at once."""
        if not message.was_loading:
            return f"the server was shut down by a second {message.signal}"
        text = f"the server was shut down by {message.signal} to rank {rank} while the model was loading"
        missing = [other for other, connection in enumerate(self._ranks) if connection.state is RankState.CONNECTING]
        # Launchers end a rank by a signal when another one has died, be it before it could connect.
        return f"{text}; rank {missing[0]} had not connected yet: it may have ended first" if missing else text

    def _on_bug(self, error: BaseException) -> None:
        """End the group for an error of this process: it must not go on half."""
        log.error("an error of the HTTP process", exc_info=error)
        self._report(FailureReport(None, f"the HTTP process: {type(error).__name__}: {error}"))

    def _report(self, report: FailureReport) -> None:
        """Take a report, the first one of each rank, and end the group."""
        if report.rank is None or report.rank not in {other.rank for other in self._reports}:
            self._reports.append(report)
        if self.state not in (GroupState.FAILING, GroupState.FAILED, GroupState.ENDED):
            self.state = GroupState.FAILING
            self.tasks.start(self._fail())

    async def _fail(self) -> None:
        """Establish who is to blame; inform the clients and every rank that is left."""
        try:
            await asyncio.sleep(GRACE_S)
            cause = blame(len(self._ranks), self._reports)
            self._failure = cause.text
            log.error("the group has failed: %s", self._failure)
            prefix = "" if cause.status == 503 else "the server failed: "
            self._end_requests(ApiError(cause.status, prefix + self._failure))
            self._send_all(Abort(self._failure))
        finally:
            self._end(GroupState.FAILED)

    def _end_requests(self, error: ApiError) -> None:
        for routed in self._requests.values():
            routed.outputs.put_nowait(error)
        self._requests.clear()

    def _end(self, state: GroupState) -> None:
        if self.state not in (GroupState.ENDED, GroupState.FAILED):
            self.state = state
            self._has_ended.set()
            self._observer.on_end()


async def listen(router: RankRouter, sock: socket.socket) -> asyncio.Server:
    """Accept the ranks' connections on a bound socket."""
    return await asyncio.start_server(router.serve_rank, sock=sock)
