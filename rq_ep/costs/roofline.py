"""A roofline cost model: what a plan would take on a machine of given peak rates. Modelled, never measured."""

from dataclasses import dataclass

import numpy as np

from rq_ep.core.cost import LayerShape, StepCost
from rq_ep.core.errors import UserError
from rq_ep.core.plan import DispatchPlan

MATRICES = 3  # of a gated expert: gate, up, down


@dataclass(frozen=True)
class Roofline:
    """Peak rates of one rank. Sustained ones are lower: compare strategies with it, do not promise seconds.

    Compute is the larger of arithmetic and reading the weights of every expert with pairs; exchange and transfers are
    the larger of a rank's sending and receiving, after a latency.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # in each direction
    latency_s: float
    activation_bytes: int = 2  # of one number on the wire

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "memory_bytes_per_s", "link_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be positive")

    def step(self, plan: DispatchPlan, shape: LayerShape) -> StepCost:
        """Modelled seconds of one layer and step.

        Args:
            plan: who computes what.
            shape: sizes of the layer; `expert_bytes` must know the formats of the plan.
        """
        replicas, num_ranks = plan.replicas, len(plan.pairs_RP)
        pairs_P = plan.pairs_RP.sum(axis=0)
        sizes_P = np.array([shape.expert_bytes[name] for name in replicas.formats_P], np.int64)
        read_R = np.bincount(replicas.ranks_P, sizes_P * (pairs_P > 0), minlength=num_ranks)
        flops_R = plan.loads_R * (2.0 * MATRICES * shape.hidden_size * shape.intermediate_size)
        compute_s_R = np.maximum(flops_R / self.flops_per_s, read_R / self.memory_bytes_per_s)

        row_bytes = shape.hidden_size * self.activation_bytes
        away_RR = plan.pairs_RR - np.diag(np.diag(plan.pairs_RR))
        one_way_R = np.maximum(away_RR.sum(axis=0), away_RR.sum(axis=1)) * row_bytes / self.link_bytes_per_s
        exchange_s_R = 2 * (one_way_R + self.latency_s * (num_ranks > 1))  # dispatch, and combine the other way

        sent_R, received_R = np.zeros(num_ranks), np.zeros(num_ranks)
        for transfer in plan.transfers:
            sent_R[transfer.src] += shape.expert_bytes[transfer.format]
            received_R[transfer.dst] += shape.expert_bytes[transfer.format]
        moved_R = np.maximum(sent_R, received_R)
        transfer_s_R = moved_R / self.link_bytes_per_s + self.latency_s * (moved_R > 0)
        return StepCost(compute_s_R, exchange_s_R, transfer_s_R)


# Data-sheet peaks per rank: dense bf16 arithmetic, HBM, NVLink in one direction. The CPU row is an order of magnitude.
MACHINES: dict[str, Roofline] = {
    "h200": Roofline(989e12, 4.8e12, 450e9, 10e-6),
    "h100": Roofline(989e12, 3.35e12, 450e9, 10e-6),
    "cpu": Roofline(50e9, 10e9, 5e9, 50e-6, activation_bytes=4),
}
