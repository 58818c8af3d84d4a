"""The HTTP side of a recording of routing decisions: one at a time, and its result."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.messages import Recorded, RecordingFailed

TIMEOUT_S = 60.0


class RecordingController:
    """Starts and ends recordings by marks, which rise by one each time.

    Args:
        mark: sends a number to every rank, which reaches all of them between the same two steps.
        directory: where traces go; None: recording was not allowed.
        max_tokens: of a trace.
    """

    def __init__(self, mark: Callable[[int], None], directory: str | None, max_tokens: int) -> None:
        self._mark = mark
        self._directory = directory
        self._max_tokens = max_tokens
        self._number = 0
        self._result: asyncio.Future[Recorded | RecordingFailed] | None = None  # while a recording is being ended

    @property
    def is_recording(self) -> bool:
        return self._number % 2 == 1

    def start(self) -> dict[str, Any]:
        """Start recording. Returns how many tokens it can come to.

        Raises:
            ApiError: the server was started without a directory for traces, or records already.
        """
        if self._directory is None:
            raise ApiError(409, "this server records nothing: start it with --record-dir DIR")
        if self.is_recording or self._result is not None:
            raise ApiError(409, "a recording is under way: stop it first")
        self._send_next()
        return {"max_tokens": self._max_tokens}

    async def stop(self) -> dict[str, Any]:
        """End the recording. Returns where its trace is, its length, and whether it had reached its limit.

        Raises:
            ApiError: there is no recording, nothing was recorded, or it could not be written.
        """
        if not self.is_recording:
            raise ApiError(409, "nothing is being recorded: start first")
        self._result = asyncio.get_running_loop().create_future()
        self._send_next()
        try:
            result = await asyncio.wait_for(self._result, TIMEOUT_S)
        except TimeoutError:
            raise ApiError(500, f"the ranks have not written the trace within {TIMEOUT_S:g} s") from None
        finally:
            self._result = None
        if isinstance(result, RecordingFailed):
            raise ApiError(409, result.reason)
        return asdict(result)

    def end(self, result: Recorded | RecordingFailed) -> None:
        """Take the result of a recording that has ended, from rank 0."""
        if self._result is not None and not self._result.done():
            self._result.set_result(result)

    def _send_next(self) -> None:
        self._number += 1
        self._mark(self._number)
