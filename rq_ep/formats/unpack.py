"""Low bits to bf16, a block of output channels at a time: on a CPU in compiled loops, on a GPU in Triton's kernels.

Tensor operations take several passes for the same. All round to nearest even and give the same bits.
"""

from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

_MAX_THREADS = 2  # with more, tensor operations are faster than the loop for int8, which takes one


def nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2n], low halves first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def int8_to_bf16(levels: Tensor) -> Tensor:
    """int8 [out, in] -> bf16, exact."""
    if levels.device.type != "cpu" or torch.get_num_threads() > _MAX_THREADS:
        return levels.to(torch.bfloat16)
    out = torch.empty(levels.shape, dtype=torch.bfloat16)
    _int8(levels.numpy(), _bits(out, np.uint16))
    return out


def e4m3_to_bf16(numbers: Tensor) -> Tensor:
    """float8_e4m3fn [out, in] -> bf16, exact."""
    if numbers.device.type != "cpu":
        return numbers.to(torch.bfloat16)
    out = torch.empty(numbers.shape, dtype=torch.bfloat16)
    _e4m3(numbers.view(torch.uint8).numpy(), _bits(out, np.uint16))
    return out


@cache
def has_triton() -> bool:
    """Whether the GPU's kernels can be compiled here."""
    return find_spec("triton") is not None


def can_unpack_pairs(codes: Tensor) -> bool:
    """Whether `int4_to_bf16` and `mxfp4_to_bf16` run on the device of `codes`."""
    return codes.device.type == "cpu" or has_triton()


def e4m3_groups_to_bf16(numbers_OGI: Tensor, scale_OG: Tensor) -> Tensor:
    """float8_e4m3fn [out, groups, group] and fp32 scales -> bf16 [out, in]."""
    if numbers_OGI.device.type != "cpu":
        return (numbers_OGI.to(torch.bfloat16) * scale_OG[..., None]).to(torch.bfloat16).flatten(1)
    out = torch.empty(numbers_OGI.shape, dtype=torch.bfloat16)
    _e4m3_groups(numbers_OGI.view(torch.uint8).numpy(), scale_OG.numpy(), _bits(out, np.uint16))
    return out.flatten(1)


def int4_to_bf16(codes_OGB: Tensor, scale_OG: Tensor) -> Tensor:
    """Levels plus 8, uint8 [out, groups, group / 2], and bf16 scales -> bf16 [out, in]."""
    if codes_OGB.device.type != "cpu":
        return _pairs_on_gpu("int4", codes_OGB, scale_OG)
    out = torch.empty(len(codes_OGB), codes_OGB[0].numel() * 2, dtype=torch.bfloat16)
    _int4(codes_OGB.numpy(), scale_OG.float().numpy(), _bits(out, np.uint32).reshape(codes_OGB.shape))
    return out


def mxfp4_to_bf16(blocks_OGB: Tensor, scales_OG: Tensor) -> Tensor:
    """Codes, uint8 [out, groups, 16], and exponents plus 127, uint8 -> bf16 [out, in], exact."""
    if blocks_OGB.device.type != "cpu":
        return _pairs_on_gpu("mxfp4", blocks_OGB, scales_OG)
    out = torch.empty(len(blocks_OGB), blocks_OGB[0].numel() * 2, dtype=torch.bfloat16)
    halves_OG = power_of_two(scales_OG.int() - 128)  # what the number 0.5 stands for
    _mxfp4(blocks_OGB.numpy(), halves_OG.numpy(), _bits(out, np.uint32).reshape(blocks_OGB.shape))
    return out


