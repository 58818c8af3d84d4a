"""One rank's engine: requests in, tokens out, in step with the other ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from rq_ep.engine.idle import empty_step
from rq_ep.engine.lockstep import LockstepManager, agreement, batching_config
from rq_ep.engine.request import Output, Request, Sampling

CPU_KV_CACHE_TOKENS = 16384


@dataclass(frozen=True)
class Limits:
    """Sizes of a rank's batches and KV cache; no cache size means what a GPU has left, or a modest one on CPU."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    kv_cache_tokens: int | None = None


class Engine:
    """Continuous batching over a model whose experts are expert-parallel. Every rank of the group makes one.

    Args:
        model: a causal language model, its attention chosen (`families.set_attention`).
        layers: its expert-parallel layers, in the order in which a forward pass enters them.
        control: the group's gloo process group, used by nobody else while the engine runs; None: one rank alone.
        limits: sizes of this rank's batches and cache.
        on_outputs: called after each step with the news of this rank's requests, on the engine's thread.
        on_failure: called with an error that ends the engine, on the engine's thread. The other ranks wait for this
            one: it must end the process.
        heartbeat_s: how often an idle group meets, in seconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        control: dist.ProcessGroup | None,
        limits: Limits,
        *,
        on_outputs: Callable[[list[Output]], None],
        on_failure: Callable[[BaseException], None],
        heartbeat_s: float = 1.0,
    ) -> None:
        self.eos_token_ids = _eos_token_ids(model)
        self._samplings: dict[str, Sampling] = {}
        self._manager = LockstepManager(
            model,
            GenerationConfig(do_sample=False, eos_token_id=self.eos_token_ids or -1),
            batching_config(
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                kv_cache_tokens=limits.kv_cache_tokens or (CPU_KV_CACHE_TOKENS if model.device.type == "cpu" else None),
                seed=0,
            ),
            agree=agreement(control),
            empty_step=empty_step(model, layers),
            samplings=self._samplings,
            on_failure=on_failure,
            heartbeat_s=heartbeat_s,
        )
        self._news = _News(on_outputs, self._samplings, frozenset(self.eos_token_ids))
        self._manager.output_router = self._news
        self._manager.warmup()  # makes the cache, so that it is known to fit before the first request
        self.max_request_tokens = infer_max_single_request_tokens(self._manager.batch_processor.cache)

    def start(self) -> None:
        """Start the engine's thread."""
        self._manager.start()

    def submit(self, request: Request) -> None:
        """Take a request; its tokens come through `on_outputs`. It must fit: `num_tokens <= max_request_tokens`."""
        self._samplings[request.id] = request.sampling
        self._news.expect(request.id)
        self._manager.add_request(
            request.prompt_ids,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=-1 if request.ignore_eos else None,
        )

    def cancel(self, request_id: str) -> None:
        """Forget a request; nothing more is heard of it."""
        self._news.forget(request_id)
        self._manager.cancel_request(request_id)

    def wake(self, num_announced: int) -> None:
        """Say that the group has been given `num_announced` requests so far, so that no rank sleeps through one."""
        self._manager.wake(num_announced)

    def stop(self) -> None:
        """Finish what is running and wait for the engine's thread. It ends once every rank has been asked to stop."""
        if self._manager.is_running():
            self._manager.stop(block=True)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        processor = self._manager.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been started."""
        processor = self._manager.batch_processor
        waiting = 0 if processor is None else len(processor.scheduler.waiting_requests)
        return waiting + self._manager.input_queue.qsize()


class _News(OutputRouter):
    """Turns the manager's cumulative outputs into what is new of each request, one call for each step."""

    def __init__(
        self,
        on_outputs: Callable[[list[Output]], None],
        samplings: dict[str, Sampling],
        eos_token_ids: frozenset[int],
    ) -> None:
        super().__init__()
        self._on_outputs = on_outputs
        self._samplings = samplings
        self._eos_token_ids = eos_token_ids
        self._num_told: dict[str, int] = {}

    def expect(self, request_id: str) -> None:
        self._num_told[request_id] = 0

    def forget(self, request_id: str) -> None:
        self._num_told.pop(request_id, None)
        self._samplings.pop(request_id, None)

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        if news := [self._new_part(output) for output in outputs if output.request_id in self._num_told]:
            self._on_outputs(news)

    def _new_part(self, output: GenerationOutput) -> Output:
        token_ids = output.generated_tokens[self._num_told.get(output.request_id, 0) :]
        if not output.is_finished():
            self._num_told[output.request_id] = len(output.generated_tokens)
            return Output(output.request_id, token_ids)
        self.forget(output.request_id)
        if output.status == RequestStatus.FAILED:
            return Output(output.request_id, token_ids, "error", output.error or "the request failed")
        ended_itself = bool(token_ids) and token_ids[-1] in self._eos_token_ids
        return Output(output.request_id, token_ids, "stop" if ended_itself else "length")


def _eos_token_ids(model: PreTrainedModel) -> list[int]:
    """The model's end tokens: a checkpoint may name none, one or several."""
    eos: Any = None if model.generation_config is None else model.generation_config.eos_token_id
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
