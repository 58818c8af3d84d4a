"""What the ranks tell each other before a step is planned, and what follows from it about rows on their way."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replicas
from rq_ep.parallel.ep_group import EPGroup, count_pairs


@dataclass(frozen=True)
class Homes:
    """The only rank that holds an expert; R for an expert that several ranks hold.

    A token goes to such a rank or stays away, whatever the plan. So a source can count its rows for each rank, each
    token once, before there is a plan, and the host need not wait for a GPU a second time to learn them.
    """

    rank_E: IntArray
    num_ranks: int
    on_device_E: Tensor

    @classmethod
    def of(cls, replicas: Replicas, num_experts: int, num_ranks: int, device: torch.device) -> "Homes":
        """The homes of a layer with these resident replicas."""
        rank_E = np.full(num_experts, num_ranks)
        rank_E[replicas.experts_P] = replicas.ranks_P
        rank_E[np.bincount(replicas.experts_P, minlength=num_experts) > 1] = num_ranks
        return cls(rank_E, num_ranks, torch.from_numpy(rank_E).to(device))

    def census(self, topk_ids_TK: Tensor, group: EPGroup) -> "Census":
        """Count this rank's pairs and rows and gather those of all ranks: the one time the host waits for a device."""
        num_experts = len(self.rank_E)
        counts_E = count_pairs(topk_ids_TK, num_experts)
        if self.num_ranks == 1:
            return Census(group.gather_counts(counts_E), np.zeros((1, 1), np.int64), self)
        is_met_TR = torch.zeros(len(topk_ids_TK), self.num_ranks + 1, dtype=torch.int32, device=topk_ids_TK.device)
        is_met_TR.scatter_(1, self.on_device_E[topk_ids_TK], 1)
        gathered_RN = group.gather_counts(torch.cat([counts_E, is_met_TR.sum(0)[: self.num_ranks]]))
        return Census(gathered_RN[:, :num_experts], gathered_RN[:, num_experts:], self)


@dataclass(frozen=True)
class Census:
    """Every rank's counts; the same on every rank.

    `tokens_RR[s, r]` tokens of source s name an expert that lives on rank r alone.
    """

    counts_RE: IntArray
    tokens_RR: IntArray
    homes: Homes

    def most_rows_RR(self, plan: DispatchPlan) -> IntArray:
        """[source, destination] no more rows travel; as many do where no expert is split or lent."""
        replicas = plan.replicas
        is_home_P = self.homes.rank_E[replicas.experts_P] == replicas.ranks_P
        elsewhere = replace(plan, pairs_RP=np.where(is_home_P, 0, plan.pairs_RP))
        most_RR: IntArray = np.minimum(plan.pairs_RR, self.tokens_RR + elsewhere.pairs_RR)
        return most_RR
