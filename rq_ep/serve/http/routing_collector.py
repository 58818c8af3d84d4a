"""The experts of answers' tokens, gathered as they come, and written as vLLM does: a NumPy file in base64."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np

from rq_ep.engine.requests import RoutedExperts
from rq_ep.serve.http.openai.api_errors import ApiError

MAX_BYTES = 1 << 28  # of the unfinished answers together


class RoutingCollector:
    """Gathers the experts of all answers of a server, which holds a bounded number of bytes of them."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    @contextmanager
    def answer(self) -> Iterator["AnswerRouting"]:
        """Gather those of an answer, until the block ends."""
        routing = AnswerRouting(self)
        try:
            yield routing
        finally:
            self._num_bytes -= routing.num_bytes

    def hold(self, num_bytes: int) -> None:
        """Make room for more bytes.

        Raises:
            ApiError: there is none.
        """
        if self._num_bytes + num_bytes > self._max_bytes:
            text = (
                f"return_routed_experts: the experts of unfinished answers come to {self._max_bytes} bytes: try later"
            )
            raise ApiError(429, text, "return_routed_experts")
        self._num_bytes += num_bytes


class AnswerRouting:
    """The experts of one answer's tokens and of its prompt's."""

    def __init__(self, collector: RoutingCollector) -> None:
        self._collector = collector
        self._parts: list[bytes] = []
        self._form: RoutedExperts | None = None
        self.num_bytes = 0

    def add(self, routed: RoutedExperts) -> None:
        """Take those of the next tokens.

        Raises:
            ApiError: the server holds too many.
        """
        part = base64.b64decode(routed.data)
        self._collector.hold(len(part))
        self.num_bytes += len(part)
        self._parts.append(part)
        self._form = routed

    def encoded(self) -> str:
        """An array [tokens - 1, layers, experts of each] int32, as a NumPy file in base64. Takes time for many."""
        assert self._form is not None
        ids = np.frombuffer(b"".join(self._parts), self._form.dtype).reshape(-1, *self._form.shape[1:])
        file = BytesIO()
        np.save(file, ids.astype("<i4"))
        return base64.b64encode(file.getbuffer()).decode()
