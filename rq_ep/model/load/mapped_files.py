"""Memory-mapped files that are read again while a model serves: what is in them must be what was opened."""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

from rq_ep.core.errors import UserError


class MappedFiles:
    """Files as they are now, to be compared with what they are later.

    What is written into a mapped file is read from it, and reading what was cut off ends the process. A file that was
    deleted, or replaced by another one, is still there for who has opened it.

    Args:
        files: all of them; they are kept open.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [(os.open(file, os.O_RDONLY), file) for file in files]
        self._states = [_state(descriptor) for descriptor, _ in self._files]
        weakref.finalize(self, _close, [descriptor for descriptor, _ in self._files])

    def check(self) -> None:
        """Return if what was opened is unchanged: call it before reading and after.

        Raises:
            UserError: it has changed or is out of reach; the message names the file.
        """
        for (descriptor, file), before in zip(self._files, self._states, strict=True):
            try:
                now = _state(descriptor)
            except OSError as error:  # its server does not know it any more
                raise UserError(f"{file}: cannot be read any more ({error.strerror}): start the server again") from None
            if now != before:
                raise UserError(f"{file}: was written to while it is served: start the server again to serve it")


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
