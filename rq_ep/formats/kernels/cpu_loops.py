"""Compiled loops of the CPU over low-bit numbers, on arrays of their bits; one thread each, without Python's lock.

They are written so that the compiler turns them into vector instructions: each form was timed, and close relatives (an
index computed from several variables, a call for every group) take five to ten times as long.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]  # bits of bf16
Pairs = npt.NDArray[np.uint32]  # bits of two of them, the first in the low half


@njit(cache=True, nogil=True)
def int8(levels: npt.NDArray[np.int8], out: Halves) -> None:
    """[out, in] -> [out, in]."""
    for n in range(levels.shape[0]):
        for k in range(levels.shape[1]):
            out[n, k] = np.float32(levels[n, k]).view(np.uint32) >> np.uint32(16)


@njit(cache=True, nogil=True)
def e4m3(bytes_: Bytes, out: Halves) -> None:
    """[out, in] -> [out, in]."""
    for n in range(bytes_.shape[0]):
        for k in range(bytes_.shape[1]):
            out[n, k] = _e4m3_bits(bytes_[n, k])


@njit(cache=True, nogil=True)
def e4m3_groups(bytes_: Bytes, scale: Floats, out: Halves) -> None:
    """[out, groups, group] times [out, groups] -> [out, groups, group]."""
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
def int4(codes: Bytes, scale: Floats, out: Pairs) -> None:
    """Levels plus 8, [out, groups, group / 2], times [out, groups] -> pairs shaped as the codes."""
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
def mxfp4(blocks: Bytes, half: Floats, out: Pairs) -> None:
    """Codes, [out, groups, 16], times what the number 0.5 stands for, [out, groups] -> pairs shaped as the codes."""
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
def scale_columns(out: Halves, scale: Floats) -> None:
    """[n, channels] times [channels], in place."""
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
def scale_rows(out: Halves, scale: Floats) -> None:
    """[channels, n] times [channels], in place."""
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
def _e4m3_bits(byte: np.uint8) -> np.uint16:
    """The bits of an e4m3 number in bf16."""
    magnitude = np.uint32(byte & np.uint8(127))
    normal = np.uint32((magnitude << np.uint32(4)) + np.uint32(120 << 7))
    steps = np.float32(byte & np.uint8(127))
    subnormal = np.float32(steps * np.float32(2.0**-9)).view(np.uint32) >> np.uint32(16)
    sign = (np.uint32(byte) & np.uint32(128)) << np.uint32(8)
    return np.uint16((normal if magnitude > np.uint32(7) else subnormal) | sign)


@njit(inline="always")
def _in_halves(code: np.uint8) -> np.float32:
    """The value of an e2m1 code in halves: 0 1 2 3 4 6 8 12, negative with bit 3."""
    magnitude = np.int32(code & 7)
    value = (magnitude if magnitude < 4 else 2 * magnitude - 4) if magnitude < 6 else 4 * magnitude - 16
    return np.float32(value if code < 8 else -value)


@njit(inline="always")
def _to_even(bits: np.uint32) -> np.uint32:
    """Bits of an fp32 number, so changed that their upper half is its bf16, rounded to nearest even."""
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(bits + np.uint32(np.uint32(0x7FFF) + is_odd))
