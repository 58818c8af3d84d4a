"""Loading a checkpoint onto the ranks of an expert-parallel group; each rank gets an ordinary transformers model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from rq_ep.config import Environment
from rq_ep.core.cost import CostModel
from rq_ep.core.errors import check_integer
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.costs import cost_model
from rq_ep.formats import ExpertBuffers, get_format
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.load.attach import check_layers, layer_cost, place_uniformly, without_rank
from rq_ep.model.load.load_report import LoadReport
from rq_ep.model.load.memory import (
    RankBytes,
    arriving_bytes,
    check_fits,
    expert_bytes,
    most_layer_bytes,
    rank_bytes,
    step_bytes,
)
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.load.ranks import LoadRanks
from rq_ep.model.model_folder import find_model
from rq_ep.model.seam.expert_modules import ExpertsModule, experts_per_token, family_of
from rq_ep.moe import BorrowBuffers, EPExperts, ExpertBank, LocalExperts
from rq_ep.moe.telemetry import CallRecorder
from rq_ep.parallel import EPGroup, Exchange, ExchangeSettings
from rq_ep.parallel.agreement import run_on_all_ranks
from rq_ep.parallel.host import all_cores
from rq_ep.solver.migration.members import planner_for_members
from rq_ep.strategies import choose_strategy

log = logging.getLogger(__name__)


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
    telemetry: CallRecorder | None = None,
    max_tokens: int | None = None,
    max_dispatch_bytes: int | None = None,
    movable_formats: Sequence[str] | None = None,
    room_bytes: int = 0,
    keeps_stacks: bool = False,
    joins_later: bool = False,
    revision: str | None = None,
    strict_weights: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint with its experts distributed over the ranks; every rank of the group calls this.

    The result is an ordinary transformers model in evaluation mode, with a `LoadReport` as `model.rq_ep`. Every rank
    runs it on its own inputs, and all ranks must run it equally often: a rank without inputs calls the layers of
    `model.rq_ep.layers` with zero rows. `generate` does so by itself: its calls may end at different lengths, but each
    rank must make the same number of them.

    Args:
        path: directory of a Hugging Face checkpoint, or ORG/NAME of the hub (`find_model`).
        placement: the ranks and formats of all experts, or its file; default: the strategy places the experts by
            itself for uniform load, in the bytes of standard EP.
        strategy: splits each step's tokens among the replicas; its name, or an object. Default: the one that made the
            placement, `standard` without a placement.
        group: the ranks that share the experts; default: all processes of the launcher, or this one alone. With one
            group, several models use the same communicators.
        num_local_ranks: instead of a group, so many ranks in this process.
        dtype: to compute in; default: as the checkpoint was saved. Without a placement the experts are stored in it
            too; those of a placement are stored in its formats.
        device: auto, cpu or cuda, where no group decides it.
        attn_implementation: as in transformers.
        packed_experts: directory that `rq-ep quantize` wrote; an expert that is not there in its format is quantized
            now, each weight rounded to the nearest.
        machine: cost model by which strategies weigh transfers of weights against balance, or its name or file
            (`rq_ep.costs`), the same on every rank; default: they go by their settings alone.
        telemetry: records every call of every MoE layer.
        max_tokens: of a rank's largest step, whose rows then count when memory is checked; default: not known.
        max_dispatch_bytes: rows of other ranks that a rank holds at once; more come in parts. Default: a tenth more
            than in a balanced step.
        movable_formats: the placement may be replaced while the model runs, by one with experts in its own formats and
            in these; default: it stays.
        room_bytes: of a rank, beside its budget, for experts that arrive meanwhile; they count when memory is checked.
        keeps_stacks: experts of a layer stay in one buffer, as fast kernels want it, and are copied when some move.
        joins_later: this rank is to join others that serve already: it reads no experts, and its layers give zeros
            until then (`EPExperts.join`).
        revision: branch, tag or commit of a model of the hub.
        strict_weights: refuse a checkpoint with tensors that the model does not know, instead of leaving them unread.

    Raises:
        UserError: the checkpoint cannot be served, a file is missing, damaged or of another model, the placement is for
            other ranks or layers, or what a rank needs does not fit its device. It is raised on every rank.
    """
    for name, value in (("max_tokens", max_tokens), ("max_dispatch_bytes", max_dispatch_bytes)):
        if value is not None:
            check_integer(name, value, 1)
    ranks = LoadRanks.of(group, num_local_ranks, device)
    folder = find_model(path, revision, ranks.group)
    arguments = _Arguments(
        folder, placement, strategy, dtype, attn_implementation, packed_experts, machine, telemetry, max_tokens,
        max_dispatch_bytes, movable_formats, room_bytes, keeps_stacks, joins_later, strict_weights,
    )  # fmt: skip
    return run_on_all_ranks(ranks.group, lambda: _Loader(arguments, ranks).load())


