"""The cost of a dispatch plan on a machine: seconds of one layer. Cost models of machines are in `rq_ep.costs`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rq_ep.core.arrays import FloatArray
from rq_ep.core.plan import DispatchPlan, WeightTransfer

LAYER_PHASES = ("gather", "plan", "dispatch", "compute", "combine")  # of one call of an MoE layer, as they are timed


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one MoE layer on which its cost depends."""

    hidden_size: int
    intermediate_size: int
    expert_bytes: Mapping[str, int]  # format -> bytes of one expert


@dataclass(frozen=True)
class StepCost:
    """Modelled seconds of one layer in one step, [R] each; the layer ends with its slowest rank."""

    compute_s_R: FloatArray
    exchange_s_R: FloatArray
    transfer_s_R: FloatArray

    @property
    def layer_s(self) -> float:
        """Seconds of the slowest rank without any overlap: an upper bound for a runtime that overlaps."""
        return float((self.compute_s_R + self.exchange_s_R + self.transfer_s_R).max())


@dataclass(frozen=True)
class LayerCost:
    """Seconds of the parts of one layer on one machine, by which a strategy weighs balance against transfers.

    The compute time of a rank is the longer of its arithmetic and of reading the weights of its active replicas
    (TEMPO's model: few rows are bound by memory, many by arithmetic). An overhead is added for each active replica,
    such as its dequantization, and one for the call; with several formats it is the largest, as measured. Each rank
    that computes pairs of an expert reads its weights.
    """

    pair_s: Mapping[str, float]  # format -> arithmetic of one pair among many
    stream_s: Mapping[str, float]  # format -> reading the weights of one replica
    transfer_s: Mapping[str, float]  # format -> one packed expert over a rank's link
    row_s: float  # one row over a rank's link, one way
    overhead_s: Mapping[str, float] = field(default_factory=dict)  # format -> for each active replica; default 0
    latency_s: float = 0.0  # of each exchange and of each round of transfers
    call_s: Mapping[str, float] = field(default_factory=dict)  # format -> for each rank that computes in it; default 0

    def step(self, plan: DispatchPlan) -> StepCost:
        """Modelled seconds of `plan`.

        An exchange takes a rank the longer of its sending and its receiving. A round of transfers takes a rank the
        longest of its sending, its receiving, and all that any of its lenders sends; it begins when the rank and its
        lenders are ready. A rank sends one message and receives one at a time, in an order that the plan leaves open:
        the bidirectional one-port model of Beaumont, Legrand, Marchal and Robert, "Pipelining broadcasts on
        heterogeneous platforms", 2005.
        """
        num_ranks = len(plan.pairs_RP)
        compute_s_R = self.compute_s_R(plan)
        away_RR = plan.pairs_RR.copy()
        np.fill_diagonal(away_RR, 0)
        one_way_s_R = np.maximum(away_RR.sum(axis=0), away_RR.sum(axis=1)) * self.row_s
        exchange_s_R = 2 * (one_way_s_R + self.latency_s * (num_ranks > 1))  # dispatch, and combine the other way
        return StepCost(compute_s_R, exchange_s_R, self._transfer_s_R(plan.transfers, num_ranks))

    def _transfer_s_R(self, transfers: Sequence[WeightTransfer], num_ranks: int) -> FloatArray:
        ended_s_R = np.zeros(num_ranks)
        for number in sorted({transfer.round for transfer in transfers}):
            together = [transfer for transfer in transfers if transfer.round == number]
            sent_s_R, received_s_R = np.zeros(num_ranks), np.zeros(num_ranks)
            for transfer in together:
                sent_s_R[transfer.src] += self.transfer_s[transfer.format]
                received_s_R[transfer.dst] += self.transfer_s[transfer.format]
            began_s_R, moved_s_R = ended_s_R.copy(), np.maximum(sent_s_R, received_s_R)
            for _, src, dst, *_ in together:
                began_s_R[dst] = max(began_s_R[dst], ended_s_R[src])
                moved_s_R[dst] = max(moved_s_R[dst], sent_s_R[src])
            ended_s_R = began_s_R + moved_s_R + self.latency_s * (moved_s_R > 0)
        return ended_s_R

    def compute_s_R(self, plan: DispatchPlan) -> FloatArray:
        """[R] modelled seconds of expert compute without communication."""
        replicas, num_ranks = plan.replicas, len(plan.pairs_RP)
        stored, number_P = replicas.stored_formats
        pairs_P = plan.pairs_RP.sum(axis=0)
        active_P = pairs_P > 0
        pair_s_P = np.array([self.pair_s[name] for name in stored])[number_P]
        stream_s_P = np.array([self.stream_s[name] for name in stored])[number_P]
        arithmetic_s_R = np.bincount(replicas.ranks_P, pairs_P * pair_s_P, minlength=num_ranks)
        stream_s_R = np.bincount(replicas.ranks_P, active_P * stream_s_P, minlength=num_ranks)
        seconds_R: FloatArray = np.maximum(arithmetic_s_R, stream_s_R)
        if self.overhead_s:
            overhead_s_P = np.array([self.overhead_s.get(name, 0.0) for name in stored])[number_P]
            seconds_R += np.bincount(replicas.ranks_P, active_P * overhead_s_P, minlength=num_ranks)
        if self.call_s:
            call_s_P = np.array([self.call_s.get(name, 0.0) for name in stored])[number_P]
            call_s_R = np.zeros(num_ranks)
            np.maximum.at(call_s_R, replicas.ranks_P, active_P * call_s_P)
            seconds_R += call_s_R
        return seconds_R


class CostModel(Protocol):
    """A machine: gives the cost of a layer of any shape."""

    @property
    def description(self) -> str:
        """The source of the figures, as text for readers of a result."""
        ...

    def layer(self, shape: LayerShape) -> LayerCost: ...
