"""EPLB for engines of equal slots: its placement, searched on from there."""

from dataclasses import dataclass
from typing import ClassVar

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.search.slots.equal_slots import check_slots, place_slots
from rq_ep.strategies.eplb import Eplb


@dataclass(frozen=True)
class EqualSlotsEplb(Eplb):
    """As many replicas on every rank, one format, even splits: what SGLang, TensorRT-LLM and vLLM's kin can serve.

    It places alone. Here, `eplb` serves what it places, so placements carry that name.
    """

    name: ClassVar[str] = Eplb.name

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        check_slots(problem)
        return place_slots(problem, self, super().place(problem).layers)
