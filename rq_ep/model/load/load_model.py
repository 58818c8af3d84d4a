"""Loading a checkpoint onto the ranks of an expert-parallel group: on every rank, an ordinary transformers model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from rq_ep.core.cost import CostModel
from rq_ep.core.errors import check_integer
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.costs import cost_model
from rq_ep.formats import get_format
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format, open_checkpoint
from rq_ep.model.checkpoint.weight_conversion import WeightReader
from rq_ep.model.dtypes import stored_dtype, torch_dtype
from rq_ep.model.load.attach import check_layers, choose_strategy, layer_cost, place_uniformly
from rq_ep.model.load.memory import RankBytes, check_fits, expert_bytes, rank_bytes, step_bytes
from rq_ep.model.load.ranks import LoadRanks
from rq_ep.model.load.whole_model import empty_model, fill
from rq_ep.model.seam.expert_modules import ExpertsModule, family_of, find_expert_modules
from rq_ep.moe import BorrowBuffers, EPExperts, ExpertBank, LocalExperts, Telemetry
from rq_ep.parallel import EPGroup, Exchange, ExchangeSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """How a model's experts were loaded; a loaded model keeps it as `model.rq_ep`, see `report_of`."""

    placement: Placement
    strategy: Strategy
    layers: tuple[EPExperts | LocalExperts, ...]  # in the order in which a forward pass enters them
    telemetry: Telemetry | None
    bytes_read: int  # from the checkpoint, by this process
    expert_bytes: Mapping[str, int]  # resident in this process, by weight format
    rank_bytes: RankBytes  # all that a rank needs of its device


def report_of(model: PreTrainedModel) -> LoadReport:
    """The report of a model that `load` returned."""
    report: Any = model.rq_ep
    assert isinstance(report, LoadReport), report
    return report


def load(
    path: str | Path,
    placement: Placement | str | Path | None = None,
    strategy: str | Strategy | None = None,
    *,
    group: EPGroup | None = None,
    num_local_ranks: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    attn_implementation: str | None = None,
    packed_experts: str | Path | None = None,
    machine: CostModel | str | None = None,
    telemetry: Telemetry | None = None,
    max_tokens: int | None = None,
    max_dispatch_bytes: int | None = None,
) -> PreTrainedModel:
    """Load a checkpoint with its experts spread over the ranks; every rank of the group calls this.

    The result is an ordinary transformers model in evaluation mode. Every rank runs it on its own inputs, and all ranks
    must run it equally often: a rank without inputs calls the layers of `model.rq_ep.layers` with zero rows. `generate`
    sees to that by itself, so its calls may end apart, but each rank must make the same number of them.

    Args:
        path: directory of a Hugging Face checkpoint.
        placement: where the experts go, or the file that says so; default: the strategy places them by itself, taking
            all experts to be equally busy, in the bytes of standard EP.
        strategy: how each step's tokens are spread, by name or as an object; default: the one that made the placement,
            `standard` without a placement.
        group: the ranks that share the experts; default: all processes of the launcher, or this one alone. Name one to
            load several models on the same communicators.
        num_local_ranks: instead of a group, play so many ranks in this process.
        dtype: what activations and all but the experts are computed in; default: as the checkpoint was saved. Without
            a placement the experts are stored in it too; those of a placement are stored in its formats.
        device: auto, cpu or cuda, where no group decides it.
        attn_implementation: as in transformers.
        packed_experts: directory that `rq-ep quantize` wrote; an expert that is not there in its format is quantized
            now, each weight rounded to the nearest.
        machine: what strategies weigh moving weights against balance with, or its name or file (`rq_ep.costs`), the
            same on every rank; default: they go by their settings alone.
        telemetry: told about every call of every MoE layer.
        max_tokens: of a rank's largest step, so that its rows are counted when memory is checked; default: not known.
        max_dispatch_bytes: rows of other ranks that a rank holds at once; more come in parts. Default: a tenth more
            than in a balanced step.

    Raises:
        UserError: the checkpoint cannot be served, a file is missing, damaged or of another model, the placement is for
            other ranks or layers, or what a rank needs does not fit its device; on every rank, whichever found it.
    """
    for name, value in (("max_tokens", max_tokens), ("max_dispatch_bytes", max_dispatch_bytes)):
        if value is not None:
            check_integer(name, value, 1)
    ranks = LoadRanks.of(group, num_local_ranks, device)
    return ranks.together(
        lambda: _load(
            path, placement, strategy, ranks, dtype, attn_implementation, packed_experts, machine, telemetry,
            max_tokens, max_dispatch_bytes,
        )
    )  # fmt: skip


