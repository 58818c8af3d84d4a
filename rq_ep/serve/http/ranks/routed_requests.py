"""The unfinished requests: which rank each is on, how many are taken, and the outputs that wait for their clients.

A request whose rank is lost goes on on another one, which gets its prompt and the tokens that have come: positions are
absolute, so that a seed gives the same tokens again. The client notices a pause.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from rq_ep.engine.requests import Output, Request
from rq_ep.serve.http.openai.api_errors import ApiError

MAX_UNREAD_OUTPUTS = 4096  # of a request; some megabytes
MAX_PROMPT_LOGPROBS = 1 << 23  # of the unfinished requests together; each takes some 70 bytes here until it is answered
MIN_PROGRESS = 8  # tokens: whatever ended a rank after so many, it is not what has ended an earlier one


@dataclass
class RoutedRequest:
    """A request between its arrival and its end.

    Args:
        request: as its client asked for it.
        rank: the rank that it is on.
    """

    request: Request
    rank: int
    outputs: asyncio.Queue[Output | ApiError] = field(default_factory=asyncio.Queue)
    token_ids: list[int] = field(default_factory=list)  # of the answer, that have come
    num_prompt_scores: int = 0  # that have come
    has_prompt_scores: bool = False  # whether some have come: those of a prompt of one token are none
    num_resumptions: int = 0
    lost_ranks: list[int] = field(default_factory=list)  # on which it was while they served
    num_given: int = 0  # tokens, or parts of what is told of its prompt, that its rank has given
    num_repeated: int = 0  # scores of the prompt that this rank gives once more
    num_routed: int = 0  # tokens whose experts have come
    resumed_s: float = 0.0  # by `time.monotonic`

    @property
    def id(self) -> str:
        """The id that its rank knows it by."""
        return f"{self.request.id}-{self.num_resumptions}" if self.num_resumptions else self.request.id

    @property
    def rest(self) -> Request:
        """What its rank is to do: the request, or what is left of it."""
        request, answered = self.request, self.token_ids
        if not self.num_resumptions:
            return request
        is_scored = self.has_prompt_scores and self.num_prompt_scores >= len(request.prompt_ids) - 1
        return replace(
            request,
            id=self.id,
            prompt_ids=[*request.prompt_ids, *answered],
            max_tokens=request.max_tokens - len(answered),
            scores_prompt=request.scores_prompt and not (is_scored and request.max_tokens > 0),
            num_answered=len(answered),
            routed_from=None if request.routed_from is None else request.routed_from + self.num_routed,
        )

    async def next_output(self) -> Output:
        """Wait for an output; an `ApiError` ends the request."""
        output = await self.outputs.get()
        if isinstance(output, ApiError):
            raise output
        return output

    def take(self, output: Output) -> Output | None:
        """Note an output of its rank. Returns what of it is new to the client; None: nothing."""
        self.token_ids += output.token_ids
        self.num_given += max(len(output.token_ids), output.prompt_scores is not None or output.routed is not None)
        self.num_routed += 0 if output.routed is None else output.routed.shape[0]
        if output.prompt_scores is None:
            return output
        num_skipped = min(self.num_repeated, len(output.prompt_scores))
        new = output.prompt_scores[num_skipped:]
        is_repeated = self.has_prompt_scores and not new and output.finish_reason is None
        self.num_repeated -= num_skipped
        self.num_prompt_scores += len(new)
        self.has_prompt_scores = True
        return None if is_repeated else replace(output, prompt_scores=new)

    def move(self, rank: int) -> None:
        """Go on on another rank."""
        self.rank = rank
        self.num_resumptions += 1
        self.num_given, self.num_repeated = 0, self.num_prompt_scores
        self.resumed_s = time.monotonic()


class RoutedRequests:
    """All requests of a group that have not ended.

    Args:
        max_queue_size: requests that may be unfinished at once.
        on_cancel: called with a request that its rank need not go on with.
        on_resumed: called with a request at its first output on another rank.
    """

    def __init__(
        self,
        max_queue_size: int,
        on_cancel: Callable[[RoutedRequest], None],
        on_resumed: Callable[[RoutedRequest], None],
    ) -> None:
        self._max_queue_size = max_queue_size
        self._on_cancel = on_cancel
        self._on_resumed = on_resumed
        self._by_id: dict[str, RoutedRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RoutedRequest]:
        return iter(self._by_id.values())

    def __contains__(self, routed: RoutedRequest) -> bool:
        return routed.id in self._by_id

    def on_rank(self, rank: int) -> list[RoutedRequest]:
        """The requests that are on a rank."""
        return [routed for routed in self if routed.rank == rank]

    def add(self, request: Request, ranks: Collection[int], beside: str | None = None) -> RoutedRequest:
        """Choose the least loaded of some ranks for a request, or that of an unfinished one.

        Args:
            request: the new one.
            ranks: to choose from.
            beside: the unfinished one.

        Raises:
            ApiError: there are too many requests, or they ask for too many log-probabilities.
        """
        if len(self) >= self._max_queue_size:
            raise ApiError(429, f"{len(self)} requests are waiting or running (--max-queue-size): try later")
        self._check_prompt_logprobs(request)
        other = None if beside is None else self._by_id.get(beside)
        rank = self._least_loaded(ranks) if other is None or other.rank not in ranks else other.rank
        routed = self._by_id[request.id] = RoutedRequest(request, rank)
        return routed

    def move(self, routed: RoutedRequest, ranks: Collection[int]) -> None:
        """Have a request go on on the least loaded of some ranks. What its old one still sends of it is ignored."""
        del self._by_id[routed.id]
        routed.move(self._least_loaded(ranks))
        self._by_id[routed.id] = routed

    def is_poison(self, routed: RoutedRequest, was_serving: bool) -> bool:
        """Note that the rank of a request is lost. Whether the request may be the cause, as it was of another loss.

        That is so where it was on two ranks that were lost, and had not come far on the second.
        """
        if was_serving:
            routed.lost_ranks.append(routed.rank)
        return was_serving and len(routed.lost_ranks) > 1 and routed.num_given < MIN_PROGRESS

    def _least_loaded(self, ranks: Collection[int]) -> int:
        loads = dict.fromkeys(ranks, 0)
        for other in self:
            if other.rank in loads:
                loads[other.rank] += other.request.num_tokens
        return least_loaded(loads)

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
        if routed is None:  # cancelled meanwhile, or it has gone to another rank
            return
        if routed.outputs.qsize() >= MAX_UNREAD_OUTPUTS:
            text = f"the client has left {MAX_UNREAD_OUTPUTS} parts of the answer unread: the request was cancelled"
            self.fail(routed, ApiError(408, text))
        elif output.finish_reason == "error":  # the rank may go on with it: if its output was too long
            self.fail(routed, ApiError(500, f"rank {routed.rank}: {output.error}"))
        else:
            if routed.num_resumptions and not routed.num_given:
                self._on_resumed(routed)
            if output.finish_reason is not None:
                del self._by_id[output.request_id]
            if (new := routed.take(output)) is not None:
                routed.outputs.put_nowait(new)

    def fail(self, routed: RoutedRequest, error: ApiError) -> None:
        """End a request with an error."""
        self.cancel(routed)
        routed.outputs.put_nowait(error)

    def cancel(self, routed: RoutedRequest) -> None:
        """End a request that nobody waits for, unless it has ended."""
        if self._by_id.pop(routed.id, None) is not None:
            self._on_cancel(routed)

    def end_all(self, error: ApiError) -> None:
        """End every request with an error; the ranks are told in another way."""
        for routed in self:
            routed.outputs.put_nowait(error)
        self._by_id.clear()


def least_loaded(loads: Mapping[int, int]) -> int:
    """The rank whose unfinished requests may come to the fewest tokens; the lowest number among equals.

    Args:
        loads: by rank, the tokens (prompt and allowed answer) of its unfinished requests.
    """
    return min(sorted(loads), key=lambda rank: loads[rank])
