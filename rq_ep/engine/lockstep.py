"""Continuous batching in lockstep: what is changed of transformers' manager, all of it in this file.

`ContinuousBatchingManager._generation_loop_body` and `ModelRunner._sample` are private; pyproject.toml pins the range
of transformers they were tested with.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

from rq_ep.engine.latent_attention import cache_head_size, pad_cache
from rq_ep.engine.progress_tracker import Position
from rq_ep.engine.requests import Batch, Sampling
from rq_ep.engine.running import Running
from rq_ep.engine.sampling import next_tokens
from rq_ep.engine.scoring import PromptScorer, score_tokens
from rq_ep.parallel.ep_group import RankFailure

# Largest value of each flag over the ranks.
Agree = Callable[[Sequence[int]], list[int]]

GREEDY = Sampling()


def agreement(control: dist.ProcessGroup | None) -> Agree:
    """The largest flags of a gloo group, the same on every rank: what starts every step. None: one rank alone.

    Each rank sends its flags to all: one hop, where gloo's all-reduce goes round a ring twice. With four processes on
    two cores that is 1.2 ms instead of 4.8 ms.
    """
    if control is None:
        return list
    size = dist.get_world_size(control)

    def agree(flags: Sequence[int]) -> list[int]:
        flags_RF = torch.tensor(flags, dtype=torch.int64).repeat(size, 1)
        received_RF = torch.empty_like(flags_RF)
        try:
            dist.all_to_all_single(received_RF, flags_RF, group=control)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise PeerLost(f"no agreement on the next step, another rank may have ended: {reason}") from error
        largest: list[int] = received_RF.amax(dim=0).tolist()
        return largest

    return agree


class PeerLost(RankFailure):
    """The ranks could not agree on a step: one of them is not there."""


def is_consequence(error: BaseException) -> bool:
    """Whether an error only tells that another rank has failed: a collective that could not be finished."""
    return isinstance(error, PeerLost) or (isinstance(error, RankFailure) and isinstance(error.__cause__, RankFailure))


class LockstepManager(ContinuousBatchingManager):
    """A manager whose steps are those of the whole group.

    Before each step the ranks agree on who has work. Who has runs its batch; the others enter every MoE layer with zero
    rows; if nobody has, all sleep until they are woken, and meet once every `heartbeat_s` to see that all still live.

    Args:
        model: a causal language model with expert-parallel layers.
        generation_config: end tokens; sampling is each request's own.
        batching: sizes of batches and cache.
        agree: the group's agreement.
        empty_step: enters every MoE layer with zero rows.
        running: the requests of this rank that are still wanted, by id.
        scorer: the prompts of this rank that are to be scored.
        on_failure: told of an error that ends the loop; the others wait for this rank, so it must end the process.
        on_mark: told of a mark (`Engine.mark`), between two steps, the same two on every rank.
        position: told where the loop is.
        heartbeat_s: longest sleep of an idle group, in seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        generation_config: GenerationConfig,
        batching: ContinuousBatchingConfig,
        *,
        agree: Agree,
        empty_step: Callable[[], None],
        running: Mapping[str, Running],
        scorer: PromptScorer,
        on_failure: Callable[[BaseException], None],
        on_mark: Callable[[int], None],
        position: Position,
        heartbeat_s: float,
    ) -> None:
        super().__init__(model, generation_config, batching)
        self._agree = agree
        self._empty_step = empty_step
        self._running = running
        self._scorer = scorer
        self._on_failure = on_failure
        self._on_mark = on_mark
        self._position = position
        self._heartbeat_s = heartbeat_s
        self._num_announced = 0
        self._scores = False  # in the step under way, rather than running a batch
        self._has_batch = False
        self._mark = self._marked = 0
        self.num_steps = 0  # with tokens of this rank
        self.steps_s = 0.0

    def wake(self, num_announced: int) -> None:
        """Rouse the loop: the group has been given `num_announced` requests so far, one of them perhaps to this rank.

        A rank that knows of more requests than another must not sleep before the other knows of them too.
        """
        self._num_announced = max(self._num_announced, num_announced)
        self._wake_up_loop.set()

    def mark(self, number: int) -> None:
        """Have every rank told this number between the same two steps; numbers rise."""
        self._mark = number
        self._wake_up_loop.set()

    @property
    def batch(self) -> Batch:
        """What the step under way is made of on this rank; to be asked within it, on the loop's thread."""
        if self._scores:
            return Batch(self._scorer.under_way, True)
        futures = self.batch_processor.inputs_and_outputs.requests_in_batch if self._has_batch else []
        parts = [(future.state.request_id, future.query_length) for future in futures]
        return Batch(parts, any(not future.state.generated_tokens for future in futures))

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        self._wake_up_loop.set()  # `stop` has just asked for the end: an idle loop must not sleep over it
        super().join(stop_trigger_time, timeout)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        is_first = self.batch_processor is None
        config = self.model.config.get_text_config()
        with cache_head_size(config):
            processor = super()._create_batch_processor()
        if is_first:
            pad_cache(processor.cache, config)
            processor.model_runner._sample = Sampler(processor.inputs_and_outputs, self._running)
        return processor

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        assert not bootstrapping, "asynchronous batching would keep a step in flight"
        try:
            with torch.inference_mode():  # many small operations: a twelfth less CPU time than under `no_grad`
                return self._step(batch_processor)
        except BaseException as error:
            self._on_failure(error)
            raise

    def _step(self, processor: ContinuousBatchProcessor) -> bool:
        """One step of the group; False ends the loop on every rank."""
        self._wake_up_loop.clear()
        announced = self._num_announced
        # Scoring and batches take turns: neither waits for the other's last request.
        scores = self._scorer.has_work() and not (self._scores and processor.has_pending_requests())
        self._scores = scores
        self._has_batch = not scores and processor.prepare_next_batch()
        ready = scores or self._has_batch
        # `tp_status` lags behind by one call of prepare_next_batch
        status = self.background_thread_status.local_status
        flags = (
            ready,
            status == BackgroundThreadStatus.DONT_STOP,
            status >= BackgroundThreadStatus.HARD_STOP,
            processor.has_pending_requests() or self._scorer.has_work(),
            announced,
            -announced,
            self._mark,
        )
        self._position.begin_step()
        any_ready, any_running, any_hard_stop, any_pending, most, minus_least, mark = self._agree(flags)
        self._position.agreed()
        if any_hard_stop:
            return False
        if mark > self._marked:
            self._marked = mark
            self._on_mark(mark)
        start_s = time.perf_counter()
        if scores:
            self._score()
        elif ready:
            self._generation_step()
            self.current_batch += 1
            processor.update_batch()
        elif any_ready:
            self._empty_step()
        elif any_pending or most != -minus_least:
            self._wake_up_loop.wait(timeout=0.001)
        elif not any_running:
            return False
        else:
            self._wake_up_loop.wait(timeout=self._heartbeat_s)
        if ready:
            self.num_steps += 1
            self.steps_s += time.perf_counter() - start_s
        return True

    def _score(self) -> None:
        """Score a chunk of a prompt; if nobody wants one any more, the group still waits for this rank."""
        if not self._scorer.step(self._running.__contains__):
            self._empty_step()