@dataclass(frozen=True)
class _Arguments:
    """The arguments of `load` but those that choose the ranks."""

    path: Path
    placement: Placement | str | Path | None
    strategy: str | Strategy | None
    dtype: str | torch.dtype | None
    attn_implementation: str | None
    packed_experts: str | Path | None
    machine: CostModel | str | None
    telemetry: CallRecorder | None
    max_tokens: int | None
    max_dispatch_bytes: int | None
    movable_formats: Sequence[str] | None
    room_bytes: int
    keeps_stacks: bool
    joins_later: bool
    strict_weights: bool


class _Loader:
    """Loads a model onto the ranks of this process.

    Construction reads and checks everything but weights: the model is there with its parameters on the meta device.
    """

    def __init__(self, arguments: _Arguments, ranks: LoadRanks) -> None:
        self._arguments = arguments
        self._ranks = ranks
        path, placement, machine = arguments.path, arguments.placement, arguments.machine
        # Small files first, so that contradictory arguments are refused at once.
        placement = Placement.load(placement) if isinstance(placement, str | Path) else placement
        self._machine = cost_model(machine) if isinstance(machine, str) else machine
        self._strategy = choose_strategy(arguments.strategy, placement)
        self._opened = OpenedModel.open(
            path, arguments.dtype, arguments.attn_implementation, strict_weights=arguments.strict_weights
        )
        self._model, self._experts = self._opened.model, self._opened.experts
        self._family = family_of(self._experts[0].module)
        identity = model_identity(path)
        if placement is not None:
            placement.check_serves(identity, ranks.num_ranks)
        packed = arguments.packed_experts
        self._packed = None if packed is None else PackedExperts.open(packed, identity)

        layout = self._family.layout
        if placement is None:
            placement = place_uniformly(self._strategy, self._opened, ranks.num_ranks, identity)
        check_layers(placement, self._experts)
        placement.check_bytes({name: get_format(name).nbytes(layout) for name in placement.formats})
        self._placement = without_rank(placement, ranks.local[0]) if arguments.joins_later else placement

    def load(self) -> PreTrainedModel:
        """Replace the experts, read all weights, and return the model with its `LoadReport`."""
        resident = expert_bytes(self._placement, self._family.layout, self._ranks.local)
        needed = self._rank_bytes(resident)
        check_fits(needed, self._ranks.local[0], self._ranks.device)
        layers = self._replace_experts(needed.borrowed)
        with all_cores(Environment.from_os().local_world_size):
            self._read_experts(layers)
        self._opened.fill(self._ranks.device)
        assert sum(resident.values()) == sum(bank.nbytes for layer in layers for bank in _banks(layer))
        report = LoadReport(
            self._placement,
            self._strategy,
            layers,
            self._arguments.telemetry,
            self._opened.checkpoint.bytes_read,
            resident,
            needed,
        )
        self._finish(report)
        return self._model

    def _rank_bytes(self, resident: Mapping[str, int]) -> RankBytes:
        ranks, arguments = self._ranks, self._arguments
        step = None
        if arguments.max_tokens is not None:
            top_k = experts_per_token(self._model.config)
            step = step_bytes(
                self._family, top_k, ranks.num_ranks, arguments.max_tokens, self._opened.dtype, ranks.device.type,
                arguments.max_dispatch_bytes,
            )  # fmt: skip
        arriving = 0
        if arguments.movable_formats is not None:
            arriving = arriving_bytes(self._placement, ranks.local, arguments.room_bytes)
            if arguments.keeps_stacks:
                arriving += most_layer_bytes(self._placement, self._family.layout, ranks.local)
        return rank_bytes(
            self._model, self._experts, resident, self._placement, self._strategy, self._family.layout, step,
            arguments.movable_formats, arriving,
        )  # fmt: skip

    def _replace_experts(self, max_borrowed_bytes: int) -> tuple[EPExperts | LocalExperts, ...]:
        """Put an expert-parallel layer, its banks still empty, in the place of every experts module."""
        ranks, telemetry = self._ranks, self._arguments.telemetry
        come_and_go = self._arguments.movable_formats is not None and not self._arguments.keeps_stacks
        expert_buffers = ExpertBuffers(ranks.device) if come_and_go else None
        borrow_buffers = [BorrowBuffers(self._family.layout, ranks.device, max_borrowed_bytes) for _ in ranks.local]
        exchange_settings = ExchangeSettings.for_device(
            ranks.device.type, self._arguments.max_dispatch_bytes, is_alone=ranks.num_ranks == 1
        )
        layers: list[EPExperts | LocalExperts] = []
        for module, placed in zip(self._experts, self._placement.layers, strict=True):
            family = family_of(module.module)
            cost = layer_cost(self._machine, family, self._placement, self._strategy)
            planner = planner_for_members(self._strategy, placed, self._placement.topology, cost, ranks.members)
            layer: EPExperts | LocalExperts
            if ranks.group is None:
                layer = LocalExperts(
                    family,
                    placed,
                    planner,
                    ranks.num_ranks,
                    device=ranks.device,
                    exchange_settings=exchange_settings,
                    telemetry=telemetry,
                    borrow_buffers=borrow_buffers,
                    expert_buffers=expert_buffers,
                )
            else:
                layer = EPExperts(
                    family,
                    placed,
                    planner,
                    ranks.group,
                    exchange=Exchange(ranks.group, exchange_settings),
                    telemetry=telemetry,
                    joins_later=self._arguments.joins_later,
                    borrow_buffers=borrow_buffers[0],
                    expert_buffers=expert_buffers,
                )
            self._model.set_submodule(module.name, layer)
            layers.append(layer)
        return tuple(layers)

    def _read_experts(self, layers: Sequence[EPExperts | LocalExperts]) -> None:
        """Read the replicas of this process one by one into their banks; those not packed in advance are packed now."""
        replicas = [
            (module, expert, bank)
            for module, layer in zip(self._experts, layers, strict=True)
            for bank in _banks(layer)
            for expert in bank.experts
        ]
        console = Console(stderr=True)
        is_shown = 0 in self._ranks.local and console.is_terminal
        for module, expert, bank in track(replicas, "Loading experts", console=console, disable=not is_shown):
            packed = self._packed_expert(module, expert, bank.format_of(expert).name)
            if packed is None:
                weights = self._opened.reader.expert(module.name, expert)
                bank.put(expert, {name: weight.to(self._ranks.device) for name, weight in weights.items()})
            else:
                bank.put_packed(expert, packed.to(self._ranks.device))

    def _packed_expert(self, module: ExpertsModule, expert: int, format_name: str) -> torch.Tensor | None:
        """An expert as the checkpoint or `rq-ep quantize` stored it; None if neither has it in this format."""
        packed = self._opened.reader.stored_expert(module.name, expert, format_name)
        if packed is None and self._packed is not None:
            packed = self._packed.packed(module.layer_index, expert, format_name)
        return packed

    def _finish(self, report: LoadReport) -> None:
        model: Any = self._model
        model.to(self._ranks.device).eval().requires_grad_(False)
        model.rq_ep = report
        if self._ranks.are_processes:
            # Ranks end their sequences apart: those that are done go on calling the model until all are.
            model.generate = partial(model.generate, synced_gpus=True)
        if 0 in self._ranks.local:
            self._opened.log_notes()
        rank, sizes = self._ranks.local[0], sorted(report.expert_bytes.items())
        shown = ", ".join(f"{size:,} in {name}" for name, size in sizes)
        log.info("rank %d: %s bytes read, bytes of experts: %s", rank, f"{report.bytes_read:,}", shown or 0)
        log.info("rank %d needs at most %s", rank, report.rank_bytes)


def _banks(layer: EPExperts | LocalExperts) -> tuple[ExpertBank, ...]:
    return layer.banks if isinstance(layer, LocalExperts) else (layer.bank,)
