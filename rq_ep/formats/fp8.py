"""8-bit floats of 4 exponent and 3 mantissa bits (e4m3, without infinities), one fp32 scale for each output channel."""

from typing import ClassVar

import torch
from torch import Tensor

from rq_ep.formats.kernels.unpack import e4m3_to_bf16
from rq_ep.formats.quantized import Fields, Parts, Quantized

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
_LARGEST_STEP = 32.0  # between numbers of the topmost binade


class Fp8(Quantized):
    """Weights only: rows stay in the dtype they come in. The largest weight of a channel becomes 448."""

    name: ClassVar[str] = "fp8"
    max_error: ClassVar[float] = 0.5 * _LARGEST_STEP / LARGEST * (1 + 1e-5)

    def fields(self, num_out: int, num_in: int) -> Fields:
        return {"numbers": ((num_out, num_in), DTYPE), "scale": ((num_out,), torch.float32)}

    def quantize(self, weight_OI: Tensor) -> Parts:
        scale_O = (weight_OI.abs().amax(1) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        numbers = (weight_OI / scale_O[:, None]).clamp_(-LARGEST, LARGEST)
        return {"numbers": numbers.to(DTYPE), "scale": scale_O}

    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype != torch.bfloat16:  # fp16 would overflow in a sum of numbers up to 448
            return (parts["numbers"].float() * parts["scale"][:, None]).to(dtype), None
        return e4m3_to_bf16(parts["numbers"]), parts["scale"]  # exact
