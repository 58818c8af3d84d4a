"""Recorded loads dealt to the ranks that would have served them."""

import numpy as np

from rq_ep.core.arrays import IntArray


def deal_counts(counts_SLE: IntArray, num_ranks: int) -> IntArray:
    """[S, L, R, E] pairs from each source rank: as even as possible, remainders to ranks in turn.

    Args:
        counts_SLE: recorded pairs per step, layer and expert; which rank they came from was not recorded.
        num_ranks: R.
    """
    num_experts = counts_SLE.shape[2]
    base_SLE, rest_SLE = np.divmod(counts_SLE, num_ranks)
    # A rank's turn comes after the last remainder dealt, so that no rank collects the remainders of all experts.
    first_SLE = (np.cumsum(rest_SLE, axis=2) - rest_SLE) % num_ranks
    turn_SLRE = (np.arange(num_ranks).reshape(1, 1, num_ranks, 1) - first_SLE[:, :, None]) % num_ranks
    dealt: IntArray = base_SLE[:, :, None] + (turn_SLRE < rest_SLE[:, :, None])
    assert dealt.shape == (*counts_SLE.shape[:2], num_ranks, num_experts)
    return dealt
