"""Unpacking low-bit numbers to bf16: on a CPU in compiled loops, on a GPU in Triton kernels.

Tensor operations need several passes for the same. All of them round to nearest even and give the same bits.
Axes: O output channels, I inputs, G groups of inputs, B bytes of a group.
"""

from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rq_ep.formats.kernels import cpu_loops as loops

_MAX_THREADS = 2  # with more, tensor operations are faster than the loop for int8, which takes one


def nibbles(codes: Tensor) -> Tensor:
    """The two 4-bit codes of each byte, low half first: uint8 [..., n] -> [..., 2n]."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def int8_to_bf16(levels: Tensor) -> Tensor:
    """int8 [O, I] -> bf16, exact."""
    if levels.device.type != "cpu" or torch.get_num_threads() > _MAX_THREADS:
        return levels.to(torch.bfloat16)
    out = torch.empty(levels.shape, dtype=torch.bfloat16)
    loops.int8(levels.numpy(), _bits(out, np.uint16))
    return out


def e4m3_to_bf16(numbers: Tensor) -> Tensor:
    """float8_e4m3fn [O, I] -> bf16, exact."""
    if numbers.device.type != "cpu":
        return numbers.to(torch.bfloat16)
    out = torch.empty(numbers.shape, dtype=torch.bfloat16)
    loops.e4m3(numbers.view(torch.uint8).numpy(), _bits(out, np.uint16))
    return out


@cache
def has_triton() -> bool:
    """Whether Triton, which compiles the GPU kernels, is installed."""
    return find_spec("triton") is not None


def can_unpack_pairs(codes: Tensor) -> bool:
    """Whether `int4_to_bf16` and `mxfp4_to_bf16` run on the device of `codes`."""
    return codes.device.type == "cpu" or has_triton()


def e4m3_groups_to_bf16(numbers_OGI: Tensor, scale_OG: Tensor) -> Tensor:
    """float8_e4m3fn [O, G, group size] and fp32 scales [O, G] -> bf16 [O, I]."""
    if numbers_OGI.device.type != "cpu":
        return numbers_OGI.to(torch.bfloat16).mul_(scale_OG[..., None]).flatten(1)
    out = torch.empty(numbers_OGI.shape, dtype=torch.bfloat16)
    loops.e4m3_groups(numbers_OGI.view(torch.uint8).numpy(), scale_OG.numpy(), _bits(out, np.uint16))
    return out.flatten(1)


def int4_to_bf16(codes_OGB: Tensor, scale_OG: Tensor) -> Tensor:
    """Codes, levels plus 8, uint8 [O, G, B], and bf16 scales [O, G] -> bf16 [O, I]."""
    if codes_OGB.device.type != "cpu":
        return _pairs_on_gpu("int4", codes_OGB, scale_OG)
    out = torch.empty(len(codes_OGB), codes_OGB[0].numel() * 2, dtype=torch.bfloat16)
    loops.int4(codes_OGB.numpy(), scale_OG.float().numpy(), _bits(out, np.uint32).reshape(codes_OGB.shape))
    return out


def mxfp4_to_bf16(blocks_OGB: Tensor, scales_OG: Tensor) -> Tensor:
    """Codes, uint8 [O, G, B], and exponents plus 127, uint8 [O, G] -> bf16 [O, I], exact."""
    if blocks_OGB.device.type != "cpu":
        return _pairs_on_gpu("mxfp4", blocks_OGB, scales_OG)
    out = torch.empty(len(blocks_OGB), blocks_OGB[0].numel() * 2, dtype=torch.bfloat16)
    half_scale_OG = power_of_two(scales_OG.int() - 128)
    loops.mxfp4(blocks_OGB.numpy(), half_scale_OG.numpy(), _bits(out, np.uint32).reshape(blocks_OGB.shape))
    return out


def scale_channels(out_NO: Tensor, scale_O: Tensor) -> Tensor:
    """Multiply products [N, O], contiguous or transposed, by factors of their channels, [O], in place."""
    if out_NO.device.type != "cpu" or out_NO.dtype != torch.bfloat16:
        return out_NO.mul_(scale_O)
    if out_NO.is_contiguous():
        loops.scale_columns(_bits(out_NO, np.uint16), scale_O.numpy())
    else:  # the transpose is contiguous
        loops.scale_rows(_bits(out_NO.T, np.uint16), scale_O.numpy())
    return out_NO


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of integers, fp32, exact; 0 below 2^-126."""
    return (exponent + 127).clamp_(min=0).bitwise_left_shift_(23).to(torch.int32).view(torch.float32)


def _pairs_on_gpu(kind: str, codes_OGB: Tensor, scale_OG: Tensor) -> Tensor:
    from rq_ep.formats.kernels.triton_codes import pairs_to_bf16

    return pairs_to_bf16(kind, codes_OGB, scale_OG)


def _bits(out: Tensor, dtype: type[np.uint16] | type[np.uint32]) -> npt.NDArray[np.unsignedinteger]:
    return out.view(torch.int16).numpy().view(dtype)
