"""EPLB, DeepSeek's balancer: replicate the experts with most load per replica, pack evenly, split evenly."""

from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush, heapreplace
from typing import ClassVar

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Planner, RebalanceRule, SplitRule, Strategy, Summary
from rq_ep.core.topology import Topology, nodes_of_groups
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.split.min_max_split import ByExpert
from rq_ep.solver.split.source_split import in_source_order

ROUNDING = 1e-6  # of a pair: more than sums of shares are off, less than a share of one pair


@dataclass(frozen=True)
class Eplb(Strategy):
    """The two greedy steps of github.com/deepseek-ai/EPLB, global or hierarchical, without its need for equal divisors.

    Hierarchical (groups of experts to nodes first) where the model has expert groups that divide by the nodes. Unlike
    the original, never two replicas of an expert on a rank, and a layer without load is spread evenly.
    """

    name: ClassVar[str] = "eplb"
    summary: ClassVar[Summary] = Summary(
        "replicas of the busy, packed evenly; same bytes, or `--num-redundant-experts N` more",
        "even split over replicas",
        "DeepSeek EPLB",
    )
    split: ClassVar[SplitRule | None] = "even"
    counts_replicas: ClassVar[bool] = True
    # As vLLM does by default: whatever is planned is taken, for the first time after a quarter of an interval.
    rebalance_rule: ClassVar[RebalanceRule | None] = RebalanceRule(
        window=1000, interval=3000, full_step=1, first=0.25, min_gain=None, price=0.0
    )

    def place(self, problem: PlacementProblem, current: Placement | None = None) -> Placement:
        return certify(problem, self, self.layers(problem))

    def layers(self, problem: PlacementProblem) -> list[LayerPlacement]:
        """Replicas of every layer, with `problem.num_redundant_experts` more than experts in each."""
        stats, topology = problem.stats, problem.topology
        loads_LE = stats.counts.sum(axis=0).astype(np.float64)
        layers = []
        for layer, loads_E in zip(stats.layers, loads_LE, strict=True):
            if not loads_E.any():
                loads_E = np.ones_like(loads_E)
            pools = _node_pools(loads_E, topology, stats.expert_groups)
            replicas = []
            for number, (experts, ranks) in enumerate(pools):
                extras = problem.num_redundant_experts * (number + 1) // len(pools)
                extras -= problem.num_redundant_experts * number // len(pools)
                for expert, rank in _place_pool(loads_E, experts, ranks, extras):
                    replicas.append(Replica(rank, expert, stats.native_format))
            layers.append(LayerPlacement.even(layer, stats.num_experts, replicas))
        return layers

    def planner(self, layer: LayerPlacement, topology: Topology, cost: LayerCost | None = None) -> Planner:
        replicas = layer.replicas
        by_expert = ByExpert.of(replicas, topology.num_ranks)
        cuts_2C = _intervals(layer.shares_P[by_expert.replicas_C], by_expert)

        def plan(counts_RE: IntArray) -> DispatchPlan:
            totals_C = counts_RE.sum(axis=0)[by_expert.experts_C]
            first_C, end_C = np.floor(cuts_2C * totals_C + ROUNDING).astype(np.int64)
            quotas_C = end_C - first_C
            return DispatchPlan(replicas, in_source_order(by_expert, counts_RE, quotas_C))

        plan(np.zeros((topology.num_ranks, layer.num_experts), np.int64))  # what is compiled is compiled now
        return plan


def _intervals(shares_C: FloatArray, by_expert: ByExpert) -> FloatArray:
    """[2, C] where each replica's part of its expert's pairs starts and ends, as fractions of them.

    Replicas share evenly, but for placements of other engines in which a rank holds an expert in two of three slots.
    """
    is_first_C, is_last_C = by_expert.number_C == 0, by_expert.number_C == by_expert.num_replicas_C - 1
    running_C = np.cumsum(shares_C)
    before_C = (running_C - shares_C)[by_expert.first_E[by_expert.experts_C]]
    ends_C = np.where(is_last_C, 1.0, running_C - before_C)
    return np.stack([np.where(is_first_C, 0.0, np.roll(ends_C, 1)), ends_C])


