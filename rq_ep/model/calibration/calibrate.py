"""Calibration: run a little text, and learn each expert's load, step by step, and how much low bits would hurt it."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rq_ep.core.arrays import FloatArray
from rq_ep.core.errors import UserError, check_choice, check_integer
from rq_ep.core.files import check_writable
from rq_ep.core.stats import ExpertStats
from rq_ep.formats import get_format
from rq_ep.model.calibration.divergence import Divergence, dropped_LE, quantized_LEQ
from rq_ep.model.calibration.forward_stats import Progress, Subject, listen
from rq_ep.model.calibration.importance import IMPORTANCES, wanda_E
from rq_ep.model.calibration.layer_records import LayerRecord
from rq_ep.model.calibration.output_error import output_errors
from rq_ep.model.calibration.route_log import RouteLog
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.load.ranks import together
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.text.windows import Texts
from rq_ep.parallel import EPGroup
from rq_ep.parallel.default_group import default_group


@torch.no_grad()
def calibrate(
    model: str | Path | PreTrainedModel,
    texts: Texts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    formats: Sequence[str] | None = None,
    batch_size: int = 8,
    sequence_length: int = 128,
    max_tokens: int = 32_768,
    importance: str = "output",
    measure_kl: bool = False,
    sensitivity_tokens: int = 2048,
    packed_experts: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    group: EPGroup | None = None,
    seed: int = 0,
    trace_path: str | Path | None = None,
    halfway_path: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ExpertStats:
    """Run text through a model and record what `place` needs to know of its experts.

    The text runs through the model once (`listen`); loads, importance and the inputs on which formats are measured all
    come from that pass. A model that is too large for one process is spread over the ranks of a group, all of which
    call this with the same arguments, get the same result, and leave files to rank 0.

    Args:
        model: checkpoint directory, or a model that is already in memory.
        texts: domain -> texts; or texts (str); or paths (Path) of files and directories, see `windows.read_texts`.
        tokenizer: default: the checkpoint's.
        formats: weight formats to measure; the native one is always among them. Default: native and, unless the
            checkpoint is quantized already, int8.
        batch_size: sequences in a batch.
        sequence_length: tokens in a sequence.
        max_tokens: tokens to run in all, shared evenly by the domains.
        importance: how much an expert matters, one of `importance.IMPORTANCES`. `drop` takes a pass over
            `sensitivity_tokens` for every expert: for small models.
        measure_kl: also measure what each expert's formats do to the model's answers, a pass for each of them; `place`
            then goes by this instead of importance and error. For small models, in one process.
        sensitivity_tokens: tokens of such a pass, at least one batch.
        packed_experts: directory that `rq-ep quantize` wrote: the error of a format is measured on these experts, where
            they are there, instead of on weights rounded to the nearest.
        dtype: to compute in; default: as the weights are stored.
        device: auto, cpu or cuda; a model in memory, or a group, stays where it is.
        group: ranks to spread the experts of a checkpoint over; default: all processes of the launcher, or this one.
        seed: chooses the places that windows of text are taken from.
        trace_path: also write what the router chose for every token of the same steps, a `RoutingTrace`, there.
        halfway_path: file to keep what has been heard in, so that the same call can go on where it was stopped; not
            with a trace.
        progress: called with (stage, done, total) while it runs.

    Raises:
        UserError: no such checkpoint, a model without experts that we can serve, no text, an unknown format, a model
            whose experts give infinite or undefined outputs.
    """
    check_choice("--importance", importance, IMPORTANCES)
    check_integer("--sensitivity-tokens", sensitivity_tokens, 1)
    if group is None and not isinstance(model, PreTrainedModel):
        group = default_group(device)
    subject = Subject.open(model, dtype, device, group)
    if measure_kl and subject.group is not None:
        raise UserError(
            f"--measure-kl changes expert by expert in one process, not on {subject.group.size}: leave it out"
        )
    if formats is None:
        formats = ("int8",) if get_format(subject.native).is_native else ()
    names = tuple(dict.fromkeys((subject.native, *formats)))
    others = [get_format(name) for name in names[1:]]
    if trace_path is not None and subject.is_seq2seq:
        raise UserError("--trace: layers of an encoder and a decoder see different tokens; leave it out")
    routes = RouteLog() if trace_path is not None and subject.is_first else None

    def open_files() -> PackedExperts | None:
        if trace_path is not None and subject.is_first:
            check_writable(trace_path)
        if packed_experts is None:
            return None
        if subject.identity is None:
            raise UserError("--experts: the model was not loaded from a checkpoint directory")
        return PackedExperts.open(packed_experts, subject.identity)

    prepared = together(subject.group, open_files)
    heard = listen(
        subject, texts, tokenizer=tokenizer, batch_size=batch_size, sequence_length=sequence_length,
        max_tokens=max_tokens, seed=seed, routes=routes, halfway_path=halfway_path, progress=progress,
    )  # fmt: skip
    experts, layout, records = subject.experts, subject.family.layout, heard.records
    num_experts = experts[0].num_experts
    layers = tuple(found.layer for found in experts)
    if routes is not None and trace_path is not None:
        routes.trace(num_experts, layers, subject.identity).save(trace_path)

    error_LEQ = np.zeros((len(experts), num_experts, len(names)))  # of the native format: none

    def measure_errors() -> None:
        for i, (found, record) in enumerate(zip(experts, records, strict=True)):
            packed = partial(_packed, prepared, found.layer)
            error_LEQ[i, :, 1:] = output_errors(found, subject.family, record.kept_rows(), others, packed)
            progress("formats", i + 1, len(experts))

    together(subject.group, measure_errors)
    asks_again = importance == "drop" or (measure_kl and bool(others))
    num_batches = max(1, sensitivity_tokens // (batch_size * sequence_length))
    divergence = Divergence(subject.network, heard.windows.batches[:num_batches]) if asks_again else None
    kl_LEQ = None
    if measure_kl and divergence is not None:
        kl_LEQ = np.zeros_like(error_LEQ)
        tick = _ticks(progress, "formats, expert by expert", kl_LEQ[..., 1:].size)
        kl_LEQ[..., 1:] = quantized_LEQ(divergence, experts, layout, others, tick)

    shape = subject.family.shape(names)
    return ExpertStats(
        counts=np.stack([step.counts_LE for step in heard.steps]),
        tokens=np.array([step.tokens for step in heard.steps], np.int64),
        phase=np.array([step.phase for step in heard.steps], np.int64),
        domain=np.array([step.domain for step in heard.steps], np.int64),
        formats=names,
        native_format=subject.native,
        expert_bytes=shape.expert_bytes,
        importance=_importance_LE(importance, subject, records, divergence, progress),
        visits=np.stack([record.visits_E for record in records]),
        gate_mass=np.stack([record.gate_mass_E for record in records]),
        error=_of_all_ranks(subject, error_LEQ),
        kl=kl_LEQ,
        model=subject.identity,
        layers=layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        top_k=records[0].topk_ids_TK.shape[1],
        expert_groups=getattr(subject.network.config, "n_group", None) or None,
        importance_definition=IMPORTANCES[importance],
        num_tokens=heard.windows.num_tokens,
        domains=heard.windows.domains,
        source="calibration",
    )


def _of_all_ranks(subject: Subject, found: FloatArray) -> FloatArray:
    """What ranks found of the experts that they hold, put together: each lies on one of them, the others have zeros."""
    return found if subject.group is None else np.sum(subject.group.all_gather_object(found), axis=0)


def _packed(prepared: PackedExperts | None, layer: int, expert: int, name: str) -> Tensor | None:
    return None if prepared is None else prepared.packed(layer, expert, name)


def _importance_LE(
    name: str,
    subject: Subject,
    records: Sequence[LayerRecord],
    divergence: Divergence | None,
    progress: Progress,
) -> FloatArray:
    """[L, E] what `importance.IMPORTANCES` calls `name`."""
    if name == "drop":
        assert divergence is not None
        tick = _ticks(progress, "dropping, expert by expert", sum(found.num_experts for found in subject.experts))
        return dropped_LE(divergence, subject.experts, tick)
    of_record: dict[str, Callable[[ExpertsModule, LayerRecord], FloatArray]] = {
        "output": lambda found, record: record.importance_E,
        "gate-mass": lambda found, record: record.gate_mass_E,
        "load": lambda found, record: record.visits_E.astype(np.float64),
        "wanda": lambda found, record: wanda_E(found, subject.family, record.kept_rows(), record.visits_E),
    }
    found_LE = np.stack([of_record[name](*pair) for pair in zip(subject.experts, records, strict=True)])
    return _of_all_ranks(subject, found_LE) if name == "wanda" else found_LE


def _ticks(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """Each call reports one more step of a stage."""
    numbers = count(1)
    return lambda: progress(stage, next(numbers), total)
