"""A group of which some ranks are holes plans as a group of its members alone, whatever the strategy."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.members import lifted, lifted_layer, lowered, lowered_layer, planner_for_members
from tests.strategies.cases import EXPERT_BYTES
from tests.strategies.conformance import check_plan
from tests.strategies.test_conformance import strategy_of

COST = LayerCost({"bf16": 1e-6, "int8": 1e-6}, {"bf16": 1e-5, "int8": 5e-6}, {"bf16": 1e-5, "int8": 5e-6}, 1e-7)


def drawn_layer(generator: np.random.Generator, strategy: Strategy, num_ranks: int, num_experts: int) -> LayerPlacement:
    """A layer that the strategy can serve: one replica of each expert, and others where it serves several."""
    replicas = {(int(generator.integers(num_ranks)), expert) for expert in range(num_experts)}
    if strategy.serves_replicas:
        replicas |= {(int(generator.integers(num_ranks)), int(generator.integers(num_experts))) for _ in range(4)}
    names = generator.choice(["bf16", "int8"], num_experts)
    return LayerPlacement.even(3, num_experts, [Replica(rank, e, str(names[e])) for rank, e in replicas])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_holes_get_and_send_nothing_and_the_plan_is_that_of_the_members_alone(strategy_name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    strategy = strategy_of(strategy_name)
    num_ranks, num_experts = int(generator.integers(2, 8)), int(generator.integers(1, 10))
    topology = Topology(num_ranks, int(generator.integers(0, num_ranks + 1)))
    members = sorted(generator.permutation(num_ranks)[: generator.integers(1, num_ranks + 1)].tolist())
    compact = drawn_layer(generator, strategy, len(members), num_experts)
    layer = lifted_layer(compact, members)
    counts_RE = np.zeros((num_ranks, num_experts), np.int64)
    counts_RE[members] = generator.integers(0, 50, (len(members), num_experts)) ** 2
    cost = COST if generator.integers(2) else None

    plan = planner_for_members(strategy, layer, topology, cost, members)(counts_RE)
    alone = strategy.planner(compact, topology.of(members), cost)(counts_RE[members])

    check_plan(plan, layer, counts_RE)
    holes = np.setdiff1d(np.arange(num_ranks), members)
    assert not plan.pairs_RP[holes].any()
    assert not plan.pairs_RR[:, holes].any()
    np.testing.assert_array_equal(plan.pairs_RP[members], alone.pairs_RP)
    assert list(plan.replicas) == [one._replace(rank=members[one.rank]) for one in alone.replicas]
    assert list(plan.transfers) == [one._replace(src=members[one.src], dst=members[one.dst]) for one in alone.transfers]


def test_ranks_of_a_node_stay_together_when_others_leave() -> None:
    topology = Topology(8, 4)
    assert topology.of(range(8)) == topology
    assert topology.of([0, 1, 3, 4, 5, 6, 7]).nodes_R.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert topology.of([0, 4, 5, 6]).num_nodes == 2
    assert topology.of([4, 5, 6, 7]) == Topology(4)
    assert topology.of([1, 2, 4]).neighbors_GR2.tolist() == [
        [[0, 1], [1, 2], [2, 3]], [[0, 2], [0, 2], [2, 3]], [[0, 3], [0, 3], [0, 3]],
    ]  # fmt: skip


def test_sources_fill_replicas_of_their_own_node_first_after_a_rank_has_left() -> None:
    strategy, topology, members = strategy_of("rq"), Topology(6, 3), [0, 1, 3, 4, 5]
    layer = LayerPlacement.even(0, 1, [Replica(1, 0, "bf16"), Replica(3, 0, "bf16")])
    counts_RE = np.array([[10], [0], [0], [0], [10], [0]])
    plan = planner_for_members(strategy, layer, topology, None, members)(counts_RE)
    assert plan.pairs_RP.tolist() == [[10, 0], [0, 0], [0, 0], [0, 0], [0, 10], [0, 0]]


def test_a_group_without_holes_has_the_strategys_own_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, topology = strategy_of("rq"), Topology(2)
    monkeypatch.setattr(type(strategy), "planner", lambda self, *arguments: arguments)
    layer = LayerPlacement.even(0, 1, [Replica(1, 0, "bf16")])
    assert planner_for_members(strategy, layer, topology, COST, [0, 1]) == (layer, topology, COST)


def test_a_layer_without_some_expert_has_no_plan_until_it_arrives() -> None:
    layer = LayerPlacement.even(4, 2, [Replica(0, 0, "bf16"), Replica(1, 1, "bf16")])
    planner = planner_for_members(strategy_of("llep"), layer, Topology(2), None, [0])
    with pytest.raises(AssertionError, match="no rank holds expert 1 of layer 4"):
        planner(np.zeros((2, 2), np.int64))


def test_a_placement_lowered_to_its_members_and_lifted_again_is_the_same() -> None:
    replicas = [Replica(0, 0, "bf16"), Replica(2, 0, "bf16"), Replica(2, 1, "int8"), Replica(3, 2, "bf16")]
    layers = (LayerPlacement.even(0, 3, replicas),)
    bytes_R = tuple(bytes_by_rank(layers, 5, EXPERT_BYTES).tolist())
    placement = Placement(layers, "rq", Topology(5, 2), bytes_R, (2000, 0, 2000, 1000, 0))
    alone = lowered(placement, [0, 2, 3])
    assert alone.topology.nodes_R.tolist() == [0, 1, 1]
    assert (alone.bytes_R, alone.budget_bytes_R) == ((1000, 1504, 1000), (2000, 2000, 1000))
    assert [one.rank for one in alone.layers[0].replicas] == [0, 1, 1, 2]
    again = lifted(alone, [0, 2, 3], placement.topology)
    assert again.to_dict() == placement.to_dict()


def test_members_share_what_replicas_on_holes_computed() -> None:
    layer = LayerPlacement.even(
        0, 2, [Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(2, 0, "bf16"), Replica(2, 1, "bf16")]
    )
    assert lowered_layer(layer, [0, 2]).shares_P.tolist() == [0.5, 0.5, 1.0]
    with pytest.raises(UserError, match="expert 1 has no replica"):
        lowered_layer(layer, [0, 1])
