"""Dispatch of a small step: all rows go to all ranks with their routing, so that counts and plan need no collective.

Axes: M rows of all ranks, by rank; J local replicas of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class GatheredRows:
    """The rows of all ranks in one step, and what their routers chose: the same on every rank.

    A call takes two collectives, rows and sums, whose sizes follow from the number of each rank's rows alone, so that
    they are the same in every step of as many rows. The counts of all ranks follow from the routing: the host waits for
    a GPU once, for that. Pairs are computed in the order of `DispatchHandle`, and give the same sums.
    """

    group: EPGroup
    rows_R: tuple[int, ...]
    rows_MD: Tensor
    weights_MK: Tensor  # fp32, on the device
    ids_MK: Ids
    host_weights_MK: npt.NDArray[np.float32]

    @classmethod
    def gather(
        cls, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, rows_R: Sequence[int], group: EPGroup
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
        top_k = topk_ids_TK.shape[1]
        rows_MD = hidden_TD
        metadata = torch.cat([topk_ids_TK.int(), topk_weights_TK.float().view(torch.int32)], 1)
        if group.size > 1:
            rows = hidden_TD.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps strides without rows
            message = torch.cat([metadata.view(torch.uint8), rows.view(torch.uint8)], 1)
            arrived = group.all_to_all(message.repeat(len(group.members), 1), to_members(group, len(rows)), rows_R)
            metadata = arrived[:, : top_k * METADATA_BYTES].contiguous().view(torch.int32)
            rows_MD = arrived[:, top_k * METADATA_BYTES :].contiguous().view(hidden_TD.dtype)
        host = metadata.cpu()
        return cls(
            group=group,
            rows_R=tuple(rows_R),
            rows_MD=rows_MD,
            weights_MK=metadata[:, top_k:].view(torch.float32),
            ids_MK=np.ascontiguousarray(host[:, :top_k].numpy()),
            host_weights_MK=host[:, top_k:].view(torch.float32).numpy(),
        )

    def counts_RE(self, num_experts: int) -> IntArray:
        """[R, E] pairs from each source rank to each expert."""
        counts_RE = np.zeros((self.group.size, num_experts), np.int64)
        count_by_source(self.ids_MK, self.ends_R, counts_RE)
        return counts_RE

    def received(self, plan: DispatchPlan) -> Received:
        """What this rank computes.

        Args:
            plan: made from these very counts.
        """
        replicas, local = plan.replicas, plan.replicas.on_rank(self.group.rank)
        pairs_J = plan.pairs_RP[:, local.start : local.stop].sum(axis=0)
        ends_J = np.cumsum(pairs_J)
        pair_N = np.empty(int(pairs_J.sum()), np.int64)
        fits = take_pairs(
            self.ids_MK, self._order_N(plan), self.ends_R, np.require(plan.pairs_RP, np.int64, ("C", "W")),
            replicas.first_E, replicas.by_expert_P, local.start, ends_J - pairs_J, pair_N,
        )  # fmt: skip
        assert fits, "the plan has fewer pairs of an expert than were routed to it"
        chosen_N = torch.from_numpy(pair_N).to(self.rows_MD.device, non_blocking=True)
        return Received(
            rows_MD=self.rows_MD,
            row_N=chosen_N // max(self.ids_MK.shape[1], 1),
            weight_N=self.weights_MK.reshape(-1).index_select(0, chosen_N),
            experts=tuple(replicas.experts_P[local.start : local.stop].tolist()),
            offsets=(0, *ends_J.tolist()),
        )

    def combine(self, partial_MD: Tensor) -> Tensor:
        """out_TD [T, D] in the rows' dtype: the sums of all ranks over this rank's rows, added as by `Combine`.

        Args:
            partial_MD: [M, D] fp32, for each row the weighted sum over this rank's replicas; changed in place.
        """
        group, dtype = self.group, self.rows_MD.dtype
        num_own, end = self.rows_R[group.rank], int(self.ends_R[group.rank])
        out_TD = partial_MD[end - num_own : end]
        if group.size > 1:
            sums = group.all_to_all(partial_MD.to(dtype), self.rows_R, to_members(group, num_own))
            for rank, sums_TD in zip(group.members, sums.view(len(group.members), *out_TD.shape), strict=True):
                if rank != group.rank:
                    out_TD += sums_TD
        return out_TD.to(dtype, copy=True)

    @property
    def received_bytes(self) -> dict[str, int]:
        """Bytes that the other ranks send to this one: rows with their routing, and sums."""
        row_bytes = self.rows_MD.shape[1] * self.rows_MD.dtype.itemsize
        others, own = sum(self.rows_R) - self.rows_R[self.group.rank], self.rows_R[self.group.rank]
        routing_bytes = self.ids_MK.shape[1] * METADATA_BYTES
        return {
            "dispatch": others * (row_bytes + routing_bytes),
            "combine": (len(self.group.members) - 1) * own * row_bytes,
        }

    @cached_property
    def ends_R(self) -> IntArray:
        """[R] where the rows of each rank end."""
        return np.cumsum(self.rows_R)

    def _order_N(self, plan: DispatchPlan) -> IntArray:
        """The order in which pairs fill replicas: that of rows; by weight those of experts that mix formats."""
        if not plan.replicas.mixing_experts:
            return np.arange(self.ids_MK.size)
        by_weight = self.host_weights_MK * np.isin(self.ids_MK, plan.replicas.mixing_experts)
        source_M = np.repeat(np.arange(len(self.rows_R)), self.rows_R)
        return np.lexsort((by_weight.ravel(), np.repeat(source_M, self.ids_MK.shape[1])))


def to_members(group: EPGroup, num_rows: int) -> list[int]:
    """[R] so many for each member."""
    return [num_rows if rank in group.members else 0 for rank in range(group.size)]


@compiled
def count_by_source(ids_MK: Ids, ends_R: IntArray, counts_RE: IntArray) -> None:
    """Add up the pairs of each source rank and expert.

    Args:
        ids_MK: the experts of each row.
        ends_R: where the rows of each source end.
        counts_RE: changed in place.
    """
    source = 0
    for row in range(len(ids_MK)):
        while row >= ends_R[source]:
            source += 1
        for expert in ids_MK[row]:
            counts_RE[source, expert] += 1


@compiled
def take_pairs(
    ids_MK: Ids,
    order_N: IntArray,
    ends_R: IntArray,
    pairs_RP: IntArray,
    first_E: IntArray,
    by_expert_P: IntArray,
    first_local: int,
    next_J: IntArray,
    pair_N: IntArray,
) -> bool:
    """Write the pairs m * K + k of one rank's replicas: by replica, then source, then in their order.

    False: the plan has fewer pairs of an expert than a source has.

    Args:
        ids_MK: the experts of each row.
        order_N: all pairs, by source; those of an expert fill its replicas in this order.
        ends_R: where the rows of each source end.
        pairs_RP: the plan.
        first_E: where each expert's replicas begin in `by_expert_P`.
        by_expert_P: replicas, in the order in which they are filled.
        first_local: the rank's first replica.
        next_J: where the pairs of each of its replicas begin; changed in place.
        pair_N: overwritten.
    """
    top_k, source = max(ids_MK.shape[1], 1), -1
    left_P, next_E = pairs_RP[0].copy(), first_E.copy()
    for pair in order_N:
        row = pair // top_k
        while source < 0 or row >= ends_R[source]:
            source += 1
            left_P[:] = pairs_RP[source]
            next_E[:] = first_E
        expert = ids_MK[row, pair % top_k]
        while next_E[expert] < first_E[expert + 1] and left_P[by_expert_P[next_E[expert]]] == 0:
            next_E[expert] += 1
        if next_E[expert] == first_E[expert + 1]:
            return False
        replica = by_expert_P[next_E[expert]]
        left_P[replica] -= 1
        local = replica - first_local
        if 0 <= local < len(next_J):
            pair_N[next_J[local]] = pair
            next_J[local] += 1
    return True
