"""Continuous batching in lockstep: what is changed of transformers' manager, all of it in this file.

`ContinuousBatchingManager._generation_loop_body` and `ModelRunner._sample` are private; pyproject.toml pins the range
of transformers they were tested with.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache_allocators import SLIDING_ATTENTION
from transformers.generation.continuous_batching.cache_allocators.sliding_attention import (
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestStatus
from transformers.generation.continuous_batching.requests import RequestState as RequestRecord

from rq_ep.core.errors import UserError
from rq_ep.engine.empty_step import WARMUP_TOKENS
from rq_ep.engine.kv_cache import PAGE_SIZE, cache_config, pad_cache
from rq_ep.engine.nonfinite import NOT_FINITE, NonFiniteTokens
from rq_ep.engine.output_processor import RequestState, choose_tokens
from rq_ep.engine.requests import Batch, Request
from rq_ep.engine.rotary import SequenceRotary
from rq_ep.engine.routed_experts import RoutedExpertsCapturer
from rq_ep.engine.step_loop import Batches
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.agreement import run_on_all_ranks


class LockstepManager(ContinuousBatchingManager):
    """A manager whose loop makes the steps of the whole group (`StepLoop`).

    Args:
        model: a causal language model with expert-parallel layers.
        generation_config: end tokens; sampling is each request's own.
        batching: sizes of batches and cache.
        step: makes one step of the group with the batches of this manager; False ends the loop, on every rank.
        wake_up: ends the sleep of an idle loop; a request that is added sets it too.
        outputs: gets what each step has made.
        rotary: the rotary embeddings of the model.
        requests: the requests of this rank that are still wanted, by id.
        routed_experts: captures the experts of the requests that ask for them.
        on_failure: called with an error that ends the loop; the others wait for this rank, so it must end the process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig,
        batching: ContinuousBatchingConfig,
        *,
        step: Callable[[Batches], bool],
        wake_up: threading.Event,
        outputs: OutputRouter,
        rotary: SequenceRotary,
        requests: Mapping[str, RequestState],
        routed_experts: RoutedExpertsCapturer,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        super().__init__(model, generation_config, batching)  # type: ignore[arg-type]
        self.output_router = outputs
        self._wake_up_loop = wake_up
        self._step = step
        self._rotary = rotary
        self._requests = requests
        self._routed_experts = routed_experts
        self._on_failure = on_failure
        self._has_failed = False
        self._nonfinite = NonFiniteTokens()
        self._is_running = False  # whether a forward pass is under way
        self._keeps_batch = False  # whether the batch that was prepared last is to be run again

    def begin(self, group: TorchGroup) -> None:
        """Make the cache, and run a prompt and a token after it, whose output nobody wants; every rank calls this.

        Raises:
            UserError: the cache does not fit a rank's memory.
        """
        run_on_all_ranks(group, self._make_cache)
        self.warmup()
        self.add_request([0] * WARMUP_TOKENS, request_id="warm-up", max_new_tokens=2, eos_token_id=-1)
        self.current_batch = 0
        with torch.inference_mode():
            while self.prepare():
                self.run()
        self.processor.cache.reset()

    def _make_cache(self) -> None:
        try:
            self.batch_processor = self._create_batch_processor()
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"the KV cache does not fit ({reason}): lower --kv-cache-tokens") from None

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        self._wake_up_loop.set()  # `stop` has just asked for the end: an idle loop must not sleep over it
        super().join(stop_trigger_time, timeout)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        is_first = self.batch_processor is None
        config = self.model.config
        self.model.config = cache_config(config)
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model.config = config
        if is_first:
            cache = processor.cache
            pad_cache(cache, config)
            search = self._routed_experts.match_prefix(cache.search_prefix_match)
            cache.search_prefix_match = search  # type: ignore[method-assign,assignment]
            ios = processor.inputs_and_outputs
            assert isinstance(ios, ContinuousBatchingIOs)
            self._nonfinite.watch(processor.cache)
            sampler = Sampler(ios, self._requests, self._nonfinite)
            processor.model_runner._sample = sampler  # type: ignore[method-assign,assignment]
        return processor

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        assert not bootstrapping, "asynchronous batching would keep a step in flight"
        try:
            with torch.inference_mode():  # steps are many small operations: it takes a twelfth less CPU than `no_grad`
                return self._step(self)
        except BaseException as error:
            self._has_failed = True
            self._on_failure(error)
            raise

    def _handle_critical_error(self, error: Exception, batch_processor: ContinuousBatchProcessor | None) -> None:
        """transformers' thread ends by an error, perhaps before its first step."""
        if not self._has_failed:
            self._on_failure(error)
        super()._handle_critical_error(error, batch_processor)

    @property
    def processor(self) -> ContinuousBatchProcessor:
        """The scheduler and cache, which are there from `begin` on."""
        assert self.batch_processor is not None
        return self.batch_processor

    def submit(self, request: Request) -> None:
        """Take a request; any thread may."""
        state = self._requests.get(request.id)  # None: it was cancelled meanwhile
        end_token_ids = () if state is None else state.end_token_ids
        self.add_request(
            request.prompt_ids,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=sorted(end_token_ids) or -1,
        )

    # What the engine shows

    @property
    def max_request_tokens(self) -> int:
        """The longest request that an empty cache can hold; to be asked for after `begin`."""
        return int(infer_max_single_request_tokens(self.processor.cache))

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        processor = self.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that requests hold."""
        pool = self.processor.cache.pool
        # A sector stays with the layers that it was given to, even when all its blocks are free again.
        begun = sum(pool.count_free_blocks(at) / size for at, size in enumerate(pool.blocks_per_sector))
        return float(1 - (pool.num_free_sectors + begun) / pool.num_sectors)

    # The batches of a `StepLoop`

    @property
    def keeps_running(self) -> bool:
        # `tp_status` lags behind by one call of prepare_next_batch.
        return bool(self.background_thread_status.local_status == BackgroundThreadStatus.DONT_STOP)

    @property
    def stops_now(self) -> bool:
        return bool(self.background_thread_status.local_status >= BackgroundThreadStatus.HARD_STOP)

    def has_requests(self) -> bool:
        return bool(self.processor.has_pending_requests())

    def prepare(self) -> bool:
        if self._keeps_batch:
            self._keeps_batch = False
            return True
        if self._rotary.recompute_after is not None:
            self._restart_outgrown(self._rotary.recompute_after)
        scheduler = self.processor.scheduler
        if not scheduler.active_requests:
            # It blocks new requests until an active one finishes. If the last of these was cancelled, none ever does.
            scheduler.block_new_requests = False
        return bool(self.processor.prepare_next_batch())

    def _restart_outgrown(self, num_tokens: int) -> None:
        """Have the cache of sequences that come to more than `num_tokens` computed anew, next and before all others."""
        scheduler = self.processor.scheduler
        for state in list(scheduler.active_requests.values()):
            if state.status == RequestStatus.DECODING and state.position_offset == num_tokens:
                self._compute_anew(state)

    def _compute_anew(self, state: RequestRecord) -> None:
        scheduler = self.processor.scheduler
        scheduler.finish_request(state.request_id)
        scheduler.add_waiting_request(state.create_equivalent_initial_request())
        scheduler.waiting_requests_order.rotate(1)

    def restart(self) -> None:
        """Keep the batch: writing the same keys and values to the same places of the cache again changes nothing.

        Where a step overwrites what it has to read, its requests are computed anew instead.
        """
        self._nonfinite.take()
        batch = self._ios.requests_in_batch
        self._keeps_batch = not (self._is_running and any(map(self._overwrites, batch)))
        self._is_running = False
        if not self._keeps_batch:
            for future in reversed(batch):
                self._compute_anew(future.state)

    def _overwrites(self, future: FutureRequestState) -> bool:
        """Whether some tokens of a request in a step take the places of others that the first of them still sees."""
        allocator = self.processor.cache.cache_allocators.get(SLIDING_ATTENTION)
        if allocator is None:
            return False
        assert isinstance(allocator, SlidingAttentionCacheAllocator)
        end = future.state.position_offset
        return 1 < future.query_length < end and end > allocator.sliding_window

    def run(self) -> None:
        self._is_running = True
        if self._rotary.follows_length:
            with self._rotary.lengths(self._rotary.batch_lengths(self._ios.requests_in_batch)):
                self._generation_step()
        else:
            self._generation_step()
        self._is_running = False
        self.current_batch += 1
        self.processor.update_batch()

    def contents(self) -> Batch:
        return batch_of(self._ios.requests_in_batch)

    def has_prompts(self) -> bool:
        return has_prompts(self._ios.requests_in_batch)

    @property
    def _ios(self) -> ContinuousBatchingIOs:
        ios = self.processor.inputs_and_outputs
        assert isinstance(ios, ContinuousBatchingIOs)
        return ios


def batch_of(futures: Sequence[Any]) -> Batch:
    """The requests of a batch, from transformers' records of it."""
    parts = [(future.state.request_id, future.query_length) for future in futures]
    # The offsets are those after the step.
    starts = [future.state.position_offset - future.query_length for future in futures]
    return Batch(parts, has_prompts(futures), starts=starts)


