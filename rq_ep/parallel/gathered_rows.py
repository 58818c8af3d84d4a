"""Dispatch of a small step: all rows go to all ranks with their routing, so that counts and plan need no collective.

Axes: M rows of all ranks, by rank; J local replicas of a rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan
from rq_ep.parallel.dispatch_handle import Received
from rq_ep.parallel.ep_group import EPGroup
from rq_ep.parallel.row_parts import METADATA_BYTES
from rq_ep.solver.compiled import compiled

Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GatheredRows:
    """The rows of all ranks in one step, and what their routers chose: the same on every rank.

    A call takes two collectives, rows and sums, whose sizes follow from the number of each rank's rows alone, so that
    they are the same in every step of as many rows. The counts of all ranks follow from the routing: the host waits for
    a GPU once, for that. Pairs are computed in the order of `DispatchHandle`, and give the same sums.
    """

    group: EPGroup
    rows_R: IntArray
    rows_MD: Tensor
    ids_MK: Ids
    weights_MK: Weights

    @classmethod
    def gather(
        cls, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, rows_R: IntArray, group: EPGroup
    ) -> "GatheredRows":
        """Send this rank's rows to all, and receive theirs; every rank calls this.

        Args:
            hidden_TD: [T, D] rows of this rank, T may be 0.
            topk_ids_TK: [T, K] integers, the experts of each row.
            topk_weights_TK: [T, K] routing weights.
            rows_R: rows of each rank, known to all; none where it is no member.
            group: the ranks.
        """
        assert len(hidden_TD) == rows_R[group.rank], f"{len(hidden_TD)} rows: rank {group.rank} announced {rows_R}"
        ids_TK, weights_TK = topk_ids_TK.int(), topk_weights_TK.float()
        if group.size == 1:
            return cls(group, rows_R, hidden_TD, on_host(ids_TK), on_host(weights_TK))
        pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in (ids_TK, weights_TK, hidden_TD)]
        message = torch.cat([piece.view(torch.uint8) for piece in pieces], 1)  # `contiguous` keeps strides without rows
        arrived = group.all_to_all(
            message.repeat(len(group.members), 1), to_members(group, len(message)), rows_R.tolist()
        )
        routing_bytes = ids_TK.shape[1] * METADATA_BYTES
        ids_MK, weights_MK = arrived[:, :routing_bytes].cpu().tensor_split(2, dim=1)
        return cls(
            group=group,
            rows_R=rows_R,
            rows_MD=arrived[:, routing_bytes:].contiguous().view(hidden_TD.dtype),
            ids_MK=on_host(ids_MK).view(np.int32),
            weights_MK=on_host(weights_MK).view(np.float32),
        )

    def counts_RE(self, num_experts: int) -> IntArray:
        """[R, E] pairs from each source rank to each expert."""
        return count_by_source(self.ids_MK, self.rows_R, num_experts)

    def received(self, plan: DispatchPlan) -> Received:
        """What this rank computes.

        Args:
            plan: made from these very counts.
        """
        replicas, local = plan.replicas, plan.replicas.on_rank(self.group.rank)
        row_N, weight_N, ends_J, fits = take_pairs(
            self.ids_MK, self.weights_MK, self._order_N(plan), self.rows_R,
            np.require(plan.pairs_RP, np.int64, ("C", "W")), replicas.first_E, replicas.by_expert_P,
            local.start, local.stop,
        )  # fmt: skip
        assert fits, "the plan has fewer pairs of an expert than were routed to it"
        device = self.rows_MD.device
        return Received(
            rows_MD=self.rows_MD,
            row_N=torch.from_numpy(row_N).to(device, non_blocking=True),
            weight_N=torch.from_numpy(weight_N).to(device, non_blocking=True),
            experts=tuple(replicas.experts_P[local.start : local.stop].tolist()),
            offsets=(0, *ends_J.tolist()),
        )

    def combine(self, partial_MD: Tensor) -> Tensor:
        """out_TD [T, D] in the rows' dtype: the sums of all ranks over this rank's rows, added as by `Combine`.

        Args:
            partial_MD: [M, D] fp32, for each row the weighted sum over this rank's replicas; changed in place.
        """
        group, dtype = self.group, self.rows_MD.dtype
        num_own, start = int(self.rows_R[group.rank]), int(self.rows_R[: group.rank].sum())
        out_TD = partial_MD[start : start + num_own]
        if group.size > 1:
            sums = group.all_to_all(partial_MD.to(dtype), self.rows_R.tolist(), to_members(group, num_own))
            for rank, sums_TD in zip(group.members, sums.view(len(group.members), *out_TD.shape), strict=True):
                if rank != group.rank:
                    out_TD += sums_TD
        return out_TD.to(dtype, copy=True)

    @property
    def received_bytes(self) -> dict[str, int]:
        """Bytes that the other ranks send to this one: rows with their routing, and sums."""
        row_bytes = self.rows_MD.shape[1] * self.rows_MD.dtype.itemsize
        own = int(self.rows_R[self.group.rank])
        others = len(self.rows_MD) - own
        routing_bytes = self.ids_MK.shape[1] * METADATA_BYTES
        return {
            "dispatch": others * (row_bytes + routing_bytes),
            "combine": (len(self.group.members) - 1) * own * row_bytes,
        }

    def _order_N(self, plan: DispatchPlan) -> IntArray:
        """The order in which pairs fill replicas: that of rows; by weight those of experts that mix formats."""
        if not plan.replicas.mixing_experts:
            return np.arange(self.ids_MK.size)
        by_weight = self.weights_MK * np.isin(self.ids_MK, plan.replicas.mixing_experts)
        source_M = np.repeat(np.arange(len(self.rows_R)), self.rows_R)
        return np.lexsort((by_weight.ravel(), np.repeat(source_M, self.ids_MK.shape[1])))


def on_host(tensor: Tensor) -> Any:
    """The values as a contiguous array."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def to_members(group: EPGroup, num_rows: int) -> list[int]:
    """[R] so many for each member."""
    return [num_rows if rank in group.members else 0 for rank in range(group.size)]


