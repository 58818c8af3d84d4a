"""Few experts change their format where the load has moved, and ranks make room for them."""

import numpy as np

from rq_ep.core.placement import LayerPlacement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.fit_formats import enforce_low_cap

SIZES = {"bf16": 1000, "int8": 504}
# Expert 0 and 1 on both ranks, 2 and 3 low, on one each.
LAYER = LayerPlacement.even(
    0, 4, [*(Replica(rank, e, "bf16") for e in (0, 1) for rank in (0, 1)), Replica(0, 2, "int8"), Replica(1, 3, "int8")]
)


def problem_of(pairs: list[int], cap: float, budget: int | None = 2504, rules: Rules | None = None) -> PlacementProblem:
    stats = ExpertStats(np.array([[pairs]]), ("bf16", "int8"), "bf16", SIZES)
    budgets = None if budget is None else (budget, budget)
    return PlacementProblem(
        stats, Topology(2), budgets, ("bf16", "int8"), max_low_precision_share=cap, rules=rules or Rules()
    )


def stored(layers: list[LayerPlacement]) -> list[tuple[int, int, str]]:
    return [tuple(one) for one in layers[0].replicas]


def test_nothing_changes_where_the_cap_holds() -> None:
    layers = [LAYER]
    assert enforce_low_cap(problem_of([50, 30, 10, 10], 0.2), layers) is layers
    mixed = [LayerPlacement.even(0, 1, [Replica(0, 0, "bf16"), Replica(1, 0, "int8")], ("int8", "bf16"))]
    stats = ExpertStats(np.array([[[9]]]), ("bf16", "int8"), "bf16", SIZES)
    assert (
        enforce_low_cap(
            PlacementProblem(stats, Topology(2), None, ("bf16", "int8"), max_low_precision_share=0.1), mixed
        )
        is mixed
    )


def test_the_busiest_low_expert_becomes_native_and_its_rank_gives_up_a_spare_replica() -> None:
    layers = enforce_low_cap(problem_of([30, 40, 20, 10], 0.1), [LAYER])
    assert stored(list(layers)) == [(0, 1, "bf16"), (0, 2, "bf16"), (1, 0, "bf16"), (1, 1, "bf16"), (1, 3, "int8")]
    assert (bytes_by_rank(layers, 2, SIZES) <= 2504).all()


def test_without_a_budget_nothing_is_given_up() -> None:
    assert len(enforce_low_cap(problem_of([30, 40, 20, 10], 0.1, budget=None), [LAYER])[0].replicas) == 6


def test_what_is_fixed_is_not_given_up() -> None:
    rules = Rules(fixed=(Selection((0,), (0,), (0,)),))
    layers = enforce_low_cap(problem_of([30, 40, 20, 10], 0.1, rules=rules), [LAYER])
    assert (0, 0, "bf16") in stored(list(layers))
    assert (0, 1, "bf16") not in stored(list(layers))


def test_the_last_replica_is_never_given_up() -> None:
    lone = LayerPlacement.even(0, 2, [Replica(0, 0, "int8"), Replica(0, 1, "int8")])
    stats = ExpertStats(np.array([[[5, 5]]]), ("bf16", "int8"), "bf16", SIZES)
    layers = enforce_low_cap(
        PlacementProblem(stats, Topology(2), (1008, 1008), ("bf16", "int8"), max_low_precision_share=0.0), [lone]
    )
    assert [one.format for one in layers[0].replicas] == ["bf16", "bf16"], "over its budget; a search goes on from here"