def has_prompts(futures: Sequence[Any]) -> bool:
    """Whether any request of a batch has tokens of its prompt in it."""
    return any(not future.state.generated_tokens for future in futures)


class Sampler:
    """Stands in for `ModelRunner._sample`: each request has a temperature and a random stream of its own."""

    def __init__(
        self, ios: ContinuousBatchingIOs, requests: Mapping[str, RequestState], nonfinite: NonFiniteTokens
    ) -> None:
        self._ios = ios
        self._requests = requests
        self._nonfinite = nonfinite

    def __call__(self, scores_1NV: torch.Tensor, output_ids: torch.Tensor) -> None:
        rows = [future.state for future in self._ios.requests_in_batch if future.has_new_token]
        scores_NV = scores_1NV[0, : len(rows)]
        states = [self._requests.get(row.request_id) for row in rows]
        tokens_N = choose_tokens(scores_NV, states, [row.position_offset for row in rows])
        output_ids[0, : len(rows)].copy_(tokens_N)
        self._break_nonfinite()

    def _break_nonfinite(self) -> None:
        """Mark the requests that have tokens in this step whose keys or values are not finite."""
        is_finite_T = self._nonfinite.take()
        if is_finite_T is None:
            return
        parts = batch_of(self._ios.requests_in_batch).parts
        for (request_id, _), is_finite_t in zip(parts, is_finite_T.split([size for _, size in parts]), strict=True):
            if (state := self._requests.get(request_id)) is not None:
                state.problem = state.problem if is_finite_t.all() else NOT_FINITE


def batching_config(
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_tokens: int | None,
    shares_prefixes: bool,
) -> ContinuousBatchingConfig:
    """Settings of a rank's batches and cache.

    Args:
        max_num_seqs: requests in a batch.
        max_num_batched_tokens: tokens in a batch.
        kv_cache_tokens: room of the cache; None: what the GPU has left.
        shares_prefixes: whether a prompt takes whole pages that an earlier one with the same beginning has filled.
    """
    settings: dict[str, Any] = {} if kv_cache_tokens is None else {"num_blocks": -(-kv_cache_tokens // PAGE_SIZE)}
    return ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        max_batch_tokens=max_num_batched_tokens,
        max_requests_per_batch=min(max_num_seqs, max_num_batched_tokens),
        # A step must be over when the group agrees on the next one, and captured graphs cannot hold the exchange.
        use_async_batching=False,
        use_cuda_graph=False,
        allow_block_sharing=shares_prefixes,
        auto_switch_to_flash=False,
        disable_nccl_graph_mixing=False,
        seed=0,  # of nothing that an answer shows: each request has a random stream of its own
        **settings,
    )
