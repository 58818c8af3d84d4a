"""Placement files of every engine: written and read back; damaged and hostile ones are refused."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.interchange import ENGINES, SlotMap, export, write_slots
from tests.interchange.cases import SIZES, damage, placement, slot_map, slot_maps

FILES = [(name, suffix) for name, engine in ENGINES.items() for suffix in engine.suffixes]
DUPLICATE_FILES = [(name, suffix) for name, suffix in FILES if ENGINES[name].allows_duplicates]
shared_folder = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_same(restored: SlotMap, slots: SlotMap) -> None:
    np.testing.assert_array_equal(restored.experts_LS, slots.experts_LS)
    assert (restored.layers, restored.num_ranks, restored.num_experts) == (
        slots.layers,
        slots.num_ranks,
        slots.num_experts,
    )


@pytest.mark.parametrize(("name", "suffix"), FILES)
@shared_folder
@given(slots=slot_maps())
def test_round_trip(tmp_path: Path, name: str, suffix: str, slots: SlotMap) -> None:
    path = tmp_path / f"map{suffix}"
    write_slots(slots, name, path)
    check_same(ENGINES[name].read(path, slots.num_ranks, slots.layers), slots)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "no temporary file is left"


@pytest.mark.parametrize(("name", "suffix"), DUPLICATE_FILES)
def test_round_trip_with_duplicates(tmp_path: Path, name: str, suffix: str) -> None:
    slots = slot_map(2, 2, 6, 7, seed=1, duplicates=True)
    assert slots.num_duplicates
    path = tmp_path / f"map{suffix}"
    write_slots(slots, name, path)
    check_same(ENGINES[name].read(path, slots.num_ranks, slots.layers), slots)


@pytest.mark.parametrize(("name", "suffix"), FILES)
@shared_folder
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path: Path, name: str, suffix: str, data: st.DataObject) -> None:
    slots = slot_map(2, 2, 3, 4, seed=3, duplicates=False)
    path = tmp_path / f"map{suffix}"
    write_slots(slots, name, path)
    damage(path, data)
    with suppress(UserError):  # anything else fails the test
        restored = ENGINES[name].read(path, 2, slots.layers)
        assert restored.experts_LS.shape == slots.experts_LS.shape


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["physical_to_logical_map", "layer_list", "moe_layer_count", "layer_id", "device_list", "device_id",
                 "device_count", "device_expert", "num_slots", "initial_global_assignments"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), [("sglang", ".json"), ("ascend", ".json"), ("trtllm", ".yaml")])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=ANYTHING)
def test_any_document_is_a_map_or_a_users_mistake(tmp_path: Path, name: str, suffix: str, document: Any) -> None:
    path = tmp_path / f"map{suffix}"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"map\."):
        ENGINES[name].read(path, 2, None)


@pytest.mark.parametrize("name", ENGINES)
def test_missing_files_and_unknown_ranks_are_refused(tmp_path: Path, name: str) -> None:
    suffix = ENGINES[name].suffixes[0]
    with pytest.raises(UserError, match=r"nowhere"):
        ENGINES[name].read(tmp_path / f"nowhere{suffix}", 2, None)
    slots = slot_map(1, 2, 2, 4, seed=0, duplicates=False)
    write_slots(slots, name, tmp_path / f"map{suffix}")
    if name == "ascend":
        with pytest.raises(UserError, match=r"--num-ranks 4: .* is for 2 devices"):
            ENGINES[name].read(tmp_path / f"map{suffix}", 4, slots.layers)
    else:
        with pytest.raises(UserError, match=r"--num-ranks: .* does not say"):
            ENGINES[name].read(tmp_path / f"map{suffix}", None, slots.layers)
    with pytest.raises(UserError, match=r"--layers"):
        ENGINES[name].read(tmp_path / f"map{suffix}", 2, (77, 78))


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 2)])
def test_tensors_that_are_no_map_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.save({"physical_to_logical_map": torch.zeros(shape, dtype=torch.int64)}, tmp_path / "map.pt")
    with pytest.raises(UserError, match=r"map\.pt: "):
        ENGINES["sglang"].read(tmp_path / "map.pt", 1, None)


def test_sglang_gets_a_row_for_every_layer_and_no_other_key(tmp_path: Path) -> None:
    slots = SlotMap(np.array([[2, 0, 1, 0], [1, 2, 0, 1]]), (1, 3), 2, 3, num_model_layers=5)
    for suffix in (".json", ".pt"):
        path = tmp_path / f"map{suffix}"
        write_slots(slots, "sglang", path)
        document = json.loads(path.read_text()) if suffix == ".json" else torch.load(path, weights_only=True)
        assert set(document) == {"physical_to_logical_map"}
        trivial = [0, 1, 2, 0]
        rows = torch.as_tensor(document["physical_to_logical_map"]).tolist()
        assert rows == [trivial, [2, 0, 1, 0], trivial, [1, 2, 0, 1], trivial]


def test_trtllm_names_slots_layers_and_no_updates(tmp_path: Path) -> None:
    path = tmp_path / "moe_load_balancer.yaml"
    write_slots(SlotMap(np.array([[2, 0, 1, 0], [1, 2, 0, 1]]), (3, 4), 2, 3), "trtllm", path)
    assert yaml.safe_load(path.read_text()) == {
        "num_slots": 4,
        "initial_global_assignments": {3: [2, 0, 1, 0], 4: [1, 2, 0, 1]},
        "layer_updates_per_iter": 0,
    }


def test_ascend_counts_moe_layers_and_refuses_twins(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_slots(SlotMap(np.array([[2, 0, 1, 0]]), (3,), 2, 3), "ascend", path)
    assert json.loads(path.read_text()) == {
        "moe_layer_count": 1,
        "layer_list": [
            {
                "layer_id": 0,
                "device_count": 2,
                "device_list": [
                    {"device_id": 0, "device_expert": [2, 0]},
                    {"device_id": 1, "device_expert": [1, 0]},
                ],
            }
        ],
    }
    with pytest.raises(UserError, match=r"layer 3: rank 1 holds expert 0 twice"):
        write_slots(SlotMap(np.array([[2, 1, 0, 0]]), (3,), 2, 3), "ascend", path)


def test_eplb_tensors_say_the_same_thrice(tmp_path: Path) -> None:
    slots = SlotMap(np.array([[2, 0, 1, 0], [1, 2, 0, 1]]), (0, 1), 2, 3)
    path = tmp_path / "eplb.npz"
    write_slots(slots, "eplb", path)
    with np.load(path) as stored:
        arrays = dict(stored)
    assert {name: array.dtype for name, array in arrays.items()} == dict.fromkeys(arrays, np.dtype(np.int64))
    np.testing.assert_array_equal(arrays["phy2log"], slots.experts_LS)
    np.testing.assert_array_equal(arrays["log2phy"], [[[1, 3], [2, -1], [0, -1]], [[2, -1], [0, 3], [1, -1]]])
    np.testing.assert_array_equal(arrays["logcnt"], [[2, 1, 1], [1, 2, 1]])
    wider = np.concatenate([arrays["log2phy"][:, :, ::-1], np.full((2, 3, 2), -1)], axis=2)
    np.savez(path, allow_pickle=False, **{**arrays, "log2phy": wider})
    check_same(ENGINES["eplb"].read(path, 2, None), slots)
    np.savez(path, allow_pickle=False, **{**arrays, "logcnt": arrays["logcnt"] + 1})
    with pytest.raises(UserError, match="logcnt contradicts phy2log"):
        ENGINES["eplb"].read(path, 2, None)


def test_yaml_of_aliases_is_no_bomb(tmp_path: Path) -> None:
    lines = ["a0: &a0 [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join([*lines, "num_slots: 10", "initial_global_assignments: {0: *a11}"]))
    with pytest.raises(UserError, match="references"):
        ENGINES["trtllm"].read(path, 2, None)


def test_export_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    uneven = placement([(0, 0, "bf16", 1.0), (0, 1, "bf16", 1.0), (1, 2, "bf16", 1.0)])
    with pytest.raises(UserError, match=r"trtllm cannot serve this placement: layer 0: 2 slots on rank 0"):
        export(uneven, "trtllm", tmp_path / "out.yaml")
    with pytest.raises(UserError, match=r"file type for trtllm: '.json'"):
        export(slot_map(1, 2, 2, 3, 0, duplicates=False).to_placement(SIZES, "bf16"), "trtllm", tmp_path / "out.json")
    with pytest.raises(UserError, match=r"unknown engine 'triton'"):
        export(uneven, "triton", tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_placements_of_ours_reach_every_engine(tmp_path: Path, name: str, suffix: str) -> None:
    slots = slot_map(2, 2, 3, 4, seed=5, duplicates=False)
    saved = tmp_path / "placement.json"
    slots.to_placement(SIZES, "bf16").save(saved)
    path = tmp_path / f"map{suffix}"
    export(Placement.load(saved), name, path)
    restored = ENGINES[name].read(path, 2, slots.layers)
    np.testing.assert_array_equal(np.sort(restored.slots_LRK, axis=2), np.sort(slots.slots_LRK, axis=2))
