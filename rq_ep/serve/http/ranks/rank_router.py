"""The group as the HTTP process sees it: takes requests while it serves, drains it, and ends it when it cannot go on.

What is done about a rank that dies, leaves or comes back is decided by `Membership`, and carried out here. A group goes
through these states; it may fail in each of the first four:

    LOADING -> SERVING -> DRAINING -> STOPPING -> ENDED
                                      FAILING  -> FAILED
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Protocol, assert_never

from rq_ep.engine.progress import Progress
from rq_ep.engine.requests import Output, Request
from rq_ep.serve.frames import Role
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks.blame import FailureReport, blame
from rq_ep.serve.http.ranks.membership import (
    AskToLeave,
    ChangeRefused,
    CommandSupervisor,
    Effect,
    GenerationServes,
    GiveUp,
    Membership,
    RankLost,
    SendRegroup,
)
from rq_ep.serve.http.ranks.rank_connections import RankConnections, RankState
from rq_ep.serve.http.ranks.removal_checks import RemovalChecks
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
    FromSupervisor,
    ImportanceReport,
    Loaded,
    Mark,
    MembersChecked,
    MigrationGivenUp,
    MigrationPlanned,
    Outputs,
    PeerUnreachable,
    PlacementServed,
    RankEnded,
    RankGivenUp,
    RankStarted,
    RankStats,
    Ready,
    RebalanceAnswer,
    RebalanceCommand,
    RebalanceStatus,
    Recorded,
    RecordingFailed,
    Regroup,
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

    def on_rank_lost(self, rank: int, was_member: bool) -> None:
        """A rank is lost."""

    def on_recovery(self, seconds: Mapping[str, float]) -> None:
        """The members serve again after a loss, or a request goes on that was moved; seconds by part."""

    def on_resumption(self) -> None:
        """A request is moved to another rank."""

    def on_end(self) -> None:
        """Serving is over, in whatever way; called once."""


class RankRouter:
    """Routes requests to the ranks and brings their tokens back; listens to the connections of the ranks.

    Args:
        num_ranks: size of the group.
        token: the secret of this run, which the ranks prove that they know.
        observer: receives what the ranks report.
        max_queue_size: requests that may be unfinished at once.
        stall_s: seconds after which a rank that is silent, or makes no progress, counts as lost.
        survives: the group goes on without a rank that is lost while it serves; else it fails.
    """

    def __init__(
        self,
        num_ranks: int,
        token: str,
        observer: GroupObserver,
        *,
        max_queue_size: int,
        stall_s: float,
        survives: bool = False,
    ) -> None:
        self._num_ranks = num_ranks
        self._observer = observer
        self._watchdog = Watchdog(stall_s)
        self.state = GroupState.LOADING
        self.survives = survives
        self.membership = Membership(num_ranks)
        self._connections = RankConnections(num_ranks, token, self)
        self._requests = RoutedRequests(max_queue_size, self._send_cancel, self._on_resumed)
        self._checks = RemovalChecks(self.membership, lambda rank, message: self._connections.send(rank, message))
        self._served_s: dict[int, float] = {}  # since when each rank serves in its generation
        self._held: list[MigrationPlanned] = []  # until all members serve in the generation
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
        return self._connections.num_open(Role.RANK)

    def num_unfinished_on(self, rank: int) -> int:
        return len(self._requests.on_rank(rank))

    def why_unavailable(self) -> str | None:
        """Why no request can be taken now; None if one can."""
        if self.state is GroupState.SERVING:
            return None
        return UNAVAILABLE.get(self.state, self._failure)

    async def generate(self, request: Request, beside: str | None = None) -> AsyncIterator[Output]:
        """Send a request to the least loaded rank, and yield its outputs until it ends; leaving early cancels it.

        Args:
            request: to be answered.
            beside: an unfinished request with the same prompt, which its rank has in its cache.

        Raises:
            ApiError: the server is not taking requests, or the group failed.
        """
        if (reason := self.why_unavailable()) is not None:
            raise ApiError(503, f"not serving: {reason}")
        routed = self._requests.add(request, self.membership.open_ranks, beside)
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
        """Hand over a request, or the rest of it, and wake the other members: they may all be asleep."""
        rest = routed.rest
        parts, last = request_in_parts(rest)
        for part in parts:
            self._connections.send(routed.rank, part)
            await asyncio.sleep(0)  # writing them down takes time, in which other requests go on
            if routed.id != rest.id:  # its rank is lost, and it is handed over to another one
                return
        if routed not in self._requests:  # the group has failed meanwhile, or drains
            return
        self._num_announced += 1
        add, wake = AddRequest(last, self._num_announced), Wake(self._num_announced)
        for rank in self.membership.members:
            self._connections.send(rank, add if rank == routed.rank else wake)

    def _send_cancel(self, routed: RoutedRequest) -> None:
        self._connections.send(routed.rank, Cancel(routed.id))

    def mark(self, number: int) -> None:
        """Have every rank receive a number between the same two steps, asleep or not."""
        self._connections.send(self.membership.leader, Mark(number))
        self._connections.send_all(Wake(self._num_announced), self.membership.members)

    def rebalance(self, command: RebalanceCommand) -> None:
        """Pass a command on to the leader."""
        self._connections.send(self.membership.leader, command)

    async def remove_ranks(self, ranks: Collection[int], *, moves: bool) -> None:
        """Have ranks leave once their requests have finished or, with `moves`, have gone to other ranks.

        Raises:
            ChangeRefused: nothing is changed; the others cannot hold the model, for example.
        """
        self.membership.check_removal(ranks)
        if not set(ranks).isdisjoint(self.membership.members):
            refusal = await self._checks.refusal(ranks)
            if refusal is not None:
                raise ChangeRefused(refusal)
        self._carry_out(self.membership.remove(ranks))
        for rank in self.membership.leaving:
            if moves and rank in ranks:
                for routed in self._requests.on_rank(rank):
                    self._send_cancel(routed)
                    self._move(routed)
            self._note_drained(rank)

    def add_ranks(self, ranks: Collection[int]) -> None:
        """Have ranks come back.

        Raises:
            ChangeRefused: nothing is changed.
        """
        self._carry_out(self.membership.add(ranks))

    # As the listener of the connections

    def on_connect(self, rank: int, role: Role) -> None:
        if self.state in (GroupState.FAILING, GroupState.FAILED):  # it comes late
            self._send_to(rank, role, Abort(self.why_unavailable() or ""))
        elif self.state is GroupState.STOPPING:
            self._send_to(rank, role, Stop())
        elif role is Role.SUPERVISOR:
            self.membership.supervisor_connected(rank)
        else:
            self.membership.connected(rank)

    def on_message(self, rank: int, message: FromRank) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    self._requests.deliver(output)
            case RankStats():
                if rank in self.membership.members:
                    self._watchdog.report(rank, self._progress(rank, message))
                    self._checks.note_free(rank, message.free_bytes)
                    self._observer.on_stats(rank, message)
            case Recorded() | RecordingFailed():
                self._observer.on_recorded(message)
            case MigrationPlanned():
                if rank == self.membership.leader and not self.membership.is_pending(rank):  # else it is outdated
                    self._held.append(message)
                    self._begin_migrations()
            case ImportanceReport() | MigrationGivenUp():
                self._connections.send(self.membership.leader, message)
            case RebalanceStatus() | RebalanceAnswer() | PlacementServed():
                self._observer.on_rebalance(message)
            case Checked():
                self._observer.on_checked(message)
            case Ready():
                if self.state is GroupState.LOADING:
                    self.state = GroupState.SERVING
                    self.membership.start()
                self._observer.on_ready(message)
            case Loaded():
                self._carry_out(self.membership.loaded(rank, message.store))
            case PeerUnreachable():
                if self._goes_on:
                    self.membership.unreachable(rank, message.text)
                else:
                    self._report(FailureReport(rank, f"rank {rank}: {message.text}", is_consequence=True))
            case Regrouped():
                self._served_s[rank] = time.monotonic()
                self._carry_out(self.membership.regrouped(rank, message.generation, message.seconds))
            case CannotContinue():
                self._carry_out(self.membership.cannot_continue(message.generation, message.reason))
            case MembersChecked():
                self._checks.take(message)
            case DrainRequest():
                self._start_draining(message.timeout_s)
            case Failed():
                if self._goes_on:
                    self._connections.mute(rank)  # it ends by itself, and names its error
                self._lose(rank, f"rank {rank}: {message.text}", message.is_consequence)
            case Aborted():
                self._report(FailureReport(rank, self._shutdown_text(rank, message), status=503))
            case Bye():
                self._watchdog.forget(rank)
            case _:
                assert_never(message)

    def on_supervisor_message(self, rank: int, message: FromSupervisor) -> None:
        match message:
            case RankEnded():
                if self._goes_on:
                    self._carry_out(self.membership.ended(rank, message.status))
                elif self.state is GroupState.LOADING:
                    self._report(FailureReport(rank, f"rank {rank} {message.status}"))
            case RankStarted():
                log.info("rank %d is started again (%d)", rank, message.num_restarts)
                self.membership.started(rank, message.num_restarts)
            case RankGivenUp():
                if self._goes_on:
                    log.warning("rank %d is not started again: %s", rank, message.reason)
                    self._carry_out(self.membership.given_up(rank, message.reason))
            case DrainRequest():
                self._start_draining(message.timeout_s)
            case Aborted():
                self._report(FailureReport(rank, self._shutdown_text(rank, message), status=503))
            case Bye():
                pass
            case _:
                assert_never(message)

    def on_leave(self, rank: int, role: Role) -> None:
        if self._goes_on:
            left = self.membership.left if role is Role.RANK else self.membership.supervisor_lost
            self._carry_out(left(rank))
        self._end_if_all_have_left()

    def on_loss(self, rank: int, text: str) -> None:
        self._lose(rank, text)
        self._end_if_all_have_left()

    def on_supervisor_loss(self, rank: int, text: str) -> None:
        if self._goes_on:
            self._carry_out(self.membership.supervisor_lost(rank))
        elif self.state is GroupState.LOADING:
            self._report(FailureReport(rank, text))
        self._end_if_all_have_left()

    def _end_if_all_have_left(self) -> None:
        is_over = self.state is GroupState.STOPPING or any(
            # Rank 0 is the first to connect: once it has gone, none will come.
            0 in self._connections.in_state(RankState.GONE, role) and self.state is not GroupState.FAILING
            for role in Role
        )
        if is_over and self._connections.num_open(*Role) == 0:
            self._end(GroupState.ENDED)

    def on_bug(self, error: BaseException) -> None:
        """End the group for an error of this process: it must not go on half."""
        log.error("an error of the HTTP process", exc_info=error)
        self._report(FailureReport(None, f"the HTTP process: {type(error).__name__}: {error}"))

    def _progress(self, rank: int, stats: RankStats) -> Progress:
        """The progress of a rank; while a change of the members is under way, since the change began."""
        if not self.membership.is_pending(rank):
            return stats.progress
        return replace(stats.progress, stuck_s=min(stats.progress.stuck_s, self.membership.seconds_in_generation))

    # The members

    @property
    def _goes_on(self) -> bool:
        """Whether the group goes on without a rank that is lost now."""
        return self.survives and self.state in (GroupState.SERVING, GroupState.DRAINING)

    def _lose(self, rank: int, text: str, is_consequence: bool = False) -> None:
        if self._goes_on:
            self._carry_out(self.membership.lost(rank, text))
        elif self.state is not GroupState.STOPPING or rank in self.membership.members:
            self._report(FailureReport(rank, text, is_consequence))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        """Do what a change of the members asks for."""
        for effect in effects:
            match effect:
                case SendRegroup():
                    self._regroup(effect.message)
                case CommandSupervisor():
                    self._connections.send_supervisor(effect.rank, effect.message)
                case RankLost():
                    self._cut_off(effect)
                case GenerationServes():
                    log.info("the members serve in generation %d: %s", self.membership.generation, effect.seconds)
                    if effect.is_recovery:
                        self._observer.on_recovery(effect.seconds)
                    self._begin_migrations()
                case AskToLeave():
                    self.tasks.start(self._ask_to_leave(effect))
                case GiveUp():
                    self._report(FailureReport(None, effect.reason))
                case _:
                    assert_never(effect)

    def _regroup(self, message: Regroup) -> None:
        log.info("generation %d has the ranks %s", message.generation, message.members)
        self._held.clear()
        self._watchdog.watch(message.members)
        self._connections.send_all(message, message.members)
        self._connections.send_all(Wake(self._num_announced), message.members)  # one that joins has missed all so far
        self._checks.ask_again()

    async def _ask_to_leave(self, asked: AskToLeave) -> None:
        """Have ranks leave whose requests have ended, unless the others cannot hold the model any more."""
        refusal = await self._checks.refusal(asked.ranks)
        if refusal is not None:
            log.warning("%s do not leave: %s", ", ".join(f"rank {rank}" for rank in asked.ranks), refusal)
        if self._goes_on:
            self._carry_out(self.membership.may_leave(asked, refusal))

    def _cut_off(self, lost: RankLost) -> None:
        """Hear no more of a rank, and have its requests go on on other ranks."""
        if lost.was_member:
            log.warning("%s: the group goes on without it", lost.reason)
        self._connections.drop(lost.rank)
        self._watchdog.forget(lost.rank)
        self._observer.on_rank_lost(lost.rank, lost.was_member)
        for routed in self._requests.on_rank(lost.rank):
            if self._requests.is_poison(routed, lost.was_serving):
                first, second = routed.lost_ranks[-2:]
                text = f"this request was on rank {first} and on rank {second} when they died: it is not tried again"
                self._requests.fail(routed, ApiError(500, text))
            else:
                self._move(routed)

    def _move(self, routed: RoutedRequest) -> None:
        self._requests.move(routed, self.membership.open_ranks)
        self._observer.on_resumption()
        self.tasks.start(self._announce(routed))

    def _on_resumed(self, routed: RoutedRequest) -> None:
        start_s = max(routed.resumed_s, self._served_s.get(routed.rank, 0.0))
        self._observer.on_recovery({"re-prefill": time.monotonic() - start_s})

    def _begin_migrations(self) -> None:
        """Have every rank begin the migrations that were planned, once all serve: later the ranks were told to stop."""
        if self.membership.is_changing:
            return
        if self.state in (GroupState.SERVING, GroupState.DRAINING):
            for planned in self._held:
                begin = BeginMigration(planned.generation, planned.placement, planned.rounds)
                self._connections.send_all(begin, self.membership.members)
        self._held.clear()

    async def watch(self) -> None:
        """Look now and then whether a rank is silent, makes no progress, or has no requests left and may leave."""
        while self.state not in (GroupState.FAILING, GroupState.FAILED):
            await asyncio.sleep(TICK_S)
            if (stall := self._watchdog.check()) is not None:
                if self._goes_on:
                    self._carry_out(self.membership.stalled(*stall))
                else:
                    self._report(FailureReport(None, stall.text))
            if self._goes_on:
                self._carry_out(self.membership.check())
                for rank in self.membership.leaving:
                    self._note_drained(rank)

    def _note_drained(self, rank: int) -> None:
        if not self._requests.on_rank(rank):
            self._carry_out(self.membership.drained(rank))

    # The end

    def _start_draining(self, timeout_s: float) -> None:
        if self.state in (GroupState.LOADING, GroupState.SERVING):  # every rank may get the signal
            self.state = GroupState.DRAINING
            self.membership.may_grow = False
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
        self._send_everywhere(Stop())

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
            cause = blame(self.membership.members, self._reports)
            self._failure = cause.text
            log.error("the group has failed: %s", self._failure)
            prefix = "" if cause.status == 503 else "the server failed: "
            self._requests.end_all(ApiError(cause.status, prefix + self._failure))
            self._send_everywhere(Abort(self._failure))
        finally:
            self._end(GroupState.FAILED)

    def _send_to(self, rank: int, role: Role, message: Stop | Abort) -> None:
        send = self._connections.send if role is Role.RANK else self._connections.send_supervisor
        send(rank, message)

    def _send_everywhere(self, message: Stop | Abort) -> None:
        for role in Role:
            for rank in range(self._num_ranks):
                self._send_to(rank, role, message)

    def _end(self, state: GroupState) -> None:
        if self.state not in (GroupState.ENDED, GroupState.FAILED):
            self.state = state
            self._checks.end("the server ends")
            self._observer.on_end()
