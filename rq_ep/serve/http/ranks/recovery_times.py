"""How long the members of a group take to serve again after a change."""

from collections.abc import Callable, Mapping


class RecoveryTimes:
    """The times of the change that is under way. Losses that come before the group serves as a whole are one recovery.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._generation_s = 0.0  # when the generation began,
        self._started_s: float | None = None  # and when the first loss since the group last served as a whole came
        self._seconds: dict[str, float] = {}  # of each part, the longest of all members

    @property
    def seconds_in_generation(self) -> float:
        return self._clock() - self._generation_s

    def begin_change(self) -> None:
        """Ranks join or leave on purpose, be it within a recovery."""
        if self._started_s is None:
            self._seconds = {}

    def begin_recovery(self, detect_s: float) -> None:
        """A loss, of which the first sign came so many seconds ago."""
        if self._started_s is None:
            self._started_s = self._clock() - detect_s
            self._seconds = {}
        self.add({"detect": detect_s})

    def begin_generation(self) -> None:
        self._generation_s = self._clock()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Take the parts that a member has measured."""
        for part, duration in seconds.items():
            self._seconds[part] = max(self._seconds.get(part, 0.0), duration)

    def end(self) -> tuple[bool, dict[str, float]]:
        """The group serves as a whole: whether that was a recovery, and the seconds of its parts."""
        is_recovery = self._started_s is not None
        if self._started_s is not None:
            self._seconds["total"] = self._clock() - self._started_s
        self._started_s = None
        return is_recovery, self._seconds
