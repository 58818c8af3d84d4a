"""What a step does on a rank, beside another rank whose flags are given."""

import threading
from collections.abc import Callable, Sequence

import pytest

from rq_ep.engine.progress import ProgressTracker
from rq_ep.engine.requests import Batch
from rq_ep.engine.step_agreement import UNKNOWN, StepFlags
from rq_ep.engine.step_loop import Recover, StepLoop
from rq_ep.moe.migration.expert_mover import MoverFlags

BATCH = Batch([("old", 1), ("new", 3)], True)


class RecordedEvent(threading.Event):
    """An event that does not sleep, and remembers how long it was to."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.timeouts.append(timeout)
        return self.is_set()


class Rank:
    """A rank without a model, one of two; `other` are the flags of the other one."""

    def __init__(
        self,
        ready: bool,
        pending: bool,
        other: StepFlags,
        *,
        keeps_running: bool = True,
        stops_now: bool = False,
        prompts: int = 0,
        wanted: tuple[str, ...] = ("a prompt",),
        mover_flags: Callable[[], MoverFlags] | None = None,
        recover: Recover | None = None,
    ) -> None:
        self.other = other
        self.ready, self.pending = ready, pending
        self.keeps_running, self.stops_now = keeps_running, stops_now
        self.prompts, self.wanted = prompts, wanted
        self.under_way = [("a prompt", 5)]
        self.did: list[str] = []
        self.batches: list[Batch] = []  # as they are in each step
        self.event = RecordedEvent()
        self.rows: list[Sequence[int] | None] = []  # as they are announced and, after the step, taken back
        self.announced: list[StepFlags] = []
        self.num_looks = 0  # at the requests of a batch
        self.loop = StepLoop(
            gather_flags=lambda flags: self.announced.append(flags) or [flags, self.other],  # type: ignore[func-returns-value]
            prompts=Prompts(self),
            is_wanted=self.wanted.__contains__,
            empty_step=lambda: self.do("empty step"),
            on_mark=lambda number: self.did.append(f"mark {number}"),
            mover_flags=mover_flags,
            on_agreement=lambda flags: None,
            recover=recover,
            announce_rows=self.rows.append,
            progress=ProgressTracker([], [], lambda: None),
            heartbeat_s=60.0,
            wake_up=self.event,
        )
        self.loop.wake(3)

    def do(self, what: str) -> None:
        self.did.append(what)
        self.batches.append(self.loop.batch(self))

    def step(self) -> bool:
        return self.loop.step(self)

    # The batches of the loop

    def has_requests(self) -> bool:
        return self.pending

    def prepare(self) -> bool:
        return self.ready

    def run(self) -> None:
        self.do("step")

    def restart(self) -> None:
        self.did.append("restart")

    def contents(self) -> Batch:
        return BATCH

    def has_prompts(self) -> bool:
        self.num_looks += 1
        return True


class Prompts:
    """The prompts of a `Rank`."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.under_way = rank.under_way

    def has_work(self) -> bool:
        return self.rank.prompts > 0

    def step(self, is_wanted: Callable[[str], bool]) -> bool:
        self.rank.prompts -= 1
        self.rank.do("score")
        return is_wanted("a prompt")

    def restart(self) -> None:
        self.rank.did.append("restart of a prompt")


# has_step, keeps_running, stops_now, has_requests, num_announced, mark
IDLE, BUSY = StepFlags(False, True, False, False, 3, 0), StepFlags(True, True, False, True, 3, 0)
LEAVING, STOPPING = StepFlags(False, False, False, False, 3, 0), StepFlags(False, False, True, False, 3, 0)
GOING, DRAINING, STOPPED = (True, False), (False, False), (False, True)


