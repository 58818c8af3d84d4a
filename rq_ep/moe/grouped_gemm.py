"""Grouped GEMM: rows through a matrix of several experts of one format, by a kernel for format, device and rows.

Axes: G slots of a stack, each an expert with its group of rows, maybe none; O outputs of a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.formats import ExpertBuffers, ExpertLayout, Views, WeightFormat, spoil
from rq_ep.formats.kernels.blocked_product import has_fast_products
from rq_ep.formats.kernels.unpack import has_triton
from rq_ep.formats.native import Native
from rq_ep.formats.quantized import Quantized

MAX_GROUPED_ROWS = 128  # of a low-bit expert on a GPU, on average; not tuned on one
_GROUPED_STRIDE_BYTES = 16  # the grouped kernel needs strides to be multiples of this


class PackedExpert(NamedTuple):
    """An expert in a buffer of its own, uint8 [nbytes], and the tensors in it."""

    packed: Tensor
    views: Views

    @classmethod
    def blank(cls, format_: WeightFormat, layout: ExpertLayout, buffers: ExpertBuffers) -> "PackedExpert":
        """A buffer that an expert is to be written to."""
        packed = buffers.take(format_.nbytes(layout))
        spoil(packed)
        return cls(packed, format_.views(packed, layout))


@dataclass(frozen=True)
class Stack:
    """Packed experts of one format, each in a slot: all in one buffer, or each in its own, to come and go alone.

    Kernels that compute all slots at once need the one buffer; the others are computed one by one.
    """

    format: WeightFormat
    layout: ExpertLayout
    packed: Tensor | None  # the one buffer, uint8 [slots, nbytes]
    separate: tuple[PackedExpert, ...] = ()  # without it

    @classmethod
    def empty(cls, format_: WeightFormat, layout: ExpertLayout, num_slots: int, device: torch.device) -> "Stack":
        shape = (num_slots, format_.nbytes(layout))
        return cls(format_, layout, torch.zeros(shape, dtype=torch.uint8, device=device))

    def __len__(self) -> int:
        return len(self.separate) if self.packed is None else len(self.packed)

    @property
    def nbytes(self) -> int:
        if self.packed is None:
            return sum(expert.packed.nbytes for expert in self.separate)
        return self.packed.nbytes

    def at(self, slot: int) -> Tensor:
        """The bytes of the expert in a slot, uint8 [nbytes]."""
        return self.separate[slot].packed if self.packed is None else self.packed[slot]

    def expert(self, slot: int) -> PackedExpert:
        """The expert in a slot."""
        return PackedExpert(self.at(slot), self.experts[slot]) if self.packed is not None else self.separate[slot]

    @cached_property
    def views(self) -> Views:
        """Tensors of all experts in the one buffer, [slots, ...]."""
        assert self.packed is not None
        return self.format.views(self.packed, self.layout)

    @cached_property
    def experts(self) -> tuple[Views, ...]:
        """Tensors of each expert."""
        if self.packed is None:
            return tuple(expert.views for expert in self.separate)
        return tuple(self.format.views(packed, self.layout) for packed in self.packed)


@dataclass(frozen=True)
class GroupedRows:
    """Rows up to ends[0] are for the expert in slots[0], then up to ends[1] for the next, ...; none without rows."""

    x_ND: Tensor
    slots: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return list(pairwise((0, *self.ends)))

    def ends_by_slot(self, num_slots: int) -> npt.NDArray[np.int32]:
        """Where the rows of the expert in each slot end, [G]."""
        ends_G = np.zeros(num_slots, np.int32)
        ends_G[list(self.slots)] = self.ends
        return np.maximum.accumulate(ends_G)


class Kernel(NamedTuple):
    """A kernel of the grouped GEMM: the products that it supports, and their computation."""

    can_multiply: Callable[[GroupedRows, Stack, str], bool]
    multiply: Callable[[GroupedRows, Stack, str], Tensor]


def multiply(x_ND: Tensor, stack: Stack, slots: Sequence[int], ends: Sequence[int], name: str) -> Tensor:
    """Rows up to ends[0] through matrix `name` of the expert in slots[0], then up to ends[1] through the next, ...

    Args:
        x_ND: rows [N, in].
        stack: the experts.
        slots: where they lie, ascending.
        ends: ascending, the last is N; an expert may have no rows.
        name: of the matrix.

    Returns:
        [N, out], with biases.
    """
    active = [(slot, end) for slot, (start, end) in zip(slots, pairwise((0, *ends)), strict=True) if start < end]
    grouped = GroupedRows(x_ND, tuple(slot for slot, _ in active), tuple(end for _, end in active))
    return next(kernel for kernel in KERNELS if kernel.can_multiply(grouped, stack, name)).multiply(
        grouped, stack, name
    )


def can_group(x_ND: Tensor, stack: Stack, name: str) -> bool:
    """Whether one kernel computes a stack's experts: in one buffer, bf16, stored as computed, strides as it needs."""
    return stack.packed is not None and _suits_grouping(x_ND, stack, name)


