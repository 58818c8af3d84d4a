"""The orders that pairs are sent and computed in."""

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.core.plan import DispatchPlan


def pairs_by_replica(topk_ids_TK: Tensor, topk_weights_TK: Tensor, plan: DispatchPlan, rank: int) -> Tensor:
    """[N] int64, the pairs t * K + k of source `rank` in the order of the replicas that compute them.

    Experts whose replicas mix formats deal out their pairs by weight, lowest first; the others as they come.
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
