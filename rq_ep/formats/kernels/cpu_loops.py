"""Compiled CPU loops that unpack low-bit numbers to bf16, on arrays of their bits; one thread each, without the GIL.

They are written so that the compiler vectorizes them. Each form was timed; similar ones (an index computed from several
variables, a call for every group) take five to ten times as long.

Axes: o output channels, g groups of inputs, i inputs, or bytes of two inputs.
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
    """Levels [O, I] -> bf16 [O, I]."""
    for o in range(levels.shape[0]):
        for i in range(levels.shape[1]):
            out[o, i] = np.float32(levels[o, i]).view(np.uint32) >> np.uint32(16)


@njit(cache=True, nogil=True)
def e4m3(bytes_: Bytes, out: Halves) -> None:
    """Bytes of e4m3 numbers [O, I] -> bf16 [O, I]."""
    for o in range(bytes_.shape[0]):
        for i in range(bytes_.shape[1]):
            out[o, i] = _e4m3_bits(bytes_[o, i])


@njit(cache=True, nogil=True)
def e4m3_groups(bytes_: Bytes, scale: Floats, out: Halves) -> None:
    """Bytes of e4m3 numbers [O, G, group size] times scales [O, G] -> bf16 [O, G, group size]."""
    weights = np.empty(bytes_.shape[1:], np.float32)
    bits = weights.view(np.uint32)
    for o in range(bytes_.shape[0]):
        for g in range(bytes_.shape[1]):
            for i in range(bytes_.shape[2]):
                bits[g, i] = np.uint32(_e4m3_bits(bytes_[o, g, i])) << np.uint32(16)
        for g in range(bytes_.shape[1]):
            factor = scale[o, g]
            for i in range(bytes_.shape[2]):
                weights[g, i] = weights[g, i] * factor
        for g in range(bytes_.shape[1]):
            for i in range(bytes_.shape[2]):
                out[o, g, i] = _round_to_even(bits[g, i]) >> np.uint32(16)


@njit(cache=True, nogil=True)
def int4(codes: Bytes, scale: Floats, out: Pairs) -> None:
    """Codes, levels plus 8, [O, G, group size / 2] times scales [O, G] -> pairs of bf16, shaped as the codes."""
    low = np.empty(codes.shape[1:], np.float32)
    high = np.empty(codes.shape[1:], np.float32)
    low_bits, high_bits = low.view(np.uint32), high.view(np.uint32)
    for o in range(codes.shape[0]):
        for g in range(codes.shape[1]):
            factor = scale[o, g]
            for i in range(codes.shape[2]):
                low[g, i] = np.float32(np.int32(codes[o, g, i] & 15) - 8) * factor
                high[g, i] = np.float32(np.int32(codes[o, g, i] >> 4) - 8) * factor
        for g in range(codes.shape[1]):
            for i in range(codes.shape[2]):
                low_half = _round_to_even(low_bits[g, i]) >> np.uint32(16)
                out[o, g, i] = low_half | (_round_to_even(high_bits[g, i]) & np.uint32(0xFFFF0000))


@njit(cache=True, nogil=True)
def mxfp4(blocks: Bytes, half_scale: Floats, out: Pairs) -> None:
    """Codes [O, G, 16] times half of each group's scale, [O, G] -> pairs of bf16, shaped as the codes."""
    low = np.empty(blocks.shape[1:], np.float32)
    high = np.empty(blocks.shape[1:], np.float32)
    low_bits, high_bits = low.view(np.uint32), high.view(np.uint32)
    for o in range(blocks.shape[0]):
        for g in range(blocks.shape[1]):
            factor = half_scale[o, g]
            for i in range(blocks.shape[2]):
                low[g, i] = _doubled_e2m1(blocks[o, g, i] & 15) * factor
                high[g, i] = _doubled_e2m1(blocks[o, g, i] >> 4) * factor
        for g in range(blocks.shape[1]):
            for i in range(blocks.shape[2]):
                out[o, g, i] = (low_bits[g, i] >> np.uint32(16)) | (high_bits[g, i] & np.uint32(0xFFFF0000))


@njit(cache=True, nogil=True)
def scale_columns(out: Halves, scale: Floats) -> None:
    """bf16 [N, O] times factors of the channels, [O], in place."""
    scaled = np.empty(out.shape[1], np.float32)
    bits = scaled.view(np.uint32)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            bits[column] = np.uint32(out[row, column]) << np.uint32(16)
        for column in range(out.shape[1]):
            scaled[column] = scaled[column] * scale[column]
        for column in range(out.shape[1]):
            out[row, column] = _round_to_even(bits[column]) >> np.uint32(16)


@njit(cache=True, nogil=True)
def scale_rows(out: Halves, scale: Floats) -> None:
    """bf16 [O, N] times factors of the channels, [O], in place."""
    scaled = np.empty(out.shape[1], np.float32)
    bits = scaled.view(np.uint32)
    for row in range(out.shape[0]):
        factor = scale[row]
        for column in range(out.shape[1]):
            bits[column] = np.uint32(out[row, column]) << np.uint32(16)
        for column in range(out.shape[1]):
            scaled[column] = scaled[column] * factor
        for column in range(out.shape[1]):
            out[row, column] = _round_to_even(bits[column]) >> np.uint32(16)


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
def _doubled_e2m1(code: np.uint8) -> np.float32:
    """Twice the value of an e2m1 code: 0 1 2 3 4 6 8 12, negative with bit 3."""
    magnitude = np.int32(code & 7)
    value = (magnitude if magnitude < 4 else 2 * magnitude - 4) if magnitude < 6 else 4 * magnitude - 16
    return np.float32(value if code < 8 else -value)


@njit(inline="always")
def _round_to_even(bits: np.uint32) -> np.uint32:
    """Add to the bits of an fp32 number so that their upper half is its bf16, rounded to nearest even."""
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(bits + np.uint32(np.uint32(0x7FFF) + is_odd))
