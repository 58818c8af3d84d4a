"""Detecting the rank that keeps the others waiting."""

from rq_ep.engine.progress import Progress
from rq_ep.serve.http.ranks.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_silent_rank_is_named_with_where_the_others_wait() -> None:
    clock = Clock()
    watchdog = Watchdog(10, clock)
    for rank in range(3):
        watchdog.report(rank, Progress(4, None, None, 0.0))
    for _ in range(11):
        clock.now_s += 1
        for rank in (0, 2):
            watchdog.report(rank, Progress(5, 3, "all-to-all", clock.now_s))
        stall = watchdog.check()
        assert (stall is None) == (clock.now_s <= 10)
    assert stall is not None
    assert (stall.rank, stall.seconds) == (1, 11.0)
    assert stall.text == (
        "rank 1 has not been heard for 11 s (--stall-timeout); last seen in step 4, computing; "
        "rank 0 waits in step 5, MoE layer 3, all-to-all; rank 2 waits in step 5, MoE layer 3, all-to-all"
    )


def test_of_ranks_that_all_stand_still_the_last_one_is_blamed() -> None:
    watchdog = Watchdog(10, Clock())
    watchdog.report(0, Progress(5, 3, "all-to-all", 12))
    watchdog.report(1, Progress(5, 3, None, 11))
    watchdog.report(2, Progress(5, 3, "all-to-all", 11))
    stall = watchdog.check()
    assert stall is not None
    assert (stall.rank, stall.seconds) == (1, 11.0)
    assert "rank 1 has not gone on for 11 s" in stall.text
    watchdog.report(2, Progress(6, None, None, 0.1))
    assert watchdog.check() is None, "one of them still goes on"


def test_a_rank_that_does_not_leave_its_step_is_blamed_where_others_wait_for_the_next_generation() -> None:
    watchdog = Watchdog(10, Clock())
    watchdog.report(0, Progress(894, 0, "forming of generation 9", 11, 8, True))
    watchdog.report(1, Progress(894, 0, "all-to-all", 11, 8))
    watchdog.report(2, Progress(225, 1, "forming of generation 9", 11, 8, True))  # it has joined later
    stall = watchdog.check()
    assert stall is not None
    assert stall.rank == 1
    watchdog.report(1, Progress(1, None, "agreement on the step", 11, 9))
    assert (stall := watchdog.check()) is not None
    assert stall.rank == 2, "others have begun with the next generation"


def test_ranks_that_are_to_be_watched_need_not_have_reported() -> None:
    clock = Clock()
    watchdog = Watchdog(10, clock)
    watchdog.report(0, Progress(5, 3, None, 30.0))
    watchdog.watch([1, 2])
    for _ in range(11):
        clock.now_s += 1
        watchdog.report(2, Progress(1, None, None, 0.0))
        stall = watchdog.check()
        assert (stall is None) == (clock.now_s <= 10)
    assert stall is not None
    assert (stall.rank, stall.seconds) == (1, 11.0)


def test_a_watchdog_that_slept_itself_blames_nobody() -> None:
    clock = Clock()
    watchdog = Watchdog(10, clock)
    watchdog.report(0, Progress(1, None, None, 0.0))
    clock.now_s = 100
    assert watchdog.check() is None
    watchdog.forget(0)
    clock.now_s = 105
    assert watchdog.check() is None