def eplb_candidates(problem: PlacementProblem) -> list[list[LayerPlacement]]:
    """EPLB's layers with no extra replicas, and with as many as the smallest budget has room for."""
    stats, num_ranks = problem.stats, problem.topology.num_ranks
    numbers = {0}
    if problem.budget_bytes_R is not None:
        slots = min(problem.budget_bytes_R) // (stats.expert_bytes[stats.native_format] * stats.num_layers)
        numbers.add(max(min(slots, stats.num_experts) * num_ranks - stats.num_experts, 0))
    return [Eplb().layers(replace(problem, num_redundant_experts=number)) for number in sorted(numbers)]


def _node_pools(
    loads_E: FloatArray, topology: Topology, expert_groups: int | None
) -> list[tuple[list[int], list[int]]]:
    """Experts and the ranks they may live on: one pool, or one per node where expert groups divide by nodes."""
    num_experts, num_nodes = len(loads_E), topology.num_nodes
    everywhere = (list(range(num_experts)), list(range(topology.num_ranks)))
    if num_nodes == 1 or topology.num_ranks % num_nodes:
        return [everywhere]
    if not expert_groups or expert_groups % num_nodes or num_experts % expert_groups:
        return [everywhere]
    group_size = num_experts // expert_groups
    nodes_G = nodes_of_groups(loads_E.reshape(expert_groups, group_size).sum(axis=1), num_nodes)
    pools = []
    for node in range(num_nodes):
        experts = np.flatnonzero(np.repeat(nodes_G, group_size) == node).tolist()
        pools.append((experts, np.flatnonzero(topology.nodes_R == node).tolist()))
    return pools


def _place_pool(loads_E: FloatArray, experts: list[int], ranks: list[int], num_extras: int) -> list[tuple[int, int]]:
    """(expert, rank) of every replica of these experts, `num_extras` more than one of each, on these ranks."""
    num_replicas = dict.fromkeys(experts, 1)
    heaviest = [(-loads_E[expert], expert) for expert in experts]
    heapify(heaviest)
    for _ in range(min(num_extras, len(experts) * (len(ranks) - 1))):
        while num_replicas[heaviest[0][1]] == len(ranks):  # an expert on every rank takes no more
            heapreplace(heaviest, (1.0, heaviest[0][1]))
        expert = heaviest[0][1]
        num_replicas[expert] += 1
        heapreplace(heaviest, (-loads_E[expert] / num_replicas[expert], expert))
    names = [expert for expert in experts for _ in range(num_replicas[expert])]
    loads = [float(loads_E[expert]) / num_replicas[expert] for expert in names]
    share, rest = divmod(len(names), len(ranks))
    held = _pack(loads, names, [share + (position < rest) for position in range(len(ranks))])
    return [(expert, rank) for rank, here in zip(ranks, held, strict=True) for expert in here]


def _pack(loads: list[float], names: list[int], sizes: list[int]) -> list[list[int]]:
    """Longest first onto the least loaded bin that has room and lacks the name; bin b ends with sizes[b]."""
    bins: list[list[int]] = [[] for _ in sizes]
    bin_loads = [0.0] * len(sizes)
    load_of = dict(zip(names, loads, strict=True))
    emptiest = [(0.0, b) for b, size in enumerate(sizes) if size]  # a heap of the bins that have room
    for item in sorted(range(len(names)), key=lambda item: -loads[item]):
        name, passed = names[item], []
        while emptiest and name in bins[emptiest[0][1]]:
            passed.append(heappop(emptiest))
        if emptiest:
            chosen = heappop(emptiest)[1]
        else:
            # Every bin with room holds the name: another bin hands over something that the first of them lacks.
            room = min(b for _, b in passed)
            chosen = next(b for b, held in enumerate(bins) if name not in held)
            moved = next(other for other in bins[chosen] if other not in bins[room])
            bins[chosen].remove(moved)
            bins[room].append(moved)
            bin_loads[chosen] -= load_of[moved]
            bin_loads[room] += load_of[moved]
            passed = [(bin_loads[b], b) for _, b in passed if len(bins[b]) < sizes[b]]
        bins[chosen].append(name)
        bin_loads[chosen] += loads[item]
        if len(bins[chosen]) < sizes[chosen]:
            passed.append((bin_loads[chosen], chosen))
        for entry in passed:
            heappush(emptiest, entry)
    return bins
