"""What the plans of a strategy say: loads, rows received, weights moved, modelled seconds. No tensors, no ranks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bench.layer.case import Case, Routes
from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost, StepCost
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan, imbalance
from rq_ep.core.topology import Topology
from rq_ep.costs import Profile


@dataclass(frozen=True)
class Planned:
    """The plans of the different batches; they repeat over the rounds."""

    case: Case
    topology: Topology
    plans: tuple[DispatchPlan, ...]
    rows_BRR: IntArray  # [batch, source, destination] rows: a token bound for several experts of a rank counts once

    @classmethod
    def of(cls, case: Case, name: str, layer: LayerPlacement, topology: Topology, routes: Routes) -> "Planned":
        planner = case.planner(name, layer, topology)
        plans = tuple(planner(case.counts(ids_R)) for ids_R in routes)
        rows_BRR = [
            [rows_sent(ids_TK, plan, rank) for rank, ids_TK in enumerate(ids_R)]
            for plan, ids_R in zip(plans, routes, strict=True)
        ]
        return cls(case, topology, plans, np.array(rows_BRR))

    @property
    def imbalance_B(self) -> FloatArray:
        return np.array([imbalance(plan.loads_R) for plan in self.plans])

    @cached_property
    def costs(self) -> list[StepCost]:
        """Modelled seconds of each batch in the sizes as run; empty without a machine."""
        return self._costs(self.case.cost(self.case.shape))

    def facts(self) -> dict[str, Any]:
        """Figures of a row of the result."""
        received_BR = self.rows_BRR.sum(axis=1)
        row_bytes = self.case.shape.hidden_size * self.case.dtype.itemsize
        crosses_RR = self.topology.nodes_R[:, None] != self.topology.nodes_R
        is_measured = isinstance(self.case.machine, Profile)
        full = [] if is_measured else self._costs(self.case.cost(self.case.full_shape))
        return {
            "imbalance_mean": float(self.imbalance_B.mean()),
            "imbalance_worst": float(self.imbalance_B.max()),
            "tokens_per_rank": float(np.mean([plan.loads_R.mean() for plan in self.plans])) / self.case.shape.top_k,
            "ideal_speed_up": float(self.imbalance_B.mean()),
            "pairs_by_rank": np.mean([plan.loads_R for plan in self.plans], axis=0).tolist(),
            "received_rows_peak": int(received_BR.max()),
            "received_bytes_peak": int(received_BR.max()) * row_bytes,
            "received_pairs_peak": int(max(plan.loads_R.max() for plan in self.plans)),
            "rows_staying_share": _share(np.trace(self.rows_BRR, axis1=1, axis2=2), self.rows_BRR),
            "rows_between_nodes_share": _share(self.rows_BRR * crosses_RR, self.rows_BRR),
            "experts_moved_per_step": float(np.mean([len(plan.transfers) for plan in self.plans])),
            "predicted_compute_s": _slowest([cost.compute_s_R for cost in self.costs]) if is_measured else None,
            "modelled_exchange_s": _slowest([cost.exchange_s_R for cost in self.costs]),
            "modelled_transfer_s": _slowest([cost.transfer_s_R for cost in self.costs]),
            "modelled_full_size": {
                "compute_s": _slowest([cost.compute_s_R for cost in full]),
                "exchange_s": _slowest([cost.exchange_s_R for cost in full]),
                "transfer_s": _slowest([cost.transfer_s_R for cost in full]),
                "layer_s": float(np.mean([cost.layer_s for cost in full])),
            }
            if full
            else None,
        }

    def _costs(self, cost: LayerCost | None) -> list[StepCost]:
        return [] if cost is None else [cost.step(plan) for plan in self.plans]


def rows_sent(ids_TK: IntArray, plan: DispatchPlan, rank: int) -> IntArray:
    """[R] rows that source `rank` has for each rank, itself included.

    Pairs are taken in (token, k) order; where formats of an expert are mixed they go by weight, which changes which
    rows travel and hardly how many.
    """
    by_expert_P = plan.replicas.by_expert_P
    tokens_N = np.argsort(ids_TK.ravel(), kind="stable") // ids_TK.shape[1]
    destination_N = np.repeat(plan.replicas.ranks_P[by_expert_P], plan.pairs_RP[rank, by_expert_P])
    is_sent_RT = np.zeros((len(plan.pairs_RP), len(ids_TK)), bool)
    is_sent_RT[destination_N, tokens_N] = True
    rows_R: IntArray = is_sent_RT.sum(axis=1)
    return rows_R


def _slowest(seconds_BR: list[FloatArray]) -> float | None:
    """Of the slowest rank, mean over batches."""
    return float(np.max(seconds_BR, axis=1).mean()) if seconds_BR else None


def _share(part: IntArray, whole: IntArray) -> float:
    return float(part.sum() / max(whole.sum(), 1))