@compiled
def count_by_source(ids_MK: Ids, rows_R: IntArray, num_experts: int) -> IntArray:
    """[R, E] pairs of each source rank and expert.

    Args:
        ids_MK: the experts of each row.
        rows_R: rows of each source.
        num_experts: E.
    """
    counts_RE = np.zeros((len(rows_R), num_experts), np.int64)
    row = 0
    for source in range(len(rows_R)):
        for _ in range(rows_R[source]):
            for expert in ids_MK[row]:
                counts_RE[source, expert] += 1
            row += 1
    return counts_RE


@compiled
def take_pairs(
    ids_MK: Ids,
    weights_MK: Weights,
    order_N: IntArray,
    rows_R: IntArray,
    pairs_RP: IntArray,
    first_E: IntArray,
    by_expert_P: IntArray,
    first_local: int,
    end_local: int,
) -> tuple[IntArray, Weights, IntArray, bool]:
    """The pairs of one rank's replicas: by replica, then source, then in their order.

    Args:
        ids_MK: the experts of each row.
        weights_MK: their weights.
        order_N: all pairs m * K + k, by source; those of an expert fill its replicas in this order.
        rows_R: rows of each source.
        pairs_RP: the plan.
        first_E: where each expert's replicas begin in `by_expert_P`.
        by_expert_P: replicas, in the order in which they are filled.
        first_local: the rank's first replica.
        end_local: one more than its last.

    Returns:
        Rows of its pairs; their weights; where the pairs of each of its replicas end; and false where the plan has
        fewer pairs of an expert than a source has.
    """
    ends_J = pairs_RP[:, first_local:end_local].sum(axis=0).cumsum()
    next_J = np.zeros_like(ends_J)
    next_J[1:] = ends_J[:-1]
    num_pairs = ends_J[-1] if len(ends_J) else 0
    row_N, weight_N = np.empty(num_pairs, np.int64), np.empty(num_pairs, np.float32)
    top_k, start = ids_MK.shape[1], 0
    for source in range(len(rows_R)):
        left_P, next_E = pairs_RP[source].copy(), first_E.copy()
        end = start + rows_R[source] * top_k
        for pair in order_N[start:end]:
            row, k = pair // top_k, pair % top_k
            expert = ids_MK[row, k]
            while next_E[expert] < first_E[expert + 1] and left_P[by_expert_P[next_E[expert]]] == 0:
                next_E[expert] += 1
            if next_E[expert] == first_E[expert + 1]:
                return row_N, weight_N, ends_J, False
            replica = by_expert_P[next_E[expert]]
            left_P[replica] -= 1
            if first_local <= replica < end_local:
                position = next_J[replica - first_local]
                row_N[position], weight_N[position] = row, weights_MK[row, k]
                next_J[replica - first_local] += 1
        start = end
    return row_N, weight_N, ends_J, True
