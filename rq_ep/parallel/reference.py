"""What every path is compared with: no processes, no packing, one loop after another."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rq_ep.core.plan import DispatchPlan


class Assignment(NamedTuple):
    """One routed pair and the replica that computes it."""

    token: int
    k: int
    replica: int


def assign(topk_ids_TK: Sequence[Sequence[int]], plan: DispatchPlan, rank: int) -> list[Assignment]:
    """The replica of every pair of source `rank`, in (token, k) order: each expert's replicas fill rank by rank."""
    waiting = {
        expert: [
            p for p, replica in enumerate(plan.replicas) if replica.expert == expert
            for _ in range(int(plan.pairs_RP[rank, p]))
        ]
        for expert in set(plan.replicas.experts_P.tolist())
    }  # fmt: skip
    return [
        Assignment(token, k, waiting[expert].pop(0))
        for token, experts in enumerate(topk_ids_TK)
        for k, expert in enumerate(experts)
    ]


def dense_moe(
    hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The MoE layer on one device: weighted sums of the experts' outputs, in fp32, returned in the rows' dtype.

    Args:
        hidden_TD: [T, D] rows.
        topk_ids_TK: [T, K] experts of each row.
        topk_weights_TK: [T, K] routing weights.
        expert: number of an expert and rows [n, D] to its outputs [n, D].
    """
    out_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    for number in sorted(set(topk_ids_TK.flatten().tolist())):
        for k in range(topk_ids_TK.shape[1]):
            tokens = torch.nonzero(topk_ids_TK[:, k] == number).flatten()
            if len(tokens):
                weighted = expert(number, hidden_TD[tokens]).float() * topk_weights_TK[tokens, k, None].float()
                out_TD[tokens] += weighted
    return out_TD.to(hidden_TD.dtype)
