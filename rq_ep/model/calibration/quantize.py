"""Quantizing experts in advance: rounded with regard to the inputs they meet, layer by layer, into a directory."""

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.placement import Placement
from rq_ep.formats import get_format
from rq_ep.model.calibration.forward_stats import Progress, Subject, listen
from rq_ep.model.calibration.rounding import ROUNDINGS, Rounding
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.load.attach import check_layers
from rq_ep.model.load.ranks import together
from rq_ep.model.load.sharded_model import SpreadExperts
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.text.windows import Texts
from rq_ep.parallel import EPGroup
from rq_ep.parallel.default_group import default_group

MAX_ROWS = 2048  # inputs kept of each expert: GPTQ wants some for each of a matrix' inputs


@torch.no_grad()
def quantize(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    formats: Sequence[str] | None = None,
    placement: Placement | None = None,
    rounding: str = "calibrated",
    texts: Texts | None = None,
    max_tokens: int = 32_768,
    batch_size: int = 8,
    sequence_length: int = 128,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    group: EPGroup | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> PackedExperts:
    """Write a model's experts in low-bit formats; layers that are there already, made in the same way, are kept.

    Args:
        model: checkpoint directory, or a model loaded from one.
        out: directory to write to.
        formats: every expert in each of these; default: what `placement` asks for.
        placement: only the experts that it stores in low bits, in its formats.
        rounding: one of `rounding.ROUNDINGS`; `calibrated` needs text.
        texts: what the experts are to meet; see `windows.read_texts`.
        max_tokens: tokens to run in all.
        batch_size: sequences in a batch.
        sequence_length: tokens in a sequence.
        dtype: to compute in; default: as the weights are stored.
        device: auto, cpu or cuda, where no group decides it.
        group: ranks to spread the experts over; each quantizes its own, and rank 0 writes them. Default: all processes
            of the launcher, or this one.
        seed: chooses the places that windows of text are taken from.
        progress: called with (stage, done, total) while it runs.

    Raises:
        UserError: nothing to quantize, no text to calibrate on, a model or a placement that does not fit.
    """
    for name in formats or ():
        get_format(name)  # names it if there is none
    round_expert = ROUNDINGS[check_choice("--rounding", rounding, ROUNDINGS)]
    if (formats is None) == (placement is None):
        raise UserError("give either --formats, for all experts, or --placement, for those it stores in low bits")
    if rounding != "nearest" and texts is None:
        raise UserError(
            f"--rounding {rounding} needs --text: give text of the kind you will serve, or round to nearest"
        )
    if group is None and not isinstance(model, PreTrainedModel):
        group = default_group(device)
    subject = Subject.open(model, dtype, device, group)
    if subject.identity is None:
        raise UserError("quantize: the model was not loaded from a checkpoint directory")
    wanted = _wanted(subject, formats, placement)
    how = {"rounding": rounding, "seed": str(seed), "max_tokens": str(max_tokens), "wanted": _digest(wanted)}
    packed = PackedExperts(Path(out), subject.identity)
    missing = _missing(subject, packed, wanted, how)
    rows_LE: dict[int, list[Tensor]] = {}
    if missing and rounding != "nearest":
        assert texts is not None
        heard = listen(
            subject, texts, max_tokens=max_tokens, batch_size=batch_size, sequence_length=sequence_length, seed=seed,
            max_rows=MAX_ROWS, progress=progress,
        )  # fmt: skip
        rows_LE = {at: heard.records[at].kept_rows() for at in missing}
    for done, at in enumerate(missing):
        progress("quantizing", done, len(missing))
        found = subject.experts[at]
        rows_E = rows_LE[at] if rows_LE else [torch.empty(0, subject.family.hidden_size)] * found.num_experts
        experts = together(subject.group, partial(_held, found, wanted[at], rows_E, round_expert))
        if isinstance(found, SpreadExperts):
            experts |= _from_other_ranks(found, wanted[at], experts)
        if subject.is_first:
            packed.write(found.layer, how, experts)
    progress("quantizing", len(missing), len(missing))
    return packed


Packed = dict[tuple[int, str], Tensor]  # (expert, format) -> uint8 [nbytes]
Wanted = list[list[tuple[int, str]]]  # [L] (expert, format) to be written


def _missing(subject: Subject, packed: PackedExperts, wanted: Wanted, how: Mapping[str, str]) -> list[int]:
    """The layers, by their place among the MoE layers, that rank 0 does not find written as wanted."""

    def look() -> list[int]:
        if not subject.is_first:
            return []
        return [at for at, found in enumerate(subject.experts) if wanted[at] and not packed.has(found.layer, how)]

    missing = together(subject.group, look)
    return missing if subject.group is None else list(subject.group.all_gather_object(missing)[0])


def _held(
    found: ExpertsModule, wanted: Sequence[tuple[int, str]], rows_E: Sequence[Tensor], round_expert: Rounding
) -> Packed:
    """What is wanted of a layer and lies in this process."""
    return {
        (expert, name): round_expert(get_format(name), found.weights(expert), rows_E[expert], found.family)
        for expert, name in wanted
        if expert in found.held
    }


def _from_other_ranks(found: SpreadExperts, wanted: Sequence[tuple[int, str]], own: Packed) -> Packed:
    """On rank 0 what the others packed of a layer, on these nothing; every rank calls this."""
    group, homes, layout = found.module.layer.group, found.homes, found.family.layout
    if group.rank:
        group.start_transfers([(packed, 0) for packed in own.values()], []).wait()
        return {}
    landings = {
        (expert, name): torch.empty(get_format(name).nbytes(layout), dtype=torch.uint8, device=group.device)
        for expert, name in wanted
        if homes[expert] != 0
    }
    group.start_transfers([], [(landing, homes[expert]) for (expert, _), landing in landings.items()]).wait()
    return landings


def _wanted(subject: Subject, formats: Sequence[str] | None, placement: Placement | None) -> Wanted:
    native = get_format(subject.native).name
    if placement is None:
        names = [name for name in dict.fromkeys(formats or ()) if get_format(name).name != native]
        if not names:
            raise UserError(f"--formats {','.join(formats or ())}: name a format other than the stored one, {native}")
        return [[(expert, name) for expert in range(found.num_experts) for name in names] for found in subject.experts]
    assert subject.identity is not None
    placement.check_serves(subject.identity, placement.topology.num_ranks)
    check_layers(placement, subject.experts)
    wanted = [
        sorted({(replica.expert, replica.format) for replica in layer.replicas if replica.format != native})
        for layer in placement.layers
    ]
    if not any(wanted):
        raise UserError(f"--placement: all replicas are in {native}, as the checkpoint has them: nothing to quantize")
    return wanted


def _digest(wanted: Wanted) -> str:
    return sha256(repr(wanted).encode()).hexdigest()[:16]
