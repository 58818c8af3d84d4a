"""What is measured. Everything follows from these fields: rows, routing, weights, and what calibration saw."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from bench.layer.published import Shape
from bench.layer.recorded import Recorded, RecordedRoutes
from bench.layer.workloads import Workload
from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import CostModel, LayerCost, LayerShape
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Planner, Strategy
from rq_ep.core.topology import Topology
from rq_ep.costs import Profile
from rq_ep.formats import FORMATS, get_format, native_format_name
from rq_ep.moe import ExpertFamily

NUM_CALIBRATION_STEPS = 16
MAX_CALIBRATION_TOKENS = 4096  # per rank and step: shares of load need no more
MAX_KEPT_BYTES = 2**30  # of experts' weights as drawn
NUM_BATCHES = 4  # different batches that take turns, by default

Routes = tuple[tuple[IntArray, ...], ...]


@dataclass(frozen=True)
class Batch:
    """The rows of one rank in one step."""

    hidden_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Contestant:
    """A strategy, with replicas beyond standard EP's bytes, or with a placement from a file instead of its own."""

    strategy: Strategy
    num_extra_replicas: int = 0
    placement: Placement | None = None


@dataclass(frozen=True)
class Case:
    """One layer under one workload and several strategies."""

    shape: Shape  # as run
    full_shape: Shape  # of the model, before sizes were reduced
    workload: Workload | Recorded
    calibration: Workload | Recorded
    contestants: dict[str, Contestant]
    formats: tuple[str, ...]
    dtype: torch.dtype
    machine: CostModel | None
    num_rounds: int
    seed: int
    num_batches: int = NUM_BATCHES
    drawn_experts: dict[int, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def family(self) -> ExpertFamily:
        return _family(self.shape)

    def ids(self, step: int, rank: int, num_ranks: int) -> IntArray:
        """[T, K] experts of one rank's tokens in a measured step."""
        return self.workload.ids(self.seed, "measure", step, rank, num_ranks)

    def all_ids(self, num_ranks: int) -> Routes:
        """[batch][rank] experts of all ranks' tokens in the measured steps."""
        return tuple(
            tuple(self.ids(step, rank, num_ranks) for rank in range(num_ranks)) for step in range(self.num_batches)
        )

    def counts(self, ids_R: Sequence[IntArray]) -> IntArray:
        """[R, E] routed pairs of one step."""
        return np.stack([_count(ids_TK, self.shape) for ids_TK in ids_R])

    def batch(self, step: int, rank: int, num_ranks: int, device: torch.device) -> Batch:
        ids_TK = torch.from_numpy(self.ids(step, rank, num_ranks)).to(device)
        random = torch.Generator(device).manual_seed(hash((self.seed, step, rank)))
        hidden_TD = torch.randn(len(ids_TK), self.shape.hidden_size, generator=random, device=device)
        weights_TK = torch.rand(ids_TK.shape, generator=random, device=device).softmax(-1)
        if isinstance(self.workload, RecordedRoutes):
            weights_TK = torch.from_numpy(self.workload.weights("measure", step, rank, num_ranks)).to(device)
        return Batch(hidden_TD.to(self.dtype), ids_TK, weights_TK)

    def expert(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """Weights of an expert, the same for every strategy and rank. A CPU keeps some, as drawing them takes time."""
        if number in self.drawn_experts:
            return self.drawn_experts[number]
        random = torch.Generator(device).manual_seed(self.seed * 100_003 + number)
        weights = {
            name: (torch.randn(shape, generator=random, device=device) * shape[1] ** -0.5).to(self.dtype)
            for name, shape in self.family.layout.shapes.items()
        }
        num_bytes = sum(weight.nbytes for weight in weights.values())
        if device.type == "cpu" and (len(self.drawn_experts) + 1) * num_bytes <= MAX_KEPT_BYTES:
            self.drawn_experts[number] = weights
        return weights

    def stats(self, num_ranks: int) -> ExpertStats:
        """Calibration: loads of steps that are not measured, from the same generator."""
        source = self.calibration
        if isinstance(source, Workload):
            source = replace(source, tokens_per_rank=min(source.tokens_per_rank, MAX_CALIBRATION_TOKENS))
        counts_SE = [
            sum(
                _count(source.ids(self.seed, "calibrate", step, rank, num_ranks), self.shape)
                for rank in range(num_ranks)
            )
            for step in range(NUM_CALIBRATION_STEPS)
        ]
        sizes = {name: get_format(name).nbytes(self.family.layout) for name in self.formats}
        return ExpertStats(
            counts=np.stack(counts_SE)[:, None],
            formats=self.formats,
            native_format=self.formats[0],
            expert_bytes=sizes,
            hidden_size=self.shape.hidden_size,
            intermediate_size=self.shape.intermediate_size,
            top_k=self.shape.top_k,
        )

    def place(self, name: str, stats: ExpertStats, topology: Topology) -> LayerPlacement:
        """A contestant's replicas: those of its file; else inside standard EP's bytes, unless it names extra ones."""
        contestant = self.contestants[name]
        if contestant.placement is not None:
            return self._layer_of(contestant.placement, name, topology)
        budget = (standard_ep_bytes(stats, topology.num_ranks),) * topology.num_ranks
        problem = PlacementProblem(
            stats,
            topology,
            None if contestant.num_extra_replicas else budget,
            self.formats,
            num_redundant_experts=contestant.num_extra_replicas,
        )
        return contestant.strategy.place(problem).layers[0]

    def _layer_of(self, placement: Placement, name: str, topology: Topology) -> LayerPlacement:
        """The workload's layer of a placement, its native replicas in this run's dtype, the others as they are.

        Raises:
            UserError: it is for another number of ranks or experts, or lacks the layer.
        """
        source = f"--placement of {name}"
        if placement.topology.num_ranks != topology.num_ranks:
            raise UserError(f"{source}: made for {placement.topology.num_ranks} ranks, not for {topology.num_ranks}")
        layers = {layer.index: layer for layer in placement.layers}
        index = placement.layers[0].index if self.workload.layer is None else self.workload.layer
        if index not in layers:
            raise UserError(f"{source}: has layers {', '.join(map(str, layers))}, not {index}")
        layer = layers[index]
        if layer.num_experts != self.shape.num_experts:
            raise UserError(f"{source}: made for {layer.num_experts} experts, not for {self.shape.num_experts}")
        native = native_format_name(self.dtype)

        def as_run(formats: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(native if get_format(text).is_native else text for text in formats)

        table = layer.replicas
        table = replace(table, formats_P=as_run(table.formats_P), mixed_formats=as_run(table.mixed_formats))
        return replace(layer, replicas=table)

    def planner(self, name: str, layer: LayerPlacement, topology: Topology) -> Planner:
        """Plans are made for the machine and the model's full sizes: reduced ones only make compute affordable."""
        return self.contestants[name].strategy.planner(layer, topology, self.cost(self.full_shape))

    def cost(self, shape: Shape) -> LayerCost | None:
        """What this layer costs on the modelled machine, in some size."""
        if self.machine is None:
            return None
        layout = _family(shape).layout
        known = self.machine.experts if isinstance(self.machine, Profile) else FORMATS
        sizes = {name: FORMATS[name].nbytes(layout) for name in known}  # what is lent may be in any
        return self.machine.layer(LayerShape(shape.hidden_size, shape.intermediate_size, sizes))


def _family(shape: Shape) -> ExpertFamily:
    return ExpertFamily.gated(shape.hidden_size, shape.intermediate_size)


def _count(ids_TK: IntArray, shape: Shape) -> IntArray:
    counts_E: IntArray = np.bincount(ids_TK.ravel(), minlength=shape.num_experts)
    return counts_E
