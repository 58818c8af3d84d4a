"""The next placement of an engine: what it keeps to, and what it refuses by name."""

from typing import Any

import numpy as np
import pytest

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.plugins.slot_rebalance import Balancing, arrivals, rebalanced
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.search.slots.slot_search import even_imbalance

LAYERS, EXPERTS, RANKS, SLOTS = 2, 24, 8, 32
FIRST_LP = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1))


def loads(num_steps: int, seed: int = 0) -> IntArray:
    generator = np.random.default_rng(seed)
    rates_LE = generator.lognormal(3, 1.2, (LAYERS, EXPERTS))
    return generator.poisson(rates_LE * generator.lognormal(0, 0.5, (num_steps, LAYERS, EXPERTS)))


def imbalance(loads_SLE: IntArray, experts_LP: IntArray) -> list[float]:
    return [
        even_imbalance(LayerSteps(loads_SLE[:, i], RANKS), row.reshape(RANKS, -1)) for i, row in enumerate(experts_LP)
    ]


@pytest.mark.parametrize("num_steps", [1, 40])
def test_better_than_the_engines_own_with_few_arrivals(num_steps: int) -> None:
    loads_SLE = loads(num_steps)
    own_LP = np.stack([np.random.default_rng(i).permutation(row) for i, row in enumerate(FIRST_LP)])
    new_LP = rebalanced(Balancing(loads_SLE, own_LP, RANKS, old_LP=FIRST_LP))
    assert (np.array(imbalance(loads_SLE, new_LP)) < imbalance(loads_SLE, own_LP)).all()
    assert arrivals(FIRST_LP, new_LP, RANKS) < arrivals(FIRST_LP, own_LP, RANKS)
    np.testing.assert_array_equal(new_LP, rebalanced(Balancing(loads_SLE, own_LP, RANKS, old_LP=FIRST_LP)))
    again_LP = rebalanced(Balancing(loads_SLE, new_LP, RANKS, old_LP=new_LP))
    assert arrivals(new_LP, again_LP, RANKS) <= 2, "the same loads ask for other moves again"


def test_layers_without_loads_and_idle_experts() -> None:
    loads_SLE = loads(20)
    loads_SLE[:, 0] = 0  # a dense layer of SGLang
    loads_SLE[:, 1, 3:] = 0
    new_LP = rebalanced(Balancing(loads_SLE, FIRST_LP[:, ::-1], RANKS, old_LP=FIRST_LP))
    np.testing.assert_array_equal(new_LP[0], FIRST_LP[0])
    assert set(new_LP[1]) == set(range(EXPERTS))
    np.testing.assert_array_equal(rebalanced(Balancing(loads(0), FIRST_LP, RANKS)), FIRST_LP)


def test_maps_of_another_size_with_empty_slots_and_twins() -> None:
    loads_SLE = loads(20)
    for old_LP in (
        FIRST_LP[:, :-RANKS],
        np.where(np.arange(SLOTS) < EXPERTS, FIRST_LP, -1),
        np.tile(np.sort(FIRST_LP[0]), (LAYERS, 1)),  # the first experts are twice on their rank
        None,
    ):
        new_LP = rebalanced(Balancing(loads_SLE, FIRST_LP, RANKS, old_LP=old_LP))
        assert all(set(row) == set(range(EXPERTS)) for row in new_LP.tolist())
        assert (np.array(imbalance(loads_SLE, new_LP)) <= imbalance(loads_SLE, FIRST_LP)).all()


def test_groups_stay_on_the_node_that_serves_them() -> None:
    own_LP = np.tile(np.concatenate([[e, e + 1, e + 2, e] for e in range(0, EXPERTS, 3)]), (LAYERS, 1))
    asked = Balancing(loads(20), own_LP, RANKS, num_nodes=2, num_groups=4, old_LP=own_LP[:, ::-1])
    for row in rebalanced(asked).reshape(LAYERS, 2, -1).tolist():
        assert set(row[0]) == set(range(12, 24)), "the groups were on these nodes before"
    with pytest.raises(UserError, match="on no node"):
        rebalanced(asked._replace(own_LP=FIRST_LP, old_LP=None))


def test_more_ranks_than_experts() -> None:
    new_LP = rebalanced(Balancing(np.array([[9, 5, 1]]), np.array([[0, 1, 2, 0, 1, 0]]), num_ranks=6))
    assert np.bincount(new_LP[0]).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 3}, "32 slots do not divide by 3 ranks"),
        ({"num_ranks": 1}, "32 slots for 24 experts on 1 ranks: a rank would hold some twice"),
        ({"num_nodes": 2, "num_groups": 3}, "24 experts in 3 groups do not divide by 2 nodes of 8 ranks"),
        ({"num_nodes": 3, "num_groups": 3}, "do not divide by 3 nodes of 8 ranks"),
        ({"loads_SLE": np.full((LAYERS, EXPERTS), np.nan)}, "whole numbers from 0 up, but one is nan"),
        ({"loads_SLE": np.full((LAYERS, EXPERTS), -1)}, "whole numbers from 0 up, but one is -1"),
        ({"loads_SLE": np.zeros((3, LAYERS, 0))}, r"loads of shape \[3, 2, 0\]"),
        ({"loads_SLE": np.zeros((LAYERS, EXPERTS), bool)}, "loads are bool, not numbers"),
        ({"loads_SLE": np.ones((0, EXPERTS))}, r"loads of shape \[1, 0, 24\]"),
        ({"loads_SLE": np.ones((3, EXPERTS))}, r"3 layers of loads, but a map of shape \[2, 32\]"),
        ({"loads_SLE": np.ones((LAYERS, 8))}, "the engine's own map names expert 8, but there are 8"),
        ({"own_LP": np.zeros((LAYERS, SLOTS))}, "the engine's own map leaves an expert out"),
        ({"old_LP": np.full((LAYERS, SLOTS), -2)}, "the map that serves names expert -2"),
    ],
)
def test_what_contradicts_itself_is_named(change: dict[str, Any], message: str) -> None:
    asked = Balancing(np.ones((LAYERS, EXPERTS)), FIRST_LP, RANKS, old_LP=FIRST_LP)
    with pytest.raises(UserError, match=message):
        rebalanced(asked._replace(**change))
