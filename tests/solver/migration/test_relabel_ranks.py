"""Renumbered ranks keep a solution what it is, inside the budgets, and move less."""

import numpy as np
import pytest

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.replicas import Replica, replica_bytes
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.relabel_ranks import relabel_ranks
from tests.solver.migration.test_plan_moves import SIZES, drawn


def moved(before: list[list[Replica]], layers: list[LayerPlacement]) -> int:
    total = 0
    for replicas, layer in zip(before, layers, strict=True):
        stored = {(one.rank, one.expert): one.format for one in replicas}
        total += sum(
            SIZES[one.format]
            for one in layer.replicas
            if stored.get((one.rank, one.expert)) not in (one.format, "bf16")
        )
    return total


def layered(layers: list[list[Replica]]) -> list[LayerPlacement]:
    return [LayerPlacement.even(at, 9, replicas) for at, replicas in enumerate(layers)]


def test_a_solution_with_ranks_shuffled_moves_nothing() -> None:
    before = drawn(4, 0)
    shuffled = [
        [one._replace(rank=int(order[one.rank])) for one in layer]
        for layer, order in zip(before, ([1, 2, 3, 0], [3, 2, 1, 0], [0, 2, 1, 3]), strict=True)
    ]
    renumbered = relabel_ranks(before, layered(shuffled), None, Topology(4), SIZES, "bf16")
    assert [sorted(layer.replicas) for layer in renumbered] == [sorted(layer) for layer in before]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks_per_node", [0, 2])
def test_less_moves_and_budgets_hold(seed: int, ranks_per_node: int) -> None:
    before, new = drawn(4, seed), layered(drawn(4, seed + 50))
    bytes_R = np.sum([replica_bytes(layer.replicas, 4, SIZES) for layer in new], axis=0)
    budget_R = [int(bytes_R.max()), int(np.sort(bytes_R)[2]), int(np.sort(bytes_R)[1]), int(bytes_R.max())]
    if (bytes_R > budget_R).any():
        budget_R = [int(bytes_R.max())] * 4
    renumbered = relabel_ranks(before, new, budget_R, Topology(4, ranks_per_node), SIZES, "bf16")
    assert moved(before, renumbered) <= moved(before, new)
    assert (np.sum([replica_bytes(layer.replicas, 4, SIZES) for layer in renumbered], axis=0) <= budget_R).all()
    for one, other in zip(renumbered, new, strict=True):
        per_rank = [
            sorted((replica.expert, replica.format) for replica in one.replicas if replica.rank == r) for r in range(4)
        ]
        of_new = [
            sorted((replica.expert, replica.format) for replica in other.replicas if replica.rank == r)
            for r in range(4)
        ]
        assert sorted(per_rank) == sorted(of_new), "the same parts, on other ranks"


def test_replicas_on_two_nodes_stay_on_two_nodes() -> None:
    before = [[Replica(rank, expert, "bf16") for expert in range(9) for rank in (0, 2)]]
    new = layered([[Replica(rank, expert, "bf16") for expert in range(9) for rank in (1, 3)]])
    renumbered = relabel_ranks(before, new, None, Topology(4, 2), SIZES, "bf16")
    assert moved(before, renumbered) == 0
    assert set(renumbered[0].replicas.ranks_P.tolist()) == {0, 2}


def test_full_ranks_keep_their_numbers() -> None:
    before = [[Replica(0, expert, "bf16") for expert in range(8)] + [Replica(1, 8, "bf16")]]
    new = layered([[Replica(1, expert, "bf16") for expert in range(8)] + [Replica(0, 8, "bf16")]])
    assert moved(before, relabel_ranks(before, new, None, Topology(2), SIZES, "bf16")) == 0
    assert moved(before, relabel_ranks(before, new, (1000, 8000), Topology(2), SIZES, "bf16")) == 9000
