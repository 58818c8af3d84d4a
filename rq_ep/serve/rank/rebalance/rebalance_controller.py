"""The state of re-placements on the rank that leads: observes, has decisions made, starts migrations, follows them.

    IDLE -> PLANNING -> MOVING -> IDLE      a placement was accepted, and serves
            PLANNING -> IDLE                none was, or the planner has failed
            PLANNING, MOVING -> ABORTING -> IDLE

The controller does nothing itself. What is to be done goes to a `MigrationHost`, and what has happened comes back by
calls. All of it is on one thread.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol

from rq_ep.core.arrays import IntArray
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.rebalancing.rebalancer import Decision, Rebalancer
from rq_ep.serve.messages import RebalanceStatus
from rq_ep.serve.rank.rebalance.planner_process import Answer, PlannerFailure, Request

PLANNER_TIMEOUT_S = 120.0  # after which the planner is ended, and started again for the next decision
BACK_OFF_S = 10.0  # after a failure, in which nothing is decided; twice as long after each further one in a row,
MAX_BACK_OFF_S = 640.0  # up to this
ANOTHER_RANK = "another rank gave it up"


class RebalanceState(Enum):
    """State of re-placements, as the status names it."""

    IDLE = "idle"
    PLANNING = "planning"
    MOVING = "moving"
    ABORTING = "aborting"


class PlannerSide(Protocol):
    """What a `PlannerProcess` does."""

    def ask(self, request: Request) -> None: ...
    def take(self) -> Answer | None: ...
    @property
    def is_free(self) -> bool: ...
    def kill(self, reason: str) -> None: ...
    def close(self) -> None: ...


class MigrationHost(Protocol):
    """Carries out what was decided, on all ranks."""

    def begin(self, generation: int, decision: Decision) -> None:
        """Start a migration on every rank."""

    def abort(self, generation: int, reason: str) -> None:
        """Give a migration up on every rank; its end is reported as ever."""

    def round_served(self, generation: int, num_rounds: int) -> None:
        """So many rounds of a migration serve."""

    def served(self, generation: int, placement: Placement) -> None:
        """A placement serves from now on: the migration is over."""

    def answer(self, number: int, refusal: str | None, decision: Mapping[str, Any] | None) -> None:
        """Answer a command."""

    def warn(self, text: str) -> None:
        """Log what has failed."""


class RebalanceController:
    """Decides what is to be done next.

    Args:
        rebalancer: observes and decides.
        expert_bytes: format -> bytes of one expert.
        planner: makes its decisions.
        host: is given what to do.
        clock: seconds.
        generation: of the last migration before.
    """

    def __init__(
        self,
        rebalancer: Rebalancer,
        expert_bytes: Mapping[str, int],
        planner: PlannerSide,
        host: MigrationHost,
        clock: Callable[[], float] = time.monotonic,
        generation: int = 0,
    ) -> None:
        self._rebalancer = rebalancer
        self._expert_bytes = expert_bytes
        self._planner = planner
        self._host = host
        self._clock = clock
        self._state = RebalanceState.IDLE
        self._generation = generation  # of the last migration that was begun
        self._decision: Decision | None = None  # the last one
        self._decided_at = 0.0  # seconds since the epoch
        self._goal: Decision | None = None  # the one that the migration under way carries out
        self._layers = list(rebalancer.current.layers)  # as they serve
        self._round_bytes: list[int] = []  # bytes that reach ranks in each round of the migration
        self._num_rounds = 0  # rounds of the migration that serve
        self._dry_run: int | None = None  # number of the command that asks for the decision under way, and for no moves
        self._results: Counter[str] = Counter()
        self._moved_bytes = 0
        self._progress_at_s = clock()
        self._problem = ""
        self._given_up = ""  # why another rank gave up the last migration that was begun
        self._num_failures = 0  # in a row
        self._retry_at_s = clock()

    # What happens

    def observe(self, counts_LE: IntArray, phase: int) -> None:
        """Take the loads of a step."""
        self._rebalancer.observe(counts_LE, phase)

    def step(self) -> None:
        """Go on, if it is time to; called now and then."""
        if self._state is RebalanceState.IDLE and self._rebalancer.is_due and self._clock() >= self._retry_at_s:
            self._ask()
        answer = self._planner.take()
        if answer is not None:
            self._take(answer)
        elif self._is_planning and self._clock() - self._progress_at_s > PLANNER_TIMEOUT_S:
            self._progress_at_s = self._clock()
            self._planner.kill(f"the planner had no answer within {PLANNER_TIMEOUT_S:g} s, and was ended")

    def command(self, number: int, action: str) -> None:
        """Obey, or refuse: one thing is done at a time. A dry run is answered once there is a decision."""
        refusal = self._refusal(action)
        if refusal is not None:
            self._host.answer(number, refusal, None)
            return
        match action:
            case "start":
                self._ask()
                self._host.answer(number, None, None)
            case "abort":
                self._abort()
                self._host.answer(number, None, None)
            case "dry_run":
                self._dry_run = number
                self._ask()
            case _:
                raise AssertionError(action)

    def _refusal(self, action: str) -> str | None:
        """Why a command is refused in this state; None: it is not."""
        if action == "abort":
            may_abort = self._state in (RebalanceState.PLANNING, RebalanceState.MOVING)
            return None if may_abort else "nothing is under way"
        return None if self._state is RebalanceState.IDLE else f"{self._state.value}: wait for its end, or abort it"

    def refuse(self, reason: str) -> None:
        """Answer whoever waits for a decision that it will not be made."""
        if self._dry_run is not None:
            self._host.answer(self._dry_run, reason, None)

    def on_round(self, layers: Mapping[int, LayerPlacement]) -> None:
        """A round serves: layers by their position, as they are now."""
        for position, layer in layers.items():
            self._layers[position] = layer
        self._moved_bytes += self._round_bytes[self._num_rounds]
        self._num_rounds += 1
        self._progress_at_s = self._clock()
        self._host.round_served(self._generation, self._num_rounds)

    def on_given_up(self, generation: int, reason: str) -> None:
        """Another rank says why it has given a migration up; its end may have come before."""
        if generation != self._generation or self._given_up:
            return
        self._given_up = reason
        if self._problem == ANOTHER_RANK:
            self._problem = reason
            self._host.warn(f"re-placement {generation} was given up: {reason}")

    def on_end(self, is_committed: bool, reason: str) -> None:
        """A migration has ended, on all ranks alike; `reason`: why this one gave it up, if it did."""
        goal = self._goal
        assert goal is not None
        assert goal.placement is not None
        if is_committed:
            placement = goal.placement
            self._layers = list(placement.layers)
            self._num_failures = 0
        else:
            placement = self._placement_now() if self._num_rounds else self._rebalancer.current
            self._has_failed(f"re-placement {self._generation} was given up", reason or self._given_up or ANOTHER_RANK)
        self._rebalancer.commit(placement)
        self._results["committed" if is_committed else "aborted"] += 1
        self._goal = None
        self._to(RebalanceState.IDLE)
        self._host.served(self._generation, placement)

    # What is to be seen

    @property
    def status(self) -> RebalanceStatus:
        """State, last decision and progress."""
        sizes = [] if self._goal is None else self._round_bytes
        is_idle = self._state is RebalanceState.IDLE
        return RebalanceStatus(
            state=self._state.value,
            generation=self._generation,
            decision=None if self._decision is None else described(self._decision) | {"time": self._decided_at},
            results=dict(self._results),
            moved_bytes=self._moved_bytes,
            done_bytes=sum(sizes[: self._num_rounds]),
            left_bytes=sum(sizes[self._num_rounds :]),
            progress_s=0.0 if is_idle else self._clock() - self._progress_at_s,
            problem=self._problem,
            num_failures=self._num_failures,
            retry_s=max(self._retry_at_s - self._clock(), 0.0) if is_idle else 0.0,
        )

    # What is to be done

    @property
    def _is_planning(self) -> bool:
        return self._goal is None and self._state is not RebalanceState.IDLE

    def _to(self, state: RebalanceState) -> None:
        self._state = state
        self._progress_at_s = self._clock()

    def _ask(self) -> None:
        self._to(RebalanceState.PLANNING)
        self._planner.ask(self._rebalancer.request())

    def _abort(self) -> None:
        if self._state is RebalanceState.MOVING:  # else the decision is ignored when it comes
            self._host.abort(self._generation, "it was aborted by a request")
        self._state = RebalanceState.ABORTING

    def _take(self, answer: Answer) -> None:
        if isinstance(answer, PlannerFailure) and not answer.of_decision:
            self._problem = answer.reason
            self._host.warn(f"the placement that serves was not saved: {answer.reason}")
            return
        number, self._dry_run = self._dry_run, None
        was_aborted = self._state is RebalanceState.ABORTING
        self._to(RebalanceState.IDLE)
        if isinstance(answer, PlannerFailure):
            self._results["failed"] += 1
            self._has_failed("no decision was made", answer.reason)
            if number is not None:
                self._host.answer(number, answer.reason, None)
            return
        assert isinstance(answer, Decision)
        self._decision, self._decided_at = answer, time.time()
        if was_aborted:
            self._results["aborted"] += 1
        elif answer.stays:
            self._results["stayed"] += number is None
            self._num_failures = 0
        elif number is None:
            self._begin(answer)
        if number is not None:
            refusal = "it was aborted" if was_aborted else None
            self._host.answer(number, refusal, described(answer) | {"moves": _moves(answer)})

    def _has_failed(self, what: str, reason: str) -> None:
        """Say so, and wait before the next decision; a user's request for one does not wait."""
        self._problem = reason
        self._num_failures += 1
        wait_s = min(BACK_OFF_S * 2 ** (self._num_failures - 1), MAX_BACK_OFF_S)
        self._retry_at_s = self._clock() + wait_s
        again = f"; nothing is decided for {wait_s:g} s, after {self._num_failures} failures in a row"
        self._host.warn(f"{what}: {reason}{again}")

    def _begin(self, decision: Decision) -> None:
        self._problem = self._given_up = ""
        self._generation += 1
        num_ranks = self._rebalancer.current.topology.num_ranks
        sizes = [moves.received_bytes_R(num_ranks, self._expert_bytes) for moves in decision.rounds]
        self._goal, self._num_rounds, self._round_bytes = decision, 0, [int(size_R.sum()) for size_R in sizes]
        self._to(RebalanceState.MOVING)
        self._host.begin(self._generation, decision)

    def _placement_now(self) -> Placement:
        """What serves in the middle of a migration: without the certificate of what served before."""
        return self._rebalancer.current.with_layers(self._layers, self._expert_bytes)


def described(decision: Decision) -> dict[str, Any]:
    """A decision as plain values."""
    gain = decision.gain
    return {
        "stays": decision.stays,
        "reason": decision.reason,
        "gain": None
        if gain is None
        else {
            "before": gain.before, "after": gain.after, "mean": gain.estimate.mean, "noise": float(gain.estimate.noise),
        },
        "moved_bytes": decision.moved_bytes,
        "num_rounds": len(decision.rounds),
        "seconds": decision.seconds,
    }  # fmt: skip


def _moves(decision: Decision) -> list[dict[str, Any]]:
    """The moves of a decision, in their order."""
    layers = () if decision.placement is None else decision.placement.layers
    return [
        {"round": number, "layer": layers[position].index, **move._asdict()}
        for number, moves in enumerate(decision.rounds)
        for position, move in (*moves.receives, *moves.drops)
    ]
