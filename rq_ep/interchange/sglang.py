"""SGLang: records of its expert distribution recorder, and files for `--init-expert-location`.

Records, as `/dump_expert_distribution_record` writes them (`.pt`):
* modes `stat` and `stat_approx`: `logical_count` [passes, layers, experts], summed over ranks; one file a dump.
  Several files are taken as one record after another.
* modes `per_pass` and `per_token`: `records`, each with `forward_pass_id`, `rank` and `global_physical_count`
  [layers, slots], and `last_physical_to_logical_map` [layers, slots]; one file a rank. Ranks are added up pass by pass.
Layers are all layers of the model; dense ones count nothing.

Placements: `physical_to_logical_map` [layers of the model, slots], `.json` or `.pt`, and nothing beside it: SGLang
hands every key on. Rows of dense layers are never looked at; here they are filled as SGLang's own `trivial` does.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.files import read_json
from rq_ep.interchange.recorded import Recorded, steps_of, to_logical
from rq_ep.interchange.slot_map import SlotMap, read_slots
from rq_ep.interchange.tensors import (
    MAX_CELLS,
    check_text_size,
    is_tensor,
    load_pt,
    tensor_array,
    whole_numbers,
    write_arrays,
)

MAP = "physical_to_logical_map"


def read_stats(paths: Sequence[Path]) -> Recorded:
    """Read the dumps of one recording."""
    documents = [_mapping(path, load_pt(path)) for path in paths]
    if all("logical_count" in document for document in documents):
        parts = [
            steps_of(path, "logical_count", tensor_array(path, "logical_count", document["logical_count"]))
            for path, document in zip(paths, documents, strict=True)
        ]
        for path, part in zip(paths, parts, strict=True):
            if part.shape[1:] != parts[0].shape[1:]:
                raise UserError(f"{path}: {list(part.shape[1:])} layers and experts, unlike {paths[0]}")
        counts_SLE = np.concatenate(parts)
    elif all("records" in document for document in documents):
        counts_SLE = _sum_over_ranks(paths, documents)
    else:
        raise UserError(
            f"{paths[0]}: not dumps of one recording: all must hold `logical_count` (stat) or all `records` (per_pass)"
        )
    return Recorded(counts_SLE, layers=tuple(range(counts_SLE.shape[1])))


def read_map(path: Path, num_ranks: int | None, wanted: Sequence[int] | None) -> SlotMap:
    """Read a file for `--init-expert-location`."""
    if path.suffix == ".pt":
        rows: Any = _mapping(path, load_pt(path)).get(MAP)
        rows = whole_numbers(path, MAP, tensor_array(path, MAP, rows)) if is_tensor(rows) else rows
    else:
        check_text_size(path)
        rows = _mapping(path, read_json(path, "expert location", "name a file for --init-expert-location")).get(MAP)
    if rows is None:
        raise UserError(f"{path}: has no {MAP}")
    return read_slots(path, rows, num_ranks, range(len(rows)) if isinstance(rows, list | np.ndarray) else None, wanted)


def write_map(slots: SlotMap, path: Path, suffix: str) -> None:
    """Write a file for `--init-expert-location`; start SGLang with as many redundant experts and ranks."""
    num_slots = slots.experts_LS.shape[1]
    rows_LS = np.tile(np.arange(num_slots) % slots.num_experts, (slots.num_model_layers or slots.layers[-1] + 1, 1))
    rows_LS[list(slots.layers)] = slots.experts_LS
    if suffix == ".pt":
        write_arrays(path, suffix, {MAP: rows_LS})
    else:
        path.write_text(json.dumps({MAP: rows_LS.tolist()}) + "\n")


def _sum_over_ranks(paths: Sequence[Path], documents: Sequence[Mapping[str, Any]]) -> IntArray:
    """[S, L, E] counts of every forward pass."""
    name = "last_physical_to_logical_map"
    experts_LP = None
    passes: dict[int, IntArray] = {}
    seen: set[tuple[int, int, str]] = set()
    for path, document in zip(paths, documents, strict=True):
        found_LP = whole_numbers(path, name, tensor_array(path, name, document.get(name)))
        if experts_LP is not None and not np.array_equal(found_LP, experts_LP):
            raise UserError(f"{path}: another {name} than {paths[0]}: these are not ranks of one recording")
        experts_LP = found_LP
        records = document["records"]
        for record in records if isinstance(records, list) else [records]:
            number = _number(path, "forward_pass_id", _mapping(path, record))
            key = number, _number(path, "rank", record), reprlib.repr(record.get("gatherer_key"))
            if key in seen:
                raise UserError(f"{path}: pass {number} of rank {key[1]} is there twice")
            seen.add(key)
            counts = tensor_array(path, "global_physical_count", record.get("global_physical_count"))
            if counts.shape != found_LP.shape:
                raise UserError(
                    f"{path}: pass {number} counts {list(counts.shape)} layers and slots, but its map has "
                    f"{list(found_LP.shape)}"
                )
            if (len(passes) + 1) * counts.size > MAX_CELLS:
                raise UserError(f"{path}: more than {len(passes)} passes of such size; record fewer")
            passes[number] = passes.get(number, 0) + whole_numbers(path, "global_physical_count", counts)
    if experts_LP is None or not passes:
        raise UserError(f"{paths[0]}: holds no pass")
    return to_logical(paths[0], np.stack([passes[number] for number in sorted(passes)]), experts_LP)


def _number(path: Path, name: str, record: Mapping[str, Any]) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{path}: {name} of a record is {reprlib.repr(value)}, not a number")
    return value


def _mapping(path: Path, document: Any) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise UserError(f"{path}: holds a {type(document).__name__}, not what SGLang writes")
    return document
