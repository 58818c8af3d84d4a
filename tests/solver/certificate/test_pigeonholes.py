"""Whole experts on ranks: no placement beats the bound, some attain it, and a search that attains it ends."""

from itertools import product

import numpy as np
import pytest

import rq_ep.solver.search.ruin_recreate as ruin_recreate_module
from rq_ep.solver.certificate.pigeonholes import least_fullest_S, least_sum
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.solve import solve
from tests.solver.instances import RQ, problem, random_held, skewed


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(3, 2), (5, 3), (8, 3), (9, 4), (4, 6)])
@pytest.mark.parametrize("num_more", range(4))
def test_no_placement_is_below(num_experts: int, num_ranks: int, num_more: int) -> None:
    for seed in range(30):
        loads_SE = skewed(num_experts, 600, seed, 3) * num_ranks / 600
        held_ER = random_held(num_experts, num_ranks, num_more, seed)
        assert (
            LayerSplit.of(loads_SE, held_ER).values_S >= least_fullest_S(loads_SE, num_ranks, num_more) - 1e-9
        ).all()


def test_equal_experts_attain_it() -> None:
    loads_SE = np.full((1, 8), 3 / 8)
    assert [float(least_fullest_S(loads_SE, 3, more)[0]) for more in range(4)] == pytest.approx(
        [9 / 8, 9 / 8, 0.75, 0.75]
    )
    once_ER = np.arange(8)[:, None] % 3 == np.arange(3)
    assert LayerSplit.of(loads_SE, once_ER).value == pytest.approx(9 / 8)


def test_one_heavy_expert_or_two_that_meet() -> None:
    loads_SE = np.array([[5.0, 4, 3, 2], [9, 1, 1, 1]])
    assert least_fullest_S(loads_SE, 3).tolist() == [5, 9]
    assert least_fullest_S(loads_SE, 2).tolist() == [7, 9]  # of 5, 4 and 3, two are on one rank
    assert least_fullest_S(loads_SE, 2, 1).tolist() == [5, 2]
    assert least_fullest_S(loads_SE, 2, 9).tolist() == [0, 0]


def test_replicas_are_dealt_out_where_they_gain_most() -> None:
    generator = np.random.default_rng(0)
    for number in range(8):
        costs = [-np.sort(-generator.random(size)) for size in (1, 4, 2, 5)]
        dealt = product(*(range(number + 1) for _ in costs))
        sums = [
            sum(cost_M[min(more, len(cost_M) - 1)] for cost_M, more in zip(costs, numbers, strict=True))
            for numbers in dealt
            if sum(numbers) == number
        ]
        assert least_sum(costs, number) == pytest.approx(min(sums))


@pytest.mark.parametrize(("num_experts", "num_layers", "value"), [(8, 4, (1 + 9 / 8) / 2), (8, 1, 9 / 8), (4, 1, 1)])
def test_a_search_that_attains_it_ends(
    num_experts: int, num_layers: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 equal experts on 3 ranks, four layers have room for four more: two layers use them, and two cannot."""
    monkeypatch.setattr(ruin_recreate_module, "_ruin", lambda *arguments: pytest.fail("nothing is left to gain"))
    even = problem(np.full((4, num_layers, num_experts), 3000), 3, formats=("bf16",))
    assert solve(even, RQ, 64, 400).certificate["predicted"] == pytest.approx(value, abs=1e-3)
