"""Logging of the server's processes: to stderr, one line an event."""

import logging
import warnings


def set_up_logging(level: str) -> None:
    """Send our own log lines, and the warnings of libraries, to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.simplefilter("ignore", FutureWarning)  # for developers of libraries
    logging.getLogger("rq_ep").setLevel(level.upper())
