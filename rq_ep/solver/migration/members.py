"""The ranks that take part now, of all ranks of a group: from R ranks to the M members alone, and back.

Ranks are never renumbered. The others are holes: they hold no replica, and get and send nothing. Members are named in
ascending order, so that replicas keep their order by rank and expert on the way there and back.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.moves import Move
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replicas
from rq_ep.core.rules import Rules
from rq_ep.core.strategy import Planner, Strategy
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.move_rounds import MoveRound


def lowered_layer(layer: LayerPlacement, members: Sequence[int]) -> LayerPlacement:
    """The replicas of the members, on as many ranks; they share what replicas on holes would have computed.

    Raises:
        UserError: no member holds some expert.
    """
    table, is_member_P = layer.replicas, np.isin(layer.replicas.ranks_P, members)
    kept_P = np.flatnonzero(is_member_P)
    replicas = Replicas(
        np.searchsorted(members, table.ranks_P[kept_P]),
        table.experts_P[kept_P],
        tuple(table.formats_P[p] for p in kept_P.tolist()),
        table.mixed_formats,
    )
    shares_P = layer.shares_P[kept_P]
    if len(kept_P) < len(table):
        shares_E = np.bincount(replicas.experts_P, shares_P, minlength=layer.num_experts)
        copies_E = np.bincount(replicas.experts_P, minlength=layer.num_experts)
        even_P = 1 / copies_E[replicas.experts_P]
        of_all_P = shares_E[replicas.experts_P]
        shares_P = np.divide(shares_P, of_all_P, out=even_P, where=of_all_P > 0)
    return replace(layer, replicas=replicas, shares_P=shares_P)


def lifted_layer(layer: LayerPlacement, members: Sequence[int]) -> LayerPlacement:
    """The layer of as many ranks as there are members, with the members' numbers."""
    return replace(layer, replicas=_lifted_replicas(layer.replicas, np.array(members, np.int64)))


def lowered(placement: Placement, members: Sequence[int]) -> Placement:
    """The placement of the members alone, renumbered from 0 on.

    Raises:
        UserError: no member holds some expert.
    """

    def of_members(sizes_R: Sequence[int]) -> tuple[int, ...]:
        return tuple(sizes_R[rank] for rank in members)

    budget_R = placement.budget_bytes_R
    return replace(
        placement,
        layers=tuple(lowered_layer(layer, members) for layer in placement.layers),
        topology=placement.topology.of(members),
        bytes_R=of_members(placement.bytes_R),
        budget_bytes_R=None if budget_R is None else of_members(budget_R),
    )


def lifted(
    placement: Placement, members: Sequence[int], topology: Topology, budget_bytes_R: tuple[int, ...] | None = None
) -> Placement:
    """The placement of the members as one of all ranks, of which the others hold nothing.

    Args:
        placement: on as many ranks as there are members.
        members: their numbers, ascending.
        topology: all ranks.
        budget_bytes_R: of all ranks; default: the members' own, and nothing for holes.
    """

    def of_all(sizes_M: Sequence[int]) -> tuple[int, ...]:
        sizes = dict(zip(members, sizes_M, strict=True))
        return tuple(sizes.get(rank, 0) for rank in range(topology.num_ranks))

    if budget_bytes_R is None and placement.budget_bytes_R is not None:
        budget_bytes_R = of_all(placement.budget_bytes_R)
    return replace(
        placement,
        layers=tuple(lifted_layer(layer, members) for layer in placement.layers),
        topology=topology,
        bytes_R=of_all(placement.bytes_R),
        budget_bytes_R=budget_bytes_R,
    )


def lowered_problem(problem: PlacementProblem, members: Sequence[int]) -> PlacementProblem:
    """The problem of the members alone. Rules, which name ranks, are left out."""
    budget_R, held, new_rank = problem.budget_bytes_R, problem.held, {rank: i for i, rank in enumerate(members)}
    if held is not None:
        held = [[one._replace(rank=new_rank[one.rank]) for one in row if one.rank in new_rank] for row in held]
    return replace(
        problem,
        topology=problem.topology.of(members),
        budget_bytes_R=None if budget_R is None else tuple(budget_R[rank] for rank in members),
        rules=Rules(),
        held=held,
    )


def lifted_rounds(rounds: Sequence[MoveRound], members: Sequence[int]) -> tuple[MoveRound, ...]:
    """Rounds of moves between as many ranks as there are members, with the members' numbers."""

    def of_all(moves: Sequence[tuple[int, Move]]) -> tuple[tuple[int, Move], ...]:
        return tuple(
            (position, move._replace(rank=members[move.rank], source=_lifted_source(move, members)))
            for position, move in moves
        )

    return tuple(MoveRound(of_all(one.receives), of_all(one.drops)) for one in rounds)


def planner_for_members(
    strategy: Strategy, layer: LayerPlacement, topology: Topology, cost: LayerCost | None, members: Sequence[int]
) -> Planner:
    """A planner of all ranks that plans as the strategy does on the members alone; holes get and send nothing.

    What holes would send is not counted. Where no member holds some expert, which is to arrive first, there is nothing
    to plan: the planner must not be called.

    Args:
        strategy: plans.
        layer: replicas on holes are left out.
        topology: all ranks and their nodes.
        cost: the layer on the machine at hand.
        members: ascending.
    """
    num_ranks = topology.num_ranks
    if len(members) == num_ranks:
        return strategy.planner(layer, topology, cost)
    ranks_M = np.array(members, np.int64)
    held = layer.replicas.experts_P[np.isin(layer.replicas.ranks_P, ranks_M)]
    lost = np.setdiff1d(np.arange(layer.num_experts), held)
    if len(lost):
        return _no_plan(f"no rank holds expert {lost[0]} of layer {layer.index} yet")
    of_members = lowered_layer(layer, members)
    plan_of_members = strategy.planner(of_members, topology.of(members), cost)
    resident = _lifted_replicas(of_members.replicas, ranks_M)

    def plan(counts_RE: IntArray) -> DispatchPlan:
        lowered_plan = plan_of_members(counts_RE[ranks_M])
        pairs_RP = np.zeros((num_ranks, len(lowered_plan.replicas)), np.int64)
        pairs_RP[ranks_M] = lowered_plan.pairs_RP
        if not lowered_plan.transfers:
            return DispatchPlan(resident, pairs_RP)
        transfers = tuple(one._replace(src=members[one.src], dst=members[one.dst]) for one in lowered_plan.transfers)
        return DispatchPlan(_lifted_replicas(lowered_plan.replicas, ranks_M), pairs_RP, transfers)

    return plan


def _lifted_source(move: Move, members: Sequence[int]) -> int | None:
    return None if move.source is None else members[move.source]


def _no_plan(reason: str) -> Planner:
    def plan(counts_RE: IntArray) -> DispatchPlan:
        raise AssertionError(reason)

    return plan


def _lifted_replicas(replicas: Replicas, ranks_M: IntArray) -> Replicas:
    return replace(replicas, ranks_P=ranks_M[replicas.ranks_P])
