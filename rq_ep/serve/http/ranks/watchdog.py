"""Detects a rank that lives but makes no progress: stopped, swapped out, or in a collective that others never enter."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rq_ep.engine.progress import Progress

TICK_S = 0.5


class Stall(NamedTuple):
    """A rank that keeps the others waiting."""

    rank: int
    text: str
    seconds: float  # for which it has been silent, or without progress


class Watchdog:
    """Keeps the time and content of each rank's last progress report.

    Args:
        limit_s: how long a rank may be silent, or all of them without progress.
        clock: seconds.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._reports: dict[int, tuple[float, Progress]] = {}
        self._checked_s = clock()

    def report(self, rank: int, progress: Progress) -> None:
        """Take a rank's report of its progress."""
        self._reports[rank] = (self._clock(), progress)

    def forget(self, rank: int) -> None:
        """Watch a rank no more: it has said good-bye."""
        self._reports.pop(rank, None)

    def watch(self, ranks: Iterable[int]) -> None:
        """Watch these ranks and no others, from now on, whether or not they have reported."""
        self._reports = dict.fromkeys(ranks, (self._clock(), Progress(0, None, None, 0.0)))

    def check(self) -> Stall | None:
        """The rank that keeps the others waiting; None if all is well."""
        now_s = self._clock()
        slept_s, self._checked_s = now_s - self._checked_s, now_s
        if slept_s > self._limit_s / 2 + TICK_S:  # this process was stopped itself, and received no reports
            self._reports = {rank: (now_s, progress) for rank, (_, progress) in self._reports.items()}
        if not self._reports:
            return None
        silence_s, rank = max((now_s - report_s, -rank) for rank, (report_s, _) in self._reports.items())
        if silence_s > self._limit_s:
            text = f"rank {-rank} has not been heard for {silence_s:.0f} s (--stall-timeout); {self._where(-rank)}"
            return Stall(-rank, text, silence_s)
        progress_by_rank = {rank: progress for rank, (_, progress) in self._reports.items()}
        if all(progress.stuck_s > self._limit_s for progress in progress_by_rank.values()):
            last = min(progress_by_rank, key=lambda rank: (progress_by_rank[rank].order, rank))
            stuck_s = progress_by_rank[last].stuck_s
            text = f"rank {last} has not gone on for {stuck_s:.0f} s (--stall-timeout); {self._where(last)}"
            return Stall(last, text, stuck_s)
        return None

    def _where(self, suspect: int) -> str:
        """Where the suspect was last seen, and where the others wait for it."""
        others = sorted((rank, progress) for rank, (_, progress) in self._reports.items() if rank != suspect)
        waits = [f"rank {rank} waits in {progress}" for rank, progress in others]
        return "; ".join([f"last seen in {self._reports[suspect][1]}", *waits[:2]])
