"""Statistics of forward passes: a little text runs through a model once, and what its experts did is recorded."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import PHASES
from rq_ep.model.calibration.layer_records import LayerRecord, Step, recording
from rq_ep.model.calibration.loaded_model import LoadedModel
from rq_ep.model.calibration.resume import SAVE_EVERY_S, ResumeFile
from rq_ep.model.calibration.trace_builder import RoutingTraceBuilder
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.progress_callback import ProgressCallback, no_progress
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.settings import WindowSettings
from rq_ep.model.text.teacher_forcing import teacher_forcing_inputs
from rq_ep.model.text.windows import Texts, WindowBatch, Windows, check_sequence_length, make_windows
from rq_ep.parallel import EPGroup
from rq_ep.parallel.agreement import run_on_all_ranks

DECODE_STEPS = 8  # taken from every second batch of a domain
MAX_ROWS = 256  # inputs kept of each expert, to measure formats on
MAX_ROW_BYTES = 2 << 30  # of all kept inputs together
ENOUGH_TOKENS, ENOUGH_WINDOWS = 4096, 32  # below, popularity on other text of the same kind is badly predicted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForwardStats:
    """What the experts did on the text."""

    windows: Windows
    steps: list[Step]
    records: list[LayerRecord]  # of each MoE layer


def find_windows(
    model: Path | PreTrainedModel,
    texts: Texts,
    settings: WindowSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    group: EPGroup | None = None,
) -> Windows:
    """The windows of text that are to run through a model, which need not be loaded for it.

    Args:
        model: folder of a checkpoint, or a model in memory.
        texts: domain -> texts; or texts (str); or paths (Path) of files and directories, see `windows.read_texts`.
        settings: how much of the text to run; default: `WindowSettings()`.
        tokenizer: default: the checkpoint's.
        group: ranks, all of which call this and get the same.

    Raises:
        UserError: no text or tokenizer, sizes that do not fit.
    """
    settings = settings or WindowSettings()

    def find() -> Windows:
        config = read_config(model) if isinstance(model, Path) else model.config
        check_sequence_length(settings.sequence_length, config, low=2 if config.is_encoder_decoder else 1)
        return make_windows(texts, tokenizer or _tokenizer_of(model), settings)

    windows = run_on_all_ranks(group, find)
    if group is None or group.rank == 0:
        _warn_if_small(windows)
    return windows


def _tokenizer_of(model: Path | PreTrainedModel) -> PreTrainedTokenizerBase:
    path = model if isinstance(model, Path) else model.name_or_path
    if not path:
        raise UserError("tokenizer: a model that was not loaded from a checkpoint brings none; give one")
    return read_tokenizer(path)


@torch.no_grad()
def collect_forward_stats(
    loaded: LoadedModel,
    windows: Windows,
    *,
    max_rows: int = MAX_ROWS,
    trace_builder: RoutingTraceBuilder | None = None,
    resume_path: str | Path | None = None,
    save_every_s: float = SAVE_EVERY_S,
    progress: ProgressCallback = no_progress,
) -> ForwardStats:
    """Run windows of text through a model once, and record what its experts do.

    A step is one batch. Every batch is a prefill step; every second one of a domain also gives `DECODE_STEPS` decode
    steps, each of the tokens at one position of its sequences, as if these were decoded together.

    An encoder-decoder reads the first half of each sequence and is made to write the second, in one prefill step; its
    decode steps are real ones, of the first tokens written, in which the encoder's experts have no load.

    If the experts are sharded over ranks, all ranks call this, run the same text and get the same statistics.

    Args:
        loaded: the model.
        windows: as `find_windows` gives them.
        max_rows: inputs to keep of each expert, as far as `MAX_ROW_BYTES` allow.
        trace_builder: gets the routing of every token; not of an encoder-decoder.
        resume_path: file in which progress is saved, so that the same call can resume after it was stopped. It is left
            for whoever stops later, in what is measured next. Not with a `trace_builder`.
        save_every_s: seconds between two writings of it.
        progress: called with (stage, done, total).

    Raises:
        UserError: experts that give infinite or undefined outputs, a rank that would resume elsewhere.
    """
    assert trace_builder is None or resume_path is None
    num_experts = loaded.experts[0].num_experts
    max_rows_by_bytes = MAX_ROW_BYTES // (4 * loaded.family.hidden_size * num_experts * len(loaded.experts))
    max_rows = max(1, min(max_rows, max_rows_by_bytes))
    num_passes = len(windows.batches) * (1 + DECODE_STEPS if loaded.is_encoder_decoder else 1)
    resume_file = None
    if resume_path is not None:
        fingerprint = (loaded.identity, str(loaded.model.dtype), num_passes, max_rows)
        resume_file = ResumeFile(resume_path, windows, fingerprint, save_every_s)

    steps: list[Step] = []
    modules = [experts.module for experts in loaded.experts]
    with recording(modules, num_experts, rows_per_batch=-(-max_rows // num_passes)) as records:
        first = 0 if resume_file is None else resume_file.load(steps, records)
        _check_same_start(loaded.group, first, resume_path)
        for i, batch in enumerate(windows.batches[first:], first):
            has_decode_steps = i // len(windows.domains) % 2 == 0  # the domains take turns
            steps.extend(_run_batch(loaded, batch, records, has_decode_steps, trace_builder))
            is_last = i + 1 == len(windows.batches)  # it is always run: `records` tell its routing
            if resume_file is not None and loaded.is_rank_zero and not is_last:
                resume_file.save(i + 1, steps, records)
            progress("routing", i + 1, len(windows.batches))
    _check_finite(loaded.experts, records)
    return ForwardStats(windows, steps, records)


def _warn_if_small(windows: Windows) -> None:
    if windows.num_tokens < ENOUGH_TOKENS or windows.num_windows < ENOUGH_WINDOWS:
        log.warning(
            "a small sample: %d tokens in %d windows; with less than %d tokens or %d windows, popularity of experts "
            "on other text is badly predicted: give more text or raise --max-tokens",
            windows.num_tokens, windows.num_windows, ENOUGH_TOKENS, ENOUGH_WINDOWS,
        )  # fmt: skip


def _run_batch(
    loaded: LoadedModel,
    batch: WindowBatch,
    records: Sequence[LayerRecord],
    has_decode_steps: bool,
    trace_builder: RoutingTraceBuilder | None,
) -> Iterator[Step]:
    """Run a batch through the model; what its experts do is added to `records`, and returned as steps."""
    network: Any = loaded.model
    if loaded.is_encoder_decoder:
        yield from _encoder_decoder_steps(network, batch, records, has_decode_steps)
    else:
        network.base_model(batch.tokens_BT.to(network.device), use_cache=False)  # the head's logits are not needed
        yield from _decoder_steps(batch, records, has_decode_steps, trace_builder)


def _decoder_steps(
    batch: WindowBatch,
    records: Sequence[LayerRecord],
    has_decode_steps: bool,
    trace_builder: RoutingTraceBuilder | None,
) -> Iterator[Step]:
    """The batch that has just run as a prefill step, and single positions of it as decode steps."""
    num_sequences, length = batch.tokens_BT.shape
    if trace_builder is not None:
        trace_builder.begin_batch(num_sequences, length)
    ids_LBTK = [record.topk_ids_TK.reshape(num_sequences, length, -1) for record in records]

    def step(phase: str, positions: slice) -> Step:
        counts_LE = [record.counts_E(ids_BTK[:, positions]) for record, ids_BTK in zip(records, ids_LBTK, strict=True)]
        num_tokens = batch.tokens_BT[:, positions].numel()
        if trace_builder is not None:
            trace_builder.add_step(PHASES.index(phase), records, positions)
        return Step(PHASES.index(phase), batch.domain, num_tokens, np.stack(counts_LE))

    yield step("prefill", slice(None))
    if has_decode_steps:
        for position in np.unique(np.linspace(0, length - 1, DECODE_STEPS + 1).astype(int)[1:]):
            yield step("decode", slice(position, position + 1))


def _encoder_decoder_steps(
    network: Any, batch: WindowBatch, records: Sequence[LayerRecord], has_decode_steps: bool
) -> Iterator[Step]:
    """Run a batch through encoder and decoder as a prefill step, and the decoder's first tokens one by one.

    Single positions of the prefill step would not do: capacity drops tokens of a sequence, but none that come alone.
    """
    arguments, written_BW = teacher_forcing_inputs(network.config, batch.tokens_BT.to(network.device))

    def step(phase: str, tokens_BW: torch.Tensor, before_LE: IntArray) -> Step:
        return Step(PHASES.index(phase), batch.domain, tokens_BW.numel(), _visits(records) - before_LE)

    before_LE = _visits(records)
    encoded = network.get_encoder()(arguments["input_ids"])
    network(encoder_outputs=encoded, decoder_input_ids=written_BW, use_cache=False)
    yield step("prefill", written_BW, before_LE)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for tokens_B1 in written_BW.split(1, dim=1)[: DECODE_STEPS if has_decode_steps else 0]:
        before_LE = _visits(records)
        network(encoder_outputs=encoded, decoder_input_ids=tokens_B1, past_key_values=cache, use_cache=True)
        yield step("decode", tokens_B1, before_LE)


def _visits(records: Sequence[LayerRecord]) -> IntArray:
    """[L, E] pairs recorded so far."""
    return np.stack([record.visits_E for record in records])


def _check_same_start(group: EPGroup | None, first: int, path: str | Path | None) -> None:
    """Raise a `UserError` unless all ranks resume after the same batch."""
    done_R = [first] if group is None else group.all_gather_object(first)
    if len(set(done_R)) > 1:
        raise UserError(
            f"{path}: rank {int(np.argmin(done_R))} does not find it, but rank {int(np.argmax(done_R))} does: put it "
            "where all ranks see it, or remove it"
        )


def _check_finite(experts: Sequence[ExpertsModule], records: Sequence[LayerRecord]) -> None:
    for module, record in zip(experts, records, strict=True):
        if (wrong := np.flatnonzero(~np.isfinite(record.importance_E))).size:
            raise UserError(
                f"layer {module.layer_index}: expert {wrong[0]} gives infinite or undefined outputs on this text: "
                "check the model, or compute in float32 with --dtype"
            )
