"""Plain NumPy: `.npy` of counts [steps, layers, experts] or [layers, experts]; `.npz` and `.safetensors` with names.

Named arrays: `counts` as above and, if there, `tokens` [steps], `phase` [steps] (0 prefill, 1 decode) and `layers`
[layers], the index of each row in the model.
"""

from collections.abc import Sequence
from pathlib import Path

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.interchange.recorded import RecordedLoads, counts_by_step
from rq_ep.interchange.tensors import read_arrays, whole_numbers

NAMES = ("counts", "tokens", "phase", "layers")


def read_stats(paths: Sequence[Path]) -> RecordedLoads:
    """Read one file of counts."""
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: counts are one file; join them in NumPy")
    path = paths[0]
    arrays = read_arrays(path)
    if len(arrays) == 1:
        arrays = {"counts": next(iter(arrays.values()))}
    if "counts" not in arrays or set(arrays) - set(NAMES):
        names = ", ".join(name or "an array without a name" for name in arrays) or "no array"
        raise UserError(f"{path}: holds {names}; expected counts and, if you like, {', '.join(NAMES[1:])}")
    counts_SLE = counts_by_step(path, "counts", arrays["counts"])
    num_steps, num_layers, _ = counts_SLE.shape
    sizes = {"tokens": num_steps, "phase": num_steps, "layers": num_layers}
    notes: dict[str, IntArray] = {}
    for name, size in sizes.items():
        if name in arrays:
            notes[name] = whole_numbers(path, name, arrays[name])
            if notes[name].shape != (size,):
                raise UserError(f"{path}: {name} is {list(notes[name].shape)}, but counts ask for [{size}]")
    layers = tuple(notes["layers"].tolist()) if "layers" in notes else None
    if layers is not None and list(layers) != sorted(set(layers)):
        raise UserError(f"{path}: layers {list(layers)} must come once each, in ascending order")
    return RecordedLoads(counts_SLE, layers, tokens_S=notes.get("tokens"), phase_S=notes.get("phase"))
