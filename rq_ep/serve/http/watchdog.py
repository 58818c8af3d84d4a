"""Finding a rank that lives but does not get on: stopped, swapped out, or in a collective that others never enter."""

import time
from collections.abc import Callable

from rq_ep.engine.progress import Progress

TICK_S = 0.5


class Watchdog:
    """Knows when each rank was last heard, and where it was. Ranks are watched from their first word on.

    Args:
        limit_s: how long a rank may be silent, or all of them in one place.
        clock: seconds.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._heard: dict[int, tuple[float, Progress]] = {}
        self._looked_s = clock()

    def hear(self, rank: int, place: Progress) -> None:
        """Take what a rank says of its place."""
        self._heard[rank] = (self._clock(), place)

    def forget(self, rank: int) -> None:
        """A rank has said good-bye."""
        self._heard.pop(rank, None)

    def look(self) -> str | None:
        """Which rank keeps the others waiting, and where; None if all is well."""
        now_s = self._clock()
        slept_s, self._looked_s = now_s - self._looked_s, now_s
        if slept_s > self._limit_s / 2 + TICK_S:  # this process was stopped itself, and heard nobody
            self._heard = {rank: (now_s, place) for rank, (_, place) in self._heard.items()}
        if not self._heard:
            return None
        silence_s, rank = max((now_s - heard_s, -rank) for rank, (heard_s, _) in self._heard.items())
        if silence_s > self._limit_s:
            return f"rank {-rank} has not been heard for {silence_s:.0f} s (--stall-timeout); {self._where(-rank)}"
        places = {rank: place for rank, (_, place) in self._heard.items()}
        if all(place.stuck_s > self._limit_s for place in places.values()):
            last = min(places, key=lambda rank: (places[rank].order, rank))
            stuck_s = places[last].stuck_s
            return f"rank {last} has not gone on for {stuck_s:.0f} s (--stall-timeout); {self._where(last)}"
        return None

    def _where(self, suspect: int) -> str:
        """Where the suspect was last seen, and where the others wait for it."""
        waits = [f"rank {rank} waits in {place}" for rank, (_, place) in sorted(self._heard.items()) if rank != suspect]
        return "; ".join([f"last seen in {self._heard[suspect][1]}", *waits[:2]])