@pytest.mark.parametrize(
    ("ready", "pending", "other", "state", "did", "goes_on"),
    [
        (True, True, IDLE, GOING, ["step"], True),
        (True, True, BUSY, GOING, ["step"], True),
        (False, False, BUSY, GOING, ["empty step"], True),
        (False, False, IDLE, GOING, [], True),
        (False, False, BUSY, DRAINING, ["empty step"], True),
        (True, True, LEAVING, DRAINING, ["step"], True),
        (False, True, LEAVING, DRAINING, [], True),
        (False, False, IDLE, DRAINING, [], True),
        (False, False, LEAVING, GOING, [], True),
        (False, False, LEAVING, DRAINING, [], False),
        (True, True, BUSY, STOPPED, [], False),
        (True, True, STOPPING, GOING, [], False),
    ],
)
def test_a_step_does_what_the_group_agreed(
    ready: bool, pending: bool, other: StepFlags, state: tuple[bool, bool], did: list[str], goes_on: bool
) -> None:
    rank = Rank(ready, pending, other, keeps_running=state[0], stops_now=state[1])
    assert (rank.step(), rank.did) == (goes_on, did)
    assert rank.loop.num_steps == int("step" in did)


def test_a_mark_comes_before_the_step_and_once() -> None:
    rank = Rank(True, True, IDLE._replace(mark=1))
    assert rank.step()
    assert rank.step()
    assert rank.did == ["mark 1", "step", "step"]


def test_scoring_takes_turns_with_batches() -> None:
    rank = Rank(True, True, IDLE, prompts=2)
    for _ in range(4):
        assert rank.step()
    assert rank.did == ["score", "step", "score", "step"]
    assert rank.batches == [Batch([("a prompt", 5)], True), BATCH] * 2


@pytest.mark.parametrize(
    ("ready", "prompts", "other", "rows"),
    [(True, 0, 3, (4, 3)), (False, 0, 3, (0, 3)), (True, 1, 3, None), (True, 0, UNKNOWN, None)],
)
def test_rows_are_announced_for_one_step_if_every_rank_knows_its_own(
    ready: bool, prompts: int, other: int, rows: tuple[int, int] | None
) -> None:
    rank = Rank(ready, ready, BUSY._replace(num_rows=other), prompts=prompts)
    assert rank.step()
    assert rank.rows == [rows, None]


def test_an_empty_step_has_an_empty_batch() -> None:
    rank = Rank(False, False, BUSY)
    assert rank.step()
    assert rank.batches == [Batch([], False)]


def test_a_prompt_nobody_waits_for_is_an_empty_step() -> None:
    rank = Rank(False, False, IDLE, prompts=1, wanted=())
    assert rank.step()
    assert rank.did == ["score", "empty step"], "the other ranks have entered the step already"


def test_an_idle_group_sleeps_until_it_is_woken() -> None:
    rank = Rank(False, False, IDLE)
    assert rank.step()
    assert rank.event.timeouts == [60.0]
    assert not rank.event.is_set()
    rank.loop.wake(4)
    assert rank.event.is_set()


def test_no_rank_sleeps_while_another_has_not_been_told_of_a_request() -> None:
    rank = Rank(False, False, IDLE._replace(num_announced=4))
    assert rank.step()
    assert rank.event.timeouts == [0.001]


@pytest.mark.parametrize(
    ("staged", "other_staged", "sleeps"), [(7, 6, False), (6, 7, True), (7, 7, True), (0, 0, True)]
)
def test_only_the_rank_that_has_come_least_far_in_a_migration_sleeps(
    staged: int, other_staged: int, sleeps: bool
) -> None:
    """The others wait for it in the next agreement, which begins when it wakes up: once it has come further."""
    rank = Rank(False, False, IDLE._replace(staged=other_staged), mover_flags=lambda: MoverFlags(staged, 0))
    assert rank.step()
    assert rank.event.timeouts == [60.0] * sleeps


def test_a_group_that_ends_waits_for_no_migration() -> None:
    rank = Rank(False, False, LEAVING, keeps_running=False, mover_flags=lambda: MoverFlags(7, 0))
    assert not rank.step()


def test_nobody_looks_at_the_requests_of_a_batch_for_a_placement_that_stays() -> None:
    rank = Rank(True, True, IDLE)
    assert rank.step()
    assert (rank.num_looks, rank.announced[0].is_prefill) == (0, False)
    rank = Rank(True, True, IDLE, mover_flags=lambda: MoverFlags(0, 0))
    assert rank.step()
    assert (rank.num_looks, rank.announced[0].is_prefill) == (1, True)
