"""Slots brought to given numbers of replicas, and ranks leveled for one load."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.solver.search.slots.rank_leveling import leveled
from rq_ep.solver.search.slots.slot_repair import EMPTY, in_old_slots, repaired, replica_counts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slots_are_repaired_and_leveled(data: st.DataObject) -> None:
    num_ranks, num_slots = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(num_slots, num_ranks * num_slots))
    slots = st.lists(st.integers(EMPTY, num_experts - 1), min_size=num_slots, max_size=num_slots)
    old_RJ = np.array(data.draw(st.lists(slots, min_size=num_ranks, max_size=num_ranks)))
    loads_E = np.array(data.draw(st.lists(st.integers(0, 99), min_size=num_experts, max_size=num_experts)), float)
    allowed_ER = np.ones((num_experts, num_ranks), bool)
    counts_E = replica_counts(loads_E, old_RJ.size, allowed_ER.sum(axis=1))
    new_RJ = repaired(old_RJ, counts_E, loads_E / counts_E, allowed_ER)
    if new_RJ is None:
        return
    for slots_RJ in (new_RJ, leveled(loads_E, new_RJ, allowed_ER), in_old_slots(new_RJ, old_RJ)):
        np.testing.assert_array_equal(np.bincount(slots_RJ.ravel(), minlength=num_experts), counts_E)
        assert all(len(set(row)) == num_slots for row in slots_RJ.tolist())
    shares_E = loads_E / counts_E
    assert shares_E[leveled(loads_E, new_RJ, allowed_ER)].sum(axis=1).max() <= shares_E[new_RJ].sum(axis=1).max() + 1e-9
    kept_RJ = in_old_slots(new_RJ, old_RJ)
    for kept_J, old_J in zip(kept_RJ.tolist(), old_RJ.tolist(), strict=True):
        for j, expert in enumerate(kept_J):
            assert expert not in old_J or old_J[j] == expert or old_J.index(expert) != j


def test_counts_follow_the_load_per_replica() -> None:
    counts_E = replica_counts(np.array([8.0, 4.0, 1.0, 0.0]), 8, np.array([3, 4, 4, 4]))
    assert counts_E.tolist() == [3, 3, 1, 1]  # no fourth rank may hold the first


def test_a_repair_moves_what_it_must() -> None:
    old_RJ = np.array([[0, 0], [1, EMPTY], [2, 3]])
    counts_E, allowed_ER = np.array([2, 2, 1, 1]), np.ones((4, 3), bool)
    new_RJ = repaired(old_RJ, counts_E, np.array([4.0, 3.0, 2.0, 1.0]), allowed_ER)
    assert new_RJ is not None
    assert new_RJ.tolist() == [[0, 1], [1, 0], [2, 3]]
    allowed_ER[0] = [True, False, False]
    assert repaired(old_RJ, counts_E, np.ones(4), allowed_ER) is None


def test_ranks_of_equal_load_are_leveled_one_after_another() -> None:
    slots_RJ = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    loads_E = np.array([5.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    even = loads_E[leveled(loads_E, slots_RJ, np.ones((8, 4), bool))].sum(axis=1)
    assert even.tolist() == [6.0, 6.0, 6.0, 6.0]
    dear_ER = np.where(np.arange(4) == np.repeat(np.arange(4), 2)[:, None], 0.0, 9.0)
    assert leveled(loads_E, slots_RJ, np.ones((8, 4), bool), dear_ER).tolist() == slots_RJ.tolist()
    assert leveled(np.zeros(8), slots_RJ, np.ones((8, 4), bool)) is slots_RJ


@pytest.mark.parametrize("may", [True, False])
def test_leveling_keeps_to_allowed_ranks(may: bool) -> None:
    allowed_ER = np.ones((4, 2), bool)
    allowed_ER[:2, 1] = may
    loads_E = np.array([3.0, 3.0, 1.0, 1.0])
    result = leveled(loads_E, np.array([[0, 1], [2, 3]]), allowed_ER)
    assert (loads_E[result].sum(axis=1).max() == 4) == may
