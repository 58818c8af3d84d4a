"""The HTTP side of a recording: one at a time, and its result."""

import asyncio
from collections.abc import Callable

from rq_ep.serve.control import Message
from rq_ep.serve.http.openai.api_errors import ApiError

TIMEOUT_S = 60.0


class Recorder:
    """Starts and ends recordings by marks, which rise by one each time.

    Args:
        mark: has every rank told a number between the same two steps.
        directory: where traces go; None: recording was not allowed.
        max_tokens: of a trace.
    """

    def __init__(self, mark: Callable[[int], None], directory: str | None, max_tokens: int) -> None:
        self._mark = mark
        self._directory = directory
        self._max_tokens = max_tokens
        self._number = 0
        self._ended: asyncio.Future[Message] | None = None

    @property
    def is_recording(self) -> bool:
        return self._number % 2 == 1

    def start(self) -> Message:
        """Start recording; how many tokens it can come to.

        Raises:
            ApiError: the server was started without a directory for traces, or records already.
        """
        if self._directory is None:
            raise ApiError(400, "this server records nothing: start it with --record-dir DIR")
        if self.is_recording or self._ended is not None:
            raise ApiError(409, "a recording is under way: stop it first")
        self._next()
        return {"max_tokens": self._max_tokens}

    async def stop(self) -> Message:
        """End the recording; where its trace is, how long it has become, and whether it had reached its limit.

        Raises:
            ApiError: there is no recording, nothing was recorded, or it could not be written.
        """
        if not self.is_recording:
            raise ApiError(409, "nothing is being recorded: start first")
        self._ended = asyncio.get_running_loop().create_future()
        self._next()
        try:
            found = await asyncio.wait_for(self._ended, TIMEOUT_S)
        except TimeoutError:
            raise ApiError(500, f"the ranks have not written the trace within {TIMEOUT_S:g} s") from None
        finally:
            self._ended = None
        if "error" in found:
            raise ApiError(409, found["error"])
        return found

    def hear(self, found: Message) -> None:
        """Take what rank 0 says of a recording that has ended."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result({key: value for key, value in found.items() if key != "kind"})

    def _next(self) -> None:
        self._number += 1
        self._mark(self._number)
