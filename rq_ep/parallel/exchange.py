"""Dispatch and combine: rows travel to the replicas the plan chose, weighted sums travel back."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan
from rq_ep.parallel.base import EPGroup


@dataclass(frozen=True)
class WayBack:
    """Which of a source's tokens went where, so that their sums find home."""

    num_tokens: int
    own_tokens: Tensor  # tokens computed on this very rank
    sent_tokens: Tensor  # tokens sent away, by destination rank, ascending within one
    sent_splits: tuple[int, ...]  # [R] rows sent to each rank; none to this one
    received_splits: tuple[int, ...]  # [R] rows received from each rank


@dataclass(frozen=True)
class Received:
    """What a rank computes in one step. Pairs are sorted by local replica, then source rank, then (token, k)."""

    rows_MD: Tensor  # this rank's own rows, then those of each other rank
    row_N: Tensor  # int64, the row of each pair
    weight_N: Tensor  # fp32, the routing weight of each pair
    experts: tuple[int, ...]  # expert of each local replica of the plan, ascending
    offsets: tuple[int, ...]  # local replica j computes pairs offsets[j] to offsets[j + 1]
    way_back: WayBack


class Exchange:
    """Moves rows between the ranks of a group. A row bound for several replicas of one rank travels once."""

    def __init__(self, group: EPGroup) -> None:
        self.group = group

    def dispatch(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, plan: DispatchPlan) -> Received:
        """Send this rank's rows to the replicas the plan gives them; return the rows this rank computes.

        A source's j-th pair of an expert, in (token, k) order, fills the expert's replicas in the order of their ranks.
        Rows travel in their own dtype. With them go, as one int32 message, each pair's row number and the bits of its
        fp32 weight; how many pairs belong to which replica follows from the plan.

        Args:
            hidden_TD: [T, D] rows, T may be 0.
            topk_ids_TK: [T, K] integers, the experts of each row; one may be named twice.
            topk_weights_TK: [T, K] routing weights.
            plan: made from the counts of these very ids.
        """
        group, device = self.group, hidden_TD.device
        rank, size = group.rank, group.size
        num_tokens, top_k = topk_ids_TK.shape
        pairs_out_R, pairs_in_R = plan.pairs_RR[rank], plan.pairs_RR[:, rank]

        pair_N = pairs_by_replica(topk_ids_TK, topk_weights_TK, plan, rank)
        token_N = pair_N // max(top_k, 1)
        destination_N = _repeat(np.arange(size), pairs_out_R, device)

        # Which tokens each rank gets: marking them finds every one once, whatever the number of its pairs.
        is_sent_RT = torch.zeros(size, num_tokens, dtype=torch.bool, device=device)
        is_sent_RT[destination_N, token_N] = True
        rows_out_R = is_sent_RT.sum(1)
        rows_in_R = group.all_to_all(rows_out_R, [1] * size, [1] * size)
        rows_out, rows_in = torch.stack([rows_out_R, rows_in_R]).tolist()
        tokens = torch.nonzero_static(is_sent_RT, size=sum(rows_out))[:, 1]
        sent_tokens, own_tokens = _take_out(tokens, rows_out, rank)
        way_back = WayBack(num_tokens, own_tokens, sent_tokens, _without(rows_out, rank), _without(rows_in, rank))

        arrived = group.all_to_all(hidden_TD[sent_tokens], way_back.sent_splits, way_back.received_splits)
        rows_MD = torch.cat([hidden_TD[own_tokens], arrived])

        row_of_token_RT = is_sent_RT.cumsum(1, dtype=torch.int32) - 1
        weight_N = topk_weights_TK.reshape(-1)[pair_N].float()
        notes_N2 = torch.stack([row_of_token_RT[destination_N, token_N], weight_N.view(torch.int32)], 1)
        sent_notes, own_notes = _take_out(notes_N2, pairs_out_R.tolist(), rank)
        arrived_notes = group.all_to_all(sent_notes, _without(pairs_out_R, rank), _without(pairs_in_R, rank))
        before = int(pairs_in_R[:rank].sum())
        notes_N2 = torch.cat([arrived_notes[:before], own_notes, arrived_notes[before:]])

        first_row_R = rows_in[rank] + np.cumsum(way_back.received_splits) - way_back.received_splits
        first_row_R[rank] = 0
        row_N = notes_N2[:, 0] + _repeat(first_row_R, pairs_in_R, device)

        local = plan.replicas.on_rank(rank)
        pairs_RJ = plan.pairs_RP[:, local.start : local.stop]
        order_N = block_order(pairs_RJ.ravel(), np.arange(pairs_RJ.size).reshape(pairs_RJ.shape).T.ravel(), device)
        return Received(
            rows_MD=rows_MD,
            row_N=row_N[order_N],
            weight_N=notes_N2[:, 1].contiguous().view(torch.float32)[order_N],
            experts=tuple(plan.replicas.experts_P[local.start : local.stop].tolist()),
            offsets=(0, *np.cumsum(pairs_RJ.sum(axis=0)).tolist()),
            way_back=way_back,
        )

    def combine(self, partial_MD: Tensor, received: Received) -> Tensor:
        """Send weighted sums back to where the rows came from and add them up: out_TD [T, D] in the rows' dtype.

        Sums are fp32, in the order of the ranks after this rank's own part, so that the same inputs give the same bits.

        Args:
            partial_MD: [M, D] fp32, for each row of `received` the weighted sum over this rank's replicas.
        """
        way, dtype = received.way_back, received.rows_MD.dtype
        num_own = len(way.own_tokens)
        arrived = self.group.all_to_all(partial_MD[num_own:].to(dtype), way.received_splits, way.sent_splits)
        out_TD = partial_MD.new_zeros(way.num_tokens, partial_MD.shape[1], dtype=torch.float32)
        out_TD[way.own_tokens] = partial_MD[:num_own].float()
        # One rank at a time: its tokens are distinct, so no two additions meet and their order is fixed.
        splits = list(way.sent_splits)
        for tokens, rows in zip(torch.split(way.sent_tokens, splits), torch.split(arrived, splits), strict=True):
            if len(tokens):
                out_TD.index_add_(0, tokens, rows.float())
        return out_TD.to(dtype)


