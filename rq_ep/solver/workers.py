"""Threads that compute layers beside the caller: what is compiled lets the others run meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache, partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar
from weakref import ref

Done = TypeVar("Done")


class Workers:
    """The caller, and beside it threads that take tasks from a queue. Results are the same for any number of them.

    The caller does itself what it waits for and no thread has begun. While a thread does that, it takes other tasks.
    A task whose result nobody can ask for any more is not begun.
    """

    def __init__(self, tasks: "_Queue | None" = None) -> None:
        self._tasks = tasks  # None: there are no threads

    def map(self, function: Callable[..., Done], *columns: Iterable[Any]) -> Iterator[Done]:
        """The function's results for the rows of `columns`, in their order."""
        if self._tasks is None:
            return map(function, *columns)
        results = [self.ahead(function, *row) for row in zip(*columns, strict=True)]
        return (result() for result in results)

    def ahead(self, function: Callable[..., Done], *arguments: Any) -> Callable[[], Done]:
        """What returns the function's result: a thread computes it from now on, or the first call does."""
        work = partial(function, *arguments)
        if self._tasks is None:
            return cache(work)
        task = _Task(work)
        self._tasks.put(ref(task))
        return partial(self._result, self._tasks, task)

    @staticmethod
    def _result(tasks: "_Queue", task: "_Task[Done]") -> Done:
        task.run()
        with suppress(Empty):
            while not task.done():
                _run(tasks.get_nowait())
        return task.result()


class _Task(Future[Done]):
    """Work whose result somebody waits for."""

    def __init__(self, work: Callable[[], Done]) -> None:
        super().__init__()
        self._work, self._is_begun = work, Lock()

    def run(self) -> None:
        """Do the work, unless somebody has begun it."""
        if not self._is_begun.acquire(blocking=False):
            return
        try:
            self.set_result(self._work())
        except Exception as error:  # whoever waits raises it; an interrupt ends the caller at once
            self.set_exception(error)


_Queue = SimpleQueue[ref[_Task[Any]] | None]  # None ends a thread
ALONE = Workers()


@contextmanager
def workers(number: int) -> Iterator[Workers]:
    """The caller and threads, so many of them together. What nobody has waited for in the end is given up."""
    if number == 1:
        yield ALONE
        return
    tasks: _Queue = SimpleQueue()
    threads = [Thread(target=_run_all, args=(tasks,), name="rq_ep solver", daemon=True) for _ in range(number - 1)]
    for thread in threads:
        thread.start()
    try:
        yield Workers(tasks)
    finally:
        with suppress(Empty):
            while True:
                tasks.get_nowait()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()


def _run_all(tasks: _Queue) -> None:
    for task in iter(tasks.get, None):
        _run(task)


def _run(waiting: "ref[_Task[Any]] | None") -> None:
    task = None if waiting is None else waiting()
    if task is not None:
        task.run()
