"""The unfinished requests: which rank each is on, how many are taken, and the outputs that wait for their clients."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rq_ep.engine.requests import Output, Request
from rq_ep.serve.http.openai.api_errors import ApiError

MAX_UNREAD_OUTPUTS = 4096  # of a request; some megabytes
MAX_PROMPT_LOGPROBS = 1 << 23  # of the unfinished requests together; each takes some 70 bytes here until it is answered


@dataclass
class RoutedRequest:
    """A request between its arrival and its end."""

    request: Request
    rank: int
    outputs: asyncio.Queue[Output | ApiError] = field(default_factory=asyncio.Queue)

    async def next_output(self) -> Output:
        """Wait for an output; an `ApiError` ends the request."""
        output = await self.outputs.get()
        if isinstance(output, ApiError):
            raise output
        return output


class RoutedRequests:
    """All requests of a group that have not ended.

    Args:
        num_ranks: size of the group.
        max_queue_size: requests that may be unfinished at once.
        on_cancel: called with a request that its rank need not go on with.
    """

    def __init__(self, num_ranks: int, max_queue_size: int, on_cancel: Callable[[RoutedRequest], None]) -> None:
        self._num_ranks = num_ranks
        self._max_queue_size = max_queue_size
        self._on_cancel = on_cancel
        self._by_id: dict[str, RoutedRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RoutedRequest]:
        return iter(self._by_id.values())

    def __contains__(self, routed: RoutedRequest) -> bool:
        return routed.request.id in self._by_id

    def add(self, request: Request) -> RoutedRequest:
        """Choose the least loaded rank for a request.

        Raises:
            ApiError: there are too many requests, or they ask for too many log-probabilities.
        """
        if len(self) >= self._max_queue_size:
            raise ApiError(429, f"{len(self)} requests are waiting or running (--max-queue-size): try later")
        self._check_prompt_logprobs(request)
        loads_R = [0] * self._num_ranks
        for other in self:
            loads_R[other.rank] += other.request.num_tokens
        routed = self._by_id[request.id] = RoutedRequest(request, least_loaded(loads_R))
        return routed

    def _check_prompt_logprobs(self, request: Request) -> None:
        """Refuse a request that asks for more log-probabilities of prompts than this process should hold at once."""
        if not (wanted := request.num_prompt_logprobs):
            return
        how = f"{len(request.prompt_ids)} prompt tokens with logprobs {request.num_logprobs}"
        if wanted > MAX_PROMPT_LOGPROBS:
            text = f"{how} are {wanted} log-probabilities, at most {MAX_PROMPT_LOGPROBS} can be had: score it in parts"
            raise ApiError(400, text, "logprobs")
        held = sum(routed.request.num_prompt_logprobs for routed in self)
        if held + wanted > MAX_PROMPT_LOGPROBS:
            raise ApiError(429, f"{how}: other requests score {held} of {MAX_PROMPT_LOGPROBS} at once: try later")

    def deliver(self, output: Output) -> None:
        """Hand over an output to the request's client."""
        routed = self._by_id.get(output.request_id)
        if routed is None:  # cancelled meanwhile
            return
        if routed.outputs.qsize() >= MAX_UNREAD_OUTPUTS:
            text = f"the client has left {MAX_UNREAD_OUTPUTS} parts of the answer unread: the request was cancelled"
            self._fail(routed, ApiError(408, text))
        elif output.finish_reason == "error":  # the rank may go on with it: if its output was too long
            self._fail(routed, ApiError(500, f"rank {routed.rank}: {output.error}"))
        else:
            if output.finish_reason is not None:
                del self._by_id[output.request_id]
            routed.outputs.put_nowait(output)

    def _fail(self, routed: RoutedRequest, error: ApiError) -> None:
        self.cancel(routed)
        routed.outputs.put_nowait(error)

    def cancel(self, routed: RoutedRequest) -> None:
        """End a request that nobody waits for, unless it has ended."""
        if self._by_id.pop(routed.request.id, None) is not None:
            self._on_cancel(routed)

    def end_all(self, error: ApiError) -> None:
        """End every request with an error; the ranks are told in another way."""
        for routed in self:
            routed.outputs.put_nowait(error)
        self._by_id.clear()


def least_loaded(loads_R: Sequence[int]) -> int:
    """The rank whose unfinished requests may come to the fewest tokens; the lowest number among equals.

    Args:
        loads_R: [R] tokens (prompt and allowed answer) of the unfinished requests of each rank.
    """
    return min(range(len(loads_R)), key=lambda rank: loads_R[rank])
