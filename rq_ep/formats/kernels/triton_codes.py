"""Decoding of low-bit codes in Triton, and unpacking of 4-bit codes to bf16. Import it only where Triton is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512  # bytes of codes in a program


def pairs_to_bf16(kind: str, codes_OGB: Tensor, scale_OG: Tensor) -> Tensor:
    """4-bit codes, two in a byte, uint8 [O, G, B], and their scales [O, G] as stored -> bf16 [O, I]."""
    num_out, num_groups, group_bytes = codes_OGB.shape
    out = torch.empty(num_out, num_groups * group_bytes * 2, dtype=torch.bfloat16, device=codes_OGB.device)
    grid = (triton.cdiv(codes_OGB.numel(), _BLOCK),)
    _pairs_kernel[grid](
        codes_OGB.contiguous(), scale_OG.contiguous(), out.view(torch.int32), codes_OGB.numel(), group_bytes,
        KIND=kind, BLOCK=_BLOCK,
    )  # fmt: skip
    return out


@triton.jit
def _pairs_kernel(codes_ptr, scale_ptr, out_ptr, num_bytes, group_bytes, KIND: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_bytes
    codes = tl.load(codes_ptr + index, mask=mask, other=0)
    scale = scale_value(tl.load(scale_ptr + index // group_bytes, mask=mask, other=0), KIND)
    low = _bf16_bits(nibble_value(codes & 15, KIND) * scale)
    high = _bf16_bits(nibble_value(codes >> 4, KIND) * scale)
    tl.store(out_ptr + index, low | (high << 16), mask=mask)


@triton.jit
def _bf16_bits(number):
    """The bits of fp32 numbers in bf16, rounded to nearest even explicitly: Triton's interpreter truncates."""
    bits = number.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def nibble_value(code, KIND: tl.constexpr):
    """The value of a 4-bit code, fp32."""
    code = code.to(tl.int32)
    if KIND == "int4":
        number = (code - 8).to(tl.float32)
    else:
        magnitude = code & 7
        halves = tl.where(magnitude < 4, magnitude, tl.where(magnitude < 6, 2 * magnitude - 4, 4 * magnitude - 16))
        number = tl.where(code < 8, halves, -halves).to(tl.float32) * 0.5
    return number


@triton.jit
def byte_value(code, KIND: tl.constexpr):
    """The value of an 8-bit code, fp32; e4m3 is decoded by its bits, which works on every GPU."""
    if KIND == "int8":
        number = code.to(tl.float32)
    else:
        magnitude = code.to(tl.int32) & 127
        normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        number = tl.where(magnitude > 7, normal, magnitude.to(tl.float32) * 0.001953125)
        number = tl.where(code < 128, number, -number)
    return number


@triton.jit
def scale_value(stored, KIND: tl.constexpr):
    """The value of a stored scale, fp32."""
    return (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True) if KIND == "mxfp4" else stored.to(tl.float32)