def _suits_grouping(x_ND: Tensor, stack: Stack, name: str) -> bool:
    if not isinstance(stack.format, Native) or not x_ND.dtype == stack.format.dtype == torch.bfloat16:
        return False
    if x_ND.device.type == "cuda" and torch.cuda.get_device_capability(x_ND.device) < (8, 0):
        return False
    if x_ND.device.type == "cpu" and not has_fast_products(x_ND.dtype):
        return False
    return all(size * x_ND.dtype.itemsize % _GROUPED_STRIDE_BYTES == 0 for size in stack.layout.shapes[name])


def _are_several_native(grouped: GroupedRows, stack: Stack, name: str) -> bool:
    return len(grouped.slots) > 1 and can_group(grouped.x_ND, stack, name)


def _grouped_native(grouped: GroupedRows, stack: Stack, name: str) -> Tensor:
    x_ND = grouped.x_ND
    ends_G = torch.from_numpy(grouped.ends_by_slot(len(stack))).to(x_ND.device, non_blocking=True)
    weight = stack.views[name] if stack.layout.is_transposed else stack.views[name].transpose(1, 2)
    return _add_bias(F.grouped_mm(x_ND, weight, offs=ends_G), grouped, stack, name)


def _are_several_separate(grouped: GroupedRows, stack: Stack, name: str) -> bool:
    return len(grouped.slots) > 1 and stack.packed is None and _suits_grouping(grouped.x_ND, stack, name)


def _separate_native(grouped: GroupedRows, stack: Stack, name: str) -> Tensor:
    """As the grouped kernel computes them, which on a CPU takes one product after another too: with the same bits."""
    x_ND, layout = grouped.x_ND, stack.layout
    out_NO = x_ND.new_empty(len(x_ND), layout.matrix_shape(name)[0])
    for slot, (start, end) in zip(grouped.slots, grouped.spans, strict=True):
        views = stack.experts[slot]
        weight = views[name] if layout.is_transposed else views[name].T
        torch.mm(x_ND[start:end], weight, out=out_NO[start:end])
        if (bias := views.get(f"{name}_bias")) is not None:
            out_NO[start:end] += bias
    return out_NO


def _are_few_low_bits_on_gpu(grouped: GroupedRows, stack: Stack, name: str) -> bool:
    """Whether rows are so few that reading the weights takes longer than multiplying them."""
    x_ND = grouped.x_ND
    if stack.packed is None or x_ND.device.type != "cuda":
        return False
    if not isinstance(stack.format, Quantized) or not has_triton():
        return False
    from rq_ep.formats.kernels.triton_grouped import can_multiply

    return 0 < len(x_ND) <= MAX_GROUPED_ROWS * len(grouped.slots) and can_multiply(x_ND, stack.format)


def _grouped_low_bits(grouped: GroupedRows, stack: Stack, name: str) -> Tensor:
    from rq_ep.formats.kernels.triton_grouped import grouped_product, operand

    assert isinstance(stack.format, Quantized)
    matrix = operand(stack.format, stack.format.parts(stack.views, name, stack.layout))
    out_NO = grouped_product(grouped.x_ND, matrix, grouped.slots, grouped.ends)
    return _add_bias(out_NO, grouped, stack, name)


def _one_by_one(grouped: GroupedRows, stack: Stack, name: str) -> Tensor:
    """The format's own product: low bits are unpacked a block at a time, or multiplied packed where rows are few."""
    parts = [
        stack.format.linear(grouped.x_ND[start:end], stack.experts[slot], name, stack.layout)
        for slot, (start, end) in zip(grouped.slots, grouped.spans, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add_bias(out_NO: Tensor, grouped: GroupedRows, stack: Stack, name: str) -> Tensor:
    if (bias := stack.views.get(f"{name}_bias")) is not None:
        sizes = torch.from_numpy(np.diff(grouped.ends_by_slot(len(stack)), prepend=0)).to(
            out_NO.device, non_blocking=True
        )
        out_NO += torch.repeat_interleave(bias, sizes, 0, output_size=len(out_NO))
    return out_NO


# The first that supports a product computes it.
KERNELS = (
    Kernel(_are_several_native, _grouped_native),
    Kernel(_are_several_separate, _separate_native),
    Kernel(_are_few_low_bits_on_gpu, _grouped_low_bits),
    Kernel(lambda *_: True, _one_by_one),
)
