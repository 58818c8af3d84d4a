"""Evaluation: held-out text through the dense model and through expert-parallel ones, in one process, side by side.

The dense model is the checkpoint as transformers runs it, in one piece. Axes: B windows, T tokens of a window, V
vocabulary, W tokens of a continuation.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rq_ep.core.cost import CostModel
from rq_ep.core.stats import ModelIdentity
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.dtypes import torch_dtype
from rq_ep.model.evaluation.candidate import Candidate, CandidateRun
from rq_ep.model.evaluation.evaluation_result import Evaluation, Reference
from rq_ep.model.evaluation.quality import (
    Estimate,
    Quality,
    greedy_continuations,
    nll,
    recording_topk_ids,
    routing_shift,
)
from rq_ep.model.load.attach import layer_cost, place_uniformly
from rq_ep.model.load.load_model import load
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.model.model_folder import find_model
from rq_ep.model.progress_callback import ProgressCallback, no_progress
from rq_ep.model.seam.expert_modules import family_of, find_expert_modules
from rq_ep.model.settings import EvaluationSettings
from rq_ep.model.text.teacher_forcing import teacher_forcing_inputs
from rq_ep.model.text.windows import Texts, WindowBatch, Windows, check_sequence_length, make_windows
from rq_ep.moe import Telemetry
from rq_ep.parallel.default_group import own_device
from rq_ep.parallel.host import short_collections

MAX_CONTINUED = 16  # windows that are continued greedily


@torch.no_grad()
def compare(
    path: str | Path,
    texts: Texts,
    candidates: Sequence[Candidate],
    settings: EvaluationSettings | None = None,
    *,
    num_ranks: int,
    machine: CostModel | None = None,
    packed_experts: str | Path | None = None,
    progress: ProgressCallback = no_progress,
    **options: Any,
) -> list[Evaluation]:
    """Run the same windows of text through the dense model and through every candidate, taking turns batch by batch.

    An encoder-decoder reads the first half of each window and writes the second by teacher forcing.

    All ranks live in this process and compute one at a time, so a rank's seconds are its own; on the CPU they are
    those of its thread, which other processes do not stretch. The first batch is run once before anything is measured.

    Args:
        path: checkpoint directory, or ORG/NAME of the hub.
        texts: held-out text; see `windows.read_texts`.
        candidates: what to compare; each holds its own copy of the model while this runs.
        settings: how much text, and what to measure; default: `EvaluationSettings()`.
        num_ranks: ranks that share the experts; a batch's tokens are divided among them in equal runs.
        machine: predicts the seconds that are measured.
        packed_experts: directory that `rq-ep quantize` wrote, as in `load`.
        progress: called with (stage, done, total).
        options: fields of `EvaluationSettings` that differ from `settings`.

    Raises:
        UserError: no such checkpoint, no text, a placement for another model or another number of ranks, a machine
            that does not know these experts.
    """
    settings = replace(settings or EvaluationSettings(), **options)
    path = find_model(path, settings.revision)
    identity = model_identity(path)
    for candidate in candidates:
        if candidate.placement is not None:
            candidate.placement.check_serves(identity, num_ranks, f"the placement of {candidate.label}")
    check_sequence_length(settings.sequence_length, read_config(path), low=2)  # one token to read, one to predict
    windows = make_windows(texts, read_tokenizer(path), settings)
    device = own_device(settings.device)
    dense = load_whole_model(path, torch_dtype(settings.dtype), device, strict_weights=settings.strict_weights)
    loader = _CandidateLoader(path, dense, identity, num_ranks, machine, packed_experts, settings)
    runs = []
    for done, candidate in enumerate(candidates):
        progress("loading", done, len(candidates))
        runs.append(loader.load(candidate))
    noise = _NoiseFloor.of(path, torch_dtype(settings.dtype), dense.device) if settings.noise_floor else None
    _warm_up(dense, runs, windows.batches, settings.greedy_tokens, progress)
    return _run_windows(dense, runs, noise, windows, progress)


@dataclass(frozen=True)
class _CandidateLoader:
    """Loads candidates, each on all ranks in this process."""

    path: str | Path
    dense: PreTrainedModel
    identity: ModelIdentity
    num_ranks: int
    machine: CostModel | None
    packed_experts: str | Path | None
    settings: EvaluationSettings

    def load(self, candidate: Candidate) -> CandidateRun:
        """Load a candidate; without a placement, its strategy places uniform load."""
        family = family_of(find_expert_modules(self.dense)[0].module)
        placement = candidate.placement
        if placement is None:
            placement = place_uniformly(candidate.strategy, OpenedModel.open(self.path), self.num_ranks, self.identity)
        cost = layer_cost(self.machine, family, placement, candidate.strategy)
        telemetry = Telemetry(clock=time.thread_time if self.dense.device.type == "cpu" else None)
        model = load(
            self.path,
            placement,
            candidate.strategy,
            num_local_ranks=self.num_ranks,
            dtype=self.settings.dtype,
            device=self.settings.device,
            telemetry=telemetry,
            packed_experts=self.packed_experts,
        )
        return CandidateRun(candidate.label, model, telemetry, cost)


@dataclass
class _NoiseFloor:
    """The dense model once more, in the other of fp32 and bf16."""

    model: PreTrainedModel
    is_exact: bool  # this one is in fp32
    quality: Quality = field(default_factory=Quality)

    @classmethod
    def of(cls, path: str | Path, dtype: torch.dtype, device: torch.device) -> "_NoiseFloor":
        """For a dense model in `dtype`."""
        is_exact = dtype != torch.float32
        return cls(load_whole_model(path, torch.float32 if is_exact else torch.bfloat16, device), is_exact)

    def add(self, dense_BTV: Tensor, logits_BTV: Tensor, tokens_BT: Tensor) -> None:
        pair = (logits_BTV, dense_BTV) if self.is_exact else (dense_BTV, logits_BTV)
        self.quality.add(*pair, tokens_BT)


def _warm_up(
    dense: PreTrainedModel,
    runs: Sequence[CandidateRun],
    batches: Sequence[WindowBatch],
    greedy_tokens: int,
    progress: ProgressCallback,
) -> None:
    """Run the first batch without measuring it, and let all models continue the beginnings of the first windows."""
    tokens_BT = torch.cat([batch.tokens_BT for batch in batches[:MAX_CONTINUED]])[:MAX_CONTINUED].to(dense.device)
    prompts_BT = tokens_BT[:, : tokens_BT.shape[1] // 2]
    expected_BW = greedy_continuations(dense, prompts_BT, greedy_tokens) if greedy_tokens else None
    arguments, _ = teacher_forcing_inputs(dense.config, batches[0].tokens_BT.to(dense.device))
    for done, run in enumerate(runs):
        progress("warming up", done, len(runs))
        run.model(**arguments, use_cache=False)
        if expected_BW is not None:
            run.add_continuations(expected_BW, greedy_continuations(run.model, prompts_BT, greedy_tokens))
        run.telemetry.clear()


def _run_windows(
    dense: PreTrainedModel,
    runs: Sequence[CandidateRun],
    noise: _NoiseFloor | None,
    windows: Windows,
    progress: ProgressCallback,
) -> list[Evaluation]:
    dense_nll: list[float] = []
    num_predicted = 0
    # An encoder-decoder's capacity drops tokens before they reach the experts, and other tokens where choices shift.
    has_choices = not dense.config.is_encoder_decoder
    with ExitStack() as stack:
        dense_ids_L = stack.enter_context(
            recording_topk_ids([experts.module for experts in find_expert_modules(dense)])
        )
        ids_L_by_run = [stack.enter_context(recording_topk_ids(run.layers)) for run in runs]
        stack.enter_context(short_collections())
        for done, batch in enumerate(windows.batches):
            arguments, tokens_BT = teacher_forcing_inputs(dense.config, batch.tokens_BT.to(dense.device))
            num_predicted += tokens_BT[:, 1:].numel()
            dense_BTV = dense(**arguments, use_cache=False).logits
            dense_nll += nll(dense_BTV, tokens_BT)
            for run, ids_L in zip(runs, ids_L_by_run, strict=True):
                run.quality.add(dense_BTV, run.model(**arguments, use_cache=False).logits, tokens_BT)
                if has_choices:
                    run.add_shift(routing_shift(dense_ids_L, ids_L, len(tokens_BT)))
            if noise is not None:
                noise.add(dense_BTV, noise.model(**arguments, use_cache=False).logits, tokens_BT)
            progress("evaluating", done + 1, len(windows.batches))
    reference = Reference(
        Estimate.of(dense_nll).exp(),
        None if noise is None else Estimate.of(noise.quality.kl),
        None if noise is None else Estimate.of(noise.quality.agreement),
    )
    return [run.result(num_predicted, reference) for run in runs]
