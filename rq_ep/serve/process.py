"""The start and end of a server process: its logging, and the ways in which it exits."""

import logging
import os
import sys
import warnings
from typing import NoReturn

from rq_ep.core.errors import UserError

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2


def set_up_logging(level: str) -> None:
    """Send our own log lines, and the warnings of libraries, to stderr, one line an event."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.simplefilter("ignore", FutureWarning)  # for developers of libraries
    logging.getLogger("rq_ep").setLevel(level.upper())


def print_user_error(error: UserError) -> int:
    """Print what a user must put right, in one line. Returns the exit status for it."""
    print(f"rq_ep.serve: error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def exit_quickly(status: int) -> NoReturn:
    """Exit without tearing down torch, transformers and all they import: it takes seconds and frees nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_failed(reason: str | None) -> NoReturn:
    """Exit from any thread at once, as the others may be stuck in a collective. None: another rank has the reason."""
    if reason is not None:
        os.write(2, f"rq_ep.serve: error: {reason}\n".encode())
    os._exit(EXIT_FAILURE)
