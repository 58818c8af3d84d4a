"""SIGTERM and SIGINT of a rank: the first one asks to drain, whichever rank it reaches; the second one aborts."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ShutdownSignals:
    """Counts the signals of this process.

    Args:
        on_second: called with the name of the second signal, on a thread of its own.
    """

    def __init__(self, on_second: Callable[[str], None]) -> None:
        self._on_second = on_second
        self._num_received = 0

    @property
    def are_received(self) -> bool:
        """Whether a signal has come."""
        return self._num_received > 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals inside; a caller that is not on the main thread keeps its own handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        self._num_received += 1
        if self._num_received > 1:
            # On a thread: this one may hold the control connection's lock just now.
            name = signal.Signals(number).name
            threading.Thread(target=self._on_second, args=(name,), daemon=True).start()
