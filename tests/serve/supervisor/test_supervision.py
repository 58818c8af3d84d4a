"""What a supervisor decides, on every sequence of events."""

import itertools
import random
from collections.abc import Sequence
from math import inf

import pytest

from rq_ep.serve.messages import (
    Abort,
    Aborted,
    DrainRequest,
    KillRank,
    RankEnded,
    RankGivenUp,
    RankStarted,
    StartRank,
    Stop,
    StopRank,
)
from rq_ep.serve.supervisor.rank_start import EndFailed, Ending, HubAddress, Late, Leave, PassSignal, Serving
from rq_ep.serve.supervisor.supervision import (
    BACK_OFF_S,
    END_TIMEOUT_S,
    SETTLED_S,
    STOP_TIMEOUT_S,
    Action,
    CannotGoOn,
    Connect,
    Event,
    Exit,
    HubClosed,
    KillProcess,
    RankExited,
    RankPhase,
    SignalReceived,
    StartProcess,
    Supervision,
)

HUB = HubAddress(("127.0.0.1", 1), "token")
SERVING = Serving(HUB)
KILLED = RankExited(-9)
TERM = SignalReceived("SIGTERM")
DRAIN = DrainRequest(30.0)
KILLED_TEXT = "was killed by SIGKILL"


class Run:
    """A supervision, and what a supervisor would have made of its actions."""

    def __init__(self, *events: Event, rank: int = 1, max_restarts: int = 3) -> None:
        self.supervision = Supervision(rank, max_restarts, 30.0)
        self.now_s = 100.0
        self.has_process = True
        self.exit: Exit | None = None
        for event in events:
            self.on(event)

    def on(self, event: Event) -> list[Action]:
        if isinstance(event, RankExited):
            self.has_process = False
        return self._take(self.supervision.on_event(event, self.now_s))

    def wait(self) -> list[Action]:
        """Let the time pass until something is due."""
        self.now_s = self.supervision.due_s
        return self._take(self.supervision.on_time(self.now_s))

    def _take(self, actions: Sequence[Action]) -> list[Action]:
        for action in actions:
            assert self.exit is None
            match action:
                case StartProcess():
                    assert not self.has_process
                    self.has_process = True
                case KillProcess() | PassSignal() | Leave() | EndFailed():
                    assert self.has_process
                case Exit():
                    assert not self.has_process
                    self.exit = action
        return list(actions)


def test_a_rank_that_ends_while_the_group_loads_ends_its_supervisor_alike() -> None:
    assert Run().on(KILLED) == [RankEnded(KILLED_TEXT), Exit(137)]
    assert Run().on(RankExited(1)) == [RankEnded("ended with exit code 1"), Exit(1)]
    assert Run(Ending()).on(RankExited(2)) == [Exit(2)], "an error of a user, which the rank has printed"


def test_a_rank_that_serves_and_fails_is_started_again_later_and_later_until_it_is_given_up() -> None:
    run = Run(SERVING, max_restarts=9)
    pauses = []
    for number in range(1, 10):
        assert run.on(KILLED) == [RankEnded(KILLED_TEXT)]
        pauses.append(round(run.supervision.due_s - run.now_s, 6))
        assert run.wait() == [StartProcess(number), RankStarted(number)]
        if number % 2:  # whether it serves or fails while it loads
            assert run.on(SERVING) == [Connect(HUB)]
    assert pauses == [*BACK_OFF_S, 30.0, 30.0]
    reason = f"it {KILLED_TEXT}, and was started again 9 times (--max-rank-restarts)"
    assert run.on(KILLED) == [RankEnded(KILLED_TEXT), RankGivenUp(reason)]
    assert run.supervision.due_s == inf
    assert run.on(Stop()) == [Exit(0)], "it outlives the rank, and ends with the group"


def test_a_rank_that_has_served_for_long_has_all_its_restarts_again() -> None:
    run = Run(SERVING, max_restarts=1)
    for number in range(1, 5):
        run.now_s += SETTLED_S + 1
        assert run.on(KILLED) == [RankEnded(KILLED_TEXT)]
        assert run.wait() == [StartProcess(number), RankStarted(number)]
        run.on(SERVING)
    assert isinstance(run.on(KILLED)[-1], RankGivenUp), "at once it has none"


def test_no_restarts_may_be_wanted() -> None:
    run = Run(SERVING, max_restarts=0)
    assert isinstance(run.on(RankExited(1))[-1], RankGivenUp)
    assert run.on(StartRank()) == [StartProcess(1), RankStarted(1)], "by a request all the same"


def test_an_error_of_a_rank_that_joins_harms_nobody() -> None:
    """A checkpoint that is gone, say: the group serves on."""
    run = Run(SERVING, KILLED)
    run.wait()
    run.on(Ending())
    assert run.on(RankExited(2)) == [RankEnded("ended with exit code 2")]
    assert run.supervision.phase is RankPhase.WAITING


def test_a_rank_without_which_the_group_has_begun_is_started_again_if_it_fails_before_it_serves() -> None:
    run = Run()
    assert run.on(Late(HUB)) == [Connect(HUB)]
    assert run.on(KILLED) == [RankEnded(KILLED_TEXT)]
    assert run.wait() == [StartProcess(1), RankStarted(1)]


def test_signals_are_passed_on_to_a_rank_in_the_group_which_says_how_it_ends() -> None:
    assert Run().on(TERM) == [PassSignal("SIGTERM")]
    run = Run(SERVING)
    assert run.on(TERM) == [PassSignal("SIGTERM")]
    assert run.on(TERM) == [PassSignal("SIGTERM")]
    run.on(Ending())
    assert run.on(RankExited(1)) == [Exit(1)]


