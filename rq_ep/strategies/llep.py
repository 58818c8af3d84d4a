"""LLEP, least-loaded expert parallelism (arXiv 2601.17111): overloaded ranks lend experts to idle ones."""

import sys
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError, check_integer, check_number
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan, WeightTransfer, imbalance, intervals
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Planner, SplitRule, Strategy, Summary
from rq_ep.core.topology import Topology
from rq_ep.solver.certificate.certify import certify

DEFAULT_MIN_TOKENS = 1024


class Segment(NamedTuple):
    """Pairs `start` up to `end` of an expert, in the order of source ranks, computed on `rank`."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class Llep(Strategy):
    """Algorithms 2 to 4 of the paper, on its defaults; what its prose leaves open follows the authors' code.

    The fallback compares loads of ranks, as the authors' code and figures do; `fallback_on="expert"` is the formula
    that the paper prints. Segments of one expert on one rank are one borrowed replica, so no weight is transferred
    twice. The paper does not limit what a rank borrows. Where `max_borrowed` does, pairs go to the next emptiest rank
    that may still borrow, and what no rank may take stays on the home rank.

    `auto` decides by the cost of the layer. m: an expert is worth lending for transfer_s / pair_s pairs, which take as
    long to compute as its transfer takes. The default m is planned as well, and the plan of the shorter step is taken.
    lambda: a step is balanced where that is modelled to be shorter than standard expert parallelism; it is considered
    only if the fullest rank exceeds the mean by (transfer_s + latency_s) / (pair_s + 2 row_s) pairs, which take as long
    as the transfer of one expert.
    """

    name: ClassVar[str] = "llep"
    summary: ClassVar[Summary] = Summary(
        "contiguous blocks", "the least loaded rank; weights travel for one step", "LLEP, arXiv 2601.17111"
    )
    split: ClassVar[SplitRule | None] = "home"  # certified as it places: what is lent depends on each step
    lends: ClassVar[bool] = True

    max_tokens_factor: float = 1.0  # alpha: a rank's capacity, in multiples of the mean load
    min_tokens_per_gemm: int | Literal["auto"] = (
        DEFAULT_MIN_TOKENS  # m: a helper's room below this is not worth a matrix product
    )
    fallback_ratio: float | Literal["auto"] = 1.3  # lambda: below this max/mean, standard expert parallelism
    fallback_on: Literal["rank", "expert"] = "rank"
    max_borrowed: int | None = None  # experts that a rank makes room for in a step; None: all that it does not hold
    keep_small_excess: bool = False  # the paper's prose, not its algorithm: an excess below m stays on its home rank

    def __post_init__(self) -> None:
        check_number("max_tokens_factor", self.max_tokens_factor, 0.1, 1e6)
        if self.min_tokens_per_gemm != "auto":
            check_integer("min_tokens_per_gemm", self.min_tokens_per_gemm)
        if self.fallback_ratio != "auto":
            check_number("fallback_ratio", self.fallback_ratio)
        if self.max_borrowed is not None:
            check_integer("max_borrowed", self.max_borrowed)
        if not isinstance(self.keep_small_excess, bool):
            raise UserError(f"keep_small_excess {self.keep_small_excess!r:.60}: choose true or false")
        if self.fallback_on not in ("rank", "expert"):
            raise UserError(f"fallback_on {self.fallback_on!r:.60}: choose rank or expert")

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return certify(problem, self, contiguous(problem))

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        """The home of an expert is the first rank that holds it; a replica that is there already is not sent."""
        replicas, num_ranks = layer.replicas, topology.num_ranks
        _, first_E = np.unique(replicas.experts_P[replicas.by_expert_P], return_index=True)
        home_P_E = replicas.by_expert_P[first_E]
        homes_E = replicas.ranks_P[home_P_E]
        homes = homes_E.tolist()
        formats = [replicas.formats_P[p] for p in home_P_E.tolist()]
        resident = dict(zip(zip(replicas.ranks_P.tolist(), replicas.experts_P.tolist()), range(len(replicas))))
        min_chunks, min_excess = self._thresholds(formats, cost)
        max_borrowed = sys.maxsize if self.max_borrowed is None else self.max_borrowed

        def plan(counts_RE: IntArray) -> DispatchPlan:
            loads_E = counts_RE.sum(axis=0)
            loads_R = np.bincount(homes_E, loads_E, minlength=num_ranks)
            compared = loads_R if self.fallback_on == "rank" else loads_E
            ratio = self.fallback_ratio
            if ratio == "auto":
                ratio = 1 + min_excess * len(compared) / max(int(loads_E.sum()), 1)
            if num_ranks == 1 or imbalance(compared) < ratio:
                return DispatchPlan(replicas, at_home(counts_RE))
            plans = [spread(counts_RE, loads_E, min_chunk) for min_chunk in min_chunks]
            if self.fallback_ratio == "auto":
                plans.append(DispatchPlan(replicas, at_home(counts_RE)))
            if cost is None or len(plans) == 1:
                return plans[0]
            return min(plans, key=lambda plan: cost.step(plan).layer_s)

        def at_home(counts_RE: IntArray) -> IntArray:
            pairs_RP = np.zeros((num_ranks, len(replicas)), np.int64)
            pairs_RP[:, home_P_E] = counts_RE
            return pairs_RP

        def spread(counts_RE: IntArray, loads_E: IntArray, min_chunk: int) -> DispatchPlan:
            pairs_RP = at_home(counts_RE)
            capacity = int(self.max_tokens_factor * int(loads_E.sum()) / num_ranks)
            spilled = assign(
                loads_E.tolist(), homes, num_ranks, capacity, min_chunk, max_borrowed, self.keep_small_excess
            )
            borrowed: dict[tuple[int, int], IntArray] = {}
            for expert, segments in spilled.items():
                pairs_RP[:, home_P_E[expert]] = 0
                cuts = np.array([0, *(segment.end for segment in segments)])
                pairs_Rn = intervals(counts_RE[:, expert], cuts)
                for n, segment in enumerate(segments):
                    key = (segment.rank, expert)
                    if key in resident:
                        pairs_RP[:, resident[key]] += pairs_Rn[:, n]
                    else:
                        borrowed[key] = borrowed[key] + pairs_Rn[:, n] if key in borrowed else pairs_Rn[:, n]
            if not borrowed:
                return DispatchPlan(replicas, pairs_RP)
            transient = [Replica(rank, expert, formats[expert]) for rank, expert in borrowed]
            together, order_P = replicas.joined(transient, replicas.mixed_formats)
            all_pairs_RP = np.concatenate([pairs_RP, np.stack(list(borrowed.values()), axis=1)], axis=1)
            transfers = (WeightTransfer(expert, homes[expert], rank, name) for rank, expert, name in transient)
            return DispatchPlan(together, all_pairs_RP[:, order_P], tuple(sorted(transfers)))

        return plan

    def _thresholds(self, formats: list[str], cost: LayerCost | None) -> tuple[tuple[int, ...], float]:
        """Pairs worth a chunk, to be tried, and pairs above the mean worth balancing."""
        automatic = [name for name in ("min_tokens_per_gemm", "fallback_ratio") if getattr(self, name) == "auto"]
        if automatic and cost is None:
            raise UserError(f"{automatic[0]} auto: needs the cost of the layer on a machine; give a number instead")
        excess = 0.0
        if cost is not None:
            excess = min(
                (cost.transfer_s[name] + cost.latency_s) / (cost.pair_s[name] + 2 * cost.row_s) for name in formats
            )
        if self.min_tokens_per_gemm != "auto":
            return (int(self.min_tokens_per_gemm),), excess
        assert cost is not None
        break_even = ceil(max(cost.transfer_s[name] / cost.pair_s[name] for name in formats))
        return (break_even, DEFAULT_MIN_TOKENS), excess


def assign(
    loads_E: list[int],
    homes_E: list[int],
    num_ranks: int,
    capacity: int,
    min_chunk: int,
    max_borrowed: int = sys.maxsize,
    keep_small_excess: bool = False,
) -> dict[int, list[Segment]]:
    """Least-loaded assignment (Alg. 2 and 3): the segments of every expert that does not stay whole on its home rank.

    Args:
        loads_E: pairs of each expert, all source ranks together.
        homes_E: the rank each expert lives on.
        num_ranks: R.
        capacity: pairs above which a rank counts as overloaded (alpha times the mean).
        min_chunk: least room of a helper that is worth a chunk, unless the chunk is all that is left (m).
        max_borrowed: experts of others that a rank takes.
        keep_small_excess: an expert's pairs above the capacity stay at home if they are fewer than `min_chunk`.
    """
    effective_R = [0] * num_ranks  # assigned so far, and native work not decided yet
    for load, home in zip(loads_E, homes_E):
        effective_R[home] += load
    num_borrowed_R = [0] * num_ranks
    spilled: dict[int, list[Segment]] = {}
    for expert in sorted(range(len(loads_E)), key=lambda e: -loads_E[e]):
        load, home = loads_E[expert], homes_E[expert]
        if not load:
            break
        kept = min(max(capacity - effective_R[home] + load, 0), load)
        if kept == load or (keep_small_excess and load - kept < min_chunk):
            continue
        effective_R[home] -= load - kept
        segments = [Segment(home, 0, kept)] if kept else []
        segments += _spill(kept, load, home, effective_R, num_borrowed_R, capacity, min_chunk, max_borrowed)
        spilled[expert] = segments
    return spilled


def _spill(
    start: int,
    end: int,
    home: int,
    effective_R: list[int],
    num_borrowed_R: list[int],
    capacity: int,
    min_chunk: int,
    max_borrowed: int,
) -> list[Segment]:
    """Hand pairs `start` up to `end` to the least loaded other ranks, by chunks (Alg. 3); updates both lists."""
    segments: list[Segment] = []
    offered_R = [
        sys.maxsize if rank == home or number >= max_borrowed else load
        for rank, (load, number) in enumerate(zip(effective_R, num_borrowed_R))
    ]
    while start < end:
        # The least loaded helper has the most room: if a chunk does not fit there, it fits nowhere, and all goes there.
        least = min(offered_R)
        helper, rest = offered_R.index(least), end - start
        chunk = min(rest, capacity - least)
        if chunk <= 0 or (chunk < min_chunk and chunk < rest):
            chunk = rest
        if least == sys.maxsize:
            helper = home
        elif all(segment.rank != helper for segment in segments):
            num_borrowed_R[helper] += 1
        segments.append(Segment(helper, start, start + chunk))
        offered_R[helper] += chunk
        effective_R[helper] += chunk
        start += chunk
    return segments
