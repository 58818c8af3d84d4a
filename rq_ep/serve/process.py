"""The start and end of a server process: its logging, its signals, the ways in which it exits, errors nobody awaits."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from rq_ep.core.errors import UserError

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
FIRST_PRINTS_S = 30.0
REPEAT_S = 60.0
LAUNCHER_TICK_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def set_up_logging(level: str) -> None:
    """Send our own log lines, and the warnings of libraries, to stderr, one line an event."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.simplefilter("ignore", FutureWarning)  # for developers of libraries
    logging.getLogger("rq_ep").setLevel(level.upper())


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage inside: to walk modules again and again, which stay, takes a tenth of an import."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def log_repeats_once_a_minute(*names: str) -> None:
    """Bound what strangers can have logged by the loggers of these names."""
    for name in names:
        logging.getLogger(name).addFilter(RepeatFilter())


class RepeatFilter(logging.Filter):
    """Lets a message of a kind through once a minute: clients decide how often there is a reason for it."""

    def __init__(self) -> None:
        super().__init__()
        self._last_s: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (str(record.msg)[:40], record.exc_info and record.exc_info[0])
        now_s = time.monotonic()
        if now_s - self._last_s.get(kind, -REPEAT_S) < REPEAT_S:
            return False
        self._last_s[kind] = now_s
        return True


def print_user_error(error: UserError, prints: bool = True, is_told_to_end: Callable[[], bool] = lambda: False) -> int:
    """Print what a user must put right, in one line, on one rank of each node. Returns the exit status for it.

    Launchers end all ranks once one has left, so the others wait for that: the first one may be slower.

    Args:
        error: the same on every rank.
        prints: whether this rank does.
        is_told_to_end: whether the launcher ends this rank, unless it does so at once.
    """
    if prints:
        print(f"rq_ep.serve: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    end_s = time.monotonic() + FIRST_PRINTS_S
    while time.monotonic() < end_s and not is_told_to_end():
        time.sleep(0.05)
    return EXIT_USER_ERROR


def exit_quickly(status: int) -> NoReturn:
    """Exit without tearing down torch, transformers and all they import: it takes seconds and frees nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_failed(reason: str | None) -> NoReturn:
    """Exit from any thread at once, as the others may be stuck in a collective. None: another rank has the reason."""
    if reason is not None:
        print_error(reason)
    os._exit(EXIT_FAILURE)


def print_error(reason: str) -> None:
    """Print why this process ends, from any thread."""
    with suppress(OSError):  # whoever read the log has died as well
        os.write(2, f"rq_ep.serve: error: {reason}\n".encode())


@contextmanager
def thread_errors_to(on_error: Callable[[BaseException], None]) -> Iterator[None]:
    """Hand over every exception that ends a thread of this process, whoever started it.

    Python would only print it, and the process would go on without the thread.

    Args:
        on_error: called with the exception, on the thread that it ends.
    """

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is SystemExit:  # a thread that ends itself, which Python does not report either
            return
        on_error(args.exc_value or RuntimeError(f"{args.exc_type.__name__} in thread {args.thread}"))

    before = threading.excepthook
    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def signals_to(on_signal: Callable[[str], None]) -> Iterator[None]:
    """Hand over every SIGTERM and SIGINT inside; a caller that is not on the main thread keeps its own handlers.

    They are read from a socket on a thread, as a handler in Python would wait for the end of what the main thread does
    in C: a collective, say, whose other side has died.

    Args:
        on_signal: called with the name of the signal, on a thread of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def read() -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        on_signal(signal.Signals(number).name)

    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as `set_wakeup_fd` demands
    threading.Thread(target=read, name="rq_ep signals", daemon=True).start()
    fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, _ignore) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        writer.close()


def _ignore(_number: int, _frame: object) -> None:
    """Python writes to the socket only those signals that have a handler."""


@contextmanager
def watch_launcher(on_death: Callable[[str], None], has_launcher: bool) -> Iterator[None]:
    """Notice the death of the launcher inside.

    Args:
        on_death: called with what has happened, on a thread of its own.
        has_launcher: the parent of this process is a launcher, which nobody survives.
    """
    is_over = threading.Event()

    def watch(launcher: int) -> None:
        while not is_over.wait(LAUNCHER_TICK_S):
            if os.getppid() != launcher:
                on_death(f"its launcher (process {launcher}) has died")
                return

    # PR_SET_PDEATHSIG would go by the thread that started this process, not by the launcher as a whole.
    if has_launcher:
        threading.Thread(target=watch, args=(os.getppid(),), name="rq_ep launcher", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


class BackgroundTasks:
    """Tasks of the event loop that nobody awaits: an exception that ends one is handed over.

    Args:
        on_error: called with the exception.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def cancel(self) -> None:
        """End those that are left."""
        for task in self._tasks:
            task.cancel()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)
