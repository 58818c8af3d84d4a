"""TensorRT-LLM: its expert statistics folder, and the load balancer's YAML file.

Statistics, recorded with EXPERT_STATISTIC_ITER_RANGE into EXPERT_STATISTIC_PATH: `meta_info.json` (`num_experts`,
`num_experts_per_token`) and a `rank<r>.safetensors` for each rank, whose keys are `<iteration>_<layer>` and whose
values are pairs of each expert. Ranks are added up. `rank<r>_raw.safetensors`, of some versions, is not needed.

Placements, for `moe_config.load_balancer`: `num_slots`, `initial_global_assignments` {layer: [expert in each slot]},
`layer_updates_per_iter` (0: the placement stays as it is).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.files.documents import read_json
from rq_ep.interchange.recorded import RecordedLoads
from rq_ep.interchange.slot_map import SlotMap, read_slots
from rq_ep.interchange.tensors import MAX_CELLS, check_text_size, first_line, read_arrays, whole_numbers

META = "meta_info.json"
MAX_EXPERTS = 2**16


def read_stats(paths: Sequence[Path]) -> RecordedLoads:
    """Read a folder of expert statistics."""
    if len(paths) != 1 or not paths[0].is_dir():
        raise UserError(f"{paths[0]}: TensorRT-LLM's statistics are one folder, with {META} in it")
    folder = paths[0]
    meta = read_json(folder / META, "statistics", "name the folder that EXPERT_STATISTIC_PATH named")
    if not isinstance(meta, Mapping):
        raise UserError(f"{folder / META}: holds a {type(meta).__name__}, not num_experts and num_experts_per_token")
    try:
        num_experts = check_integer("num_experts", meta.get("num_experts"), 1, MAX_EXPERTS)
        top_k = check_integer("num_experts_per_token", meta.get("num_experts_per_token"), 1, num_experts)
    except UserError as error:
        raise UserError(f"{folder / META}: {error}") from None
    files = [path for path in sorted(folder.iterdir()) if re.fullmatch(r"rank\d+\.safetensors", path.name)]
    if not files:
        raise UserError(f"{folder}: has no rank0.safetensors; record again")
    counts: dict[tuple[int, int], IntArray] = {}
    for path in files:
        for key, array in read_arrays(path).items():
            match = re.fullmatch(r"(\d{1,15})_(\d{1,6})", key)
            if match is None or array.shape != (num_experts,):
                raise UserError(
                    f"{path}: {key!r:.40} has shape {list(array.shape)}; expected <iteration>_<layer> of {num_experts}"
                )
            at = int(match[1]), int(match[2])
            counts[at] = counts.get(at, 0) + whole_numbers(path, key, array)
    iterations, layers = (sorted(set(numbers)) for numbers in zip(*counts, strict=True)) if counts else ([], [])
    if len(iterations) * len(layers) * num_experts > MAX_CELLS:
        raise UserError(f"{folder}: {len(iterations)} iterations are more than fit; record fewer")
    for iteration in iterations:
        for layer in layers:
            if (iteration, layer) not in counts:
                raise UserError(f"{folder}: iteration {iteration} lacks layer {layer}, which others have; record again")
    rows = [counts[iteration, layer] for iteration in iterations for layer in layers]
    counts_SLE = np.array(rows, np.int64).reshape(len(iterations), len(layers), num_experts)
    return RecordedLoads(counts_SLE, tuple(layers), top_k)


def read_map(path: Path, num_ranks: int | None, selected: Sequence[int] | None) -> SlotMap:
    """Read a load balancer's YAML file."""
    try:
        check_text_size(path)
        text = path.read_text(encoding="utf-8")
        if re.search("[&*]", text):  # a few references to references make more values than fit into memory
            raise UserError(f"{path}: holds YAML references, which TensorRT-LLM's own files do not; it was not read")
        document = yaml.safe_load(text)
    except UserError:
        raise
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not a readable YAML file ({first_line(error)})") from None
    rows = document.get("initial_global_assignments") if isinstance(document, Mapping) else None
    if not isinstance(rows, Mapping) or not rows:
        raise UserError(f"{path}: has no initial_global_assignments")
    try:
        layers = sorted(check_integer("layer in initial_global_assignments", layer) for layer in rows)
        num_slots = check_integer("num_slots", document.get("num_slots"), 1)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    slots = read_slots(path, [rows[layer] for layer in layers], num_ranks, layers, selected)
    if slots.experts_LS.shape[1] != num_slots:
        raise UserError(f"{path}: num_slots is {num_slots}, but its layers have {slots.experts_LS.shape[1]}")
    return slots


def write_map(slots: SlotMap, path: Path, suffix: str) -> None:
    """Write a load balancer's YAML file, a layer to a line."""
    document = {
        "num_slots": slots.experts_LS.shape[1],
        "initial_global_assignments": dict(zip(slots.layers, slots.experts_LS.tolist(), strict=True)),
        "layer_updates_per_iter": 0,
    }
    path.write_text(yaml.safe_dump(document, default_flow_style=None, sort_keys=False, width=float("inf")))
