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
    """Round to nearest. The weight of largest magnitude in a group becomes -8, whatever its sign: the scale takes it.

    So all 16 levels are used, as in llama.cpp's Q4_0, and the error falls by a ninth against levels -7 .. 7. The last
    group of a channel is shorter where the group size does not divide its inputs.
    """

    group: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int4_g{self.group}"

    @property
    def max_error(self) -> float:  # type: ignore[override]
        """One step, an eighth of the largest weight, for what would be level 8; and the scale's rounding to bf16."""
        return 1 / 8 * (1 + 2**-6)

    def fields(self, num_out: int, num_in: int) -> Fields:
        num_groups = -(-num_in // self.group)
        return {"codes": ((num_out, -(-num_in // 2)), torch.uint8), "scale": ((num_out, num_groups), torch.bfloat16)}

    def quantize(self, weight_OI: Tensor) -> Parts:
        scale_OG = self.scales(weight_OI)
        levels_OI = to_levels(weight_OI, self.spread(scale_OG, weight_OI.shape[1]))
        return {"codes": pack_levels(levels_OI), "scale": scale_OG}

    def scales(self, weight_OI: Tensor) -> Tensor:
        """bf16 [out, groups]: what makes the largest weight of a group level -8."""
        num_out, num_in = weight_OI.shape
        grouped_OGI = F.pad(weight_OI, (0, -num_in % self.group)).view(num_out, -1, self.group)
        extreme = grouped_OGI.gather(2, grouped_OGI.abs().argmax(2, keepdim=True)).squeeze(2)
        return (extreme / -8).to(torch.bfloat16)

    def spread(self, scale_OG: Tensor, num_in: int) -> Tensor:
        """The scale of every weight, fp32 [out, in]."""
        return scale_OG.float().repeat_interleave(self.group, 1)[:, :num_in]

    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        codes, scale = parts["codes"], parts["scale"]
        group = min(self.group, num_in)
        if dtype == torch.bfloat16 and can_unpack_pairs(codes) and num_in % group == group % 2 == 0:
            return int4_to_bf16(codes.view(*scale.shape, group // 2), scale), None
        levels = nibbles(codes)[:, :num_in].to(torch.float32).sub_(OFFSET)
        return levels.mul_(self.spread(scale, num_in)).to(dtype), None


def to_levels(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest level, -8 .. 7, as float; 0 where the scale is 0."""
    return (weight / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-8, 7)


def pack_levels(levels_OI: Tensor) -> Tensor:
    """uint8 [out, in / 2 rounded up]: even inputs in the low half of a byte, odd ones in the high half."""
    codes = F.pad(levels_OI + OFFSET, (0, levels_OI.shape[1] % 2), value=OFFSET).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4
