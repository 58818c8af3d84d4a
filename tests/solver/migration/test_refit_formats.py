"""Formats follow the load: other experts are stored low, and those that are already stay so where that is allowed."""

import numpy as np

from rq_ep.core.placement import LayerPlacement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.refit_formats import refit_formats

SIZES = {"bf16": 1000, "int8": 504}


def problem_of(pairs: list[int], cap: float = 0.25, num_ranks: int = 2) -> PlacementProblem:
    stats = ExpertStats(np.array([[pairs]]), ("bf16", "int8"), "bf16", SIZES)
    budget = (len(pairs) // num_ranks * 1000,) * num_ranks
    return PlacementProblem(stats, Topology(num_ranks), budget, ("bf16", "int8"), max_low_precision_share=cap)


def low(layers: list[LayerPlacement]) -> set[int]:
    return {one.expert for one in layers[0].replicas if one.format == "int8"}


def test_from_standard_ep_the_least_used_experts_become_low_where_they_are() -> None:
    problem = problem_of([40, 30, 2, 3, 5, 20])
    layers = list(refit_formats(problem, contiguous(problem)))
    assert low(layers) == {2, 3, 4}
    assert [one[:2] for one in layers[0].replicas] == [one[:2] for one in contiguous(problem)[0].replicas]


def test_experts_that_are_low_already_are_preferred() -> None:
    problem = problem_of([40, 30, 10, 11, 12, 13], cap=0.2)
    stored = refit_formats(problem_of([40, 30, 40, 40, 3, 4], cap=0.1), contiguous(problem))
    assert low(list(stored)) == {4, 5}
    assert low(list(refit_formats(problem, contiguous(problem)))) == {2, 3}
    assert low(list(refit_formats(problem, stored))) == {2, 4}, "13 more pairs of expert 5 would exceed the cap"


def test_where_nothing_changes_the_layers_are_the_same() -> None:
    problem = problem_of([40, 30, 2, 3, 5, 20])
    layers = refit_formats(problem, contiguous(problem))
    assert refit_formats(problem, layers) is layers


def test_a_rank_that_exceeds_its_budget_drops_replicas_of_which_there_are_others() -> None:
    problem = problem_of([40, 30, 2, 3, 5, 20])
    layers = list(refit_formats(problem, contiguous(problem)))
    held = [*layers[0].replicas, layers[0].replicas[0]._replace(rank=1)]
    layers = [LayerPlacement.even(0, 6, held)]
    busy = problem_of([40, 30, 20, 30, 50, 20], cap=0.0)
    native = refit_formats(busy, layers)
    assert low(list(native)) == set()
    assert bytes_by_rank(native, 2, SIZES).tolist() == [3000, 3000]
