"""Grouped expert computation: rows through the experts they are routed to, weighted and summed row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.formats import ExpertLayout, Views, WeightFormat
from rq_ep.moe.family import ExpertFamily
from rq_ep.parallel import Received

# Bytes of intermediate results; more pairs than fit are computed one part after another.
MAX_WORKSPACE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_GROUPED_STRIDE_BYTES = 16  # what the grouped kernel wants strides to be multiples of


@dataclass(frozen=True)
class Stack:
    """Packed experts of one format in one buffer, uint8 [slots, nbytes]."""

    format: WeightFormat
    layout: ExpertLayout
    packed: Tensor

    @classmethod
    def empty(cls, format_: WeightFormat, layout: ExpertLayout, num_slots: int, device: torch.device) -> "Stack":
        shape = (num_slots, format_.nbytes(layout))
        return cls(format_, layout, torch.zeros(shape, dtype=torch.uint8, device=device))

    @cached_property
    def views(self) -> Views:
        """Tensors of all experts, [slots, ...]."""
        return self.format.views(self.packed, self.layout)

    @cached_property
    def experts(self) -> tuple[Views, ...]:
        """Tensors of each expert."""
        return tuple(self.format.views(packed, self.layout) for packed in self.packed)


class Share(NamedTuple):
    """Local replicas whose experts lie in one stack."""

    stack: Stack
    slots: list[int]  # where each replica lies, ascending
    replicas: list[int]  # numbers of the local replicas, each with at least one pair


def add_outputs(
    partial_MD: Tensor, received: Received, share: Share, family: ExpertFamily, max_bytes: int | None = None
) -> None:
    """Add the weighted outputs of a share's replicas to their rows, in the order of the pairs.

    Args:
        partial_MD: [M, D] fp32 sums, changed in place.
        received: rows and pairs.
        share: the replicas to compute.
        family: layout and activation.
        max_bytes: bound of the workspace; default by device.
    """
    spans = [(received.offsets[replica], received.offsets[replica + 1]) for replica in share.replicas]
    row_N = _gather(received.row_N, spans)
    weight_N = _gather(received.weight_N, spans)
    ends_G = np.cumsum([end - start for start, end in spans])
    limit = max_bytes or MAX_WORKSPACE_BYTES[partial_MD.device.type]
    step = max(1, limit // _row_bytes(family, received.rows_MD.dtype))
    for start in range(0, len(row_N), step):
        rows = row_N[start : start + step]
        ends = (ends_G - start).clip(0, len(rows)).tolist()
        up_NF = _linear(received.rows_MD[rows], share, ends, family.up)
        out_ND = _linear(family.apply_gate(up_NF), share, ends, family.down)
        _add_rows(partial_MD, rows, out_ND.float().mul_(weight_N[start : start + step, None]))


def _linear(x_ND: Tensor, share: Share, ends: Sequence[int], name: str) -> Tensor:
    """Rows up to ends[0] through the first expert's matrix `name`, then up to ends[1] through the second's, ..."""
    stack = share.stack
    spans = list(pairwise([0, *ends]))
    if sum(start < end for start, end in spans) > 1 and can_group(x_ND, stack, name):
        return _grouped_linear(x_ND, share, ends, name)
    parts = [
        stack.format.linear(x_ND[start:end], stack.experts[slot], name, stack.layout)
        for slot, (start, end) in zip(share.slots, spans, strict=True)
        if start < end
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def can_group(x_ND: Tensor, stack: Stack, name: str) -> bool:
    """Whether one grouped kernel computes a stack's experts: bf16, stored as computed, strides as it wants them."""
    if not stack.format.is_native or not x_ND.dtype == stack.views[name].dtype == torch.bfloat16:
        return False
    if x_ND.device.type == "cuda" and torch.cuda.get_device_capability(x_ND.device) < (8, 0):
        return False
    return all(size * x_ND.dtype.itemsize % _GROUPED_STRIDE_BYTES == 0 for size in stack.layout.shapes[name])


def _grouped_linear(x_ND: Tensor, share: Share, ends: Sequence[int], name: str) -> Tensor:
    stack = share.stack
    num_slots = len(stack.packed)
    sizes_S = np.zeros(num_slots, np.int64)
    sizes_S[list(share.slots)] = np.diff(ends, prepend=0)
    ends_S = torch.from_numpy(sizes_S.cumsum().astype(np.int32)).to(x_ND.device, non_blocking=True)
    weight = stack.views[name] if stack.layout.is_transposed else stack.views[name].transpose(1, 2)
    out_NO = F.grouped_mm(x_ND, weight, offs=ends_S)
    if (bias := stack.views.get(f"{name}_bias")) is not None:
        sizes = torch.from_numpy(sizes_S).to(x_ND.device, non_blocking=True)
        out_NO += torch.repeat_interleave(bias, sizes, 0, output_size=len(x_ND))
    return out_NO


def _gather(values_N: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    if all(end == start for (_, end), (start, _) in pairwise(spans)):
        return values_N[spans[0][0] : spans[-1][1]]
    return torch.cat([values_N[start:end] for start, end in spans])


def _add_rows(out_MD: Tensor, rows_N: Tensor, values_ND: Tensor) -> None:
    """Add values to rows that may repeat, in a fixed order."""
    if out_MD.device.type == "cuda":  # index_add_ adds atomically there, in any order; this one sorts first
        out_MD.index_put_((rows_N,), values_ND, accumulate=True)
    else:
        out_MD.index_add_(0, rows_N, values_ND)


def workspace_bytes(family: ExpertFamily, dtype: torch.dtype, num_pairs: int, kind: str) -> int:
    """Bytes of intermediate results that so many pairs take on a device of type `kind`."""
    return min(num_pairs * _row_bytes(family, dtype), MAX_WORKSPACE_BYTES[kind])


def _row_bytes(family: ExpertFamily, dtype: torch.dtype) -> int:
    """Workspace of one pair: its row, both matrices' outputs, the gate's, and the weighted output in fp32."""
    up_size = family.layout.shapes[family.up][family.layout.out_axis(family.up)]
    return (2 * family.hidden_size + 2 * up_size) * dtype.itemsize + 4 * family.hidden_size
