"""Weight formats, one file each; a new one takes a file and a line in `FORMATS`.

Axes in this package: O output channels, I input channels, G groups of input channels that share a scale, B bytes of
codes, N rows.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from rq_ep.core.errors import UserError, check_choice
from rq_ep.formats.expert_buffers import ExpertBuffers
from rq_ep.formats.fp8 import Fp8
from rq_ep.formats.fp8_groups import Fp8Groups
from rq_ep.formats.int4 import Int4
from rq_ep.formats.int8 import Int8
from rq_ep.formats.layout import ExpertLayout, Packing, Views, checksum, is_intact, spoil
from rq_ep.formats.mxfp4 import Mxfp4
from rq_ep.formats.native import Native


class WeightFormat(Protocol):
    """Storage of one expert in a byte buffer with a checksum, tensors, scales and biases, and its computation.

    `max_error` bounds the round trip: |weight - dequantized| <= max_error * (largest |weight| of its output channel).
    """

    @property
    def name(self) -> str: ...
    @property
    def is_native(self) -> bool: ...  # keeps weights as they are
    @property
    def max_error(self) -> float: ...

    def packing(self, layout: ExpertLayout) -> Packing:
        """Offsets, shapes and dtypes of the stored tensors."""
        ...

    def nbytes(self, layout: ExpertLayout) -> int:
        """Bytes of one packed expert, with its scales, biases, alignment and checksum."""
        ...

    def pack(self, weights: Mapping[str, Tensor], layout: ExpertLayout) -> Tensor:
        """Pack one expert: uint8 [nbytes] on the weights' device; the same weights give the same bytes.

        Raises:
            UserError: names or shapes differ from the layout, or the weights cannot be stored.
        """
        ...

    def views(self, packed: Tensor, layout: ExpertLayout) -> Views:
        """Views into a packed expert, uint8 [nbytes], or into a stack of them, uint8 [n, nbytes]."""
        ...

    def dequantize(self, views: Views, name: str, layout: ExpertLayout, dtype: torch.dtype) -> Tensor:
        """One tensor of one expert in `dtype`, shaped as in the layout."""
        ...

    def linear(self, x_NI: Tensor, views: Views, name: str, layout: ExpertLayout) -> Tensor:
        """Rows [N, I] times matrix `name` of one expert, plus its bias: [N, O] in the rows' dtype."""
        ...


FORMATS: dict[str, WeightFormat] = {
    "fp32": Native("fp32", torch.float32),
    "bf16": Native("bf16", torch.bfloat16),
    "fp16": Native("fp16", torch.float16),
    "int8": Int8(),
    "fp8": Fp8(),
    "fp8_g64": Fp8Groups(64),
    "fp8_g128": Fp8Groups(128),
    "int4_g32": Int4(32),
    "int4_g64": Int4(64),
    "int4_g128": Int4(128),
    "mxfp4": Mxfp4(),
}

_NATIVE_NAMES = {format_.dtype: name for name, format_ in FORMATS.items() if isinstance(format_, Native)}


def get_format(name: str) -> WeightFormat:
    """The format of that name; a `UserError` suggests the nearest one if there is none."""
    return FORMATS[check_choice("format", name, FORMATS)]


def native_format_name(dtype: torch.dtype) -> str:
    """The name of the format that keeps weights of `dtype` as they are."""
    if dtype not in _NATIVE_NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _NATIVE_NAMES)
        raise UserError(f"--dtype {str(dtype).removeprefix('torch.')}: experts compute in {known}")
    return _NATIVE_NAMES[dtype]


__all__ = [
    "FORMATS", "ExpertBuffers", "ExpertLayout", "Packing", "Views", "WeightFormat", "checksum", "get_format",
    "is_intact", "native_format_name", "spoil",
]  # fmt: skip
