"""EPLB: its two greedy steps against hand-made and published cases."""

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.replicas import Replica
from rq_ep.core.rules import Rules
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.strategies.eplb import Eplb


def place(
    loads_LE: list[list[int]],
    num_ranks: int,
    num_redundant: int = 0,
    ranks_per_node: int = 0,
    groups: int | None = None,
) -> Placement:
    counts_SLE = np.array([loads_LE], np.int64)
    stats = ExpertStats(counts_SLE, ("bf16",), "bf16", {"bf16": 10}, expert_groups=groups)
    topology = Topology(num_ranks, ranks_per_node)
    return Eplb().place(PlacementProblem(stats, topology, num_redundant_experts=num_redundant))


def loads_R(placement: Placement, loads_LE: list[list[int]], at: int = 0) -> np.ndarray:
    layer = placement.layers[at]
    pairs_P = np.array(loads_LE[at])[layer.replicas.experts_P] * layer.shares_P
    return np.bincount(layer.replicas.ranks_P, pairs_P, placement.topology.num_ranks)


def numbers_E(layer: LayerPlacement) -> list[int]:
    return np.bincount(layer.replicas.experts_P).tolist()


def test_the_example_of_its_readme() -> None:
    # 12 experts in 4 groups, 16 replicas on 2 nodes of 4 ranks; what DeepSeek's own code prints for it.
    loads_LE = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    printed = [
        [{5, 6}, {5, 7}, {8, 4}, {3, 4}, {10, 9}, {10, 2}, {0, 1}, {11, 1}],
        [{7, 10}, {6, 8}, {6, 11}, {8, 9}, {2, 4}, {5, 1}, {5, 0}, {3, 1}],
    ]
    placement = place(loads_LE, 8, 4, ranks_per_node=4, groups=4)
    for layer, expected in zip(placement.layers, printed, strict=True):
        held = [set(layer.replicas.experts_P[layer.replicas.on_rank(rank)].tolist()) for rank in range(8)]
        assert held == expected


def test_longest_first_reaches_the_known_maximum() -> None:
    loads_LE = [[9, 8, 7, 6, 5, 4, 3, 2]]
    assert loads_R(place(loads_LE, 4), loads_LE).tolist() == [11, 11, 11, 11]
    # Five replicas each of two giants, and the pairs of them that the packing cannot avoid: 600 / 5 + 560 / 5.
    loads_LE = [[600, 560, 120, 120, 20, 10, 10, 10]]
    assert loads_R(place(loads_LE, 8, 8), loads_LE).max() == 232


def test_replicas_go_to_the_largest_load_per_replica() -> None:
    assert numbers_E(place([[600, 300, 100, 100]], 4, 3).layers[0]) == [3, 2, 1, 1]


def test_zero_redundancy_takes_the_bytes_of_standard_ep() -> None:
    loads_LE = [[50, 40, 3, 3, 2, 2, 1, 1]]
    placement = place(loads_LE, 4)
    assert placement.bytes_R == (20,) * 4
    assert loads_R(placement, loads_LE).max() == 51
    assert numbers_E(placement.layers[0]) == [1] * 8


@pytest.mark.parametrize(
    ("loads", "num_ranks", "num_redundant"),
    [
        ([100, 0, 0, 0], 4, 4),
        ([0, 0, 0, 0], 4, 4),
        ([5, 4, 3], 5, 4),
        ([7, 1, 1, 1, 1], 3, 2),
        ([1], 3, 9),
        ([3, 2], 2, 9),
    ],
)
def test_ranks_hold_distinct_experts_and_equal_numbers(loads: list[int], num_ranks: int, num_redundant: int) -> None:
    layer = place([loads], num_ranks, num_redundant).layers[0]
    total = min(len(loads) + num_redundant, len(loads) * num_ranks)
    assert len(layer.replicas) == total
    per_rank = np.bincount(layer.replicas.ranks_P, minlength=num_ranks)
    assert per_rank.max() - per_rank.min() <= 1


