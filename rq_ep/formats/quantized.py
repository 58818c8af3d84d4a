"""Base class of the low-bit formats: matrices are stored as [O, I] and multiplied block by block; biases are fp32."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats.kernels.blocked_product import blocked_product
from rq_ep.formats.layout import ExpertLayout, Packing, Views

Parts = Mapping[str, Tensor]  # the stored tensors of one matrix; the first axis of each is its output channels
Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # their shapes and dtypes


class Quantized(ABC):
    """A format whose matrices are levels times scales. A product needs workspace for one block of output channels."""

    is_native: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def max_error(self) -> float: ...

    @abstractmethod
    def fields(self, num_out: int, num_in: int) -> Fields:
        """Shapes and dtypes of the parts of a matrix [O, I]."""

    @abstractmethod
    def quantize(self, weight_OI: Tensor) -> Parts:
        """The parts of a finite fp32 matrix [O, I]."""

    def check_parts(self, name: str, parts: Parts) -> None:
        """Raise a `UserError` unless all numbers stored of matrix `name` are finite."""
        for tensor in parts.values():
            if tensor.is_floating_point():
                check_finite(name, tensor.float())

    @abstractmethod
    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Dequantize some output channels: weights [O, I] in `dtype`, and factors [O] still to be applied, or None."""

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
        """Pack an expert whose matrices are quantized already: uint8 [nbytes].

        Args:
            matrices: the parts of every matrix, by its name.
            biases: at least the biases, by their names.
            layout: tensors of one expert.

        Raises:
            UserError: a part is missing or has another shape or dtype, or a bias is not finite.
        """
        stored: dict[str, Tensor] = {}
        for name in layout.matrices:
            actual = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in matrices[name].items()}
            expected = dict(self.fields(*layout.matrix_shape(name)))
            if actual != expected:
                raise UserError(f"tensor {name!r} of an expert in {self.name} is stored as {expected}, not {actual}")
            self.check_parts(name, matrices[name])
            stored |= {f"{name}.{part}": tensor for part, tensor in matrices[name].items()}
        for name in layout.shapes.keys() - set(layout.matrices):
            check_finite(name, biases[name])
            stored[name] = biases[name]
        return self.packing(layout).pack(stored)

    def views(self, packed: Tensor, layout: ExpertLayout) -> Views:
        return self.packing(layout).views(packed)

    def parts(self, views: Views, name: str, layout: ExpertLayout) -> Parts:
        """The parts of matrix `name`."""
        return {part: views[f"{name}.{part}"] for part in self.fields(*layout.matrix_shape(name))}

    def dequantize(self, views: Views, name: str, layout: ExpertLayout, dtype: torch.dtype) -> Tensor:
        if name not in layout.matrices:
            return views[name].to(dtype)
        weight, scale = self.expand(self.parts(views, name, layout), layout.matrix_shape(name)[1], torch.float32)
        weight = (weight if scale is None else weight * scale[:, None]).to(dtype)
        return weight.T.contiguous() if layout.is_transposed else weight

    def linear(self, x_NI: Tensor, views: Views, name: str, layout: ExpertLayout) -> Tensor:
        out_NO = self.product(x_NI, self.parts(views, name, layout))
        bias = views.get(f"{name}_bias")
        return out_NO if bias is None else out_NO.add_(bias)

    def product(self, x_NI: Tensor, parts: Parts) -> Tensor:
        """Rows [N, I] times one matrix: [N, O] in the rows' dtype."""

        def unpack(start: int, end: int) -> tuple[Tensor, Tensor | None]:
            return self.expand({name: part[start:end] for name, part in parts.items()}, x_NI.shape[1], x_NI.dtype)

        return blocked_product(x_NI, len(next(iter(parts.values()))), unpack)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise a `UserError` unless every element of tensor `name` is a finite number."""
    lowest, highest = weight.aminmax()  # much faster than `isfinite`; what is not finite shows in one of the two
    if not (lowest.isfinite() & highest.isfinite()):
        raise UserError(f"tensor {name!r} of an expert holds infinite or undefined weights: check the model")
