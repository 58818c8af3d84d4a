"""The routing counts that the ranks gather before a step is planned, and the bounds on rows that follow from them.

Axes: V what a rank counts, its pairs of the E experts and then its tokens for the R ranks.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replicas
from rq_ep.parallel.ep_group import EPGroup
from rq_ep.parallel.permute import histogram


@dataclass(frozen=True)
class SoleHolders:
    """For each expert the only rank that holds it; R for an expert that several ranks hold.

    A token that chose an expert with a sole holder visits this rank, whatever the plan. So a source can count its rows
    for each rank, each token once, before there is a plan, and the host need not wait for a GPU a second time.
    """

    rank_E: IntArray
    num_ranks: int
    on_device_E: Tensor  # `rank_E` on the device of the ids

    @classmethod
    def of(cls, replicas: Replicas, num_experts: int, num_ranks: int, device: torch.device) -> "SoleHolders":
        """The sole holders in a layer with these resident replicas."""
        rank_E = np.full(num_experts, num_ranks)
        rank_E[replicas.experts_P] = replicas.ranks_P
        rank_E[np.bincount(replicas.experts_P, minlength=num_experts) > 1] = num_ranks
        return cls(rank_E, num_ranks, torch.from_numpy(rank_E).to(device))


@dataclass(frozen=True)
class RoutingCounts:
    """Every rank's counts of one step; the same on every rank.

    `counts_RE[r, e]` pairs of source r chose expert e. `tokens_RR[s, r]` tokens of source s chose an expert whose sole
    holder is rank r.
    """

    counts_RE: IntArray
    tokens_RR: IntArray
    sole_holders: SoleHolders

    @classmethod
    def gather(cls, topk_ids_TK: Tensor, sole_holders: SoleHolders, group: EPGroup) -> "RoutingCounts":
        """Count this rank's pairs and tokens and gather those of all ranks: the one time the host waits for a device.

        Args:
            topk_ids_TK: [T, K] integers, the experts of each row of this rank.
            sole_holders: of the layer's experts.
            group: the ranks; every one calls this.
        """
        num_experts, num_ranks = len(sole_holders.rank_E), sole_holders.num_ranks
        counts_E = count_pairs(topk_ids_TK, num_experts)
        if num_ranks == 1:
            return cls(counts_E.cpu().numpy()[None], np.zeros((1, 1), np.int64), sole_holders)
        visits_TR = torch.zeros(len(topk_ids_TK), num_ranks + 1, dtype=torch.int32, device=topk_ids_TK.device)
        visits_TR.scatter_(1, sole_holders.on_device_E[topk_ids_TK], 1)  # the last column: experts that several hold
        counts_RV = group.gather_counts(torch.cat([counts_E, visits_TR.sum(0)[:num_ranks]]))
        return cls(counts_RV[:, :num_experts], counts_RV[:, num_experts:], sole_holders)

    def max_rows_RR(self, plan: DispatchPlan) -> IntArray:
        """[source, destination] rows that travel at most; as many do where no expert is split or lent."""
        replicas = plan.replicas
        is_sole_P = self.sole_holders.rank_E[replicas.experts_P] == replicas.ranks_P
        others = replace(plan, pairs_RP=np.where(is_sole_P, 0, plan.pairs_RP))
        rows_RR: IntArray = np.minimum(plan.pairs_RR, self.tokens_RR + others.pairs_RR)
        return rows_RR


def count_pairs(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """[E] int64 pairs of each expert, on the ids' device."""
    return histogram(topk_ids_TK.reshape(-1).to(torch.int64), num_experts)
