"""R&Q as published (arXiv 2602.19938): few-bit replicas of top experts, paid for by the least important ones."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Planner, SplitRule, Strategy, Summary
from rq_ep.core.topology import Topology, home_ranks
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.split.min_max_split import ByExpert


@dataclass(frozen=True)
class PaperReplicateQuantize(Strategy):
    """One replica for each layer's top expert, in few bits, on the least loaded other rank; pairs split evenly.

    The paper counts the bytes of one device. Here each rank keeps to standard EP's: the rank that takes the replica
    stores as many of its least important experts in few bits as that asks for. Layers where it holds too few, or where
    the cap on low-precision pairs would be exceeded, stay as they are and are named in the certificate.
    """

    name: ClassVar[str] = "rq_paper"
    summary: ClassVar[Summary] = Summary(
        "contiguous blocks, and an int8 replica of each layer's top expert, paid for by the least important",
        "even split over replicas",
        "R&Q, arXiv 2602.19938",
    )
    split: ClassVar[SplitRule | None] = "even"
    needs_low_format: ClassVar[bool] = True

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        stats, formats = problem.stats, Formats.of(problem)
        if formats.low is None:
            raise UserError(
                f"strategy {self.name!r} stores replicas in few bits, but --formats {','.join(problem.formats)} with "
                f"--max-low-precision-share {problem.max_low_precision_share:g} allow none: "
                "add int8, calibrated, and let some pairs use it"
            )
        loads_LE = stats.counts.sum(axis=0)
        importance_LE = loads_LE.astype(np.float64) if stats.importance is None else stats.importance
        layers, without = [], []
        for layer, loads_E, importance_E in zip(stats.layers, loads_LE, importance_LE, strict=True):
            replicas = _replicate(problem, formats, loads_E, importance_E)
            if len(replicas) == stats.num_experts:
                without.append(layer)
            layers.append(LayerPlacement.even(layer, stats.num_experts, replicas, (formats.low, formats.native)))
        importance = "pairs" if stats.importance is None else "importance"
        return certify(problem, self, layers, importance=importance, layers_without_replica=without)

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        """Pair i of an expert, counted over the source ranks, goes to replica i mod n."""
        replicas = layer.replicas
        by_expert = ByExpert.of(replicas, topology.num_ranks)
        number_C, num_replicas_C = by_expert.number_C, by_expert.num_replicas_C

        def plan(counts_RE: IntArray) -> DispatchPlan:
            ends_RC = np.cumsum(counts_RE[:, by_expert.experts_C], axis=0)
            dealt_RC = (ends_RC + (num_replicas_C - 1 - number_C)) // num_replicas_C
            pairs_RP = np.empty_like(dealt_RC)
            pairs_RP[:, by_expert.replicas_C] = np.diff(dealt_RC, axis=0, prepend=0)
            return DispatchPlan(replicas, pairs_RP)

        return plan


def _replicate(
    problem: PlacementProblem, formats: Formats, loads_E: IntArray, importance_E: FloatArray
) -> list[Replica]:
    """The replicas of one layer; standard EP's if no rank can take the one of the top expert."""
    assert formats.low is not None
    num_ranks, num_experts = problem.topology.num_ranks, len(loads_E)
    homes_E = home_ranks(num_experts, num_ranks)
    contiguous = [Replica(rank, expert, formats.native) for expert, rank in enumerate(homes_E.tolist())]
    top = int(np.argmax(loads_E))
    loads_R = np.bincount(homes_E, loads_E, minlength=num_ranks)
    others = [rank for rank in range(num_ranks) if rank != homes_E[top]]
    if not others:
        return contiguous
    taker = min(others, key=lambda rank: (loads_R[rank], rank))
    own = np.flatnonzero(homes_E == taker)
    room = (-(-num_experts // num_ranks) - len(own)) * formats.native_bytes
    num_low = max(0, -(-(formats.low_bytes - room) // (formats.native_bytes - formats.low_bytes)))
    low = own[np.lexsort((own, loads_E[own], importance_E[own]))][:num_low].tolist()
    low_pairs = int(loads_E[top]) / 2 + int(loads_E[low].sum())
    if num_low > len(own) or low_pairs > problem.max_low_precision_share * int(loads_E.sum()):
        return contiguous
    stored = [replica._replace(format=formats.low) if replica.expert in low else replica for replica in contiguous]
    return [*stored, Replica(taker, top, formats.low)]