def scale_channels(out_NO: Tensor, scale_O: Tensor) -> Tensor:
    """Multiply products [N, out] with factors of their channels, in place; they are contiguous or transposed."""
    if out_NO.device.type != "cpu" or out_NO.dtype != torch.bfloat16:
        return out_NO.mul_(scale_O)
    if out_NO.is_contiguous():
        _scale_columns(_bits(out_NO, np.uint16), scale_O.numpy())
    else:  # the transpose of what lies in memory
        _scale_rows(_bits(out_NO.T, np.uint16), scale_O.numpy())
    return out_NO


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to integers, fp32, by its bits; 0 below 2^-126."""
    return (exponent + 127).clamp_(min=0).bitwise_left_shift_(23).to(torch.int32).view(torch.float32)


def _pairs_on_gpu(kind: str, codes_OGB: Tensor, scale_OG: Tensor) -> Tensor:
    from rq_ep.formats.triton_codes import pairs_to_bf16

    return pairs_to_bf16(kind, codes_OGB, scale_OG)


def _bits(out: Tensor, dtype: type[np.uint16] | type[np.uint32]) -> npt.NDArray[np.unsignedinteger]:
    return out.view(torch.int16).numpy().view(dtype)


# The loops are written so that the compiler turns them into vector instructions: each of these forms was timed, and
# close relatives (an index computed from several variables, a call for every group) are five to ten times slower.


@njit(cache=True, nogil=True)
def _int8(levels, out):
    for n in range(levels.shape[0]):
        for k in range(levels.shape[1]):
            out[n, k] = np.float32(levels[n, k]).view(np.uint32) >> np.uint32(16)


@njit(cache=True, nogil=True)
def _e4m3(bytes_, out):
    for n in range(bytes_.shape[0]):
        for k in range(bytes_.shape[1]):
            out[n, k] = _e4m3_bits(bytes_[n, k])


@njit(cache=True, nogil=True)
def _e4m3_groups(bytes_, scale, out):
    weights = np.empty(bytes_.shape[1:], np.float32)
    bits = weights.view(np.uint32)
    for n in range(bytes_.shape[0]):
        for g in range(bytes_.shape[1]):
            for k in range(bytes_.shape[2]):
                bits[g, k] = np.uint32(_e4m3_bits(bytes_[n, g, k])) << np.uint32(16)
        for g in range(bytes_.shape[1]):
            factor = scale[n, g]
            for k in range(bytes_.shape[2]):
                weights[g, k] = weights[g, k] * factor
        for g in range(bytes_.shape[1]):
            for k in range(bytes_.shape[2]):
                out[n, g, k] = _to_even(bits[g, k]) >> np.uint32(16)


@njit(cache=True, nogil=True)
def _int4(codes, scale, out):
    low = np.empty(codes.shape[1:], np.float32)
    high = np.empty(codes.shape[1:], np.float32)
    low_bits, high_bits = low.view(np.uint32), high.view(np.uint32)
    for n in range(codes.shape[0]):
        for g in range(codes.shape[1]):
            factor = scale[n, g]
            for k in range(codes.shape[2]):
                low[g, k] = np.float32(np.int32(codes[n, g, k] & 15) - 8) * factor
                high[g, k] = np.float32(np.int32(codes[n, g, k] >> 4) - 8) * factor
        for g in range(codes.shape[1]):
            for k in range(codes.shape[2]):
                low_half = _to_even(low_bits[g, k]) >> np.uint32(16)
                out[n, g, k] = low_half | (_to_even(high_bits[g, k]) & np.uint32(0xFFFF0000))


@njit(cache=True, nogil=True)
def _mxfp4(blocks, half, out):
    low = np.empty(blocks.shape[1:], np.float32)
    high = np.empty(blocks.shape[1:], np.float32)
    low_bits, high_bits = low.view(np.uint32), high.view(np.uint32)
    for n in range(blocks.shape[0]):
        for g in range(blocks.shape[1]):
            factor = half[n, g]
            for k in range(blocks.shape[2]):
                low[g, k] = _in_halves(blocks[n, g, k] & 15) * factor
                high[g, k] = _in_halves(blocks[n, g, k] >> 4) * factor
        for g in range(blocks.shape[1]):
            for k in range(blocks.shape[2]):
                out[n, g, k] = (low_bits[g, k] >> np.uint32(16)) | (high_bits[g, k] & np.uint32(0xFFFF0000))


@njit(cache=True, nogil=True)
def _scale_columns(out, scale):
    scaled = np.empty(out.shape[1], np.float32)
    bits = scaled.view(np.uint32)
    for n in range(out.shape[0]):
        for k in range(out.shape[1]):
            bits[k] = np.uint32(out[n, k]) << np.uint32(16)
        for k in range(out.shape[1]):
            scaled[k] = scaled[k] * scale[k]
        for k in range(out.shape[1]):
            out[n, k] = _to_even(bits[k]) >> np.uint32(16)


@njit(cache=True, nogil=True)
def _scale_rows(out, scale):
    scaled = np.empty(out.shape[1], np.float32)
    bits = scaled.view(np.uint32)
    for n in range(out.shape[0]):
        factor = scale[n]
        for k in range(out.shape[1]):
            bits[k] = np.uint32(out[n, k]) << np.uint32(16)
        for k in range(out.shape[1]):
            scaled[k] = scaled[k] * factor
        for k in range(out.shape[1]):
            out[n, k] = _to_even(bits[k]) >> np.uint32(16)


@njit(inline="always")
def _e4m3_bits(byte):
    """The bits of an e4m3 number in bf16."""
    magnitude = np.uint32(byte & np.uint8(127))
    normal = np.uint32((magnitude << np.uint32(4)) + np.uint32(120 << 7))
    steps = np.float32(byte & np.uint8(127))
    subnormal = np.float32(steps * np.float32(2.0**-9)).view(np.uint32) >> np.uint32(16)
    sign = (np.uint32(byte) & np.uint32(128)) << np.uint32(8)
    return np.uint16((normal if magnitude > np.uint32(7) else subnormal) | sign)


@njit(inline="always")
def _in_halves(code):
    """The value of an e2m1 code in halves: 0 1 2 3 4 6 8 12, negative with bit 3."""
    magnitude = np.int32(code & 7)
    value = (magnitude if magnitude < 4 else 2 * magnitude - 4) if magnitude < 6 else 4 * magnitude - 16
    return np.float32(value if code < 8 else -value)


@njit(inline="always")
def _to_even(bits):
    """Bits of an fp32 number, so changed that their upper half is its bf16, rounded to nearest even."""
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(bits + np.uint32(np.uint32(0x7FFF) + is_odd))
