"""Native formats, weights as they are: fp32, bf16 and fp16."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.formats.kernels.blocked_product import blocked_product, is_widened
from rq_ep.formats.layout import ExpertLayout, Packing, Views


@dataclass(frozen=True)
class Native:
    """One floating dtype, stored without change."""

    name: str
    dtype: torch.dtype
    is_native: ClassVar[bool] = True

    @property
    def max_error(self) -> float:
        """Half a unit in the last place, relative: what rounding fp32 weights to this dtype costs at most."""
        return torch.finfo(self.dtype).eps / 2

    def packing(self, layout: ExpertLayout) -> Packing:
        return Packing.of((name, shape, self.dtype) for name, shape in layout.shapes.items())

    def nbytes(self, layout: ExpertLayout) -> int:
        return self.packing(layout).nbytes

    def pack(self, weights: Mapping[str, Tensor], layout: ExpertLayout) -> Tensor:
        layout.check(weights)
        return self.packing(layout).pack(weights)

    def views(self, packed: Tensor, layout: ExpertLayout) -> Views:
        return self.packing(layout).views(packed)

    def dequantize(self, views: Views, name: str, layout: ExpertLayout, dtype: torch.dtype) -> Tensor:
        return views[name].to(dtype)

    def linear(self, x_NI: Tensor, views: Views, name: str, layout: ExpertLayout) -> Tensor:
        weight_OI = views[name].T if layout.is_transposed else views[name]
        bias = views.get(f"{name}_bias")
        if weight_OI.dtype == x_NI.dtype and not is_widened(x_NI):
            return F.linear(x_NI, weight_OI, bias)
        out_NO = blocked_product(x_NI, len(weight_OI), lambda start, end: (weight_OI[start:end].to(x_NI.dtype), None))
        return out_NO if bias is None else out_NO.add_(bias)
