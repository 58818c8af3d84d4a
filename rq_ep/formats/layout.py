"""Layout of one expert in a byte buffer: every tensor on a 16-byte boundary, a checksum at the end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rq_ep.core.errors import UserError

ALIGNMENT = 16  # bytes; grouped kernels want strides in multiples of it
_CHECKSUM_BYTES = 16
_CHECKSUM_BLOCK = 512  # words

Views = Mapping[str, Tensor]  # tensors of one packed expert, or of a stack of them, without a copy


@dataclass(frozen=True)
class ExpertLayout:
    """Names and shapes of the tensors of one expert, as transformers keeps them in memory.

    Two-dimensional tensors are matrices, one-dimensional ones biases, named `<matrix>_bias`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    is_transposed: bool = False  # matrices are stored [in, out] instead of [out, in]

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(name for name, shape in self.shapes.items() if len(shape) == 2)

    def out_axis(self, name: str) -> int:
        """The axis of matrix `name` that numbers its output channels."""
        assert len(self.shapes[name]) == 2, name
        return 1 if self.is_transposed else 0

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Output and input channels of matrix `name`."""
        out_axis = self.out_axis(name)
        return self.shapes[name][out_axis], self.shapes[name][1 - out_axis]

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise a `UserError` unless `weights` holds exactly the tensors of this layout."""
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if shapes != dict(self.shapes):
            raise UserError(f"an expert of this model has tensors {dict(self.shapes)}, not {shapes}")


@dataclass(frozen=True)
class Field:
    """One tensor inside a packed expert."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Packing:
    """The fields of a packed expert, and its size in bytes."""

    fields: Mapping[str, Field]
    nbytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> "Packing":
        """Lay out tensors, given as (name, shape, dtype), in the order of their names."""
        fields: dict[str, Field] = {}
        offset = 0
        for name, shape, dtype in sorted(tensors, key=lambda tensor: tensor[0]):
            fields[name] = Field(offset, shape, dtype)
            offset = -(-fields[name].end // ALIGNMENT) * ALIGNMENT
        return cls(fields, offset + _CHECKSUM_BYTES)

    def views(self, packed: Tensor) -> Views:
        """Views into a packed expert, uint8 [nbytes], or into a stack of them, uint8 [n, nbytes]."""
        assert (packed.dtype, packed.shape[-1]) == (torch.uint8, self.nbytes), (packed.dtype, packed.shape)
        stack = packed.shape[:-1]
        return {
            name: packed[..., field.offset : field.end].view(field.dtype).view(*stack, *field.shape)
            for name, field in self.fields.items()
        }

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy `tensors`, cast to their fields' dtypes, into a new buffer on their device, and add its checksum."""
        device = next(iter(tensors.values())).device
        packed = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        for name, view in self.views(packed).items():
            view.copy_(tensors[name])
        _stored_checksum(packed).copy_(checksum(packed))
        return packed


def spoil(packed: Tensor) -> None:
    """Let a buffer, uint8 [nbytes], not match its checksum until a whole expert is there: it may hold an older one."""
    _stored_checksum(packed).fill_(1)


def checksum(packed: Tensor) -> Tensor:
    """Checksum of a packed expert's tensors: int64 scalar on the expert's device.

    Blocks of 4 KiB are summed as 64-bit words and weighted by their position, so that bytes which changed, went missing
    or came from another expert or position are detected. It runs at memory speed on every device; all wrap integers
    alike.
    """
    words = packed[:-_CHECKSUM_BYTES].view(torch.int64)
    num_whole = len(words) // _CHECKSUM_BLOCK * _CHECKSUM_BLOCK
    blocks = words[:num_whole].view(-1, _CHECKSUM_BLOCK).sum(1)
    weights = torch.arange(len(blocks), device=packed.device).mul_(2).add_(1)
    return (blocks * weights).sum() - words[num_whole:].sum()


def is_intact(packed: Tensor) -> Tensor:
    """Whether a packed expert still matches its stored checksum: bool scalar on its device."""
    return checksum(packed) == _stored_checksum(packed)


def _stored_checksum(packed: Tensor) -> Tensor:
    return packed[-_CHECKSUM_BYTES:].view(torch.int64)[0]
