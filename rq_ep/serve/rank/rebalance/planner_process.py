"""The planner process of the rank that leads: finds placements beside the engine, at low priority and on one thread.

Requests and answers are pickles in its pipes, which nobody else holds. It ends when its input does: with its parent.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from rq_ep.config import child_environment
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.rebalancing.rebalancer import Decision, RebalanceRequest, decide
from rq_ep.rebalancing.settle import Settlement, SettleRequest, settle
from rq_ep.rebalancing.warm_up import warm_up
from rq_ep.strategies import make_strategy

NICENESS = 10  # a tenth of a core where all are busy; at 19, where it gets a hundredth, no decision comes in time
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
END_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class SaveRequest:
    """A placement that is to be written to a file: whole, then renamed."""

    placement: Placement
    path: str


@dataclass(frozen=True)
class PlannerFailure:
    """The process has ended without an answer, or has answered with an error."""

    reason: str
    of_decision: bool  # or of another placement that was asked for; else of one that was to be saved


Request = RebalanceRequest | SettleRequest | SaveRequest
Answer = Decision | Settlement | PlannerFailure


class PlannerProcess:
    """The parent's side. One placement is asked for at a time; nothing here waits for the process.

    The process starts at once, as its imports take seconds; one that has died is started again for the next request.

    Args:
        command: what to start; default: `main`.
    """

    def __init__(self, command: list[str] | None = None) -> None:
        # Not by `-m`: what a module run so pickles is of `__main__`.
        self._command = command or [sys.executable, "-c", f"from {__name__} import main; main()"]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._num_awaited = 0  # placements that were asked for, whose answers were not taken
        self._killed_for = ""
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="rq_ep planner", daemon=True).start()

    def ask(self, request: Request) -> None:
        """Have a decision made, a placement found, or one saved."""
        self._num_awaited += not isinstance(request, SaveRequest)
        self._requests.put(request)

    def take(self) -> Answer | None:
        """The answer to the last request for a placement, or the failure of any; None if there is none yet."""
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            return None
        self._num_awaited -= not (isinstance(answer, PlannerFailure) and not answer.of_decision)
        return answer

    @property
    def is_free(self) -> bool:
        """Whether it answers nothing that somebody else has asked for."""
        return self._num_awaited == 0

    def kill(self, reason: str) -> None:
        """End a process that does not answer; its request fails for this reason."""
        if (process := self._process) is not None:
            self._killed_for = reason
            process.kill()

    def close(self) -> None:
        """End the process and its thread; what was asked for last is not begun any more."""
        self._is_closed = True
        self._requests.put(None)
        self.kill("it is not needed any more")

    # On a thread of its own: a request is megabytes, and an answer takes seconds.

    def _run(self) -> None:
        with suppress(OSError):  # the request that it is started for will say so
            self._started()
        while (request := self._requests.get()) is not None and not self._is_closed:
            answer = self._answer(request)
            if answer is not None:
                self._answers.put(answer)
        if self._process is not None:
            self._end(self._process)

    def _answer(self, request: Request) -> Answer | None:
        of_decision = not isinstance(request, SaveRequest)
        try:
            process = self._started()
        except OSError as error:  # no memory for one, say
            return PlannerFailure(f"the planner process cannot be started ({error})", of_decision)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(request, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer: Answer | None = pickle.load(process.stdout)
            return answer
        except (OSError, EOFError):
            self._process = None
            status = self._end(process)
            reason = self._killed_for or f"the planner process has ended (exit status {status})"
            self._killed_for = ""
            return PlannerFailure(reason, of_decision)
        except Exception as error:  # what cannot be pickled, or read
            process.kill()
            self._process = None
            self._end(process)
            reason = f"no message for or from the planner process: {type(error).__name__}: {error}"
            return PlannerFailure(reason, of_decision)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = child_environment() | dict.fromkeys(THREADS, "1")
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not written yet has no reader any more
                    continue
        try:
            return process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _handle(request: Request) -> Answer | None:
    try:
        if isinstance(request, RebalanceRequest):
            return decide(request)
        if isinstance(request, SettleRequest):
            return settle(request)
        request.placement.save(request.path)
        return None
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return PlannerFailure(reason, not isinstance(request, SaveRequest))


def serve(requests: BinaryIO, answers: BinaryIO, on_end: Callable[[], Any]) -> None:
    """Answer requests one by one; `on_end` is called when the input ends, in the middle of a decision too."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                waiting.put(pickle.load(requests))
        finally:  # the end of the input, or something that is no request
            on_end()

    threading.Thread(target=read, daemon=True).start()
    while True:
        answer = _handle(waiting.get())
        with suppress(BrokenPipeError):  # the parent has died: so does this process, as its input ends
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a launcher's, to all processes: rank 0 decides what they mean
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    threading.Thread(target=lambda: warm_up(make_strategy("rq")), name="rq_ep warm-up", daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    serve(sys.stdin.buffer, answers, lambda: os._exit(0))


if __name__ == "__main__":
    main()
