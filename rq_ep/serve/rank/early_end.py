"""How a rank's process ends before its time: by an error, a signal, or the death of whoever has started it."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rq_ep.serve.control import ControlClient
from rq_ep.serve.messages import Aborted, Failed
from rq_ep.serve.process import exit_failed, exit_quickly, thread_errors_to, watch_launcher
from rq_ep.serve.rank.shutdown_signals import ShutdownSignals
from rq_ep.serve.rank.supervisor_link import SupervisorLink
from rq_ep.serve.supervisor.rank_start import EndFailed, Ending, HubAddress, Late, Leave, PassSignal, Serving

ABORT_TIMEOUT_S = 5.0
DELIVERY_S = 0.5  # what was sent is lost if a process ends that has not read all that came


class EarlyEnd:
    """Ends this process at once, from any thread, and has the HTTP process learn why.

    The other ranks must not be left waiting in a collective, and the main thread may be stuck in one.

    Args:
        rank: the rank in this process.
        link: to the supervisor, if there is one.
    """

    def __init__(self, rank: int, link: SupervisorLink | None = None) -> None:
        self._rank = rank
        self._link = link
        self._is_survived = False  # whether the group goes on without this rank
        self.is_failing = False  # whether this process ends by itself soon, and the HTTP process parts from it
        self.signals = ShutdownSignals(on_abort=self._abort)
        self.client: ControlClient | None = None  # once this rank is connected

    @contextmanager
    def watching(self, has_launcher: bool) -> Iterator[None]:
        """End this process where a signal says so, a thread ends by an exception, or its parent dies.

        Args:
            has_launcher: the parent of this process is a launcher, which nobody survives.
        """
        if self._link is not None:
            threading.Thread(target=self._follow, args=(self._link,), name="rq_ep supervisor", daemon=True).start()
        with (
            watch_launcher(self.fail, has_launcher),
            self.signals.installed(),
            thread_errors_to(lambda error: self.fail(f"{type(error).__name__}: {error}")),
        ):
            yield

    def late(self, hub: HubAddress) -> None:
        """The group has begun without this rank, which joins it."""
        if self._link is not None:
            self._link.report(Late(hub))

    def serving(self, hub: HubAddress) -> None:
        """The rank serves: a signal asks to drain, and a supervisor starts the rank again if it fails."""
        self.signals.may_drain = True
        if self._link is not None:
            self._is_survived = True
            self._link.report(Serving(hub))

    def fail(self, reason: str, is_consequence: bool = False) -> NoReturn:
        """End with an error. The HTTP process knows who is to blame, and answers with `Abort` if the group has failed.

        Args:
            reason: the error, in one line.
            is_consequence: it only says that another rank has failed.
        """
        self.is_failing = self._is_survived
        if self.client is not None:
            self.client.send(Failed(reason, is_consequence))
            time.sleep(DELIVERY_S if self._is_survived else ABORT_TIMEOUT_S)
        exit_failed(f"rank {self._rank}: {reason}")

    def _abort(self, signal_name: str) -> NoReturn:
        """End by a signal; clients learn that it was on purpose, and not that a rank died."""
        was_loading = not self.signals.may_drain
        self._report_ending()
        if self.client is not None:
            self.client.send(Aborted(signal_name, was_loading))
        how = f"{signal_name} while the model was loading" if was_loading else f"a second {signal_name}"
        exit_failed(f"rank {self._rank}: aborted by {how}")

    def _follow(self, link: SupervisorLink) -> None:
        """Do what the supervisor says, and end with it."""
        supervisor = os.getppid()
        for command in link.commands():
            match command:
                case PassSignal():
                    self.signals.take(command.name, is_passed_on=True)
                case EndFailed():
                    self._report_ending()
                    self.fail(command.reason)
                case Leave():
                    self._report_ending()
                    if self.client is not None:
                        self.client.close()
                    exit_quickly(0)
        self.fail(f"its supervisor (process {supervisor}) has died")

    def _report_ending(self) -> None:
        if self._link is not None:
            self._link.report(Ending())
