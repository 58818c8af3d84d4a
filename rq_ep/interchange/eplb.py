"""DeepSeek's EPLB: the three tensors that `rebalance_experts` returns, in a `.npz`, `.safetensors` or `.pt` file.

`phy2log` [layers, slots] the expert in each slot; `log2phy` [layers, experts, most copies] the slots of each expert,
padded with -1; `logcnt` [layers, experts] how many these are. Rows are MoE layers only.

Axes: S slots, C slots of one expert.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.interchange.slot_map import SlotMap, read_slots
from rq_ep.interchange.tensors import read_arrays, whole_numbers, write_arrays


def read_map(path: Path, num_ranks: int | None, selected: Sequence[int] | None) -> SlotMap:
    """Read `phy2log`; the other two must agree with it, if they are there."""
    arrays = read_arrays(path)
    if "phy2log" not in arrays or arrays["phy2log"].ndim != 2:
        raise UserError(f"{path}: has no phy2log [layers, slots]")
    rows_LS = whole_numbers(path, "phy2log", arrays["phy2log"])
    whole = read_slots(path, rows_LS, num_ranks)
    for name, expected in slot_tables(whole).items():
        if name in arrays and not _same(arrays[name], expected):
            raise UserError(f"{path}: {name} contradicts phy2log")
    return read_slots(path, rows_LS, num_ranks, None, selected)


def write_map(slots: SlotMap, path: Path, suffix: str) -> None:
    """Write the three tensors."""
    write_arrays(path, suffix, slot_tables(slots))


def slot_tables(slots: SlotMap) -> dict[str, IntArray]:
    """The three tensors; an expert's slots ascend."""
    counts_LE = np.stack([np.bincount(experts_S, minlength=slots.num_experts) for experts_S in slots.experts_LS])
    slots_LEC = np.full((*counts_LE.shape, counts_LE.max()), -1, np.int64)
    for slots_EC, experts_S in zip(slots_LEC, slots.experts_LS, strict=True):
        order_S = np.argsort(experts_S, kind="stable")
        first_E = np.searchsorted(experts_S[order_S], np.arange(slots.num_experts))
        sorted_S = experts_S[order_S]
        slots_EC[sorted_S, np.arange(len(order_S)) - first_E[sorted_S]] = order_S
    return {"phy2log": slots.experts_LS, "log2phy": slots_LEC, "logcnt": counts_LE}


def _same(array: np.ndarray, expected: IntArray) -> bool:
    """Whether a tensor says what is expected, with the slots of an expert in any order and any padding."""
    if expected.ndim < 3:
        return np.array_equal(array, expected)
    if array.ndim != 3 or array.shape[:2] != expected.shape[:2] or array.shape[2] < expected.shape[2]:
        return False
    ordered = -np.sort(-array, axis=2)
    descending = -np.sort(-expected, axis=2)
    width = expected.shape[2]
    return np.array_equal(ordered[..., :width], descending) and bool((ordered[..., width:] == -1).all())
