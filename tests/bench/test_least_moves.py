"""The least bytes to move are those that trying every placement finds."""

from itertools import product

import numpy as np
import pytest

from bench.solver.least_moves import least_moves
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.rebalancing.replan import moved_bytes

SIZES = {"bf16": 1000, "int8": 500}
FORMATS = tuple(SIZES)
WHERE = ((0,), (1,), (0, 1))  # ranks that may hold an expert


def least_of_all(problem: PlacementProblem, counts_E: np.ndarray, limit: float) -> int:
    """By trying every placement of one layer on two ranks; experts begin native on their home ranks."""
    least = np.inf
    for choice in product(product(FORMATS, WHERE), repeat=len(counts_E)):
        bytes_R = [sum(SIZES[name] for name, ranks in choice if rank in ranks) for rank in range(2)]
        low = sum(pairs for pairs, (name, _) in zip(counts_E, choice, strict=True) if name == "int8")
        alone = [
            sum(pairs for pairs, (_, ranks) in zip(counts_E, choice, strict=True) if ranks == (r,)) for r in (0, 1)
        ]
        is_inside = max(bytes_R) <= 2000 and low <= problem.max_low_precision_share * counts_E.sum()
        if is_inside and max(*alone, counts_E.sum() / 2) <= limit * counts_E.sum() / 2:
            homes = enumerate(expert // 2 for expert in range(len(counts_E)))
            moved = sum(SIZES[choice[e][0]] for e, home in homes for rank in choice[e][1] if rank != home)
            least = min(least, moved)
    return int(least)


@pytest.mark.parametrize("pairs", [(60, 20, 10, 10), (40, 40, 10, 10), (70, 25, 3, 2)])
@pytest.mark.parametrize("limit", [1.0, 1.1])
def test_finds_what_trying_every_placement_finds(pairs: tuple[int, ...], limit: float) -> None:
    counts_SLE = np.array(pairs)[None, None]
    stats = ExpertStats(counts_SLE, FORMATS, "bf16", SIZES, top_k=1)
    problem = PlacementProblem(stats, Topology(2), (2000, 2000), FORMATS, max_low_precision_share=0.25)
    current = Placement(tuple(contiguous(problem)), "rq", Topology(2), (2000, 2000))
    least = least_moves(problem, current, counts_SLE, limit, num_groups=1, time_limit_s=10)
    assert least.layers is not None
    found = moved_bytes(problem, current, Placement(tuple(least.layers), "rq", Topology(2), (0, 0)))
    assert found == least.bound == least_of_all(problem, counts_SLE[0, 0], limit)
    assert found > 0


def test_says_so_where_no_placement_is_balanced_enough() -> None:
    counts_SLE = np.array([[[97, 1, 1, 1]]])
    stats = ExpertStats(counts_SLE, FORMATS[:1], "bf16", {"bf16": 1000}, top_k=1)
    problem = PlacementProblem(stats, Topology(2), (2000, 2000))
    current = Placement(tuple(contiguous(problem)), "rq", Topology(2), (2000, 2000))
    assert least_moves(problem, current, counts_SLE, 1.1, num_groups=1, time_limit_s=10).layers is None
