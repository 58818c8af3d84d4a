"""Threads that compute layers beside one another: what is compiled lets the others run meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

Done = TypeVar("Done")


@dataclass(frozen=True)
class Workers:
    """Threads of a pool or, without one, the caller alone. Results are the same for any number of them."""

    pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[..., Done], *columns: Iterable[Any]) -> Iterator[Done]:
        """The function's results for the rows of `columns`, in their order."""
        return map(function, *columns) if self.pool is None else self.pool.map(function, *columns)

    def ahead(self, function: Callable[..., Done], *arguments: Any) -> Callable[[], Done]:
        """What returns the function's result: a worker computes it from now on, or the first call does."""
        if self.pool is None:
            return cache(partial(function, *arguments))
        return self.pool.submit(function, *arguments).result


ALONE = Workers()


@contextmanager
def workers(number: int) -> Iterator[Workers]:
    """So many threads, or the caller alone for one. What nobody has waited for in the end is given up."""
    if number == 1:
        yield ALONE
        return
    pool = ThreadPoolExecutor(number, "rq_ep solver")
    try:
        yield Workers(pool)
    finally:
        pool.shutdown(cancel_futures=True)