def test_without_a_rank_in_the_group_the_supervisor_asks_to_drain_and_aborts_itself() -> None:
    run = Run(SERVING, KILLED)
    assert run.on(TERM) == [DRAIN]
    assert run.supervision.due_s == inf, "a server that drains starts no ranks"
    end = Exit(1, "rank 1: aborted by a second SIGTERM")
    assert run.on(TERM) == [Aborted("SIGTERM", was_loading=False), end]
    run = Run(SERVING, KILLED)
    run.wait()
    assert run.on(TERM) == [DRAIN]
    assert run.on(TERM) == [Aborted("SIGTERM", was_loading=False), Leave()]
    assert run.on(RankExited(0)) == [Exit(1)]


def test_a_rank_that_dies_after_a_signal_is_not_started_again_and_the_group_drains() -> None:
    run = Run(SERVING, TERM)
    assert run.on(KILLED) == [RankEnded(KILLED_TEXT), DRAIN]
    assert run.supervision.due_s == inf
    assert run.on(Stop()) == [Exit(0)]


@pytest.mark.parametrize(("event", "status"), [(Stop(), 0), (Abort("x"), 1), (HubClosed(), 1), (CannotGoOn("x"), 1)])
def test_the_end_of_the_group_is_that_of_every_supervisor(event: Event, status: int) -> None:
    serving = Run(SERVING, event)
    assert serving.exit is None, "the rank comes first"
    assert serving.on(RankExited(3)) in ([Exit(3)], [RankEnded("ended with exit code 3"), Exit(3)])
    waiting = Run(SERVING, KILLED, event)
    assert waiting.exit is not None
    assert waiting.exit.status == status
    joining = Run(SERVING, KILLED)
    joining.wait()
    assert joining.on(event) == [EndFailed("x") if isinstance(event, CannotGoOn) else Leave()]
    assert joining.on(RankExited(0)) == [Exit(status)]
    removed = Run(SERVING, StopRank(), RankExited(0), event)
    assert removed.exit is not None
    assert removed.exit.status == status


@pytest.mark.parametrize(("event", "timeout_s"), [(Stop(), STOP_TIMEOUT_S), (Abort("x"), END_TIMEOUT_S)])
def test_a_rank_that_does_not_end_is_killed(event: Event, timeout_s: float) -> None:
    run = Run(SERVING, event)
    assert run.supervision.due_s == run.now_s + timeout_s
    assert run.wait() == [KillProcess()]
    assert run.on(KILLED)[-1] == Exit(137)


def test_rank_0_names_the_http_process_that_has_died() -> None:
    run = Run(SERVING, KILLED, rank=0)
    assert run.on(HubClosed()) == [Exit(1, "rank 0: the HTTP process has died")]
    assert Run(rank=0).on(HubClosed()) == [EndFailed("the HTTP process has died")], "it waits for the other ranks"


def test_a_stalled_rank_is_killed_and_started_again() -> None:
    run = Run(SERVING)
    assert run.on(KillRank("no progress")) == [KillProcess()]
    assert run.on(KILLED) == [RankEnded(KILLED_TEXT)]
    assert run.wait() == [StartProcess(1), RankStarted(1)]


def test_a_rank_leaves_and_comes_back_when_it_is_asked_to() -> None:
    run = Run(SERVING)
    assert run.on(StopRank()) == [Leave()]
    run.on(Ending())
    assert run.on(RankExited(0)) == []
    assert run.supervision.due_s == inf
    assert run.on(StartRank()) == [StartProcess(1), RankStarted(1)]
    run.on(SERVING)
    run.on(StopRank())
    assert run.on(StartRank()) == [], "the old process has not ended yet"
    assert run.on(RankExited(0)) == [StartProcess(2), RankStarted(2)]


def test_a_rank_that_is_given_up_comes_back_with_all_its_restarts_when_it_is_asked_for() -> None:
    run = Run(SERVING, max_restarts=1)
    run.on(KILLED)
    run.wait()
    assert isinstance(run.on(KILLED)[-1], RankGivenUp)
    assert run.on(StartRank()) == [StartProcess(2), RankStarted(2)]
    assert run.on(KILLED) == [RankEnded(KILLED_TEXT)]
    assert run.wait() == [StartProcess(3), RankStarted(3)]


EVENTS: tuple[Event | None, ...] = (
    SERVING, Ending(), KILLED, RankExited(0), TERM, CannotGoOn("x"), HubClosed(), Stop(), Abort("x"), KillRank("x"),
    StopRank(), StartRank(), None,
)  # fmt: skip
ENDS = (CannotGoOn, HubClosed, Stop, Abort)


def check_sequence(events: Sequence[Event | None]) -> None:
    """Run it as far as it can happen. `Run` asserts that no process is started beside another, or left behind."""
    run = Run(SERVING) if events and events[0] is None else Run()
    must_end = False
    for event in events:
        if isinstance(event, (Serving, Ending, RankExited)) and not run.has_process:
            continue
        if event is None and run.supervision.due_s == inf:
            continue
        actions = run.wait() if event is None else run.on(event)
        must_end |= isinstance(event, ENDS)
        if run.exit is not None:
            return
        assert not (must_end and any(isinstance(action, StartProcess) for action in actions))
    if must_end:  # within a bounded time, whatever the rank does
        assert run.has_process
        assert run.wait() == [KillProcess()]
        run.on(KILLED)
        assert run.exit is not None


def test_every_sequence_of_events_leaves_one_process_at_most_and_ends_with_the_group() -> None:
    for length in range(1, 5):
        for events in itertools.product(EVENTS, repeat=length):
            check_sequence(events)
    random_ = random.Random(0)
    for _ in range(5000):
        check_sequence(random_.choices(EVENTS, k=20))
