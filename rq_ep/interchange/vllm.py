"""vLLM: expert loads of its EPLB state, saved by the user, since vLLM itself writes no such file.

A `.pt`, `.npz` or `.safetensors` file with the fields of the same names:
* `expert_load_window` [steps, layers, slots] or `expert_load_pass` [layers, slots], and `physical_to_logical_map`
  [layers, slots], -1 in slots that elastic EP keeps empty; or
* `last_expert_load` [layers, experts], the sums of the last re-placement; or
* one array without a name, or named `logical_count`: [steps, layers, experts] or [layers, experts].
Rows are MoE layers only. Several files are ranks of one run, before their all-reduce, and are added up.
"""

from collections.abc import Sequence
from pathlib import Path

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.interchange.recorded import RecordedLoads, counts_by_step, fold_slots
from rq_ep.interchange.tensors import BARE, read_arrays, whole_numbers

PHYSICAL = ("expert_load_window", "expert_load_pass")
LOGICAL = ("last_expert_load", "logical_count", BARE)
MAP = "physical_to_logical_map"


def read_stats(paths: Sequence[Path]) -> RecordedLoads:
    """Read the loads of one run, a file from each rank or one for all."""
    first_SLE = _read(paths[0])
    counts_SLE = first_SLE.copy()
    for path in paths[1:]:
        more_SLE = _read(path)
        if more_SLE.shape != first_SLE.shape:
            raise UserError(f"{path}: has shape {list(more_SLE.shape)}, but {paths[0]} {list(first_SLE.shape)}")
        counts_SLE += more_SLE
    return RecordedLoads(counts_SLE)


def _read(path: Path) -> IntArray:
    arrays = read_arrays(path)
    physical = [name for name in PHYSICAL if name in arrays]
    logical = [name for name in LOGICAL if name in arrays]
    if physical:
        if MAP not in arrays:
            raise UserError(f"{path}: {physical[0]} counts slots; save {MAP} beside it")
        experts_LP = whole_numbers(path, MAP, arrays[MAP], low=-1)
        return fold_slots(path, counts_by_step(path, physical[0], arrays[physical[0]]), experts_LP)
    if logical:
        return counts_by_step(path, logical[0], arrays[logical[0]])
    raise UserError(
        f"{path}: holds {', '.join(arrays) or 'no array'}; expected {' or '.join(PHYSICAL)} with {MAP}, "
        "or one array of counts by expert"
    )
