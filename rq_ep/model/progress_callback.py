"""Progress callbacks of work that takes a while."""

from collections.abc import Callable
from itertools import count

ProgressCallback = Callable[[str, int, int], None]  # stage, done, total


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def item_counter(progress: ProgressCallback, stage: str, total: int) -> Callable[[], None]:
    """A callback without arguments, each call of which reports that one more item of a stage is done."""
    numbers = count(1)
    return lambda: progress(stage, next(numbers), total)
