"""Expert loads that an engine recorded, and the model metadata that its file lacks to become statistics.

Axes: P slots of all ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from rq_ep.interchange.rows import select_rows
from rq_ep.interchange.tensors import MAX_CELLS, Array, whole_numbers


@dataclass(frozen=True)
class RecordedLoads:
    """Pairs by step, row and expert, and the rest of what the file holds."""

    counts_SLE: IntArray
    layers: tuple[int, ...] | None = None  # index in the model of each row's layer, where the file has it
    top_k: int | None = None
    tokens_S: IntArray | None = None
    phase_S: IntArray | None = None


@dataclass(frozen=True)
class ModelMetadata:
    """Sizes of a model that other engines' files lack; the fields are named after the options of `rq-ep convert`."""

    expert_bytes: Mapping[str, int] = field(default_factory=dict)  # format -> bytes of one expert
    native_format: str | None = None  # default: the first of `expert_bytes`
    top_k: int | None = None
    layers: tuple[int, ...] | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    expert_groups: int | None = None

    @property
    def native(self) -> str:
        """The native format.

        Raises:
            UserError: no sizes were given.
        """
        if not self.expert_bytes:
            raise UserError(
                "--expert-bytes: say what one expert takes in each format, native first, such as "
                "bf16=88080384,int8=44126208; its matrices' bytes in bf16 are 2 * 3 * hidden size * intermediate size"
            )
        return self.native_format or next(iter(self.expert_bytes))


def to_stats(recorded: RecordedLoads, metadata: ModelMetadata, source: str) -> ExpertStats:
    """Convert recorded loads to statistics.

    Steps without any pair are left out. So are layers without any pair (dense ones), where the file numbers its layers
    and the metadata selects none.

    Raises:
        UserError: the file and the metadata contradict each other, or nothing was recorded.
    """
    counts_SLE, labels = recorded.counts_SLE, recorded.layers
    steps = np.flatnonzero(counts_SLE.any(axis=(1, 2)))
    if not len(steps):
        raise UserError(f"{source}: no step of it routes any pair; record under load")
    selected = metadata.layers
    if selected is None and labels is not None:
        busy = np.flatnonzero(counts_SLE.any(axis=(0, 2)))
        selected = tuple(labels[row] for row in busy.tolist())
    rows, layers = select_rows(source, counts_SLE.shape[1], labels, selected)
    if metadata.top_k is not None and recorded.top_k not in (None, metadata.top_k):
        raise UserError(f"--top-k {metadata.top_k}: {source} was recorded at {recorded.top_k}")
    return ExpertStats(
        counts=np.ascontiguousarray(counts_SLE[steps][:, rows]),
        formats=tuple(metadata.expert_bytes),
        native_format=metadata.native,
        expert_bytes=dict(metadata.expert_bytes),
        tokens=None if recorded.tokens_S is None else recorded.tokens_S[steps],
        phase=None if recorded.phase_S is None else recorded.phase_S[steps],
        layers=layers,
        hidden_size=metadata.hidden_size,
        intermediate_size=metadata.intermediate_size,
        top_k=metadata.top_k or recorded.top_k,
        expert_groups=metadata.expert_groups,
        source=source,
    )


def counts_by_step(source: Path, name: str, array: Array) -> IntArray:
    """[S, L, E] counts of an array of these axes, or of the last two: one step."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(
            f"{source}: {name or 'its content'} has shape {list(array.shape)}, not [steps, layers, experts] or "
            "[layers, experts]"
        )
    counts = whole_numbers(source, name, array)
    return counts if counts.ndim == 3 else counts[None]


def fold_slots(source: Path, physical_SLP: IntArray, experts_LP: IntArray) -> IntArray:
    """[S, L, E] counts by expert from counts by slot.

    Args:
        physical_SLP: pairs of each slot.
        experts_LP: the expert in each slot; -1 in an empty one, which counts nothing.
    """
    if experts_LP.shape != physical_SLP.shape[1:]:
        raise UserError(
            f"{source}: its map is {list(experts_LP.shape)}, but it counts {list(physical_SLP.shape[1:])} layers and "
            "slots"
        )
    num_experts = int(experts_LP.max(initial=-1)) + 1
    num_steps, num_layers, num_slots = physical_SLP.shape
    if num_experts > num_slots or num_steps * num_layers * num_experts > MAX_CELLS:
        raise UserError(f"{source}: its map names expert {num_experts - 1}, but there are {num_slots} slots")
    logical_SLE = np.zeros((num_steps, num_layers, num_experts), np.int64)
    for layer, experts_P in enumerate(experts_LP):
        for slot, expert in enumerate(experts_P.tolist()):
            if expert < 0:
                continue
            logical_SLE[:, layer, expert] += physical_SLP[:, layer, slot]
    return logical_SLE
