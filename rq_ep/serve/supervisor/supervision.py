"""What a supervisor does on which event: decisions alone, without processes, sockets or a clock."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import TypeAlias, assert_never

from rq_ep.serve.messages import (
    Abort,
    Aborted,
    DrainRequest,
    FromSupervisor,
    KillRank,
    RankEnded,
    RankGivenUp,
    RankStarted,
    StartRank,
    Stop,
    StopRank,
    ToSupervisor,
)
from rq_ep.serve.process import EXIT_FAILURE
from rq_ep.serve.supervisor.rank_start import Command, EndFailed, Ending, HubAddress, Late, Leave, PassSignal, Serving

# Before each restart in a row. There is one before the first too: the rank may have ended because the group does.
BACK_OFF_S = (0.1, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
SETTLED_S = 600.0  # a rank that has served so long has all its restarts again
STOP_TIMEOUT_S = 30.0  # until a rank is killed that ends together with all others
END_TIMEOUT_S = 10.0  # until a rank is killed that is to end at once


# Events


@dataclass(frozen=True)
class RankExited:
    """The rank's process has ended; every report that it has sent was taken before."""

    status: int  # as `subprocess.Popen` has it: a signal's number below zero


@dataclass(frozen=True)
class SignalReceived:
    """This process got a signal of this name."""

    name: str


@dataclass(frozen=True)
class CannotGoOn:
    """The launcher of this process has died, or an error has ended a thread of it."""

    reason: str


@dataclass(frozen=True)
class HubClosed:
    """The connection to the HTTP process has ended, or could not be made."""


Event: TypeAlias = Late | Serving | Ending | RankExited | SignalReceived | CannotGoOn | HubClosed | ToSupervisor


# Actions


@dataclass(frozen=True)
class StartProcess:
    """Start the rank's process, which joins a group that serves."""

    num_restarts: int


@dataclass(frozen=True)
class KillProcess:
    """End the rank's process by SIGKILL."""


@dataclass(frozen=True)
class Connect:
    """Connect to the HTTP process, unless this is done."""

    hub: HubAddress


@dataclass(frozen=True)
class Exit:
    """End this process."""

    status: int
    reason: str | None = None  # printed; None: the rank's process has said it


Action: TypeAlias = StartProcess | KillProcess | Connect | Exit | Command | FromSupervisor


class RankPhase(Enum):
    """What the rank's process does."""

    BEGINNING = auto()  # for the first time: the group is loading
    SERVING = auto()
    WAITING = auto()  # there is none; it is started when the back-off is over
    RESTARTING = auto()  # it loads, to join the group, be it for the first time
    LEAVING = auto()  # it was told to leave
    REMOVED = auto()  # there is none until it is asked for
    GIVEN_UP = auto()  # there is none, as it has failed too often; it may be asked for


IN_GROUP = (RankPhase.BEGINNING, RankPhase.SERVING)
WITHOUT_PROCESS = (RankPhase.WAITING, RankPhase.REMOVED, RankPhase.GIVEN_UP)


