"""Rebalancing as the HTTP process sees it: its state, commands to rank 0, and whether it makes progress."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from rq_ep.engine.progress import MoverProgress
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.messages import RebalanceAnswer, RebalanceCommand, RebalanceStatus

log = logging.getLogger("rq_ep.serve")

Action = Literal["start", "abort", "dry_run"]
STALL_S = 8.0  # without progress, after which a migration or a decision counts as stuck; it is named within 10
SILENT_S = 5.0  # without figures of a rank, which sends some every second
ANSWER_TIMEOUT_S = 180.0  # a decision on a large model takes seconds, on a busy machine more
MAX_COMMITS = 1000
MAX_NAMED = 3  # ranks in the name of a stall


class RebalanceView:
    """The last status, what changed the placement, and the commands that await an answer.

    Args:
        send: sends a command to the rank that leads, and returns which that is; None: rebalancing is off.
        clock: seconds.
    """

    def __init__(
        self, send: Callable[[RebalanceCommand], int] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send = send
        self._clock = clock
        self.status: RebalanceStatus | None = None
        self._came_at_s = 0.0
        self._movers: dict[int, MoverProgress] = {}  # by rank
        self._last_at_s: dict[int, float] = {}
        self._moved_at_s = -math.inf  # when a rank has last come further
        self._named_stall = False
        self._answers: dict[int, asyncio.Future[RebalanceAnswer]] = {}
        self._asked: dict[int, int] = {}  # by command, the rank that was sent it
        self._num_commands = 0
        self._commits: deque[dict[str, Any]] = deque(maxlen=MAX_COMMITS)

    # What comes from the ranks

    def take(self, message: RebalanceStatus | RebalanceAnswer) -> None:
        match message:
            case RebalanceStatus():
                self.status, self._came_at_s = message, self._clock()
            case RebalanceAnswer():
                answer = self._answers.get(message.number)
                if answer is not None and not answer.done():
                    answer.set_result(message)

    def on_commit(self, generation: int) -> None:
        """A placement serves, after this migration."""
        decision = None if self.status is None else self.status.decision
        about = {key: (decision or {}).get(key) for key in ("reason", "moved_bytes")}
        self._commits.append({"time": time.time(), "generation": generation, **about})

    def on_progress(self, rank: int, mover: MoverProgress) -> None:
        """Take how far a rank has come."""
        now_s = self._clock()
        before = self._movers.get(rank, mover)
        if (mover.staged, mover.num_pieces) != (before.staged, before.num_pieces):
            self._moved_at_s = now_s
        self._movers[rank], self._last_at_s[rank] = mover, now_s

    def forget(self, rank: int) -> None:
        """A rank is lost."""
        self._movers.pop(rank, None)
        self._last_at_s.pop(rank, None)
        for number, asked in self._asked.items():
            if asked == rank:
                self.take(RebalanceAnswer(number, f"rank {rank}, which led, was lost: ask again", None))

    # For the routes

    @property
    def seconds_since_progress(self) -> float:
        """0 where nothing is under way."""
        status = self.status
        if status is None or status.state == "idle":
            return 0.0
        now_s = self._clock()
        seconds = status.progress_s + now_s - self._came_at_s
        return min(seconds, now_s - self._moved_at_s) if status.state == "moving" else seconds

    def stall(self) -> str | None:
        """What makes no progress, and since when; None: all is well."""
        seconds, status = self.seconds_since_progress, self.status
        if status is None or seconds < STALL_S:
            return None
        if status.state == "planning":
            return f"the planner has not answered for {seconds:.0f} s"
        return f"re-placement {status.generation} has made no progress for {seconds:.0f} s: {self._who_is_late()}"

    def log_stall(self) -> None:
        """Log what makes no progress, once; called now and then."""
        stall = self.stall()
        if stall is not None and not self._named_stall:
            log.warning("%s; serving goes on", stall)
        self._named_stall = stall is not None

    def _who_is_late(self) -> str:
        for rank, at_s in sorted(self._last_at_s.items()):
            if self._clock() - at_s > SILENT_S:
                return f"rank {rank} is silent"
        least = min((mover.staged for mover in self._movers.values()), default=0)
        late = {rank: mover for rank, mover in sorted(self._movers.items()) if mover.staged == least}
        # Whoever waits for a message may wait for a rank that does something else.
        active = sorted((mover.is_exchanging, rank) for rank, mover in late.items() if mover.activity)
        if active:
            return "; ".join(f"rank {rank} {late[rank].activity}" for _, rank in active[:MAX_NAMED])
        return "all ranks wait" if len(late) in (0, len(self._movers)) else f"rank {next(iter(late))} is behind"

    def view(self) -> dict[str, Any]:
        """State, last decision, bytes and times, for `/v1/ep/rebalance`."""
        if self._send is None:
            return {"state": "off"}
        status = self.status
        if status is None:
            return {"state": "loading"}
        return {
            "state": status.state,
            "generation": status.generation,
            "decision": status.decision,
            "results": status.results,
            "moved_bytes": status.moved_bytes,
            "done_bytes": status.done_bytes,
            "left_bytes": status.left_bytes,
            "seconds_since_progress": self.seconds_since_progress,
            "stall": self.stall(),
            "problem": status.problem,
            "failures_in_a_row": status.num_failures,
            "seconds_until_retry": max(status.retry_s - (self._clock() - self._came_at_s), 0.0),
            "commits": list(self._commits),
        }

    async def command(self, action: Action) -> dict[str, Any]:
        """Have rank 0 do something. Returns the state, and what a dry run has found.

        Raises:
            ApiError: it is off, something is under way already or nothing is, or the planner has failed.
        """
        if self._send is None:
            raise ApiError(409, "this server keeps its placement: start it with --rebalance auto", "action")
        self._num_commands += 1
        number = self._num_commands
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        rank = self._asked[number] = self._send(RebalanceCommand(number, action))
        try:
            answer = await asyncio.wait_for(future, ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise ApiError(500, f"rank {rank} has not answered within {ANSWER_TIMEOUT_S:g} s") from None
        finally:
            del self._answers[number], self._asked[number]
        if answer.refusal is not None:
            raise ApiError(409, f"{action}: {answer.refusal}", "action")
        return {"action": action, **({} if answer.decision is None else {"decision": answer.decision})}
