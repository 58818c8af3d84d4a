"""SIGTERM and SIGINT of a rank: the first one asks to drain, whichever rank it reaches; the second one aborts.

While there is nothing to drain yet, the first one aborts. The signals are read from a socket on a thread, as a handler
in Python would wait for the end of what the main thread does in C: a collective, say, whose other side has died.
"""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class ShutdownSignals:
    """Counts the signals of this process.

    Args:
        on_abort: called with the name of a signal that is to end this process now, on a thread of its own.
    """

    def __init__(self, on_abort: Callable[[str], None]) -> None:
        self._on_abort = on_abort
        self._num_received = 0
        self.may_drain = False  # whether the first signal asks to drain
        self.is_ending = False  # whether the process ends anyway, and no signal changes how

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
        reader, writer = socket.socketpair()
        writer.setblocking(False)  # as `set_wakeup_fd` demands
        threading.Thread(target=self._read, args=(reader,), name="rq_ep signals", daemon=True).start()
        fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, _ignore) for number in NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd_before)
            writer.close()

    def _read(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in NUMBERS:
                        self._handle(signal.Signals(number).name)

    def _handle(self, name: str) -> None:
        self._num_received += 1
        if self.is_ending:
            return
        if self._num_received > 1 or not self.may_drain:
            self._on_abort(name)


def _ignore(_number: int, _frame: object) -> None:
    """Python writes to the socket only those signals that have a handler."""
