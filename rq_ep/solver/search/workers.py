"""Processes for what comes apart layer by layer."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Done = TypeVar("Done")


class Run(Protocol):
    """As the built-in `map`."""

    def __call__(self, function: Callable[[Task], Done], tasks: Iterable[Task], /) -> Iterator[Done]:
        """What the function makes of each task, in order."""


@contextmanager
def workers(number: int, num_tasks: int) -> Iterator[Run]:
    """A `map` over at most so many processes, no more than there are tasks; results come in order.

    The function and the tasks must be picklable. With one process everything stays in this one.
    """
    number = min(number, num_tasks)
    if number <= 1:
        yield map
        return
    # Spawned: a forked process would inherit the locks of the threads that numerical libraries keep.
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map
