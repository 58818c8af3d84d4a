"""The group as the HTTP process sees it: takes requests while it serves, drains it, and ends it when a rank fails.

A group goes through these states; it may fail in each of the first four:

    LOADING -> SERVING -> DRAINING -> STOPPING -> ENDED
                                      FAILING  -> FAILED
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from enum import Enum, auto
from typing import Protocol, assert_never

from rq_ep.engine.requests import Output, Request
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks.blame import FailureReport, blame
from rq_ep.serve.http.ranks.rank_connections import RankConnections, RankState
from rq_ep.serve.http.ranks.routed_requests import RoutedRequest, RoutedRequests
from rq_ep.serve.http.ranks.watchdog import TICK_S, Watchdog
from rq_ep.serve.messages import (
    Abort,
    Aborted,
    AddRequest,
    BeginMigration,
    Bye,
    Cancel,
    CannotContinue,
    Checked,
    DrainRequest,
    Failed,
    FromRank,
    ImportanceReport,
    Loaded,
    Mark,
    MigrationGivenUp,
    MigrationPlanned,
    Outputs,
    PeerUnreachable,
    PlacementServed,
    RankStats,
    Ready,
    RebalanceAnswer,
    RebalanceCommand,
    RebalanceStatus,
    Recorded,
    RecordingFailed,
    Regrouped,
    Stop,
    Wake,
    request_in_parts,
)
from rq_ep.serve.process import BackgroundTasks

log = logging.getLogger("rq_ep.serve")

GRACE_S = 0.3  # how long the other ranks may report their errors before one is blamed


class GroupState(Enum):
    """State of the ranks together."""

    LOADING = auto()  # until rank 0 says that every rank can serve
    SERVING = auto()
    DRAINING = auto()  # no new requests; the unfinished ones may finish
    STOPPING = auto()  # no request is left, and every rank was sent `Stop`
    ENDED = auto()  # every rank has left
    FAILING = auto()  # a rank has failed, and the reports of the others are awaited
    FAILED = auto()  # the clients and the ranks know the reason


UNAVAILABLE = {
    GroupState.LOADING: "the model is loading",
    GroupState.DRAINING: "draining",
    GroupState.STOPPING: "draining",
    GroupState.ENDED: "draining",
    GroupState.FAILING: "a rank failed",
}


class GroupObserver(Protocol):
    """Receives what the ranks report."""

    def on_checked(self, checked: Checked) -> None:
        """Rank 0 begins to load a checkpoint that is in order."""

    def on_ready(self, ready: Ready) -> None:
        """Every rank can serve."""

    def on_stats(self, rank: int, stats: RankStats) -> None:
        """Figures of a rank have come."""

    def on_recorded(self, result: Recorded | RecordingFailed) -> None:
        """A recording has ended."""

    def on_rebalance(self, message: RebalanceStatus | RebalanceAnswer | PlacementServed) -> None:
        """Something has changed in the re-placements."""

    def on_end(self) -> None:
        """Serving is over, in whatever way; called once."""


class RankRouter:
    """Routes requests to the ranks and brings their tokens back; listens to the connections of the ranks.

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
        self._num_ranks = num_ranks
        self._observer = observer
        self._watchdog = Watchdog(stall_s)
        self.state = GroupState.LOADING
        self._connections = RankConnections(num_ranks, token, self)
        self._requests = RoutedRequests(num_ranks, max_queue_size, self._send_cancel)
        self._num_announced = 0
        self._reports: list[FailureReport] = []  # in the order in which they came
        self._failure = ""  # why the group has failed
        self.tasks = BackgroundTasks(self.on_bug)

    async def listen(self, sock: socket.socket) -> asyncio.Server:
        """Accept the ranks' connections on a bound socket."""
        return await self._connections.listen(sock)

    # For the routes

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    @property
    def num_connected(self) -> int:
        """Ranks whose connection is open."""
        return self._connections.num_open

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
        routed = self._requests.add(request)
        try:
            await self._announce(routed)
            while True:
                output = await routed.next_output()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._requests.cancel(routed)

    async def _announce(self, routed: RoutedRequest) -> None:
        """Hand over a request, and wake the other ranks: they may all be asleep."""
        parts, last = request_in_parts(routed.request)
        for part in parts:
            self._connections.send(routed.rank, part)
            await asyncio.sleep(0)  # writing them down takes time, in which other requests go on
        if routed not in self._requests:  # the group has failed meanwhile, or drains
            return
        self._num_announced += 1
        add, wake = AddRequest(last, self._num_announced), Wake(self._num_announced)
        for rank in range(self._num_ranks):
            self._connections.send(rank, add if rank == routed.rank else wake)

    def _send_cancel(self, routed: RoutedRequest) -> None:
        self._connections.send(routed.rank, Cancel(routed.request.id))

    def mark(self, number: int) -> None:
        """Have every rank receive a number between the same two steps, asleep or not."""
        self._connections.send(0, Mark(number))
        self._connections.send_all(Wake(self._num_announced))

    def rebalance(self, command: RebalanceCommand) -> None:
        """Pass a command on to rank 0."""
        self._connections.send(0, command)

    # As the listener of the connections

    def on_connect(self, rank: int) -> None:
        if self.state in (GroupState.FAILING, GroupState.FAILED):  # it comes late
            self._connections.send(rank, Abort(self.why_unavailable() or ""))

    def on_message(self, rank: int, message: FromRank) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    self._requests.deliver(output)
            case RankStats():
                self._watchdog.report(rank, message.progress)
                self._observer.on_stats(rank, message)
            case Recorded() | RecordingFailed():
                self._observer.on_recorded(message)
            case MigrationPlanned():
                if self.state in (GroupState.SERVING, GroupState.DRAINING):  # later the ranks were told to stop
                    begin = BeginMigration(message.generation, message.placement, message.rounds)
                    self._connections.send_all(begin)
            case ImportanceReport() | MigrationGivenUp():
                self._connections.send(0, message)
            case RebalanceStatus() | RebalanceAnswer() | PlacementServed():
                self._observer.on_rebalance(message)
            case Checked():
                self._observer.on_checked(message)
            case Ready():
                if self.state is GroupState.LOADING:
                    self.state = GroupState.SERVING
                self._observer.on_ready(message)
            case Loaded() | Regrouped():
                pass
            case PeerUnreachable():
                self._report(FailureReport(rank, f"rank {rank}: {message.text}", is_consequence=True))
            case CannotContinue():
                self._report(FailureReport(None, message.reason))
            case DrainRequest():
                self._start_draining(message.timeout_s)
            case Failed():
                self._report(FailureReport(rank, f"rank {rank}: {message.text}", message.is_consequence))
            case Aborted():
                self._report(FailureReport(rank, self._shutdown_text(rank, message), status=503))
            case Bye():
                self._watchdog.forget(rank)
            case _:
                assert_never(message)

    def on_leave(self) -> None:
        # Rank 0 is the first to connect: once it has gone, none will come.
        have_all_left = 0 in self._connections.in_state(RankState.GONE) and self.num_connected == 0
        if have_all_left and self.state is not GroupState.FAILING:  # which ends once the clients know of it
            self._end(GroupState.ENDED)

    def on_loss(self, rank: int, text: str) -> None:
        self._report(FailureReport(rank, text))

    def on_bug(self, error: BaseException) -> None:
        """End the group for an error of this process: it must not go on half."""
        log.error("an error of the HTTP process", exc_info=error)
        self._report(FailureReport(None, f"the HTTP process: {type(error).__name__}: {error}"))

    # The end

    async def watch(self) -> None:
        """End the group when a rank is silent or makes no progress."""
        while self.state not in (GroupState.FAILING, GroupState.FAILED):
            await asyncio.sleep(TICK_S)
            if (stall := self._watchdog.check()) is not None:
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
        for routed in self._requests:
            self._send_cancel(routed)
        self._requests.end_all(ApiError(503, "the server was shut down before this request had finished"))
        self.state = GroupState.STOPPING
        self._connections.send_all(Stop())

    def _shutdown_text(self, rank: int, message: Aborted) -> str:
        """Why the group ends when a signal has ended a rank at once."""
        if not message.was_loading:
            return f"the server was shut down by a second {message.signal}"
        text = f"the server was shut down by {message.signal} to rank {rank} while the model was loading"
        missing = self._connections.in_state(RankState.CONNECTING)
        # Launchers end a rank by a signal when another one has died, be it before it could connect.
        return f"{text}; rank {missing[0]} had not connected yet: it may have ended first" if missing else text

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
            cause = blame(self._num_ranks, self._reports)
            self._failure = cause.text
            log.error("the group has failed: %s", self._failure)
            prefix = "" if cause.status == 503 else "the server failed: "
            self._requests.end_all(ApiError(cause.status, prefix + self._failure))
            self._connections.send_all(Abort(self._failure))
        finally:
            self._end(GroupState.FAILED)

    def _end(self, state: GroupState) -> None:
        if self.state not in (GroupState.ENDED, GroupState.FAILED):
            self.state = state
            self._observer.on_end()