class Sampler:
    """Stands in for `ModelRunner._sample`: each request has a temperature and a random stream of its own."""

    def __init__(self, ios: ContinuousBatchingIOs, running: Mapping[str, Running]) -> None:
        self._ios = ios
        self._running = running

    def __call__(self, scores_1NV: torch.Tensor, output_ids: torch.Tensor) -> None:
        states = [future.state for future in self._ios.requests_in_batch if future.has_new_token]
        scores_NV = scores_1NV[0, : len(states)]
        running = [self._running.get(state.request_id) for state in states]
        samplings = [GREEDY if found is None else found.request.sampling for found in running]
        tokens_N = next_tokens(scores_NV, samplings, [state.position_offset for state in states])
        output_ids[0, : len(states)].copy_(tokens_N)
        is_finite = scores_NV.amax(dim=-1).isfinite().tolist()  # not where any logit is NaN
        for row, found in enumerate(running):
            if found is None:
                continue
            found.is_broken |= not is_finite[row]
            if (num_top := found.request.num_logprobs) is not None:
                found.scores += score_tokens(scores_NV[row : row + 1], tokens_N[row : row + 1], num_top)


def batching_config(
    *, max_num_seqs: int, max_num_batched_tokens: int, kv_cache_tokens: int | None, seed: int
) -> ContinuousBatchingConfig:
    """Sizes of a rank's batches and cache; `kv_cache_tokens` None: what the GPU has left."""
    page_size = 32
    settings: dict[str, Any] = {} if kv_cache_tokens is None else {"num_blocks": -(-kv_cache_tokens // page_size)}
    return ContinuousBatchingConfig(
        page_size=page_size,
        max_batch_tokens=max_num_batched_tokens,
        max_requests_per_batch=min(max_num_seqs, max_num_batched_tokens),
        # A step must be over when the group agrees on the next one, and captured graphs cannot hold the exchange.
        use_async_batching=False,
        use_cuda_graph=False,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
        disable_nccl_graph_mixing=False,
        seed=seed,
        **settings,
    )
