"""Reference implementations that every path is compared with: plain loops, no processes, no packing."""

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


def assign(
    topk_ids_TK: Sequence[Sequence[int]],
    plan: DispatchPlan,
    rank: int,
    topk_weights_TK: Sequence[Sequence[float]] | None = None,
) -> list[Assignment]:
    """The replica of every pair of source `rank`, in (token, k) order: each expert's replicas fill rank by rank.

    Where replicas mix formats, those of fewest bits take the pairs of lowest weight; weights matter only there.
    """
    bits = {name: number for number, name in enumerate(plan.replicas.mixed_formats)}
    assignments = []
    for number in sorted(set(plan.replicas.experts_P.tolist())):
        held = [(p, replica) for p, replica in enumerate(plan.replicas) if replica.expert == number]
        pairs = [
            (t, k) for t, experts in enumerate(topk_ids_TK) for k, expert in enumerate(experts) if expert == number
        ]
        if len({replica.format for _, replica in held}) > 1:
            assert topk_weights_TK is not None, f"expert {number} mixes formats"
            held.sort(key=lambda item: bits[item[1].format])
            pairs.sort(key=lambda pair: topk_weights_TK[pair[0]][pair[1]])
        replicas = [p for p, _ in held for _ in range(int(plan.pairs_RP[rank, p]))]
        assignments += [Assignment(t, k, p) for (t, k), p in zip(pairs, replicas, strict=True)]
    return sorted(assignments)


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
