"""Tasks of the solver: their order, the threads that compute them, and errors."""

from collections.abc import Callable
from threading import Event

import pytest

from rq_ep.solver.workers import workers

LONG = 60.0  # seconds until a test that hangs fails


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_the_order_of_the_rows(number: int) -> None:
    with workers(number) as threads:
        ahead = threads.ahead(pow, 2, 10)
        assert list(threads.map(divmod, range(50), [7] * 50)) == [divmod(one, 7) for one in range(50)]
        assert ahead() == ahead() == 1024


def test_whoever_waits_works() -> None:
    begun, helped = Event(), Event()

    def waiting() -> bool:
        begun.set()
        return helped.wait(LONG)

    with workers(2) as threads:
        first = threads.ahead(waiting)
        assert begun.wait(LONG)
        second = threads.ahead(helped.set)  # the only thread waits for this
        assert first()
        assert second() is None


def test_the_caller_does_what_it_waits_for_before_the_rest() -> None:
    begun, go_on, done = Event(), Event(), list[int]()

    def waiting() -> bool:
        begun.set()
        return go_on.wait(LONG)

    with workers(2) as threads:
        first = threads.ahead(waiting)
        assert begun.wait(LONG)  # from now on, the only thread takes nothing
        results = [threads.ahead(done.append, number) for number in range(3)]
        results[2]()
        assert done == [2]
        go_on.set()
        assert first()


def test_what_nobody_can_ask_for_is_not_begun() -> None:
    begun, go_on, done = Event(), Event(), list[int]()

    def waiting() -> bool:
        begun.set()
        return go_on.wait(LONG)

    with workers(2) as threads:
        first = threads.ahead(waiting)
        assert begun.wait(LONG)
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
    begun, go_on = Event(), Event()

    def waiting() -> bool:
        begun.set()
        return go_on.wait(LONG)

    def interrupted() -> None:
        go_on.set()
        raise KeyboardInterrupt

    with workers(2) as threads:
        results: list[Callable[[], object]] = [threads.ahead(waiting)]
        assert begun.wait(LONG)
        results.append(threads.ahead(interrupted))  # by the caller, as the only thread waits
        with pytest.raises(KeyboardInterrupt):
            results[0]()
