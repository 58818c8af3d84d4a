"""Threads that compute layers beside the caller: what is compiled lets the others run meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache, partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

Done = TypeVar("Done")


class Workers:
    """The caller, and beside it threads that take tasks from a queue. Results are the same for any number of them.

    While the caller waits for a task that a thread has begun, it takes tasks from the queue, too.
    """

    def __init__(self, tasks: "SimpleQueue[_Task[Any] | None] | None" = None) -> None:
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
        self._tasks.put(task)
        return partial(self._result, self._tasks, task)

    @staticmethod
    def _result(tasks: "SimpleQueue[_Task[Any] | None]", task: "_Task[Done]") -> Done:
        with suppress(Empty):
            while not task.done():
                other = tasks.get_nowait()
                if other is not None:
                    other.run()
        return task.result()


class _Task(Future[Done]):
    """Work whose result somebody waits for."""

    def __init__(self, work: Callable[[], Done]) -> None:
        super().__init__()
        self._work = work

    def run(self) -> None:
        try:
            self.set_result(self._work())
        except Exception as error:  # whoever waits raises it; an interrupt ends the caller at once
            self.set_exception(error)


ALONE = Workers()


@contextmanager
def workers(number: int) -> Iterator[Workers]:
    """The caller and threads, so many of them together. What nobody has waited for in the end is given up."""
    if number == 1:
        yield ALONE
        return
    tasks: SimpleQueue[_Task[Any] | None] = SimpleQueue()
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


def _run_all(tasks: "SimpleQueue[_Task[Any] | None]") -> None:
    for task in iter(tasks.get, None):
        task.run()