def test_a_layer_without_load_is_spread_evenly() -> None:
    numbers = numbers_E(place([[0] * 8], 4, 4).layers[0])
    assert sorted(numbers) == [1] * 4 + [2] * 4


@pytest.mark.parametrize("groups", [None, 3])
def test_groups_that_do_not_divide_by_nodes_are_ignored(groups: int | None) -> None:
    loads_LE = [[9, 8, 7, 6, 5, 4, 3, 2, 1]]
    spread = place(loads_LE, 4, 3, ranks_per_node=2, groups=groups)
    assert list(spread.layers[0].replicas) == list(place(loads_LE, 4, 3).layers[0].replicas)


def test_pairs_split_evenly_over_replicas() -> None:
    layer = LayerPlacement.even(0, 2, [Replica(rank, 0, "bf16") for rank in range(3)] + [Replica(2, 1, "bf16")])
    plan = Eplb().planner(layer, Topology(3))(np.array([[5, 1], [2, 0], [3, 4]]))
    # 10 pairs of expert 0 in source order: 3 to rank 0, 3 to rank 1, 4 to rank 2.
    assert plan.pairs_RP.tolist() == [[3, 2, 0, 1], [0, 1, 1, 0], [0, 0, 3, 4]]


def test_redundant_experts_beyond_the_budget_are_refused_with_the_bytes_they_take() -> None:
    stats = ExpertStats(np.full((1, 1, 8), 5, np.int64), ("bf16",), "bf16", {"bf16": 10})
    budget = (standard_ep_bytes(stats, 4),) * 4
    with pytest.raises(UserError, match=r"30 bytes of experts .* budget of 20: raise --budget to 30"):
        Eplb().place(PlacementProblem(stats, Topology(4), budget, num_redundant_experts=4))


def test_an_even_split_is_even_to_the_pair() -> None:
    for copies in (1, 2, 3, 7, 33):
        layer = LayerPlacement.even(0, 1, [Replica(rank, 0, "bf16") for rank in range(copies)])
        planner = Eplb().planner(layer, Topology(copies))
        for total in (0, 1, copies - 1, copies, 100, 65_537, 40_000_001):
            counts_RE = np.zeros((copies, 1), np.int64)
            counts_RE[-1] = total
            ends = [number * total // copies for number in range(copies + 1)]
            assert planner(counts_RE).loads_R.tolist() == np.diff(ends).tolist()


def test_a_rank_with_two_of_three_slots_takes_two_thirds() -> None:
    even = LayerPlacement.even(0, 2, [Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "bf16")])
    layer = LayerPlacement(0, 2, even.replicas, np.array([2 / 3, 1 / 3, 1.0]))
    assert Eplb().planner(layer, Topology(2))(np.array([[30, 5], [60, 0]])).loads_R.tolist() == [60, 35]


@pytest.mark.parametrize("seed", range(3))
def test_whole_groups_are_kept_as_rules_ask(seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts_SLE = generator.integers(0, 100, (3, 4, 16))
    counts_SLE[:, 1] = 0
    stats = ExpertStats(counts_SLE, ("bf16",), "bf16", {"bf16": 10}, expert_groups=8)
    rules = Rules(whole_groups=True)
    problem = PlacementProblem(stats, Topology(8, 2), num_redundant_experts=8, rules=rules)
    for layer in Eplb().place(problem).layers:  # refused where a group were on two nodes
        nodes_P, groups_P = layer.replicas.ranks_P // 2, layer.replicas.experts_P // 2
        assert all(len(set(nodes_P[groups_P == group])) == 1 for group in range(8))
        assert (np.bincount(layer.replicas.ranks_P) == 3).all()
    with pytest.raises(UserError, match=r"breaks --rules: .* is not allowed; place with rq"):
        Eplb().place(PlacementProblem(stats, Topology(9, 3), num_redundant_experts=2, rules=rules))
