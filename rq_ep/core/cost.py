"""What a plan costs on a machine. Implementations live in `rq_ep.costs`."""

from dataclasses import dataclass
from typing import Protocol

from rq_ep.core.arrays import FloatArray
from rq_ep.core.plan import DispatchPlan


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer, as far as its cost depends on them."""

    hidden_size: int
    intermediate_size: int
    expert_bytes: dict[str, int]  # format -> bytes of one expert


@dataclass(frozen=True)
class StepCost:
    """Modelled seconds of one layer and step; every array is [R], the layer ends with its slowest rank."""

    compute_s_R: FloatArray
    exchange_s_R: FloatArray
    transfer_s_R: FloatArray

    @property
    def layer_s(self) -> float:
        """Nothing is taken to overlap: an upper bound of a well-built runtime, a fair figure for a simple one."""
        return float((self.compute_s_R + self.exchange_s_R + self.transfer_s_R).max())


class CostModel(Protocol):
    """Seconds of a plan on a given machine."""

    def step(self, plan: DispatchPlan, shape: LayerShape) -> StepCost: ...
