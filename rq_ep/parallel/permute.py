"""Permutations of routed pairs and rows: the orders in which they are sent and computed. Nothing here communicates.

Axes: B blocks of consecutive elements, J local replicas of a rank.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan


@dataclass(frozen=True)
class LocalPairs:
    """Pairs of one source rank for the replicas of one rank, sorted by replica."""

    metadata_N2: Tensor  # int32; the row of each pair, the bits of its fp32 routing weight
    pairs_J: IntArray  # pairs of each local replica


@dataclass(frozen=True)
class Route:
    """Where the pairs of one rank go in one step, and how many arrive there: what follows from routing and plan.

    Pairs `_N` are those sent to other ranks, sorted by destination rank, replica and (token, k).
    """

    rank: int
    experts: tuple[int, ...]  # expert of each local replica, ascending
    own: LocalPairs  # the pairs that stay on this rank; their rows are its tokens
    token_N: Tensor  # int64, the token of each pair sent
    weight_bits_N: Tensor  # int32, the bits of its fp32 routing weight
    pairs_RR: IntArray  # [source, destination] pairs that travel; none from a rank to itself
    pairs_RJ: IntArray  # pairs that arrive of each source for each local replica

    @classmethod
    def of(cls, topk_ids_TK: Tensor, topk_weights_TK: Tensor, plan: DispatchPlan, rank: int) -> "Route":
        """The route of the pairs of source `rank`; the plan is made from the counts of these very ids."""
        top_k = max(topk_ids_TK.shape[1], 1)
        pair_N = pairs_by_replica(topk_ids_TK, topk_weights_TK, plan, rank)
        token_N = pair_N // top_k
        weight_bits_N = topk_weights_TK.reshape(-1)[pair_N].float().view(torch.int32)
        pairs_RR = plan.pairs_RR.copy()
        start = int(pairs_RR[rank, :rank].sum())
        end = start + int(pairs_RR[rank, rank])
        np.fill_diagonal(pairs_RR, 0)
        local = plan.replicas.on_rank(rank)
        pairs_RJ = plan.pairs_RP[:, local.start : local.stop].copy()
        own_metadata_N2 = torch.stack([token_N[start:end].int(), weight_bits_N[start:end]], 1)
        own = LocalPairs(own_metadata_N2, pairs_RJ[rank].copy())
        pairs_RJ[rank] = 0
        return cls(
            rank=rank,
            experts=tuple(plan.replicas.experts_P[local.start : local.stop].tolist()),
            own=own,
            token_N=torch.cat([token_N[:start], token_N[end:]]),
            weight_bits_N=torch.cat([weight_bits_N[:start], weight_bits_N[end:]]),
            pairs_RR=pairs_RR,
            pairs_RJ=pairs_RJ,
        )

    @property
    def num_ranks(self) -> int:
        return len(self.pairs_RR)

    @property
    def pairs_out_R(self) -> IntArray:
        """[R] pairs that this rank sends to each rank."""
        pairs_R: IntArray = self.pairs_RR[self.rank]
        return pairs_R

    @property
    def pairs_in_R(self) -> IntArray:
        """[R] pairs that this rank receives from each rank."""
        pairs_R: IntArray = self.pairs_RR[:, self.rank]
        return pairs_R


@dataclass(frozen=True)
class SentRows:
    """The distinct tokens that a rank sends to each other rank: one with several pairs there travels once."""

    route: Route
    row_N: Tensor  # int64, of each pair sent: the number of its token among those sent to its destination
    is_sent_RT: Tensor  # int32, 1 where rank r gets token t

    @classmethod
    def of(cls, route: Route, num_tokens: int) -> "SentRows":
        """Mark the tokens that each rank gets; each is marked once, whatever the number of its pairs."""
        device = route.token_N.device
        destination_N = repeat(np.arange(route.num_ranks), route.pairs_out_R, device)
        is_sent_RT = torch.zeros(route.num_ranks, num_tokens, dtype=torch.int32, device=device)
        one = torch.ones((), dtype=torch.int32, device=device)  # a number would be copied to a GPU, with a wait
        is_sent_RT.index_put_((destination_N, route.token_N), one)
        return cls(route, is_sent_RT.cumsum(1)[destination_N, route.token_N] - 1, is_sent_RT)

    @property
    def counts_R(self) -> Tensor:
        """[R] rows for each rank, on the device."""
        return self.is_sent_RT.sum(1)

    @property
    def metadata_N2(self) -> Tensor:
        """int32 [N, 2], of each pair sent: its row among those of its destination, the bits of its weight."""
        return torch.stack([self.row_N.int(), self.route.weight_bits_N], 1)

    def tokens(self, slots_R: IntArray) -> Tensor:
        """Tokens in the order they are sent, by destination; slots without a row say 0.

        Args:
            slots_R: rows sent to each rank, at least as many as its distinct tokens.
        """
        token_N = self.route.token_N
        first_N = repeat(np.cumsum(slots_R) - slots_R, self.route.pairs_out_R, token_N.device)
        return token_N.new_zeros(int(slots_R.sum())).index_put_((first_N + self.row_N,), token_N)


def pairs_by_replica(topk_ids_TK: Tensor, topk_weights_TK: Tensor, plan: DispatchPlan, rank: int) -> Tensor:
    """[N] int64, the pairs t * K + k of source `rank` in the order of the replicas that compute them.

    Experts whose replicas mix formats give out their pairs by weight, lowest first; the others in (token, k) order.
    """
    by_expert_P, mixing = plan.replicas.by_expert_P, plan.replicas.mixing_experts
    pairs_P = plan.pairs_RP[rank, by_expert_P]
    num_pairs = int(pairs_P.sum())
    assert num_pairs == topk_ids_TK.numel(), f"rank {rank}: plan for {num_pairs} of {topk_ids_TK.numel()} pairs"
    ids_N, num_experts = topk_ids_TK.reshape(-1), int(plan.replicas.experts_P.max(initial=0)) + 1
    if mixing:
        is_mixing_N = torch.isin(ids_N, torch.tensor(mixing).to(ids_N.device, non_blocking=True))
        by_weight_N = torch.argsort(topk_weights_TK.reshape(-1).float() * is_mixing_N, stable=True)
        pair_N = by_weight_N[stable_order(ids_N[by_weight_N], num_experts)]
    else:
        pair_N = stable_order(ids_N, num_experts)
    return pair_N[block_order(pairs_P, np.argsort(by_expert_P), pair_N.device)]


def histogram(values_N: Tensor, num_values: int) -> Tensor:
    """[num_values] int64, how often each of 0, 1, ... occurs; unlike `bincount` it does not wait for the device."""
    counts = torch.zeros(num_values, dtype=torch.int64, device=values_N.device)
    return counts.scatter_add_(0, values_N, torch.ones_like(values_N))


def stable_order(keys_N: Tensor, num_keys: int) -> Tensor:
    """[N] int64 indices that sort integers from 0 up to `num_keys`; equal ones keep their order."""
    if keys_N.device.type == "cpu" and num_keys <= np.iinfo(np.uint16).max:  # NumPy sorts 16 bits by radix: 17 times
        return torch.from_numpy(np.argsort(keys_N.numpy().astype(np.uint16), kind="stable"))  # as fast at 16K pairs
    return torch.argsort(keys_N, stable=True)


def block_order(sizes_B: IntArray, order_B: IntArray, device: torch.device) -> Tensor:
    """[N] indices that bring consecutive blocks of elements into another order, without waiting for the device.

    Args:
        sizes_B: elements of each block, as they lie.
        order_B: the block that comes first, second, ...
        device: of the indices.
    """
    starts_B = np.cumsum(sizes_B) - sizes_B
    new_sizes_B = sizes_B[order_B]
    shift_B = starts_B[order_B] - (np.cumsum(new_sizes_B) - new_sizes_B)
    shift_N = repeat(shift_B, new_sizes_B, device)
    return shift_N + torch.arange(len(shift_N), device=device)


def repeat(values_B: IntArray, times_B: IntArray, device: torch.device) -> Tensor:
    """[N] each value so many times, without waiting for the device."""
    if device.type == "cpu":
        return torch.from_numpy(np.repeat(values_B, times_B))
    host = torch.from_numpy(np.stack([values_B, times_B])).to(device, non_blocking=True)
    return torch.repeat_interleave(host[0], host[1], output_size=int(times_B.sum()))
