"""One rank's engine: requests in, tokens out, in step with the other ranks."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rq_ep.engine.empty_step import empty_step, first_steps
from rq_ep.engine.kv_cache import cache_size
from rq_ep.engine.lockstep import LockstepManager, batching_config
from rq_ep.engine.nonfinite import NOT_FINITE
from rq_ep.engine.output_processor import GRAMMAR_FAILED, OutputProcessor, RequestState
from rq_ep.engine.padded.padded_manager import PaddedManager
from rq_ep.engine.padded.row_groups import DenseForward
from rq_ep.engine.progress import Progress, ProgressTracker
from rq_ep.engine.requests import Batch, Output, Request, Score
from rq_ep.engine.rotary import SequenceRotary
from rq_ep.engine.routed_experts import RoutedExpertsCapturer, SequenceRouting
from rq_ep.engine.scoring import PromptScorer
from rq_ep.engine.servable import PAGED
from rq_ep.engine.step_agreement import GroupFlags, flags_exchange
from rq_ep.engine.step_loop import Recover, StepLoop
from rq_ep.engine.tokens.grammars import GrammarError, Grammars
from rq_ep.moe import EPExperts, StepRouting
from rq_ep.moe.migration.expert_mover import MoverFlags
from rq_ep.parallel import TorchGroup

SCORING_CHUNK = 512


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of a rank's batches and KV cache; no cache size means what a GPU has left, or a modest one on CPU."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    kv_cache_tokens: int | None = None
    cache: str = PAGED  # or padded (`servable.choose_cache`)
    prefix_caching: bool = False  # it has no effect where pages of the cache cannot be shared, or there are none


class Engine:
    """Continuous batching over a model whose experts are expert-parallel. Every rank of the group makes one.

    Args:
        model: a causal language model, its attention chosen (`servable.set_attention`).
        layers: its expert-parallel layers, in the order in which a forward pass enters them.
        group: its ranks; their control group is the engine's alone while it runs.
        config: sizes of this rank's batches and cache.
        on_outputs: called after each step with the new tokens of this rank's requests, on the engine's thread.
        on_failure: called with an error that ends the engine, on the engine's thread. The other ranks wait for this
            one: it must end the process.
        on_mark: called with a mark, on the engine's thread, between the same two steps on every rank.
        mover_flags: what this rank announces of the migration of experts under way, before each step; None: experts
            never move.
        on_agreement: called with what the ranks have agreed on, on the engine's thread, between the same two steps on
            every rank.
        recover: called on the engine's thread when another rank has cut a step off, or the group is to change
            (`regroup`): it returns when this rank may make steps again. None: such an error is a failure.
        read_tokenizer: reads the model's tokenizer, for answers that follow a grammar; None: none does.
        heartbeat_s: how often an idle group meets, in seconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[EPExperts],
        group: TorchGroup,
        config: EngineConfig,
        *,
        on_outputs: Callable[[list[Output]], None],
        on_failure: Callable[[BaseException], None],
        on_mark: Callable[[int], None] = lambda number: None,
        mover_flags: Callable[[], MoverFlags] | None = None,
        on_agreement: Callable[[GroupFlags], None] = lambda flags: None,
        recover: Recover | None = None,
        read_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
        heartbeat_s: float = 1.0,
    ) -> None:
        self.eos_token_ids = _eos_token_ids(model)
        self._grammars: Grammars | None = None
        if read_tokenizer is not None:
            self._grammars = Grammars(read_tokenizer, vocab_size(model), self.eos_token_ids)
        self._requests: dict[str, RequestState] = {}
        self._routed_experts = RoutedExpertsCapturer(layers, layers[0].placement.num_experts, self._requests)
        self._outputs = OutputProcessor(
            self._requests,
            on_outputs,
            lambda request_id: self._manager.cancel_request(request_id),
            self._routed_experts.collect,
        )
        rotary = SequenceRotary(model)
        forward = DenseForward(model, rotary)
        self._scorer = PromptScorer(
            model,
            rotary,
            model.config._attn_implementation,
            forward.new_cache,
            min(SCORING_CHUNK, config.max_num_batched_tokens) if forward.takes_chunks else None,
            self._prompt_scored,
            lambda request: self._outputs.fail(request, NOT_FINITE),
        )
        self._tracker = ProgressTracker(layers, [layer.placement.index for layer in layers], lambda: group.operation)
        announce_rows = _rows_announcer(layers, group)
        # Prepared before the manager gives the model an attention that only its own batches can use.
        run_empty_step, self.routes_evenly = _first_empty_steps(model, layers, announce_rows, len(group.members))
        wake_up = threading.Event()
        self._step_loop = StepLoop(
            gather_flags=flags_exchange(group if group.size > 1 else None),
            prompts=self._scorer,
            is_wanted=self._requests.__contains__,
            empty_step=run_empty_step,
            on_mark=on_mark,
            mover_flags=mover_flags,
            on_agreement=on_agreement,
            recover=recover,
            announce_rows=announce_rows,
            around_batch=self._routed_experts.step,
            progress=self._tracker,
            heartbeat_s=heartbeat_s,
            wake_up=wake_up,
        )
        self._manager = self._make_manager(model, config, forward, rotary, wake_up, on_failure)
        start_s = time.perf_counter()
        with first_steps(layers):
            self._manager.begin(group)  # makes the cache, so that it is known to fit before the first request
        self.warmup_s = time.perf_counter() - start_s
        if recover is not None and group.device.type == "cuda":
            model.register_forward_hook(lambda *_: _wait_unless_aborted(group))
        self.max_request_tokens = self._manager.max_request_tokens

    def _make_manager(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        forward: DenseForward,
        rotary: SequenceRotary,
        wake_up: threading.Event,
        on_failure: Callable[[BaseException], None],
    ) -> LockstepManager | PaddedManager:
        kv_cache_tokens = cache_size(config.kv_cache_tokens, model.device.type)
        if config.cache != PAGED:
            return PaddedManager(
                forward,
                step=self._step_loop.step,
                wake_up=wake_up,
                outputs=self._outputs,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                kv_cache_tokens=kv_cache_tokens,
                requests=self._requests,
                on_failure=on_failure,
            )
        return LockstepManager(
            model,
            GenerationConfig(do_sample=False, eos_token_id=self.eos_token_ids or -1),
            batching_config(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                kv_cache_tokens=kv_cache_tokens,
                # Where frequencies follow the length of a sequence, so do the keys of its prefix.
                shares_prefixes=config.prefix_caching and not rotary.follows_length,
            ),
            step=self._step_loop.step,
            wake_up=wake_up,
            outputs=self._outputs,
            rotary=rotary,
            requests=self._requests,
            routed_experts=self._routed_experts,
            on_failure=on_failure,
        )

    def start(self) -> None:
        """Start the engine's thread."""
        self._manager.start()

    def submit(self, request: Request) -> None:
        """Take a request; its tokens come through `on_outputs`. It must fit: `num_tokens <= max_request_tokens`."""
        end_token_ids = {*([] if request.ignore_eos else self.eos_token_ids), *request.sampling.stop_token_ids}
        state = self._requests[request.id] = RequestState(request, frozenset(end_token_ids))
        if request.grammar is not None:
            try:
                assert self._grammars is not None, "there is no tokenizer"
                state.matcher = self._grammars.matcher(request.grammar, state.history.answer_ids, request.reasoning)
            except GrammarError as error:
                self._outputs.fail(request, f"{GRAMMAR_FAILED}: {error}")
                return
        if request.routed_from is not None:
            state.routing = SequenceRouting(request.num_tokens, request.routed_from, request.routed_every)
            self._routed_experts.ask()
        if request.scores_prompt:
            self._scorer.add(request)
            self._step_loop.wake(0)
        else:
            self._manager.submit(request)

    def _prompt_scored(self, request: Request, scores: list[Score], is_last: bool) -> None:
        self._outputs.prompt_scored(request, scores, is_last)
        if is_last and request.id in self._requests:
            self._manager.submit(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request; no more outputs of it are delivered."""
        self._requests.pop(request_id, None)
        self._manager.cancel_request(request_id)

    def wake(self, num_announced: int) -> None:
        """Announce that the group has been given `num_announced` requests so far: no rank must sleep through one."""
        self._step_loop.wake(num_announced)

    def mark(self, number: int) -> None:
        """Have `on_mark` of every rank called with this number, higher than any before; call it on one rank."""
        self._step_loop.mark(number)

    def regroup(self, generation: int) -> None:
        """Have `recover` called on every rank between two steps, once all know of this generation of the group."""
        self._step_loop.regroup(generation)

    def stop(self) -> None:
        """Finish what is running and wait for the engine's thread. It ends once every rank has been asked to stop."""
        if self._manager.is_running():
            self._manager.stop(block=True)

    @property
    def progress(self) -> Progress:
        """How far this rank has come."""
        return self._tracker.current()

    @property
    def batch(self) -> Batch:
        """The requests in this rank's step; to be read within it, on the engine's thread: in a hook of a layer."""
        return self._step_loop.batch(self._manager)

    @property
    def steps(self) -> tuple[int, float]:
        """Steps so far with tokens of this rank, and the seconds they took."""
        return self._step_loop.num_steps, self._step_loop.steps_s

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return self._manager.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that have not been started, or whose prompt is being scored."""
        return max(len(self._requests) - self.num_running, 0)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that requests hold."""
        return self._manager.kv_cache_usage


def vocab_size(model: PreTrainedModel) -> int:
    """Tokens that the model knows."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight.shape[0]


def _first_empty_steps(
    model: PreTrainedModel,
    layers: Sequence[EPExperts],
    announce_rows: Callable[[Sequence[int] | None], None],
    num_members: int,
) -> tuple[Callable[[], None], bool]:
    """The empty step, and whether all layers get a step's tokens, with as many experts each; every rank calls this."""
    shapes: list[set[torch.Size]] = []
    watching = StepRouting(layers, lambda ids_L, _: shapes.append({ids_TK.shape for ids_TK in ids_L}))
    with first_steps(layers), watching:
        run_empty_step = empty_step(model, layers)
        announce_rows([0] * num_members)
        run_empty_step()  # what a step of announced rows compiles is compiled now
        announce_rows(None)
    return run_empty_step, not watching.has_gaps and len(shapes[0]) == 1


def _rows_announcer(layers: Sequence[EPExperts], group: TorchGroup) -> Callable[[Sequence[int] | None], None]:
    """Tells the exchange of every layer with how many rows each member enters it; None: they have to ask."""
    exchanges = [layer.exchange for layer in layers]

    def announce(num_rows: Sequence[int] | None) -> None:
        rows_R = None
        if num_rows is not None:
            rows_R = np.zeros(group.size, np.int64)
            rows_R[list(group.members)] = num_rows
        for exchange in exchanges:
            exchange.announce_rows(rows_R)

    return announce


def _wait_unless_aborted(group: TorchGroup) -> None:
    """Return when a forward pass is over on the GPU, where collectives that were cut off go unnoticed.

    Raises:
        PeerLost: it was cut off.
    """
    torch.cuda.current_stream(group.device).synchronize()
    group.raise_if_aborted()


def _eos_token_ids(model: PreTrainedModel) -> list[int]:
    """The model's end tokens: a checkpoint may name none, one or several."""
    eos: Any = None if model.generation_config is None else model.generation_config.eos_token_id
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
