"""8-bit integers, symmetric, one fp32 scale for each output channel; biases stay fp32."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats.layout import ExpertLayout, Packing, Views

_MAX_LEVEL = 127
# Weights dequantized at a time: on a CPU a block that stays in the cache, on a GPU one that fills the machine.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


class Int8:
    """Round to nearest. The workspace of a product is one block of output channels, never a whole matrix."""

    name: ClassVar[str] = "int8"
    is_native: ClassVar[bool] = False
    max_error: ClassVar[float] = 0.5 / _MAX_LEVEL * (1 + 1e-5)

    def packing(self, layout: ExpertLayout) -> Packing:
        tensors: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, shape in layout.shapes.items():
            if name in layout.matrices:
                tensors.append((name, shape, torch.int8))
                tensors.append((_scale(name), (shape[layout.out_axis(name)],), torch.float32))
            else:
                tensors.append((name, shape, torch.float32))
        return Packing.of(tensors)

    def nbytes(self, layout: ExpertLayout) -> int:
        return self.packing(layout).nbytes

    def pack(self, weights: Mapping[str, Tensor], layout: ExpertLayout) -> Tensor:
        layout.check(weights)
        stored: dict[str, Tensor] = dict(weights)
        for name in layout.matrices:
            weight = weights[name].float()
            in_axis = 1 - layout.out_axis(name)
            scale = weight.abs().amax(in_axis, keepdim=True) / _MAX_LEVEL
            if not scale.isfinite().all():
                raise UserError(f"tensor {name!r} of an expert holds infinite or undefined weights: check the model")
            scale = scale.clamp_(min=torch.finfo(torch.float32).tiny)
            stored[name] = (weight / scale).round_().clamp_(-_MAX_LEVEL, _MAX_LEVEL)
            stored[_scale(name)] = scale.squeeze(in_axis)
        return self.packing(layout).pack(stored)

    def views(self, packed: Tensor, layout: ExpertLayout) -> Views:
        return self.packing(layout).views(packed)

    def dequantize(self, views: Views, name: str, layout: ExpertLayout, dtype: torch.dtype) -> Tensor:
        if name not in layout.matrices:
            return views[name].to(dtype)
        scale = views[_scale(name)]
        return (views[name] * (scale if layout.is_transposed else scale[:, None])).to(dtype)

    def linear(self, x_ND: Tensor, views: Views, name: str, layout: ExpertLayout) -> Tensor:
        levels_OD = views[name].T if layout.is_transposed else views[name]
        scales_O = views[_scale(name)]
        num_out, num_in = levels_OD.shape
        block = max(1, _BLOCK_ELEMENTS[x_ND.device.type] // num_in)
        out_NO = x_ND.new_empty(len(x_ND), num_out)
        for start in range(0, num_out, block):
            part = slice(start, start + block)
            weight = (levels_OD[part] * scales_O[part, None]).to(x_ND.dtype)
            out_NO[:, part] = F.linear(x_ND, weight)
        bias = views.get(f"{name}_bias")
        return out_NO if bias is None else out_NO.add_(bias)


def _scale(name: str) -> str:
    return f"{name}.scale"
