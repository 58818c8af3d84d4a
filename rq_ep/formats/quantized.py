"""What the low-bit formats share: matrices are stored as [out, in], computed with in blocks; biases stay fp32."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats.kernels.unpack import scale_channels
from rq_ep.formats.layout import ExpertLayout, Packing, Views

Parts = Mapping[str, Tensor]  # what is stored of one matrix; the first axis of each numbers its output channels
Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # their shapes and dtypes

# Weights that are unpacked at a time: on a CPU a block that stays in the cache, on a GPU one that fills the machine.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
_ROWS_ON_THE_RIGHT = range(12, 128)  # in bf16 on a CPU, so few rows are multiplied faster from this side


class Quantized(ABC):
    """A matrix is levels times scales. The workspace of a product is one block of output channels."""

    name: str
    max_error: float
    is_native: ClassVar[bool] = False

    @abstractmethod
    def fields(self, num_out: int, num_in: int) -> Fields:
        """What is stored of a matrix [out, in]."""

    @abstractmethod
    def quantize(self, weight_OI: Tensor) -> Parts:
        """The parts of a finite fp32 matrix [out, in]."""

    def check_parts(self, name: str, parts: Parts) -> None:
        """Raise a `UserError` unless all numbers stored of matrix `name` are finite."""
        for tensor in parts.values():
            if tensor.is_floating_point():
                check_finite(name, tensor.float())

    @abstractmethod
    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Some output channels as (weights [out, in] in `dtype`, factors [out] that these still lack, or None)."""

    def packing(self, layout: ExpertLayout) -> Packing:
        tensors: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, shape in layout.shapes.items():
            if name in layout.matrices:
                fields = self.fields(*layout.matrix_shape(name))
                tensors.extend((f"{name}.{part}", *field) for part, field in fields.items())
            else:
                tensors.append((name, shape, torch.float32))
        return Packing.of(tensors)

    def nbytes(self, layout: ExpertLayout) -> int:
        return self.packing(layout).nbytes

    def pack(self, weights: Mapping[str, Tensor], layout: ExpertLayout) -> Tensor:
        layout.check(weights)
        matrices = {}
        for name in layout.matrices:
            weight = weights[name].T if layout.is_transposed else weights[name]
            check_finite(name, weight)
            matrices[name] = self.quantize(weight.float().contiguous())
        return self.pack_parts(matrices, weights, layout)

    def pack_parts(self, matrices: Mapping[str, Parts], biases: Mapping[str, Tensor], layout: ExpertLayout) -> Tensor:
        """Store an expert whose matrices are quantized already: uint8 [nbytes].

        Args:
            matrices: the parts of every matrix, by its name.
            biases: at least the biases, by their names.
            layout: tensors of one expert.

        Raises:
            UserError: a part is missing or has another shape or dtype, or a bias is not finite.
        """
        stored: dict[str, Tensor] = {}
        for name in layout.matrices:
            found = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in matrices[name].items()}
            wanted = dict(self.fields(*layout.matrix_shape(name)))
            if found != wanted:
                raise UserError(f"tensor {name!r} of an expert in {self.name} is stored as {wanted}, not {found}")
            self.check_parts(name, matrices[name])
            stored |= {f"{name}.{part}": tensor for part, tensor in matrices[name].items()}
        for name in layout.shapes.keys() - set(layout.matrices):
            check_finite(name, biases[name])
            stored[name] = biases[name]
        return self.packing(layout).pack(stored)

    def views(self, packed: Tensor, layout: ExpertLayout) -> Views:
        return self.packing(layout).views(packed)

    def parts(self, views: Views, name: str, layout: ExpertLayout) -> Parts:
        """What is stored of matrix `name`."""
        return {part: views[f"{name}.{part}"] for part in self.fields(*layout.matrix_shape(name))}

    def dequantize(self, views: Views, name: str, layout: ExpertLayout, dtype: torch.dtype) -> Tensor:
        if name not in layout.matrices:
            return views[name].to(dtype)
        weight, scale = self.expand(self.parts(views, name, layout), layout.matrix_shape(name)[1], torch.float32)
        weight = (weight if scale is None else weight * scale[:, None]).to(dtype)
        return weight.T.contiguous() if layout.is_transposed else weight

    def linear(self, x_ND: Tensor, views: Views, name: str, layout: ExpertLayout) -> Tensor:
        out_NO = self.product(x_ND, self.parts(views, name, layout))
        bias = views.get(f"{name}_bias")
        return out_NO if bias is None else out_NO.add_(bias)

    def product(self, x_ND: Tensor, parts: Parts) -> Tensor:
        """Rows [N, in] times one matrix: [N, out] in the rows' dtype."""
        num_out = len(next(iter(parts.values())))
        out_NO = x_ND.new_empty(len(x_ND), num_out)
        if not len(x_ND):
            return out_NO
        for start, end in _blocks(num_out, _BLOCK_ELEMENTS[x_ND.device.type] // x_ND.shape[1]):
            part = {name: tensor[start:end] for name, tensor in parts.items()}
            weight, scale = self.expand(part, x_ND.shape[1], x_ND.dtype)
            block_NO = _matmul(x_ND, weight)
            out_NO[:, start:end] = block_NO if scale is None else scale_channels(block_NO, scale)
        return out_NO


def check_finite(name: str, weight: Tensor) -> None:
    """Raise a `UserError` unless every element of tensor `name` is a finite number."""
    if not weight.isfinite().all():
        raise UserError(f"tensor {name!r} of an expert holds infinite or undefined weights: check the model")


def _blocks(size: int, limit: int) -> list[tuple[int, int]]:
    """Spans of about equal size, none above `limit` (but at least 1)."""
    step = -(-size // -(-size // max(1, limit)))
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _matmul(x_ND: Tensor, weight_OD: Tensor) -> Tensor:
    if x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16 and len(x_ND) in _ROWS_ON_THE_RIGHT:
        return (weight_OD @ x_ND.T).T
    return F.linear(x_ND, weight_OD)