class Supervision:
    """The decisions on one rank.

    Args:
        rank: the rank.
        max_restarts: how often in a row the rank is started again.
        shutdown_timeout_s: how long running requests get to finish after a signal.
        phase: BEGINNING where the rank's process is started with its group; REMOVED where it waits to be asked for.
    """

    def __init__(
        self, rank: int, max_restarts: int, shutdown_timeout_s: float, phase: RankPhase = RankPhase.BEGINNING
    ) -> None:
        self._rank = rank
        self._max_restarts = max_restarts
        self._shutdown_timeout_s = shutdown_timeout_s
        self.phase = phase
        self._num_restarts = 0
        self._num_failures = 0  # in a row
        self._served_since_s = inf
        self._is_ending = False  # whether the rank's process has said that it ends on purpose
        self._is_wanted = False  # whether the rank is to be started again once it has left
        self._num_signals = 0
        self._status: int | None = None  # of this process, which ends when the rank's has ended; None: it goes on
        self._start_s = inf  # when the back-off is over
        self._kill_s = inf  # when the rank's process, which is to end, is killed

    @property
    def due_s(self) -> float:
        """When `on_time` is to be called."""
        return min(self._start_s, self._kill_s)

    def on_time(self, now_s: float) -> Sequence[Action]:
        """What to do as time has passed."""
        if now_s >= self._kill_s:
            self._kill_s = inf
            return [KillProcess()]
        return self._start() if now_s >= self._start_s else []

    def on_event(self, event: Event, now_s: float) -> Sequence[Action]:
        """What to do on an event."""
        match event:
            case Late():
                self.phase = RankPhase.RESTARTING
                return [Connect(event.hub)]
            case Serving():
                return self._on_serving(event, now_s)
            case Ending():
                self._is_ending = True
                return []
            case RankExited():
                return self._on_exit(event.status, now_s)
            case SignalReceived():
                return self._on_signal(event.name, now_s)
            case CannotGoOn():
                return self._end(EXIT_FAILURE, now_s, EndFailed(event.reason), f"rank {self._rank}: {event.reason}")
            case HubClosed():
                # The rank notices it too, once it has met the others. Of all ranks rank 0 alone names the reason.
                reason = "the HTTP process has died"
                command = EndFailed(reason) if self.phase is RankPhase.BEGINNING else None
                return self._end(EXIT_FAILURE, now_s, command, f"rank 0: {reason}" if self._rank == 0 else None)
            case Stop():
                return self._end(0, now_s, timeout_s=STOP_TIMEOUT_S)
            case Abort():
                return self._end(EXIT_FAILURE, now_s)
            case KillRank():
                return [] if self.phase in WITHOUT_PROCESS else [KillProcess()]
            case StopRank():
                return self._on_stop_rank(now_s)
            case StartRank():
                return self._on_start_rank()
            case _:
                assert_never(event)

    def _on_serving(self, event: Serving, now_s: float) -> Sequence[Action]:
        if self._status is None and self.phase in (RankPhase.BEGINNING, RankPhase.RESTARTING):
            self.phase = RankPhase.SERVING
            self._served_since_s = now_s
        return [Connect(event.hub)]

    def _on_exit(self, status: int, now_s: float) -> Sequence[Action]:
        phase, is_ending = self.phase, self._is_ending
        self._is_ending = False
        self._kill_s = inf
        text = describe_status(status)
        if self._status is not None and phase not in IN_GROUP:
            return [Exit(self._status)]
        if self._status is not None or phase is RankPhase.BEGINNING or (phase is RankPhase.SERVING and is_ending):
            return [*([] if is_ending else [RankEnded(text)]), Exit(exit_status(status))]
        if phase is RankPhase.LEAVING:
            self.phase = RankPhase.REMOVED
            return self._start() if self._is_wanted else []
        return [RankEnded(text), *self._after_failure(text, now_s)]

    def _after_failure(self, text: str, now_s: float) -> Sequence[Action]:
        """What follows the failure of a rank without which the group goes on."""
        self.phase = RankPhase.GIVEN_UP
        if self._num_signals:  # the rank may have died before it passed the signal on
            return [DrainRequest(self._shutdown_timeout_s)]
        if now_s - self._served_since_s >= SETTLED_S:
            self._num_failures = 0
        self._served_since_s = inf
        if self._num_failures >= self._max_restarts:
            return [RankGivenUp(f"it {text}, and was started again {self._num_failures} times (--max-rank-restarts)")]
        self.phase = RankPhase.WAITING
        self._start_s = now_s + BACK_OFF_S[min(self._num_failures, len(BACK_OFF_S) - 1)]
        self._num_failures += 1
        return []

    def _on_signal(self, name: str, now_s: float) -> Sequence[Action]:
        self._num_signals += 1
        is_in_group = self.phase in IN_GROUP  # then it is the rank that has the clients told
        if self._num_signals == 1:
            self._start_s = inf
            if self.phase is RankPhase.WAITING:
                self.phase = RankPhase.GIVEN_UP
            return [PassSignal(name) if is_in_group else DrainRequest(self._shutdown_timeout_s)]
        if is_in_group:
            return [PassSignal(name), *self._end(EXIT_FAILURE, now_s, None)]
        reason = f"rank {self._rank}: aborted by a second {name}"
        return [Aborted(name, was_loading=False), *self._end(EXIT_FAILURE, now_s, reason=reason)]

    def _on_stop_rank(self, now_s: float) -> Sequence[Action]:
        self._start_s = inf
        self._is_wanted = False
        if self.phase in WITHOUT_PROCESS:
            self.phase = RankPhase.REMOVED
            return []
        if self.phase is RankPhase.LEAVING:
            return []
        self.phase = RankPhase.LEAVING
        self._kill_s = now_s + END_TIMEOUT_S
        return [Leave()]

    def _on_start_rank(self) -> Sequence[Action]:
        self._num_failures = 0
        if self.phase in WITHOUT_PROCESS:
            return self._start()
        self._is_wanted = self.phase is RankPhase.LEAVING
        return []

    def _start(self) -> Sequence[Action]:
        self.phase = RankPhase.RESTARTING
        self._is_wanted = False
        self._start_s = inf
        self._num_restarts += 1
        return [StartProcess(self._num_restarts), RankStarted(self._num_restarts)]

    def _end(
        self,
        status: int,
        now_s: float,
        command: Command | None = None,
        reason: str | None = None,
        timeout_s: float = END_TIMEOUT_S,
    ) -> Sequence[Action]:
        """End with a status once the rank's process has ended, which has some time for it.

        Args:
            status: that of this process, unless the rank's process is in the group: then its status is taken.
            now_s: the time.
            command: what the rank's process is told; None: it learns from elsewhere that it has to end.
            reason: what is printed where the rank has no process.
            timeout_s: how long the rank's process may take before it is killed.
        """
        if self.phase in WITHOUT_PROCESS:
            return [Exit(status, reason)]
        if self._status is not None:
            return []
        self._status = status
        self._kill_s = now_s + timeout_s
        is_joining = self.phase is RankPhase.RESTARTING  # it may not have met the HTTP process yet
        return [command or Leave()] if command is not None or is_joining else []


def exit_status(status: int) -> int:
    """The exit status of a process as a shell has it."""
    return 128 - status if status < 0 else status


def describe_status(status: int) -> str:
    """How a process has ended."""
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
