"""Bodies of requests, from bytes to a checked schema. Long ones are read on a thread: the event loop never waits."""

import asyncio
import gc
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.body import Body

T = TypeVar("T")
AnyBody = TypeVar("AnyBody", bound=Body)

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody is there to read it
SHORT_BYTES = 16 << 10  # read within a millisecond
MAX_WAITING_BODIES = 64  # of the largest size, being received or read


class BodyReader:
    """Receives and reads the bodies of requests.

    Args:
        max_bytes: longest body.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_held_bytes = 0
        # One thread: a parser holds the interpreter for its whole call, and the event loop waits for one at most.
        self._thread = ThreadPoolExecutor(1, "rq_ep body")

    async def read(self, http: Request, kind: type[AnyBody]) -> AnyBody:
        """The body of a request.

        Raises:
            ApiError: it is too long, not JSON, not what `kind` says, or its client has left.
        """
        self._check_headers(http)
        parts: list[bytes] = []
        num_bytes = 0
        try:
            async for part in http.stream():
                num_bytes += len(part)
                self._num_held_bytes += len(part)
                if num_bytes > self._max_bytes:
                    raise self._too_long()
                if self._num_held_bytes > MAX_WAITING_BODIES * self._max_bytes:
                    raise ApiError(503, "too many long bodies arrive at once: try later")
                parts.append(part)
            raw = b"".join(parts)
            if num_bytes <= SHORT_BYTES:
                return parse_body(raw, kind)
            reading = asyncio.get_running_loop().run_in_executor(self._thread, self._parse_long, raw, kind)
            return await unless_disconnected(http, reading)
        except ClientDisconnect:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection") from None
        finally:
            self._num_held_bytes -= num_bytes

    def _parse_long(self, raw: bytes, kind: type[AnyBody]) -> AnyBody:
        # A million small lists would set off collections that walk the whole heap, one after another, in the same call.
        gc.disable()
        try:
            return parse_body(raw, kind)
        finally:
            gc.enable()

    def _check_headers(self, http: Request) -> None:
        length = http.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_long()
        if (encoding := http.headers.get("content-encoding", "identity")) != "identity":
            raise ApiError(415, f"Content-Encoding {encoding!r:.60} is not supported: send the body as it is")
        media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json" and not (media_type.startswith("application/") and "+json" in media_type):
            raise ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max_bytes} bytes (--max-body-bytes)")


def parse_body(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """Parse and check a body.

    Raises:
        ApiError: the first thing that is wrong with it.
    """
    try:
        document = from_json(raw, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _describe(error, document) from None


def _describe(error: ValidationError, document: dict[str, Any]) -> ApiError:
    """The first error of a body, in one sentence.

    A value that may have several types is compared with each: the errors of the types that it does not have come last,
    and of the others that one first which lies deepest in it, where it is most like a type.
    """
    errors = error.errors(include_url=False, include_input=False)
    for item in errors:
        if item["type"] == "extra_forbidden":
            item["loc"] = (*item["loc"], item["ctx"]["key"])
    first = min(errors, key=lambda item: (item["type"].endswith("_type"), -len(item["loc"])))
    loc = first["loc"]
    param = str(loc[0])
    place = ".".join(f"{key!s:.60}" for key in _keys(loc, document)) or param
    if first["type"] == "extra_forbidden":
        near = first["ctx"]["near"]
        hint = "" if near is None else f": did you mean {near!r}?"
        return ApiError(400, f"unknown parameter {place!r}{hint}", param)
    if first["type"] == "missing":
        return ApiError(400, f"{place} is required", param)
    return ApiError(400, f"{place}: {first['msg'].removeprefix('Value error, ')}", param)


def _keys(loc: Sequence[str | int], document: Any) -> Iterator[str | int]:
    """The keys and places in lists on the way into a document, of which the last may be missing there.

    Between them, pydantic names the types that it has tried.
    """
    value = document
    for number, part in enumerate(loc, 1):
        try:
            value = value[part]
        except (LookupError, TypeError):
            if number < len(loc) or not isinstance(value, dict) or "[" in str(part):
                continue
        yield part


async def unless_disconnected(http: Request, work: Awaitable[T]) -> T:
    """Do the work unless the client hangs up first; then it is cancelled, and with it the request on its rank."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection")
    finally:
        disconnected.cancel()
        task.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
