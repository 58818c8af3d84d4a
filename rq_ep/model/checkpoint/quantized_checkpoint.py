"""Reading a quantized checkpoint: each matrix under one name, dequantized, or as its parts.

By its parts an expert is packed without quantizing it again.
"""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats import native_format_name
from rq_ep.formats.quantized import Parts
from rq_ep.model.checkpoint.checkpoint_files import Checkpoint, read_config_json
from rq_ep.model.checkpoint.low_bit_matrices import (
    IGNORED_TENSORS,
    LowBitMatrix,
    TensorHeader,
    find_low_bit_matrices,
)
from rq_ep.model.checkpoint.quantization_schemes import QuantizationScheme, quantization_scheme


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The tensors of a checkpoint, quantized or not.

    Raises:
        UserError: files are missing or damaged, weights lack their scales, or are stored in a way we cannot read.
    """
    scheme = quantization_scheme(read_config_json(path), str(path))
    return Checkpoint(path) if scheme is None else QuantizedCheckpoint(path, scheme)


def expert_format(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """The weight format that holds all experts of a checkpoint as they are stored.

    It is the native format of `dtype` unless all of them are in one low-bit format: where some are not, nothing else
    holds them without rounding.
    """
    formats = {checkpoint.format_of(key) for key in checkpoint.keys if _is_expert_matrix(key)}
    stored = formats.pop() if len(formats) == 1 else None
    return native_format_name(dtype) if stored is None else stored


def has_low_bit_experts(checkpoint: Checkpoint) -> bool:
    """Whether any matrix of an expert is stored in low bits."""
    return isinstance(checkpoint, QuantizedCheckpoint) and any(map(_is_expert_matrix, checkpoint.matrices))


def _is_expert_matrix(key: str) -> bool:
    return ".experts." in key and not key.endswith("bias")


class QuantizedCheckpoint(Checkpoint):
    """The tensors of a quantized checkpoint; matrices are dequantized to fp32, as the model keeps them in memory."""

    def __init__(self, path: str | Path, scheme: QuantizationScheme) -> None:
        super().__init__(path)
        keys = [key for key in super().keys if not any(re.search(pattern, key) for pattern in IGNORED_TENSORS)]
        headers = {key: TensorHeader(Checkpoint.dtype(self, key), Checkpoint.shape(self, key)) for key in keys}
        self._matrices = find_low_bit_matrices(headers, scheme, str(path))
        low_bit_keys = {key for matrix in self._matrices.values() for key in matrix.keys.values()}
        self._plain_keys = [key for key in keys if key not in low_bit_keys]
        self._note_formats(scheme)

    def _note_formats(self, scheme: QuantizationScheme) -> None:
        if not self._matrices:
            self.notes.append(f"config.json says that weights are quantized by {scheme.method}, but none is stored so")
        unheld = [key for key, matrix in self._matrices.items() if matrix.format is None and _is_expert_matrix(key)]
        if unheld:
            self.notes.append(
                f"{unheld[0]} and {len(unheld) - 1} more matrices of experts are scaled as no weight format of ours "
                "holds them: without a placement, their experts are dequantized to the dtype to compute in"
            )

    @property
    def keys(self) -> list[str]:
        return [*self._matrices, *self._plain_keys]

    @property
    def matrices(self) -> Collection[str]:
        """The names of low-bit matrices, or of stacks of them."""
        return self._matrices.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._matrices[key].shape if key in self._matrices else super().shape(key)

    def dtype(self, key: str) -> str:
        return "F32" if key in self._matrices else super().dtype(key)

    def format_of(self, key: str) -> str | None:
        return self._matrices[key].format if key in self._matrices else None

    def tensor(self, key: str) -> Tensor:
        if key not in self._matrices:
            return super().tensor(key)
        matrix = self._matrices[key]
        if len(matrix.shape) > 2:
            return self.rows(key, 0, matrix.shape[0])
        return matrix.dequantize(*self._stored(matrix, None))

    def rows(self, key: str, first: int, last: int) -> Tensor:
        if key not in self._matrices:
            return super().rows(key, first, last)
        matrix = self._matrices[key]
        return torch.stack([matrix.dequantize(*self._stored(matrix, expert)) for expert in range(first, last)])

    def parts(self, key: str, expert: int | None = None) -> Parts:
        """The parts of a matrix, or of one matrix of a stack, in the format that holds it."""
        matrix = self._matrices[key]
        return matrix.parts(*self._stored(matrix, expert))

    def _stored(self, matrix: LowBitMatrix, expert: int | None) -> tuple[Tensor, Tensor]:
        """Numbers and scales of a matrix, or of one of a stack."""
        numbers, scale = (
            Checkpoint.tensor(self, key) if expert is None else Checkpoint.rows(self, key, expert, expert + 1)[0]
            for key in (matrix.keys["numbers"], matrix.keys["scale"])
        )
        if scale.is_floating_point() and not scale.float().isfinite().all():
            raise UserError(f"{self.path}: {matrix.keys['scale']} is infinite or not a number: the file is damaged")
        return numbers, scale
