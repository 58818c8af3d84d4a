"""vLLM-Ascend (and MindIE): expert heat, and expert map JSON for `expert_map_path`.

Heat: a tensor [layers, experts] of pairs in a `.pt` file, as its `examples/eplb/eplb_strategy.py` reads it, or the same
as `.npy`. Rows are MoE layers only. Each of several files is one step.

Maps: `moe_layer_count` and `layer_list`, each with `layer_id` (MoE layers counted from 0), `device_count` and
`device_list` of `device_id` and `device_expert`. A device must not hold an expert twice.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import read_json
from rq_ep.interchange.recorded import RecordedLoads, counts_by_step
from rq_ep.interchange.slot_map import SlotMap, read_slots
from rq_ep.interchange.tensors import BARE, check_text_size, read_arrays


def read_stats(paths: Sequence[Path]) -> RecordedLoads:
    """Read dumps of expert heat, a step from each."""
    parts = []
    for path in paths:
        arrays = read_arrays(path)
        if set(arrays) != {BARE}:
            raise UserError(f"{path}: holds {', '.join(arrays) or 'no tensor'}, not one tensor [layers, experts]")
        parts.append(counts_by_step(path, BARE, arrays[BARE]))
        if parts[-1].shape[1:] != parts[0].shape[1:]:
            raise UserError(f"{path}: {list(parts[-1].shape[1:])} layers and experts, unlike {paths[0]}")
    return RecordedLoads(np.concatenate(parts))


def read_map(path: Path, num_ranks: int | None, selected: Sequence[int] | None) -> SlotMap:
    """Read an expert map; it says how many ranks there are."""
    check_text_size(path)
    document = read_json(path, "expert map", "name an expert map")
    layers = document.get("layer_list") if isinstance(document, Mapping) else None
    if not isinstance(layers, list) or not layers:
        raise UserError(f"{path}: has no layer_list")
    rows = [_slots_of(path, number, layer) for number, layer in enumerate(layers)]
    num_devices = len(layers[0]["device_list"])
    if num_ranks not in (None, num_devices):
        raise UserError(f"--num-ranks {num_ranks}: {path} is for {num_devices} devices")
    if document.get("moe_layer_count") != len(layers):
        raise UserError(f"{path}: moe_layer_count is {document.get('moe_layer_count')!r:.40}, but it has {len(layers)}")
    return read_slots(path, rows, num_devices, None, selected)


def write_map(slots: SlotMap, path: Path, suffix: str) -> None:
    """Write an expert map."""
    layers = [
        {
            "layer_id": number,
            "device_count": slots.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": experts} for rank, experts in enumerate(slots_RK.tolist())
            ],
        }
        for number, slots_RK in enumerate(slots.slots_LRK)
    ]
    path.write_text(json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n")


def _slots_of(path: Path, number: int, layer: Any) -> list[Any]:
    """The experts of all devices of a layer, one device after another."""
    devices = layer.get("device_list") if isinstance(layer, Mapping) else None
    if not isinstance(devices, list) or not devices or layer.get("layer_id") != number:
        raise UserError(f"{path}: entry {number} of layer_list is not layer_id {number} with a device_list")
    if layer.get("device_count") != len(devices):
        raise UserError(
            f"{path}: layer {number}: device_count {layer.get('device_count')!r:.40}, but {len(devices)} are listed"
        )
    held = []
    for rank, device in enumerate(devices):
        experts = device.get("device_expert") if isinstance(device, Mapping) else None
        if not isinstance(experts, list) or device.get("device_id") != rank:
            raise UserError(f"{path}: layer {number}: entry {rank} of device_list is not device_id {rank} with experts")
        held.append(experts)
    if len({len(experts) for experts in held}) > 1:
        raise UserError(f"{path}: layer {number}: devices hold {sorted({len(experts) for experts in held})} experts")
    return [expert for experts in held for expert in experts]
