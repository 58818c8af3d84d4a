"""The life of the group as a whole: when it takes requests, how it is drained, and how it ends when it cannot go on.

It goes through these states; it may fail in each of the first four:

    LOADING -> SERVING -> DRAINING -> STOPPING -> ENDED
                                      FAILING  -> FAILED
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from rq_ep.serve.frames import Role
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks.blame import FailureReport, blame
from rq_ep.serve.http.ranks.membership import Membership
from rq_ep.serve.http.ranks.rank_connections import RankConnections, RankState
from rq_ep.serve.http.ranks.routed_requests import RoutedRequests
from rq_ep.serve.messages import Abort, Aborted, Cancel, Stop
from rq_ep.serve.process import BackgroundTasks

log = logging.getLogger("rq_ep.serve")

GRACE_S = 0.3  # how long the other ranks may report their errors before one is blamed


class GroupState(Enum):
    """State of the ranks together."""

    LOADING = auto()  # until rank 0 says that every rank can serve that the group begins with
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


class GroupLife:
    """The state of the group, and what is said to all at its end.

    Args:
        num_ranks: size of the group.
        connections: to the ranks and their supervisors.
        membership: who may be to blame.
        requests: those that have not ended.
        tasks: run what takes time.
        on_end: called once, when serving is over.
    """

    def __init__(
        self,
        num_ranks: int,
        connections: RankConnections,
        membership: Membership,
        requests: RoutedRequests,
        tasks: BackgroundTasks,
        on_end: Callable[[], None],
    ) -> None:
        self._num_ranks = num_ranks
        self._connections = connections
        self._membership = membership
        self._requests = requests
        self._tasks = tasks
        self._on_end = on_end
        self.state = GroupState.LOADING
        self._reports: list[FailureReport] = []  # in the order in which they came
        self._failure = ""  # why the group has failed

    @property
    def is_serving(self) -> bool:
        """Whether requests are answered."""
        return self.state in (GroupState.SERVING, GroupState.DRAINING)

    @property
    def is_over(self) -> bool:
        """Whether the group fails or has failed."""
        return self.state in (GroupState.FAILING, GroupState.FAILED)

    def why_unavailable(self) -> str | None:
        """Why no request can be taken now; None if one can."""
        if self.state is GroupState.SERVING:
            return None
        return UNAVAILABLE.get(self.state, self._failure)

    def begin(self, members: Sequence[int] | None = None, generation: int = 0) -> None:
        """These ranks can serve, or all, in a generation."""
        if self.state is GroupState.LOADING:
            self.state = GroupState.SERVING
            self._membership.start(members, generation)

    def welcome(self, rank: int, role: Role) -> bool:
        """Whether one who has connected takes part; one that comes late is told of the end."""
        if self.is_over:
            self._send_to(rank, role, Abort(self.why_unavailable() or ""))
        elif self.state is GroupState.STOPPING:
            self._send_to(rank, role, Stop())
        else:
            return True
        return False

    def end_if_all_have_left(self) -> None:
        """The group has ended once nobody is connected any more."""
        is_over = self.state is GroupState.STOPPING or any(
            # Rank 0 is the first to connect: once it has gone, none will come.
            0 in self._connections.in_state(RankState.GONE, role) and self.state is not GroupState.FAILING
            for role in Role
        )
        if is_over and self._connections.num_open(*Role) == 0:
            self._end(GroupState.ENDED)

    # The end that was asked for

    def start_draining(self, timeout_s: float) -> None:
        """Take no more requests, and end when there are none any more; every rank may ask for it."""
        if self.state in (GroupState.LOADING, GroupState.SERVING):
            self.state = GroupState.DRAINING
            self._membership.drain()
            self._tasks.start(self._drain(timeout_s))

    async def _drain(self, timeout_s: float) -> None:
        """Let the unfinished requests finish, then stop every rank."""
        log.info("draining: %d unfinished requests get %g s", len(self._requests), timeout_s)
        end_s = time.monotonic() + timeout_s
        while self._requests and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        if self.state is not GroupState.DRAINING:  # a rank has failed meanwhile
            return
        for routed in self._requests:
            self._connections.send(routed.rank, Cancel(routed.id))
        self._requests.end_all(ApiError(503, "the server was shut down before this request had finished"))
        self.state = GroupState.STOPPING
        self._send_everywhere(Stop())

    # The end that was not

    def report_shutdown(self, rank: int, message: Aborted) -> None:
        """A signal has ended a rank at once."""
        text = f"the server was shut down by a second {message.signal}"
        if message.was_loading:
            text = f"the server was shut down by {message.signal} to rank {rank} while the model was loading"
            # Launchers end a rank by a signal when another one has died, be it before it could connect.
            if missing := self._connections.in_state(RankState.CONNECTING):
                text += f"; rank {missing[0]} had not connected yet: it may have ended first"
        self.report(FailureReport(rank, text, status=503))

    def report(self, report: FailureReport) -> None:
        """Take a report, the first one of each rank, and end the group."""
        if report.rank is None or report.rank not in {other.rank for other in self._reports}:
            self._reports.append(report)
        if not self.is_over and self.state is not GroupState.ENDED:
            self.state = GroupState.FAILING
            self._tasks.start(self._fail())

    async def _fail(self) -> None:
        """Establish who is to blame; inform the clients and every rank that is left."""
        try:
            await asyncio.sleep(GRACE_S)
            cause = blame(self._membership.members, self._reports)
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
            self._on_end()
