"""8-bit floats (e4m3), one fp32 scale for each group of inputs of an output channel.

DeepSeek-V3's checkpoints have a scale for each block of 128 x 128. Here each channel of a block repeats its scale, so
that channels can be computed separately. The numbers are kept bit by bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.formats.fp8 import DTYPE, LARGEST, Fp8
from rq_ep.formats.kernels.unpack import e4m3_groups_to_bf16
from rq_ep.formats.quantized import Fields, Parts, Quantized


@dataclass(frozen=True)
class Fp8Groups(Quantized):
    """Weights only. The largest weight of a group becomes 448; the last group of a channel may be shorter."""

    group_size: int
    max_error: ClassVar[float] = Fp8.max_error

    @property
    def name(self) -> str:
        return f"fp8_g{self.group_size}"

    def fields(self, num_out: int, num_in: int) -> Fields:
        return {
            "numbers": ((num_out, num_in), DTYPE),
            "scale": ((num_out, -(-num_in // self.group_size)), torch.float32),
        }

    def quantize(self, weight_OI: Tensor) -> Parts:
        num_out, num_in = weight_OI.shape
        grouped_OGI = F.pad(weight_OI, (0, -num_in % self.group_size)).view(num_out, -1, self.group_size)
        scale_OG = (grouped_OGI.abs().amax(2) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        numbers_OGI = (grouped_OGI / scale_OG[..., None]).clamp_(-LARGEST, LARGEST)
        return {"numbers": numbers_OGI.flatten(1)[:, :num_in].to(DTYPE), "scale": scale_OG}

    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype == torch.bfloat16 and num_in % self.group_size == 0:
            return e4m3_groups_to_bf16(
                parts["numbers"].view(len(parts["scale"]), -1, self.group_size), parts["scale"]
            ), None
        scale = parts["scale"].repeat_interleave(self.group_size, 1)[:, :num_in]
        return (parts["numbers"].float() * scale).to(dtype), None
