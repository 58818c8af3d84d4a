"""Slots and placements into each other; a placement that is no slot map is refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings

from rq_ep.core.errors import UserError
from rq_ep.interchange import SlotMap
from tests.interchange.cases import SIZES, placement, slot_map, slot_maps


@settings(max_examples=60, deadline=None)
@given(slot_maps())
def test_slots_survive_being_a_placement(slots: SlotMap) -> None:
    placed = slots.to_placement(SIZES, "bf16")
    back = SlotMap.of(placed)
    np.testing.assert_array_equal(back.slots_LRK, np.sort(slots.slots_LRK, axis=2))
    assert (back.layers, back.num_ranks, back.num_experts) == (slots.layers, slots.num_ranks, slots.num_experts)
    assert placed.bytes_R == (len(slots.layers) * slots.slots_LRK.shape[2] * 1000,) * slots.num_ranks


@settings(max_examples=60, deadline=None)
@given(slot_maps(duplicates=True))
def test_duplicates_become_one_replica_with_their_share(slots: SlotMap) -> None:
    placed = slots.to_placement(SIZES, "bf16")
    for layer, slots_RK in zip(placed.layers, slots.slots_LRK, strict=True):
        for replica, share in zip(layer.replicas, layer.shares_P.tolist(), strict=True):
            of_expert = slots_RK == replica.expert
            assert share == pytest.approx(of_expert[replica.rank].sum() / of_expert.sum())
    duplicates = slots.slots_LRK.size - sum(len(layer.replicas) for layer in placed.layers)
    assert slots.num_duplicates == duplicates
    assert (slots.first_duplicate is None) == (duplicates == 0)


def test_duplicates_are_named() -> None:
    slots = SlotMap(np.array([[0, 1, 0, 2, 0, 3]]), (5,), 2, 4)
    assert slots.first_duplicate == (5, 0, 0)
    assert slots.num_duplicates == 1
    np.testing.assert_array_equal(SlotMap.of(slots.to_placement(SIZES, "bf16")).experts_LS, [[0, 0, 1, 0, 2, 3]])


EVEN = [(0, 0, "bf16", 0.5), (1, 0, "bf16", 0.5), (0, 1, "bf16", 1.0), (1, 2, "bf16", 1.0)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[(0, 0, "bf16", 1.0), (0, 1, "bf16", 1.0), (1, 2, "bf16", 1.0)]], "layer 0: 2 slots on rank 0, 1 on rank 1"),
        ([[(0, 0, "bf16", 1.0), (1, 1, "int8", 1.0)]], "formats bf16, int8: engines of equal slots store all experts"),
        ([EVEN, [(0, 0, "bf16", 1.0), (1, 1, "bf16", 1.0)]], "layers differ in slots"),
        ([[(0, 0, "bf16", 0.7), (1, 0, "bf16", 0.3), *EVEN[2:]]], "layer 0: expert 0 has shares 0.7, 0.3, but these"),
        ([[(0, 0, "bf16", 1.0), (1, 0, "bf16", 0.0), *EVEN[2:]]], "expert 0 has shares 1, 0, but these"),
    ],
)
def test_what_is_not_a_slot_map_is_refused_by_name(
    layers: list[list[tuple[int, int, str, float]]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SlotMap.of(placement(*layers))


def test_one_low_format_is_refused() -> None:
    from dataclasses import replace

    low = replace(placement([(0, 0, "int8", 1.0), (1, 1, "int8", 1.0)]), low_precision_planned=1.0)
    with pytest.raises(UserError, match="formats int8"):
        SlotMap.of(low)


def test_impossible_maps_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 slots do not divide by 2 ranks"):
        SlotMap(np.array([[0, 1, 2]]), (0,), 2, 3)
    with pytest.raises(UserError, match=r"layer 4: expert 1 is in no slot"):
        SlotMap(np.array([[0, 2]]), (4,), 2, 3)
    with pytest.raises(UserError, match=r"layer 4: expert 2, but there are 2 experts"):
        SlotMap(np.array([[0, 1, 2]]), (4,), 1, 2)
    with pytest.raises(UserError, match=r"--num-model-layers 3"):
        SlotMap(np.array([[0, 1]]), (4,), 1, 2, num_model_layers=3)
    assert slot_map(1, 2, 2, 4, 0, duplicates=False).num_duplicates == 0
