"""Rows through several low-bit experts at once on a GPU: Triton kernels that unpack weights in registers.

A product is read off the packed bytes, so that few rows cost what these weigh; sums are fp32. Import this module only
where Triton is installed.
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
from rq_ep.formats.mxfp4 import GROUP, Mxfp4
from rq_ep.formats.quantized import Parts, Quantized

FORMATS = (Int8, Fp8, Fp8Groups, Int4, Mxfp4)
DTYPES = (torch.bfloat16, torch.float16)
_BLOCK_N = 64
_BLOCK_K = 64  # without groups; with them a block is a group
_MIN_BLOCK_M, _MAX_BLOCK_M = 16, 64


@dataclass(frozen=True)
class Operand:
    """How a matrix of a stack of experts is stored: codes [S, out, bytes] and scales [S, out, groups]."""

    kind: str
    codes: Tensor
    scale: Tensor
    group: int  # inputs that share a scale; 0: all


def operand(format_: Quantized, parts: Parts) -> Operand:
    """What the kernel computes with, from the parts of a stack of experts in one of the FORMATS."""
    match format_:
        case Int8():
            return Operand("int8", parts["levels"], parts["scale"][..., None], 0)
        case Fp8():
            return Operand("fp8", parts["numbers"].view(torch.uint8), parts["scale"][..., None], 0)
        case Fp8Groups():
            return Operand("fp8", parts["numbers"].view(torch.uint8), parts["scale"], format_.group)
        case Int4():
            return Operand("int4", parts["codes"], parts["scale"], format_.group)
    assert isinstance(format_, Mxfp4), format_
    return Operand("mxfp4", parts["blocks"].flatten(2), parts["scales"], GROUP)


def can_multiply(x_ND: Tensor, format_: Quantized) -> bool:
    """Whether the kernel computes rows [N, in]: 16 bits each, whole groups of inputs."""
    if x_ND.dtype not in DTYPES or not isinstance(format_, FORMATS):
        return False
    group = format_.group if isinstance(format_, Int4 | Fp8Groups) else GROUP if isinstance(format_, Mxfp4) else 1
    return x_ND.shape[1] % group == 0


def grouped_product(x_ND: Tensor, matrix: Operand, slots: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Rows [N, in] up to ends[0] times the matrix in slots[0], then up to ends[1] times that in slots[1], ...

    Returns:
        [N, out] in the rows' dtype.
    """
    num_out = matrix.codes.shape[1]
    out_NO = x_ND.new_empty(len(x_ND), num_out)
    spans = list(zip(slots, [0, *ends[:-1]], ends, strict=True))
    block_m = triton.next_power_of_2(max(end - start for _, start, end in spans))
    block_m = min(max(block_m, _MIN_BLOCK_M), _MAX_BLOCK_M)
    tiles = [
        (slot, first, min(first + block_m, end)) for slot, start, end in spans for first in range(start, end, block_m)
    ]
    if not tiles:
        return out_NO
    tiles_3T = torch.from_numpy(np.array(tiles, np.int32).T.copy()).to(x_ND.device, non_blocking=True)
    x_ND = x_ND.contiguous()
    _grouped_kernel[(len(tiles), triton.cdiv(num_out, _BLOCK_N))](
        x_ND, out_NO, matrix.codes, matrix.scale, tiles_3T,
        len(tiles), num_out, x_ND.shape[1], *matrix.codes.stride()[:2], *matrix.scale.stride()[:2],
        KIND=matrix.kind, GROUPED=matrix.group > 0, BLOCK_M=block_m, BLOCK_N=_BLOCK_N,
        BLOCK_K=matrix.group or _BLOCK_K,
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
