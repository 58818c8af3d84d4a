"""Tasks of the solver: their order, the threads that compute them, and errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

import pytest

from rq_ep.solver.workers import Workers, workers

LONG = 60.0  # seconds until a test that hangs fails


@contextmanager
def the_only_thread_busy() -> Iterator[tuple[Workers, Callable[[], bool], Event]]:
    """The caller and a thread, a task that the thread has begun, and the event that it waits for."""
    begun, go_on = Event(), Event()

    def waiting() -> bool:
        begun.set()
        return go_on.wait(LONG)

    with workers(2) as threads:
        first = threads.ahead(waiting)
        assert begun.wait(LONG)
        yield threads, first, go_on


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_the_order_of_the_rows(number: int) -> None:
    with workers(number) as threads:
        ahead = threads.ahead(pow, 2, 10)
        assert list(threads.map(divmod, range(50), [7] * 50)) == [divmod(one, 7) for one in range(50)]
        assert ahead() == ahead() == 1024


def test_whoever_waits_works() -> None:
    with the_only_thread_busy() as (threads, first, go_on):
        second = threads.ahead(go_on.set)
        assert first()
        assert second() is None


def test_the_caller_does_what_it_waits_for_before_the_rest() -> None:
    done = list[int]()
    with the_only_thread_busy() as (threads, first, go_on):
        results = [threads.ahead(done.append, number) for number in range(3)]
        results[2]()
        assert done == [2]
        go_on.set()
        assert first()


def test_what_nobody_can_ask_for_is_not_begun() -> None:
    done = list[int]()
    with the_only_thread_busy() as (threads, first, go_on):
        results = [threads.ahead(done.append, number) for number in range(3)]
        del results[0]
        go_on.set()
        assert first()
        for result in results:
            result()
        assert sorted(done) == [1, 2]


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_comes_to_whoever_asks(number: int) -> None:
    with workers(number) as threads:
        results = threads.map(int, ["1", "one", "2"])
        assert next(results) == 1
        with pytest.raises(ValueError, match="'one'"):
            next(results)


def test_an_interrupt_ends_the_caller_at_once() -> None:
    def interrupted() -> None:
        go_on.set()
        raise KeyboardInterrupt

    with the_only_thread_busy() as (threads, first, go_on):
        second = threads.ahead(interrupted)  # by the caller, as the only thread waits
        with pytest.raises(KeyboardInterrupt):
            first()
        del second  # kept so far, as otherwise nobody would begin it
