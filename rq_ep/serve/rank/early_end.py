"""How a rank's process ends before its time: by an error, a signal, or the death of its launcher."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rq_ep.serve.control import ControlClient
from rq_ep.serve.messages import Aborted, Failed
from rq_ep.serve.process import exit_failed, thread_errors_to
from rq_ep.serve.rank.shutdown_signals import ShutdownSignals

ABORT_TIMEOUT_S = 5.0
LAUNCHER_TICK_S = 1.0


class EarlyEnd:
    """Ends this process at once, from any thread, and has the HTTP process learn why.

    The other ranks must not be left waiting in a collective, and the main thread may be stuck in one.

    Args:
        rank: the rank in this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.signals = ShutdownSignals(on_abort=self._abort)
        self.client: ControlClient | None = None  # once this rank is connected

    @contextmanager
    def watching(self, has_launcher: bool) -> Iterator[None]:
        """End this process where a signal says so, a thread ends by an exception, or the launcher dies.

        Args:
            has_launcher: the parent of this process is a launcher, which nobody survives.
        """
        is_over = threading.Event()
        if has_launcher:
            threading.Thread(target=self._watch, args=(is_over,), name="rq_ep launcher", daemon=True).start()
        try:
            with (
                self.signals.installed(),
                thread_errors_to(lambda error: self.fail(f"{type(error).__name__}: {error}")),
            ):
                yield
        finally:
            is_over.set()

    def fail(self, reason: str, is_consequence: bool = False) -> NoReturn:
        """End with an error. The HTTP process knows who is to blame, and answers with `Abort`.

        Args:
            reason: the error, in one line.
            is_consequence: it only says that another rank has failed.
        """
        if self.client is not None:
            self.client.send(Failed(reason, is_consequence))
            time.sleep(ABORT_TIMEOUT_S)
        exit_failed(f"rank {self._rank}: {reason}")

    def _abort(self, signal_name: str) -> NoReturn:
        """End by a signal; clients learn that it was on purpose, and not that a rank died."""
        was_loading = not self.signals.may_drain
        if self.client is not None:
            self.client.send(Aborted(signal_name, was_loading))
        how = f"{signal_name} while the model was loading" if was_loading else f"a second {signal_name}"
        exit_failed(f"rank {self._rank}: aborted by {how}")

    def _watch(self, is_over: threading.Event) -> None:
        # PR_SET_PDEATHSIG would go by the thread that started this process, not by the launcher as a whole.
        launcher = os.getppid()
        while not is_over.wait(LAUNCHER_TICK_S):
            if os.getppid() != launcher:
                self.fail(f"its launcher (process {launcher}) has died")
