"""SIGTERM and SIGINT of a rank: the first one asks to drain, whichever rank it reaches; the second one aborts.

While there is nothing to drain yet, the first one aborts.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rq_ep.serve.process import signals_to


class ShutdownSignals:
    """Counts the signals of this process.

    Some launchers signal every process there is, this one and its supervisor, which passes the signal on: those that
    came directly and those that were passed on are counted apart.

    Args:
        on_abort: called with the name of a signal that is to end this process now, on a thread of its own.
    """

    def __init__(self, on_abort: Callable[[str], None]) -> None:
        self._on_abort = on_abort
        self._num_received: Counter[bool] = Counter()  # by whether they were passed on
        self.may_drain = False  # whether the first signal asks to drain
        self.is_ending = False  # whether the process ends anyway, and no signal changes how

    @property
    def are_received(self) -> bool:
        """Whether a signal has come."""
        return self._num_received.total() > 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals inside; a caller that is not on the main thread keeps its own handlers."""
        with signals_to(self.take):
            yield

    def take(self, name: str, is_passed_on: bool = False) -> None:
        """Take a signal that has come."""
        self._num_received[is_passed_on] += 1
        if self.is_ending:
            return
        if self._num_received[is_passed_on] > 1 or not self.may_drain:
            self._on_abort(name)
