"""Quantizing experts in advance, layer by layer, into a directory of packed experts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.formats import get_format
from rq_ep.model.calibration.forward_stats import collect_forward_stats, find_windows
from rq_ep.model.calibration.loaded_model import LoadedModel, find_source
from rq_ep.model.calibration.rounding import ROUNDINGS, Rounding
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.load.attach import check_layers
from rq_ep.model.load.sharded_model import ShardedExperts
from rq_ep.model.progress_callback import ProgressCallback, no_progress
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.settings import QuantizeSettings
from rq_ep.model.text.windows import Texts
from rq_ep.parallel import EPGroup
from rq_ep.parallel.agreement import run_on_all_ranks

MAX_ROWS = 2048  # inputs kept of each expert: GPTQ wants some for each of a matrix' inputs

ExpertFormats = list[tuple[int, str]]  # (expert, format) of a layer
PackedLayer = dict[tuple[int, str], Tensor]  # (expert, format) -> uint8 [nbytes]


@torch.no_grad()
def quantize(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    settings: QuantizeSettings | None = None,
    *,
    formats: Sequence[str] | None = None,
    placement: Placement | None = None,
    texts: Texts | None = None,
    group: EPGroup | None = None,
    progress: ProgressCallback = no_progress,
    **options: Any,
) -> PackedExperts:
    """Write a model's experts in low-bit formats; a layer that was written before with equal settings is kept.

    Args:
        model: checkpoint directory, ORG/NAME of the hub, or a model loaded from one.
        out: directory to write to.
        settings: how to round, and how much text to calibrate on; default: `QuantizeSettings()`.
        formats: every expert in each of these; default: the formats of `placement`.
        placement: only the experts that it stores in low bits, in its formats.
        texts: calibration text, see `windows.read_texts`; needed unless weights are rounded to the nearest.
        group: ranks to shard the experts over; each quantizes its own, and rank 0 writes them. Default: all processes
            of the launcher, or this one.
        progress: called with (stage, done, total).
        options: fields of `QuantizeSettings` that differ from `settings`.

    Raises:
        UserError: nothing to quantize, no text to calibrate on, a model or a placement that does not fit.
    """
    for name in formats or ():
        get_format(name)  # raises if there is none
    settings = replace(settings or QuantizeSettings(), **options)
    if (formats is None) == (placement is None):
        raise UserError("give either --formats, for all experts, or --placement, for those it stores in low bits")
    if settings.rounding != "nearest" and texts is None:
        raise UserError(
            f"--rounding {settings.rounding} needs --text: give text of the kind you will serve, or round to nearest"
        )
    source, group = find_source(model, settings, group)
    windows = None
    if settings.rounding != "nearest":
        assert texts is not None
        windows = find_windows(source, texts, settings, group=group)
    loaded = LoadedModel.open(source, settings.dtype, settings.device, group, strict_weights=settings.strict_weights)
    if loaded.identity is None:
        raise UserError("quantize: the model was not loaded from a checkpoint directory")
    wanted_L = _wanted_experts(loaded, formats, placement)
    packed = PackedExperts(Path(out), loaded.identity)
    provenance = {
        "rounding": settings.rounding,
        "seed": str(settings.seed),
        "max_tokens": str(settings.max_tokens),
        "wanted": sha256(repr(wanted_L).encode()).hexdigest()[:16],
    }
    missing = _missing_layers(loaded, packed, wanted_L, provenance)
    rows_LE: dict[int, list[Tensor]] = {}
    if missing and windows is not None:
        forward_stats = collect_forward_stats(loaded, windows, max_rows=MAX_ROWS, progress=progress)
        rows_LE = {i: forward_stats.records[i].kept_rows() for i in missing}
    for done, i in enumerate(missing):
        progress("quantizing", done, len(missing))
        experts = loaded.experts[i]
        rows_E = rows_LE.get(i) or [torch.empty(0, loaded.family.hidden_size)] * experts.num_experts
        layer = _quantize_layer(loaded.group, experts, wanted_L[i], rows_E, ROUNDINGS[settings.rounding])
        if loaded.is_rank_zero:
            packed.write(experts.layer_index, provenance, layer)
    progress("quantizing", len(missing), len(missing))
    return packed


def _wanted_experts(
    loaded: LoadedModel, formats: Sequence[str] | None, placement: Placement | None
) -> list[ExpertFormats]:
    """[L] the experts to write, and in which formats."""
    native = get_format(loaded.native_format).name
    if placement is None:
        names = [name for name in dict.fromkeys(formats or ()) if get_format(name).name != native]
        if not names:
            raise UserError(f"--formats {','.join(formats or ())}: name a format other than the stored one, {native}")
        return [
            [(expert, name) for expert in range(experts.num_experts) for name in names] for experts in loaded.experts
        ]
    assert loaded.identity is not None
    placement.check_serves(loaded.identity, placement.topology.num_ranks)
    check_layers(placement, loaded.experts)
    wanted_L = [
        sorted({(replica.expert, replica.format) for replica in layer.replicas if replica.format != native})
        for layer in placement.layers
    ]
    if not any(wanted_L):
        raise UserError(f"--placement: all replicas are in {native}, as the checkpoint has them: nothing to quantize")
    return wanted_L


def _missing_layers(
    loaded: LoadedModel, packed: PackedExperts, wanted_L: Sequence[ExpertFormats], provenance: Mapping[str, str]
) -> list[int]:
    """The layers, by their place among the MoE layers, that have not been written with this provenance."""

    def read_files() -> list[int]:
        if not loaded.is_rank_zero:
            return []
        return [
            i
            for i, experts in enumerate(loaded.experts)
            if wanted_L[i] and not packed.has(experts.layer_index, provenance)
        ]

    missing = run_on_all_ranks(loaded.group, read_files)
    return missing if loaded.group is None else list(loaded.group.all_gather_object(missing)[0])


def _quantize_layer(
    group: EPGroup | None,
    experts: ExpertsModule,
    wanted: ExpertFormats,
    rows_E: Sequence[Tensor],
    round_expert: Rounding,
) -> PackedLayer:
    """The packed experts of a layer: on rank 0 all of them, elsewhere those that are held there."""

    def quantize_local() -> PackedLayer:
        return {
            (expert, name): round_expert(get_format(name), experts.weights(expert), rows_E[expert], experts.family)
            for expert, name in wanted
            if expert in experts.local_experts
        }

    local = run_on_all_ranks(group, quantize_local)
    return local | _gather_on_rank_zero(experts, wanted, local) if isinstance(experts, ShardedExperts) else local


def _gather_on_rank_zero(experts: ShardedExperts, wanted: ExpertFormats, local: PackedLayer) -> PackedLayer:
    """On rank 0 what the other ranks packed of a layer, on these nothing; every rank calls this."""
    group, rank_of, layout = experts.module.layer.group, experts.rank_of_expert, experts.family.layout
    if group.rank:
        group.start_transfers([(packed, 0) for packed in local.values()], []).wait()
        return {}
    received = {
        (expert, name): torch.empty(get_format(name).nbytes(layout), dtype=torch.uint8, device=group.device)
        for expert, name in wanted
        if rank_of[expert] != 0
    }
    group.start_transfers([], [(buffer, rank_of[expert]) for (expert, _), buffer in received.items()]).wait()
    return received
