"""SGLang: records of its expert distribution recorder, and files for `--init-expert-location`.

Records, as `/dump_expert_distribution_record` writes them (`.pt`):
* modes `stat` and `stat_approx`: `logical_count` [passes, layers, experts], summed over ranks; one file a dump.
  Several files are taken as one record after another.
* modes `per_pass` and `per_token`: `records`, each with `forward_pass_id`, `rank` and `global_physical_count`
  [layers, slots], and `last_physical_to_logical_map` [layers, slots]; one file a rank. Ranks are added up pass by pass.
Layers are all layers of the model; dense ones count nothing.

Placements: `physical_to_logical_map` [layers of the model, slots], `.json` or `.pt`, and nothing beside it: SGLang
hands every key on. SGLang never reads rows of dense layers; here they are filled as its own `trivial` does.

Axes: P slots of all ranks, S steps or, in maps, slots.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import read_json
from rq_ep.interchange.recorded import RecordedLoads, counts_by_step, fold_slots
from rq_ep.interchange.slot_map import SlotMap, read_slots
from rq_ep.interchange.tensors import (
    MAX_CELLS,
    Array,
    check_text_size,
    is_tensor,
    load_pt,
    tensor_array,
    whole_numbers,
    write_arrays,
)

MAP, LAST_MAP = "physical_to_logical_map", "last_physical_to_logical_map"
PHYSICAL = "global_physical_count"

Dump = tuple[Path, Mapping[str, Any]]


def read_stats(paths: Sequence[Path]) -> RecordedLoads:
    """Read the dumps of one recording, one after another."""
    first = _mapping(paths[0], load_pt(paths[0]))
    kind = next((name for name in ("logical_count", "records") if name in first), None)
    if kind is None:
        raise UserError(f"{paths[0]}: holds neither `logical_count` (mode stat) nor `records` (per_pass, per_token)")
    others = ((path, _mapping(path, load_pt(path))) for path in paths[1:])
    dumps = chain([(paths[0], first)], others)
    counts_SLE = _join(dumps) if kind == "logical_count" else _sum_over_ranks(dumps)
    return RecordedLoads(counts_SLE, layers=tuple(range(counts_SLE.shape[1])))


def read_map(path: Path, num_ranks: int | None, selected: Sequence[int] | None) -> SlotMap:
    """Read a file for `--init-expert-location`."""
    if path.suffix == ".pt":
        rows: Any = _mapping(path, load_pt(path)).get(MAP)
        rows = tensor_array(path, MAP, rows) if is_tensor(rows) else rows
    else:
        check_text_size(path)
        rows = _mapping(path, read_json(path, "expert location", "name a file for --init-expert-location")).get(MAP)
    if rows is None:
        raise UserError(f"{path}: has no {MAP}")
    if isinstance(rows, np.ndarray):
        rows = _map(path, MAP, rows)
    labels = range(len(rows)) if isinstance(rows, list | np.ndarray) else None
    return read_slots(path, rows, num_ranks, labels, selected)


def write_map(slots: SlotMap, path: Path, suffix: str) -> None:
    """Write a file for `--init-expert-location`; start SGLang with as many redundant experts and ranks."""
    num_slots = slots.experts_LS.shape[1]
    rows_LS = np.tile(np.arange(num_slots) % slots.num_experts, (slots.num_model_layers or slots.layers[-1] + 1, 1))
    rows_LS[list(slots.layers)] = slots.experts_LS
    if suffix == ".pt":
        write_arrays(path, suffix, {MAP: rows_LS})
    else:
        path.write_text(json.dumps({MAP: rows_LS.tolist()}) + "\n")


def _join(dumps: Iterable[Dump]) -> IntArray:
    """[S, L, E] counts of all dumps of mode `stat`."""
    parts: list[IntArray] = []
    for path, document in dumps:
        part = counts_by_step(path, "logical_count", tensor_array(path, "logical_count", document.get("logical_count")))
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"{path}: {list(part.shape[1:])} layers and experts, not {list(parts[0].shape[1:])} as the first dump"
            )
        if sum(one.size for one in parts) + part.size > MAX_CELLS:
            raise UserError(f"{path}: more steps than fit; convert fewer dumps at a time")
        parts.append(part)
    return np.concatenate(parts)


def _sum_over_ranks(dumps: Iterable[Dump]) -> IntArray:
    """[S, L, E] counts of every forward pass."""
    first_path, experts_LP = Path(), None
    passes: dict[int, IntArray] = {}
    seen: set[tuple[int, int, str]] = set()
    for path, document in dumps:
        map_LP = _map(path, LAST_MAP, tensor_array(path, LAST_MAP, document.get(LAST_MAP)))
        if experts_LP is None:
            first_path, experts_LP = path, map_LP
        if not np.array_equal(map_LP, experts_LP):
            raise UserError(f"{path}: another {LAST_MAP} than {first_path}: these are not ranks of one recording")
        records = document.get("records")
        if not isinstance(records, list) or not records:
            raise UserError(f"{path}: holds no pass")
        for record in records:
            number = _number(path, "forward_pass_id", _mapping(path, record))
            key = number, _number(path, "rank", record), reprlib.repr(record.get("gatherer_key"))
            if key in seen:
                raise UserError(f"{path}: pass {number} of rank {key[1]} is there twice")
            seen.add(key)
            counts = tensor_array(path, PHYSICAL, record.get(PHYSICAL))
            if counts.shape != map_LP.shape:
                raise UserError(
                    f"{path}: pass {number} counts {list(counts.shape)} layers and slots, but its map has "
                    f"{list(map_LP.shape)}"
                )
            if (len(passes) + 1) * counts.size > MAX_CELLS:
                raise UserError(f"{path}: more than {len(passes)} passes of such size; record fewer")
            passes[number] = passes.get(number, 0) + whole_numbers(path, PHYSICAL, counts)
    assert experts_LP is not None, "there is a dump"
    return fold_slots(first_path, np.stack([passes[number] for number in sorted(passes)]), experts_LP)


def _map(path: Path, name: str, array: Array) -> IntArray:
    """[layers, slots] the expert in each slot."""
    if array.ndim != 2:
        raise UserError(f"{path}: {name} has shape {list(array.shape)}, not [layers, slots]")
    return whole_numbers(path, name, array)


def _number(path: Path, name: str, record: Mapping[str, Any]) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{path}: {name} of a record is {reprlib.repr(value)}, not a number")
    return value


def _mapping(path: Path, document: Any) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise UserError(f"{path}: holds a {type(document).__name__}, not what SGLang writes")
    return document
