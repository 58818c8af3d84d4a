"""Grouped GEMM of several low-bit experts on a GPU: Triton kernels that unpack weights in registers.

The kernels read the packed bytes, so that few rows take only the time of reading these; sums are fp32. Import this
module only where Triton is installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rq_ep.formats.fp8 import Fp8
from rq_ep.formats.fp8_groups import Fp8Groups
from rq_ep.formats.int4 import Int4
from rq_ep.formats.int8 import Int8
from rq_ep.formats.kernels.triton_codes import byte_value, nibble_value, scale_value
from rq_ep.formats.mxfp4 import GROUP_SIZE, Mxfp4
from rq_ep.formats.quantized import Parts, Quantized

FORMATS = (Int8, Fp8, Fp8Groups, Int4, Mxfp4)
DTYPES = (torch.bfloat16, torch.float16)
_BLOCK_N = 64
_BLOCK_K = 64  # without groups; with them a block is a group
_MIN_BLOCK_M, _MAX_BLOCK_M = 16, 64


@dataclass(frozen=True)
class Operand:
    """A matrix of a stack of experts, as the kernel reads it."""

    kind: str
    codes: Tensor  # [experts, O, bytes]
    scale: Tensor  # [experts, O, G]
    group_size: int  # inputs that share a scale; 0: all


def operand(format_: Quantized, parts: Parts) -> Operand:
    """The operand of the kernel, from the parts of a stack of experts in one of the FORMATS."""
    match format_:
        case Int8():
            return Operand("int8", parts["levels"], parts["scale"][..., None], 0)
        case Fp8():
            return Operand("fp8", parts["numbers"].view(torch.uint8), parts["scale"][..., None], 0)
        case Fp8Groups():
            return Operand("fp8", parts["numbers"].view(torch.uint8), parts["scale"], format_.group_size)
        case Int4():
            return Operand("int4", parts["codes"], parts["scale"], format_.group_size)
    assert isinstance(format_, Mxfp4), format_
    return Operand("mxfp4", parts["blocks"].flatten(2), parts["scales"], GROUP_SIZE)


def can_multiply(x_NI: Tensor, format_: Quantized) -> bool:
    """Whether the kernel supports rows [N, I]: 16-bit numbers, and whole groups of inputs."""
    if x_NI.dtype not in DTYPES or not isinstance(format_, FORMATS):
        return False
    return isinstance(format_, Int8 | Fp8) or x_NI.shape[1] % _group_size(format_) == 0


def _group_size(format_: Quantized) -> int:
    return format_.group_size if isinstance(format_, Int4 | Fp8Groups) else GROUP_SIZE


def grouped_product(x_NI: Tensor, matrix: Operand, slots: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Rows up to ends[0] times the matrix in slots[0], then up to ends[1] times that in slots[1], ...

    Args:
        x_NI: rows [N, I].
        matrix: of a stack of experts.
        slots: positions in the stack.
        ends: ascending; the last is N.

    Returns:
        [N, O] in the rows' dtype.
    """
    num_out = matrix.codes.shape[1]
    out_NO = x_NI.new_empty(len(x_NI), num_out)
    spans = list(zip(slots, [0, *ends[:-1]], ends, strict=True))
    block_m = triton.next_power_of_2(max(end - start for _, start, end in spans))
    block_m = min(max(block_m, _MIN_BLOCK_M), _MAX_BLOCK_M)
    tiles = [
        (slot, first, min(first + block_m, end)) for slot, start, end in spans for first in range(start, end, block_m)
    ]
    if not tiles:
        return out_NO
    tiles_3 = torch.from_numpy(np.array(tiles, np.int32).T.copy()).to(x_NI.device, non_blocking=True)
    x_NI = x_NI.contiguous()
    _grouped_kernel[(len(tiles), triton.cdiv(num_out, _BLOCK_N))](
        x_NI, out_NO, matrix.codes, matrix.scale, tiles_3,
        len(tiles), num_out, x_NI.shape[1], *matrix.codes.stride()[:2], *matrix.scale.stride()[:2],
        KIND=matrix.kind, GROUPED=matrix.group_size > 0, BLOCK_M=block_m, BLOCK_N=_BLOCK_N,
        BLOCK_K=matrix.group_size or _BLOCK_K,
    )  # fmt: skip
    return out_NO


@triton.jit
def _grouped_kernel(
    x_ptr, out_ptr, codes_ptr, scale_ptr, tiles_ptr,
    num_tiles, num_out, num_in, codes_slot_stride, codes_row_stride, scale_slot_stride, scale_row_stride,
    KIND: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + tile).to(tl.int64)
    rows = tl.load(tiles_ptr + num_tiles + tile) + tl.arange(0, BLOCK_M)
    is_row = rows < tl.load(tiles_ptr + 2 * num_tiles + tile)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out = outs < num_out
    x_row = x_ptr + rows.to(tl.int64)[:, None] * num_in
    codes_row = codes_ptr + slot * codes_slot_stride + outs.to(tl.int64)[:, None] * codes_row_stride
    scale_row = scale_ptr + slot * scale_slot_stride + outs * scale_row_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, num_in, BLOCK_K):
        if KIND == "int4" or KIND == "mxfp4":
            pairs = tl.arange(0, BLOCK_K // 2)
            is_pair = start + 2 * pairs < num_in
            codes = tl.load(codes_row + start // 2 + pairs[None, :], mask=is_out[:, None] & is_pair[None, :], other=0)
            mask = is_row[:, None] & is_pair[None, :]
            even = tl.load(x_row + start + 2 * pairs[None, :], mask=mask, other=0)
            odd = tl.load(x_row + start + 2 * pairs[None, :] + 1, mask=mask, other=0)
            part = tl.dot(even, tl.trans(nibble_value(codes & 15, KIND).to(even.dtype)))
            part += tl.dot(odd, tl.trans(nibble_value(codes >> 4, KIND).to(odd.dtype)))
        else:
            ins = start + tl.arange(0, BLOCK_K)
            is_in = ins < num_in
            codes = tl.load(codes_row + ins[None, :], mask=is_out[:, None] & is_in[None, :], other=0)
            x = tl.load(x_row + ins[None, :], mask=is_row[:, None] & is_in[None, :], other=0)
            part = tl.dot(x, tl.trans(byte_value(codes, KIND).to(x.dtype)))
        if GROUPED:
            part *= scale_value(tl.load(scale_row + start // BLOCK_K, mask=is_out, other=0), KIND)[None, :]
        sums += part
    if not GROUPED:
        sums *= tl.load(scale_row, mask=is_out, other=0)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * num_out + outs[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_out[None, :])