def _load(
    path: str | Path,
    placement: Placement | str | Path | None,
    strategy: str | Strategy | None,
    ranks: LoadRanks,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
    packed_experts: str | Path | None,
    machine: CostModel | str | None,
    telemetry: Telemetry | None,
    max_tokens: int | None,
    max_dispatch_bytes: int | None,
) -> PreTrainedModel:
    if isinstance(placement, str | Path):
        placement = Placement.load(placement)
    if isinstance(machine, str):
        machine = cost_model(machine)
    strategy = choose_strategy(strategy, placement)
    config = read_config(path)
    serving_dtype = _serving_dtype(dtype, config)
    identity = model_identity(path)
    if placement is not None:
        placement.check_serves(identity, ranks.num_ranks)
    prepared = None if packed_experts is None else PackedExperts.open(packed_experts, identity)

    model = empty_model(path, config, serving_dtype, attn_implementation)
    experts = find_expert_modules(model)
    family = family_of(experts[0].module)
    layout = family.layout
    checkpoint = open_checkpoint(path)
    reader = WeightReader(checkpoint, model, [module.name for module in experts])
    if placement is None:
        placement = place_uniformly(
            strategy, experts, layout, expert_format(checkpoint, serving_dtype), ranks.num_ranks, identity
        )
    check_layers(placement, experts)
    placement.check_bytes({name: get_format(name).nbytes(layout) for name in placement.formats})
    resident = expert_bytes(placement, layout, ranks.local)
    step = None
    if max_tokens is not None:
        top_k = getattr(config.get_text_config(), "num_experts_per_tok", None) or 1
        kind = ranks.device.type
        step = step_bytes(family, top_k, ranks.num_ranks, max_tokens, serving_dtype, kind, max_dispatch_bytes)
    needed = rank_bytes(model, experts, resident, placement, strategy, layout, step)
    check_fits(needed, ranks.local[0], ranks.device)

    layers = _replace_experts(
        model, experts, placement, strategy, ranks, machine, telemetry, needed.borrowed, max_dispatch_bytes
    )
    _read_experts(reader, prepared, experts, layers, ranks)
    fill(model, reader, serving_dtype, ranks.device)
    assert sum(resident.values()) == sum(bank.nbytes for layer in layers for bank in _banks(layer))
    report = LoadReport(placement, strategy, layers, telemetry, checkpoint.bytes_read, resident, needed)
    _finish(model, path, ranks, report)
    sizes = ", ".join(f"{size:,} in {name}" for name, size in sorted(resident.items()))
    log.info("rank %d: %s bytes read, bytes of experts: %s", ranks.local[0], f"{checkpoint.bytes_read:,}", sizes or 0)
    log.info("rank %d needs at most %s", ranks.local[0], needed)
    return model


def _serving_dtype(dtype: str | torch.dtype | None, config: PretrainedConfig) -> torch.dtype:
    return stored_dtype(config) if dtype is None or dtype == "auto" else torch_dtype(dtype)


def _replace_experts(
    model: PreTrainedModel,
    experts: Sequence[ExpertsModule],
    placement: Placement,
    strategy: Strategy,
    ranks: LoadRanks,
    machine: CostModel | None,
    telemetry: Telemetry | None,
    max_borrowed_bytes: int,
    max_dispatch_bytes: int | None,
) -> tuple[EPExperts | LocalExperts, ...]:
    """Put an expert-parallel layer, its banks still empty, in the place of every experts module."""
    layout = family_of(experts[0].module).layout
    borrow_buffers = [BorrowBuffers(layout, ranks.device, max_borrowed_bytes) for _ in ranks.local]
    exchange = ExchangeSettings.for_device(ranks.device.type, max_dispatch_bytes)
    layers: list[EPExperts | LocalExperts] = []
    for module, placed in zip(experts, placement.layers, strict=True):
        family = family_of(module.module)
        cost = layer_cost(machine, family, placement, strategy)
        planner = strategy.planner(placed, placement.topology, cost)
        layer: EPExperts | LocalExperts
        if ranks.group is None:
            layer = LocalExperts(
                family,
                placed,
                planner,
                ranks.num_ranks,
                device=ranks.device,
                exchange=exchange,
                telemetry=telemetry,
                borrow_buffers=borrow_buffers,
            )
        else:
            layer = EPExperts(
                family,
                placed,
                planner,
                ranks.group,
                exchange=Exchange(ranks.group, exchange),
                telemetry=telemetry,
                borrow_buffers=borrow_buffers[0],
            )
        model.set_submodule(module.name, layer)
        layers.append(layer)
    return tuple(layers)


def _banks(layer: EPExperts | LocalExperts) -> tuple[ExpertBank, ...]:
    return layer.banks if isinstance(layer, LocalExperts) else (layer.bank,)


def _read_experts(
    reader: WeightReader,
    prepared: PackedExperts | None,
    experts: Sequence[ExpertsModule],
    layers: Sequence[EPExperts | LocalExperts],
    ranks: LoadRanks,
) -> None:
    """Read and store this process' replicas, one by one; what is not packed yet is packed where it will lie."""
    replicas = [
        (module, expert, bank)
        for module, layer in zip(experts, layers, strict=True)
        for bank in _banks(layer)
        for expert in bank.experts
    ]
    console = Console(stderr=True)
    is_shown = 0 in ranks.local and console.is_terminal
    for module, expert, bank in track(replicas, "Loading experts", console=console, disable=not is_shown):
        format_ = bank.format_of(expert).name
        packed = reader.stored_expert(module.name, expert, format_)
        if packed is None and prepared is not None:
            packed = prepared.packed(module.layer_index, expert, format_)
        if packed is None:
            weights = reader.expert(module.name, expert)
            bank.put(expert, {tensor: weight.to(ranks.device) for tensor, weight in weights.items()})
        else:
            bank.put_packed(expert, packed.to(ranks.device))


def _finish(model: Any, path: str | Path, ranks: LoadRanks, report: LoadReport) -> None:
    if (Path(path) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.to(ranks.device).eval().requires_grad_(False)
    model.rq_ep = report
    if ranks.are_processes:
        # LoadRanks end their sequences apart: those that are done go on calling the model until all are.
        model.generate = partial(model.generate, synced_gpus=True)
