"""The experts of requests' tokens, by logical id, for those who replay them in training; nobody else pays for it.

Rows are kept by position: a step that is made again, or on another rank, changes nothing of what was given away. A
prompt takes cached pages of the KV cache only as far as the experts of their tokens are at hand, which are kept by page
for the requests that asked for them.

Axes: T tokens, L MoE layers, K experts of each.
"""

import base64
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash

from rq_ep.engine.kv_cache import PAGE_SIZE
from rq_ep.engine.requests import Batch, RoutedExperts
from rq_ep.moe import StepRouting

if TYPE_CHECKING:
    from rq_ep.engine.output_processor import RequestState

PART_BYTES = 4 << 20  # in one output
CACHED_BYTES = 1 << 28  # of experts by page
UNEVEN = "the experts of a request's tokens are not known: the MoE layers do not all get each of them"

Rows = npt.NDArray[np.uint8 | np.int16]


class SequenceRouting:
    """The experts of one request's tokens, as far as they are known, and as far as they were given away.

    Args:
        num_tokens: that it may come to.
        num_given: of its tokens whose experts are not asked for, the first ones.
        every: tokens whose experts are given away together.
    """

    def __init__(self, num_tokens: int, num_given: int, every: int = 1) -> None:
        self._num_tokens = num_tokens
        self._num_given = num_given
        self._every = every
        self._ids_TLK: Rows | None = None
        self.num_known = 0
        self._num_pages = 0  # that were whole,
        self._page_hash: int | None = None  # and the hash of the last one and all before

    def add(self, start: int, ids_TLK: Rows) -> None:
        """Take the experts of tokens from a position on; those that are known stay."""
        assert start <= self.num_known, (start, self.num_known)
        new = ids_TLK[self.num_known - start :]
        if self._ids_TLK is None:
            self._ids_TLK = np.empty((self._num_tokens, *ids_TLK.shape[1:]), ids_TLK.dtype)
        self._ids_TLK[self.num_known : self.num_known + len(new)] = new
        self.num_known += len(new)

    def new_pages(self, token_ids: Callable[[], Sequence[int]]) -> Iterator[tuple[int, Rows]]:
        """Hash and experts of each page that has become whole.

        Args:
            token_ids: returns those of the sequence.
        """
        num_pages = self.num_known // PAGE_SIZE
        if num_pages == self._num_pages:
            return
        assert self._ids_TLK is not None
        all_ids = token_ids()
        while self._num_pages < num_pages:
            page = slice(self._num_pages * PAGE_SIZE, (self._num_pages + 1) * PAGE_SIZE)
            self._page_hash = compute_block_hash(self._page_hash, list(all_ids[page]))
            self._num_pages += 1
            yield self._page_hash, self._ids_TLK[page]

    def take(self, is_last: bool = False) -> list[RoutedExperts]:
        """What is known and not yet given away, in parts: nothing, where that is of few tokens and more will come."""
        if self._ids_TLK is None or (self.num_known - self._num_given < self._every and not is_last):
            return []
        ids_TLK = self._ids_TLK[self._num_given : self.num_known]
        self._num_given = max(self._num_given, self.num_known)
        size = max(PART_BYTES // max(ids_TLK[:1].nbytes, 1), 1)
        return [_as_message(ids_TLK[at : at + size]) for at in range(0, len(ids_TLK), size)]


def _as_message(ids_TLK: Rows) -> RoutedExperts:
    return RoutedExperts(list(ids_TLK.shape), ids_TLK.dtype.str, base64.b64encode(ids_TLK.tobytes()).decode())


class RoutedExpertsCapturer:
    """Captures the experts of the requests that ask for them.

    Args:
        layers: expert-parallel layers, in the order in which a forward pass enters them.
        num_experts: of a layer.
        requests: the requests of this rank that are still wanted, by id.
    """

    def __init__(self, layers: Sequence[nn.Module], num_experts: int, requests: "Mapping[str, RequestState]") -> None:
        self._steps = StepRouting(layers, self._keep)
        self._dtype = torch.uint8 if num_experts <= 1 << 8 else torch.int16
        self._requests = requests
        self._is_asked = False  # by any request
        self._batch: Batch | None = None  # of the step that is captured
        self._captured: list[Tensor] | None = None  # the experts of its tokens, by layer
        # By the hash of their tokens and of all before; the one whose last use is longest ago comes first.
        self._pages: OrderedDict[int, Rows] = OrderedDict()
        self._pages_bytes = 0

    def ask(self) -> None:
        """Announce that one of the requests asks for its experts; any thread may."""
        self._is_asked = True

    def step(self, contents: Callable[[], Batch]) -> AbstractContextManager[None]:
        """Inside it, capture the step of a batch, if one of its requests asks for it.

        Args:
            contents: returns the batch.
        """
        if not self._is_asked:
            return nullcontext()
        batch = contents()
        if any(self._routing(request_id) is not None for request_id, _ in batch.parts):
            return self._capturing(batch)
        self._is_asked = False
        # Looked at afterwards, as another thread adds a request before it announces that.
        self._is_asked = any(state.routing is not None for state in list(self._requests.values()))
        if not self._is_asked:
            self._steps.__exit__(None, None, None)
        return nullcontext()

    @contextmanager
    def _capturing(self, batch: Batch) -> Iterator[None]:
        if not self._steps.is_watching:  # from then on until nobody asks any more: hooks cost more to set than to have
            self._steps.__enter__()
        try:
            self._batch = batch
            yield
            self.collect()
        finally:  # what is left is of a step that was cut off
            self._batch = self._captured = None

    def _keep(self, ids_L: list[Tensor], _: list[Tensor]) -> None:
        if self._batch is not None:  # else nobody asks in this step
            self._captured = ids_L

    def collect(self) -> None:
        """Give requests the experts that were captured; the step is over on a GPU."""
        if self._batch is None or self._captured is None:
            return
        ids_L, self._captured = self._captured, None
        sizes = [size for _, size in self._batch.parts]
        is_even = all(ids_TK.shape == (sum(sizes), ids_L[0].shape[1]) for ids_TK in ids_L)
        ids_TLK: Any = torch.stack(ids_L, 1).to(self._dtype).cpu().numpy() if is_even else None
        end = 0
        for (request_id, size), start in zip(self._batch.parts, self._batch.starts, strict=True):
            end += size
            state = self._requests.get(request_id)
            if state is None or state.routing is None:
                continue
            if not is_even:
                state.problem = UNEVEN
                continue
            state.routing.add(start, ids_TLK[end - size : end])
            for page_hash, rows in state.routing.new_pages(state.token_ids):
                self._cache(page_hash, rows)

    def _routing(self, request_id: str) -> SequenceRouting | None:
        state = self._requests.get(request_id)
        return None if state is None else state.routing

    # Pages of the KV cache

    def match_prefix(self, search: Callable[[str, list[int]], int]) -> Callable[[str, list[int]], int]:
        """Bound the search for a prompt's cached pages by what is known of them.

        Args:
            search: takes the id of a request and its tokens; returns how many of them it has found, whole pages.
        """

        def search_known(request_id: str, token_ids: list[int]) -> int:
            routing = self._routing(request_id)
            if routing is None:
                return search(request_id, token_ids)
            pages = self._cached(token_ids)
            num_found = search(request_id, token_ids[: len(pages) * PAGE_SIZE + 1])
            for number, rows in enumerate(pages[: num_found // PAGE_SIZE]):
                routing.add(number * PAGE_SIZE, rows)
            return num_found

        return search_known

    def _cached(self, token_ids: Sequence[int]) -> list[Rows]:
        """The experts of the first pages of a sequence, as far as they are kept."""
        pages: list[Rows] = []
        parent: int | None = None
        for start in range(0, len(token_ids) - PAGE_SIZE + 1, PAGE_SIZE):
            parent = compute_block_hash(parent, list(token_ids[start : start + PAGE_SIZE]))
            if (rows := self._pages.get(parent)) is None:
                break
            self._pages.move_to_end(parent)
            pages.append(rows)
        return pages

    def _cache(self, page_hash: int, rows: Rows) -> None:
        if page_hash in self._pages:
            return
        self._pages[page_hash] = rows.copy()
        self._pages_bytes += rows.nbytes
        while self._pages_bytes > CACHED_BYTES:
            self._pages_bytes -= self._pages.popitem(last=False)[1].nbytes