def pairs_by_replica(topk_ids_TK: Tensor, topk_weights_TK: Tensor, plan: DispatchPlan, rank: int) -> Tensor:
    """[N] int64, the pairs t * K + k of source `rank` in the order of the replicas that compute them.

    Experts whose replicas mix formats deal out their pairs by weight, lowest first; the others as they come.
    """
    by_expert_P, mixing = plan.replicas.by_expert_P, plan.replicas.mixing_experts
    pairs_P = plan.pairs_RP[rank, by_expert_P]
    num_pairs = int(pairs_P.sum())
    assert num_pairs == topk_ids_TK.numel(), f"rank {rank}: plan for {num_pairs} of {topk_ids_TK.numel()} pairs"
    ids_N = topk_ids_TK.reshape(-1)
    if mixing:
        is_mixing_N = torch.isin(ids_N, torch.tensor(mixing, device=ids_N.device))
        by_weight_N = torch.argsort(topk_weights_TK.reshape(-1).float() * is_mixing_N, stable=True)
        pair_N = by_weight_N[torch.argsort(ids_N[by_weight_N], stable=True)]
    else:
        pair_N = torch.argsort(ids_N, stable=True)
    return pair_N[block_order(pairs_P, np.argsort(by_expert_P), pair_N.device)]


def block_order(sizes_B: IntArray, order_B: IntArray, device: torch.device) -> Tensor:
    """[N] indices that bring consecutive blocks of elements into another order, without waiting for the device.

    Args:
        sizes_B: elements of each block, as they lie.
        order_B: the block that comes first, second, ...
    """
    starts_B = np.cumsum(sizes_B) - sizes_B
    new_sizes_B = sizes_B[order_B]
    shift_B = starts_B[order_B] - (np.cumsum(new_sizes_B) - new_sizes_B)
    shift_N = _repeat(shift_B, new_sizes_B, device)
    return shift_N + torch.arange(len(shift_N), device=device)


def _repeat(values_B: IntArray, times_B: IntArray, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.from_numpy(np.repeat(values_B, times_B))
    host = torch.from_numpy(np.stack([values_B, times_B])).to(device, non_blocking=True)
    return torch.repeat_interleave(host[0], host[1], output_size=int(times_B.sum()))


def _take_out(tensor: Tensor, splits: list[int], rank: int) -> tuple[Tensor, Tensor]:
    """Part `rank` of a tensor, and what is left of it."""
    start = sum(splits[:rank])
    end = start + splits[rank]
    return torch.cat([tensor[:start], tensor[end:]]), tensor[start:end]


def _without(splits: list[int] | IntArray, rank: int) -> tuple[int, ...]:
    return tuple(0 if other == rank else int(rows) for other, rows in enumerate(splits))
