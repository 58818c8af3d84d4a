"""What every strategy must do, as checks that a test calls with any layer and any counts."""

import numpy as np

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology


def check_planners(strategy: Strategy, layer: LayerPlacement, topology: Topology, counts_RE: np.ndarray) -> None:
    """Plan a step as ranks do, each with a planner of its own, and compare their plans, and those of one planner."""
    planners = [strategy.planner(layer, topology) for _ in range(max(topology.num_ranks, 2))]
    plans = []
    for planner in (*planners, planners[0]):
        given_RE = counts_RE.copy()
        plans.append(planner(given_RE))
        np.testing.assert_array_equal(given_RE, counts_RE, "the planner changed its argument")
    check_plan(plans[0], layer, counts_RE)
    check_lending(plans[0], strategy, layer)
    for plan in plans[1:]:
        assert list(plan.replicas) == list(plans[0].replicas), "ranks plan other replicas from the same counts"
        np.testing.assert_array_equal(plan.pairs_RP, plans[0].pairs_RP, "ranks plan otherwise from the same counts")
        assert plan.transfers == plans[0].transfers, "ranks plan other transfers from the same counts"


def check_plan(plan: DispatchPlan, layer: LayerPlacement, counts_RE: np.ndarray) -> None:
    """Every pair goes to one replica of its expert; replicas are the resident ones and what is transferred."""
    assert plan.pairs_RP.dtype == np.int64
    assert (plan.pairs_RP >= 0).all()
    np.testing.assert_array_equal(computed_RE(plan, layer.num_experts), counts_RE, "pairs are lost or sent twice")
    keys = list(zip(plan.replicas.ranks_P.tolist(), plan.replicas.experts_P.tolist(), strict=True))
    assert keys == sorted(set(keys))
    resident = set(layer.replicas)
    borrowed = {Replica(transfer.dst, transfer.expert, transfer.format) for transfer in plan.transfers}
    assert len(borrowed) == len(plan.transfers)
    assert resident | borrowed == set(plan.replicas)
    assert not resident & borrowed
    holders = {(replica.rank, replica.expert) for replica in resident}
    for transfer in sorted(plan.transfers, key=lambda transfer: transfer.round):
        earlier = {(each.dst, each.expert, each.format) for each in plan.transfers if each.round < transfer.round}
        assert (transfer.src, transfer.expert) in holders or (transfer.src, transfer.expert, transfer.format) in earlier


def check_lending(plan: DispatchPlan, strategy: Strategy, layer: LayerPlacement) -> None:
    """Transfers are what the strategy declares, since memory is set aside for that."""
    assert strategy.lends or not plan.transfers, "transfers experts, but does not declare `lends`"
    if strategy.max_borrowed is not None:
        number_R = np.bincount([transfer.dst for transfer in plan.transfers], minlength=1)
        assert number_R.max() <= strategy.max_borrowed, "a rank borrows more experts than `max_borrowed`"
    formats = {transfer.format for transfer in plan.transfers}
    assert formats <= {*layer.replicas.formats_P, strategy.transient_format}


def computed_RE(plan: DispatchPlan, num_experts: int) -> np.ndarray:
    """[R, E] pairs of each source and expert, summed over the replicas they go to."""
    sums_RE = np.zeros((len(plan.pairs_RP), num_experts), np.int64)
    for p, expert in enumerate(plan.replicas.experts_P.tolist()):
        sums_RE[:, expert] += plan.pairs_RP[:, p]
    return sums_RE
