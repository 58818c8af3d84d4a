"""Calibration: measure each expert's load, step by step, its importance, and the error of its weight formats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rq_ep.core.arrays import FloatArray
from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import check_writable
from rq_ep.core.stats import ExpertStats
from rq_ep.formats import WeightFormat, get_format
from rq_ep.model.calibration.divergence import KLDivergence, kl_when_dropped_LE, kl_when_quantized_LEQ
from rq_ep.model.calibration.forward_stats import ForwardStats, collect_forward_stats, find_windows
from rq_ep.model.calibration.importance import wanda_E
from rq_ep.model.calibration.layer_records import LayerRecord
from rq_ep.model.calibration.loaded_model import LoadedModel, find_source
from rq_ep.model.calibration.output_error import output_errors_EQ
from rq_ep.model.calibration.trace_builder import RoutingTraceBuilder
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.model_folder import folder_of
from rq_ep.model.progress_callback import ProgressCallback, item_counter, no_progress
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.settings import IMPORTANCES, CalibrationSettings
from rq_ep.model.text.windows import Texts
from rq_ep.parallel import EPGroup
from rq_ep.parallel.agreement import run_on_all_ranks


@torch.no_grad()
def calibrate(
    model: str | Path | PreTrainedModel,
    texts: Texts,
    settings: CalibrationSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    packed_experts: str | Path | None = None,
    group: EPGroup | None = None,
    trace_path: str | Path | None = None,
    resume_path: str | Path | None = None,
    progress: ProgressCallback = no_progress,
    **options: Any,
) -> ExpertStats:
    """Run text through a model and record what `place` needs to know of its experts.

    The text runs through the model once; loads, importance and the inputs on which formats are measured all come from
    that pass. The experts of a model that is too large for one process are sharded over the ranks of a group. All ranks
    call this with the same arguments and get the same result; rank 0 writes the files.

    Args:
        model: checkpoint directory, ORG/NAME of the hub, or a model that is already in memory.
        texts: domain -> texts; or texts (str); or paths (Path) of files and directories, see `windows.read_texts`.
        settings: what to measure, and on how much text; default: `CalibrationSettings()`.
        tokenizer: default: the checkpoint's.
        packed_experts: directory that `rq-ep quantize` wrote: the error of a format is measured on these experts, where
            they are there, instead of on weights rounded to the nearest.
        group: ranks to shard the experts of a checkpoint over; default: all processes of the launcher, or this one.
        trace_path: also write the routing of every token of the same steps, a `RoutingTrace`, there.
        resume_path: file in which progress is saved, so that the same call can resume where it was stopped; it is
            removed in the end. Not with a trace.
        progress: called with (stage, done, total).
        options: fields of `CalibrationSettings` that differ from `settings`.

    Raises:
        UserError: no such checkpoint, a model without experts that we can serve, no text, an unknown format, a model
            whose experts give infinite or undefined outputs.
    """
    settings = replace(settings or CalibrationSettings(), **options)
    source, group = find_source(model, settings, group)
    packed = run_on_all_ranks(group, lambda: _check_inputs(source, settings, group, trace_path, packed_experts))
    windows = find_windows(source, texts, settings, tokenizer=tokenizer, group=group)
    loaded = LoadedModel.open(source, settings.dtype, settings.device, group, strict_weights=settings.strict_weights)
    formats = _formats_to_measure(loaded, settings.formats)

    trace_builder = RoutingTraceBuilder() if trace_path is not None and loaded.is_rank_zero else None
    forward_stats = collect_forward_stats(
        loaded, windows, trace_builder=trace_builder, resume_path=resume_path, progress=progress
    )
    if trace_builder is not None and trace_path is not None:
        trace_builder.build(loaded.experts[0].num_experts, _layers(loaded), loaded.identity).save(trace_path)

    records = forward_stats.records
    error_LEQ = run_on_all_ranks(loaded.group, lambda: _output_errors_LEQ(loaded, records, formats, packed, progress))
    divergence = _divergence(loaded, forward_stats, settings) if _needs_divergence(settings, formats) else None
    kl_LEQ = None
    if settings.measure_kl and divergence is not None:
        kl_LEQ = _kl_LEQ(loaded, divergence, formats, progress)
    stats = _expert_stats(
        loaded,
        forward_stats,
        formats,
        importance=_importance_LE(settings.importance, loaded, records, divergence, progress),
        error=_sum_over_ranks(loaded.group, error_LEQ),
        kl=kl_LEQ,
        importance_definition=IMPORTANCES[settings.importance],
    )
    if resume_path is not None and loaded.is_rank_zero:
        Path(resume_path).unlink(missing_ok=True)
    return stats


def _check_inputs(
    model: Path | PreTrainedModel,
    settings: CalibrationSettings,
    group: EPGroup | None,
    trace_path: str | Path | None,
    packed_experts: str | Path | None,
) -> PackedExperts | None:
    """Open the experts packed in advance, and check whatever needs no weights."""
    for name in settings.formats or ():
        get_format(name)  # raises if there is none
    if settings.measure_kl and group is not None and group.size > 1:
        raise UserError(f"--measure-kl changes expert by expert in one process, not on {group.size}: leave it out")
    if trace_path is not None:
        config = read_config(model) if isinstance(model, Path) else model.config
        if config.is_encoder_decoder:
            raise UserError("--trace: layers of an encoder and a decoder see different tokens; leave it out")
        if group is None or group.rank == 0:
            check_writable(trace_path)
    if packed_experts is None:
        return None
    folder = model if isinstance(model, Path) else folder_of(model)
    if folder is None:
        raise UserError("--experts: the model was not loaded from a checkpoint directory")
    return PackedExperts.open(packed_experts, model_identity(folder))


def _formats_to_measure(loaded: LoadedModel, names: Sequence[str] | None) -> tuple[WeightFormat, ...]:
    """The native format, and the others in the order in which they are named."""
    if names is None:
        names = () if loaded.is_quantized else ("int8",)
    return tuple(get_format(name) for name in dict.fromkeys((loaded.native_format, *names)))


def _layers(loaded: LoadedModel) -> tuple[int, ...]:
    return tuple(experts.layer_index for experts in loaded.experts)


def _output_errors_LEQ(
    loaded: LoadedModel,
    records: Sequence[LayerRecord],
    formats: Sequence[WeightFormat],
    packed: PackedExperts | None,
    progress: ProgressCallback,
) -> FloatArray:
    """[L, E, Q] relative output error of each expert; 0 in the native format, and of experts on other ranks."""
    error_LEQ = np.zeros((len(records), loaded.experts[0].num_experts, len(formats)))
    for i, (experts, record) in enumerate(zip(loaded.experts, records, strict=True)):
        packed_expert = partial(_packed_expert, packed, experts.layer_index)
        error_LEQ[i, :, 1:] = output_errors_EQ(experts, experts.family, record.kept_rows(), formats[1:], packed_expert)
        progress("formats", i + 1, len(records))
    return error_LEQ


def _packed_expert(packed: PackedExperts | None, layer: int, expert: int, name: str) -> Tensor | None:
    return None if packed is None else packed.packed(layer, expert, name)


def _needs_divergence(settings: CalibrationSettings, formats: Sequence[WeightFormat]) -> bool:
    return settings.importance == "drop" or (settings.measure_kl and len(formats) > 1)


def _divergence(loaded: LoadedModel, forward_stats: ForwardStats, settings: CalibrationSettings) -> KLDivergence:
    """From the unchanged model, on the first `settings.sensitivity_tokens` of the text."""
    num_batches = max(1, settings.sensitivity_tokens // (settings.batch_size * settings.sequence_length))
    return KLDivergence(loaded.model, forward_stats.windows.batches[:num_batches])


def _kl_LEQ(
    loaded: LoadedModel, divergence: KLDivergence, formats: Sequence[WeightFormat], progress: ProgressCallback
) -> FloatArray:
    """[L, E, Q] KL divergence with one expert in a format; 0 in the native one."""
    kl_LEQ = np.zeros((len(loaded.experts), loaded.experts[0].num_experts, len(formats)))
    count_expert = item_counter(progress, "formats, expert by expert", kl_LEQ[..., 1:].size)
    kl_LEQ[..., 1:] = kl_when_quantized_LEQ(divergence, loaded.experts, loaded.family.layout, formats[1:], count_expert)
    return kl_LEQ


def _importance_LE(
    name: str,
    loaded: LoadedModel,
    records: Sequence[LayerRecord],
    divergence: KLDivergence | None,
    progress: ProgressCallback,
) -> FloatArray:
    """[L, E] importance by the definition that `IMPORTANCES` calls `name`."""
    if name == "drop":
        assert divergence is not None
        num_experts = sum(experts.num_experts for experts in loaded.experts)
        count_expert = item_counter(progress, "dropping, expert by expert", num_experts)
        return kl_when_dropped_LE(divergence, loaded.experts, count_expert)
    definitions: Mapping[str, Callable[[ExpertsModule, LayerRecord], FloatArray]] = {
        "output": lambda experts, record: record.importance_E,
        "gate-mass": lambda experts, record: record.gate_mass_E,
        "load": lambda experts, record: record.visits_E.astype(np.float64),
        "wanda": lambda experts, record: wanda_E(experts, loaded.family, record.kept_rows(), record.visits_E),
    }
    importance_E = definitions[name]
    importance_LE = np.stack([importance_E(*pair) for pair in zip(loaded.experts, records, strict=True)])
    return _sum_over_ranks(loaded.group, importance_LE) if name == "wanda" else importance_LE


def _sum_over_ranks(group: EPGroup | None, values: FloatArray) -> FloatArray:
    """All-reduce figures of single experts: one rank holds an expert and knows its figure, the others have zero."""
    return values if group is None else np.sum(group.all_gather_object(values), axis=0)


def _expert_stats(
    loaded: LoadedModel, forward_stats: ForwardStats, formats: Sequence[WeightFormat], **measured: Any
) -> ExpertStats:
    """The record of a calibration: the forward pass, the model, and what was `measured` besides."""
    steps, records, windows = forward_stats.steps, forward_stats.records, forward_stats.windows
    shape = loaded.family.shape([format_.name for format_ in formats])
    return ExpertStats(
        counts=np.stack([step.counts_LE for step in steps]),
        tokens=np.array([step.tokens for step in steps], np.int64),
        phase=np.array([step.phase for step in steps], np.int64),
        domain=np.array([step.domain for step in steps], np.int64),
        visits=np.stack([record.visits_E for record in records]),
        gate_mass=np.stack([record.gate_mass_E for record in records]),
        num_tokens=windows.num_tokens,
        domains=windows.domains,
        formats=tuple(format_.name for format_ in formats),
        native_format=loaded.native_format,
        expert_bytes=shape.expert_bytes,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        model=loaded.identity,
        layers=_layers(loaded),
        top_k=max(record.topk_ids_TK.shape[1] for record in records),
        expert_groups=getattr(loaded.model.config, "n_group", None) or None,
        source="calibration",
        **measured,
    )
