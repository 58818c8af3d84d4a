"""The plan of one layer and step: how many routed pairs every source rank sends to every replica."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.replicas import Replicas


class WeightTransfer(NamedTuple):
    """An expert that `dst` borrows from `src` for one step. It travels packed in `format`.

    `src` holds it in that format, makes it from the one it holds, or has borrowed it in an earlier round. Transfers of
    a round start together; a rank begins the next one when its own have ended.
    """

    expert: int
    src: int
    dst: int
    format: str
    round: int = 0


@dataclass(frozen=True)
class DispatchPlan:
    """Who computes what in one step. Every rank derives the same plan from the same counts; the rest follows from it.

    `replicas` holds the resident replicas of the layer and the borrowed ones (one for each transfer), together sorted
    by (rank, expert). `pairs_RP[r, p]` pairs go from source rank r to replica p; summed over the replicas of e they
    equal `counts_RE[:, e]`. A source's pairs of e, in (token, k) order, fill e's replicas in the order of their ranks;
    where e's replicas mix formats, in the order of their gates, lowest first, fewest bits first.
    """

    replicas: Replicas
    pairs_RP: IntArray
    transfers: tuple[WeightTransfer, ...] = ()

    @cached_property
    def pairs_RR(self) -> IntArray:
        """[source rank, destination rank] routed pairs."""
        num_ranks = len(self.pairs_RP)
        running_RP = np.zeros((num_ranks, len(self.replicas) + 1), np.int64)
        np.cumsum(self.pairs_RP, axis=1, out=running_RP[:, 1:])
        first_R = np.searchsorted(self.replicas.ranks_P, np.arange(num_ranks + 1))
        return np.diff(running_RP[:, first_R], axis=1)

    @cached_property
    def loads_R(self) -> IntArray:
        """[R] routed pairs that each rank computes."""
        loads_R: IntArray = self.pairs_RR.sum(axis=0)
        return loads_R


def imbalance(loads_R: IntArray) -> float:
    """max/mean over ranks; 1 is perfect. A step without pairs counts as balanced."""
    total = int(loads_R.sum())
    return float(loads_R.max()) * len(loads_R) / total if total else 1.0


def intervals(counts_R: IntArray, cuts_n: IntArray) -> IntArray:
    """[R, n] how an expert's pairs, numbered source rank by source rank, fall into n consecutive intervals.

    Args:
        counts_R: [R] pairs of the expert on each source rank.
        cuts_n: [n + 1] ascending interval ends, from 0 to the expert's total.
    """
    ends_R = np.cumsum(counts_R)
    starts_R = ends_R - counts_R
    overlap_Rn = np.minimum(ends_R[:, None], cuts_n[1:]) - np.maximum(starts_R[:, None], cuts_n[:-1])
    pairs_Rn: IntArray = overlap_Rn.clip(min=0)
    return pairs_Rn


def spread_over_sources(counts_E: IntArray, num_ranks: int) -> IntArray:
    """[..., R, E] pairs from each source rank: as even as possible, remainders to ranks in turn.

    Args:
        counts_E: [..., E] recorded pairs of each expert; which rank they came from was not recorded.
        num_ranks: R.
    """
    base_E, rest_E = np.divmod(counts_E, num_ranks)
    # An expert's remainder begins where the one before it ended, so that no rank collects the remainders of all.
    first_E = (np.cumsum(rest_E, axis=-1) - rest_E) % num_ranks
    turn_RE = (np.arange(num_ranks)[:, None] - first_E[..., None, :]) % num_ranks
    counts_RE: IntArray = base_E[..., None, :] + (turn_RE < rest_E[..., None, :])
    return counts_RE
