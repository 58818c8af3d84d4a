"""4-bit floats (e2m1), two in a byte, with a power of two for every 32: the OCP Microscaling format MXFP4, v1.0.

Blocks and scales are laid out as gpt-oss checkpoints store them, so that these are kept bit by bit.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats.kernels.unpack import can_unpack_pairs, mxfp4_to_bf16, nibbles, power_of_two
from rq_ep.formats.quantized import Fields, Parts, Quantized

GROUP_SIZE = 32
EXPONENT_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # bit 3 of a code is the sign
_UNDEFINED = 255  # a stored scale that is no number
_MIN_EXPONENT = -125  # of a stored scale: the smallest magnitude stays a normal number in bf16


class Mxfp4(Quantized):
    """Rounding to nearest, with the better of the two exponents that bring a group's largest weight to 2 .. 8."""

    name: ClassVar[str] = "mxfp4"
    max_error: ClassVar[float] = 0.25  # what would be 8 is stored as 6

    def fields(self, num_out: int, num_in: int) -> Fields:
        num_groups = -(-num_in // GROUP_SIZE)
        return {
            "blocks": ((num_out, num_groups, GROUP_SIZE // 2), torch.uint8),
            "scales": ((num_out, num_groups), torch.uint8),
        }

    def quantize(self, weight_OI: Tensor) -> Parts:
        grouped_OGI = F.pad(weight_OI, (0, -weight_OI.shape[1] % GROUP_SIZE)).view(len(weight_OI), -1, GROUP_SIZE)
        exponent_OG = torch.frexp(grouped_OGI.abs().amax(2)).exponent - 3  # the largest weight is 4 .. 8 times 2 to it
        exponent_OG.clamp_(min=_MIN_EXPONENT)
        candidates = [_round(grouped_OGI, exponent_OG + increment) for increment in (0, 1)]
        # In fp64 a sum does not depend on its order, which differs by device.
        errors = [(_value(codes, exponent) - grouped_OGI).double().square().sum(2) for codes, exponent in candidates]
        is_better = errors[1] < errors[0]
        codes = torch.where(is_better[..., None], candidates[1][0], candidates[0][0])
        exponent_OG = exponent_OG + is_better
        return {
            "blocks": codes[..., 0::2] | codes[..., 1::2] << 4,
            "scales": (exponent_OG + EXPONENT_BIAS).to(torch.uint8),
        }

    def check_parts(self, name: str, parts: Parts) -> None:
        if (parts["scales"] == _UNDEFINED).any():
            raise UserError(f"tensor {name!r} of an expert holds an undefined scale: check the model")

    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        blocks, scales = parts["blocks"], parts["scales"]
        if dtype == torch.bfloat16 and can_unpack_pairs(blocks):
            return mxfp4_to_bf16(blocks, scales)[:, :num_in], None
        value = _value(nibbles(blocks), scales.int() - EXPONENT_BIAS)
        return value.flatten(1)[:, :num_in].to(dtype), None


def _round(grouped_OGI: Tensor, exponent_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8) of weights by one exponent for each group, ties to the even code; and the exponents."""
    magnitudes = grouped_OGI.new_tensor(MAGNITUDES)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    scaled = grouped_OGI * power_of_two(-exponent_OG)[..., None]
    down, up = (torch.bucketize(scaled.abs(), middles, right=right) for right in (False, True))
    magnitude = torch.where(down % 2 == 0, down, up)
    return (magnitude | (scaled < 0) << 3).to(torch.uint8), exponent_OG


def _value(codes: Tensor, exponent_OG: Tensor) -> Tensor:
    values = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], device=codes.device)
    return values[codes.int()] * power_of_two(exponent_OG)[..., None]
