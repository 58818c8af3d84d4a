"""4-bit integers, two in a byte, one bf16 scale for each group of inputs of an output channel."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.formats.kernels.unpack import can_unpack_pairs, int4_to_bf16, nibbles
from rq_ep.formats.quantized import Fields, Parts, Quantized

OFFSET = 8  # a stored nibble is the level plus this; levels are -8 .. 7


@dataclass(frozen=True)
class Int4(Quantized):
    """Rounding to nearest. The weight of largest magnitude in a group becomes level -8; the scale carries its sign.

    So all 16 levels are used, as in llama.cpp's Q4_0, and the error is a ninth less than with levels -7 .. 7. The last
    group of a channel is shorter if the group size does not divide its inputs.
    """

    group_size: int

    @property
    def name(self) -> str:
        return f"int4_g{self.group_size}"

    @property
    def max_error(self) -> float:
        """One step, an eighth of the largest weight, for weights that would be level 8, and the scale's rounding."""
        return 1 / 8 * (1 + 2**-6)

    def fields(self, num_out: int, num_in: int) -> Fields:
        num_groups = -(-num_in // self.group_size)
        return {"codes": ((num_out, -(-num_in // 2)), torch.uint8), "scale": ((num_out, num_groups), torch.bfloat16)}

    def quantize(self, weight_OI: Tensor) -> Parts:
        scale_OG = self.scales(weight_OI)
        levels_OI = to_levels(weight_OI, self.expand_scales(scale_OG, weight_OI.shape[1]))
        return {"codes": pack_levels(levels_OI), "scale": scale_OG}

    def scales(self, weight_OI: Tensor) -> Tensor:
        """Scales by which the largest weight of each group becomes level -8: bf16 [O, G]."""
        num_out, num_in = weight_OI.shape
        grouped_OGI = F.pad(weight_OI, (0, -num_in % self.group_size)).view(num_out, -1, self.group_size)
        extreme = grouped_OGI.gather(2, grouped_OGI.abs().argmax(2, keepdim=True)).squeeze(2)
        return (extreme / -8).to(torch.bfloat16)

    def expand_scales(self, scale_OG: Tensor, num_in: int) -> Tensor:
        """The scale of every weight, fp32 [O, I]."""
        return scale_OG.float().repeat_interleave(self.group_size, 1)[:, :num_in]

    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        codes, scale = parts["codes"], parts["scale"]
        group_size = min(self.group_size, num_in)
        if dtype == torch.bfloat16 and can_unpack_pairs(codes) and num_in % group_size == group_size % 2 == 0:
            return int4_to_bf16(codes.view(*scale.shape, group_size // 2), scale), None
        levels = nibbles(codes)[:, :num_in].to(torch.float32).sub_(OFFSET)
        return levels.mul_(self.expand_scales(scale, num_in)).to(dtype), None


def to_levels(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest level, -8 .. 7, as float; 0 where the scale is 0."""
    return (weight / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-8, 7)


def pack_levels(levels_OI: Tensor) -> Tensor:
    """Pack levels, two in a byte, even inputs in the low half: uint8 [O, I / 2 rounded up]."""
    codes = F.pad(levels_OI + OFFSET, (0, levels_OI.shape[1] % 2), value=OFFSET).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4
