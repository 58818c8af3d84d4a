"""Reading a quantized checkpoint: each matrix under one name, dequantized, or as its parts.

By its parts an expert is packed without quantizing it again.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats import get_format, native_format_name
from rq_ep.formats.quantized import Parts, Quantized
from rq_ep.model.checkpoint.checkpoint_files import Checkpoint, read_config_json
from rq_ep.model.checkpoint.quantization_schemes import IGNORED_TENSORS, QuantizationScheme, quantization_scheme


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The tensors of a checkpoint, quantized or not.

    Raises:
        UserError: files are missing or damaged, weights lack their scales, or are stored in a way we cannot read.
    """
    scheme = quantization_scheme(read_config_json(path), str(path))
    return Checkpoint(path) if scheme is None else QuantizedCheckpoint(path, scheme)


def expert_format(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """Name of the weight format of a checkpoint's experts: the format of `dtype` if they are not quantized."""
    if isinstance(checkpoint, QuantizedCheckpoint) and any("expert" in key for key in checkpoint.matrices):
        return checkpoint.format.name
    return native_format_name(dtype)


class QuantizedCheckpoint(Checkpoint):
    """The tensors of a quantized checkpoint; matrices are dequantized to fp32, as the model keeps them in memory."""

    def __init__(self, path: str | Path, scheme: QuantizationScheme) -> None:
        super().__init__(path)
        format_ = get_format(scheme.format)
        assert isinstance(format_, Quantized), format_
        self.format = format_
        self._scheme = scheme
        keys = [key for key in super().keys if not any(re.search(pattern, key) for pattern in IGNORED_TENSORS)]
        self._tensor_keys = _matrices(keys, scheme, str(path))  # matrix -> tensor of the scheme -> key
        low_bit_keys = {key for tensor_keys in self._tensor_keys.values() for key in tensor_keys.values()}
        self._plain_keys = [key for key in keys if key not in low_bit_keys]

    @property
    def keys(self) -> list[str]:
        return [*self._tensor_keys, *self._plain_keys]

    @property
    def matrices(self) -> Collection[str]:
        """The names of low-bit matrices, or of stacks of them."""
        return self._tensor_keys.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._tensor_keys:
            return super().shape(key)
        numbers = super().shape(next(iter(self._tensor_keys[key].values())))
        axis = len(numbers) - self._scheme.num_axes
        matrix = (numbers[axis], numbers[axis + 1] * self._scheme.inputs_per_element)
        return (*numbers[:axis], *(reversed(matrix) if self._scheme.is_transposed else matrix))

    def tensor(self, key: str) -> Tensor:
        if key in self._tensor_keys:
            return self._matrices(key, None)
        plain = super().tensor(key)
        if plain.dtype == self._scheme.dtype:
            raise UserError(
                f"{self.path}: {key} holds {plain.dtype} numbers, but no scales: the checkpoint is incomplete"
            )
        return plain

    def rows(self, key: str, first: int, last: int) -> Tensor:
        return self._matrices(key, (first, last)) if key in self._tensor_keys else super().rows(key, first, last)

    def parts(self, key: str, expert: int | None = None) -> Parts:
        """The parts of a matrix, or of one matrix of a stack."""
        tensors = {}
        for name, tensor_key in self._tensor_keys[key].items():
            if expert is None:
                tensors[name] = super().tensor(tensor_key)
            else:
                tensors[name] = super().rows(tensor_key, expert, expert + 1)[0]
        return self._scheme.parts(tensors)

    def _matrices(self, key: str, experts: tuple[int, int] | None) -> Tensor:
        """A matrix, or some of a stack of them."""
        shape = self.shape(key)
        if len(shape) == 2:
            assert experts is None
            return self._matrix(self.parts(key), shape)
        first, last = experts or (0, shape[0])
        return torch.stack([self._matrix(self.parts(key, expert), shape[1:]) for expert in range(first, last)])

    def _matrix(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        num_in = shape[0 if self._scheme.is_transposed else 1]
        weight, scale = self.format.expand(parts, num_in, torch.float32)
        weight = weight if scale is None else weight * scale[:, None]
        return weight.T if self._scheme.is_transposed else weight


def _matrices(keys: Iterable[str], scheme: QuantizationScheme, what: str) -> dict[str, dict[str, str]]:
    """Matrix -> tensor of the scheme -> key, for every matrix that has a scale.

    Raises:
        UserError: a scale without numbers, numbers without a scale, or a tensor that is not supported.
    """
    present = set(keys)
    for suffix, name in scheme.unsupported.items():
        if matches := sorted(key for key in present if key.endswith(f".weight{suffix}")):
            raise UserError(
                f"{what}: {matches[0]}: {name} are not supported: save a bf16 copy of the model and use that"
            )
    (numbers_suffix, *_), scales_suffix = scheme.suffixes.values(), list(scheme.suffixes.values())[-1]
    matrices = {}
    for key in sorted(present):
        if key.endswith(scales_suffix):
            matrix = key.removesuffix(scales_suffix)
            tensor_keys = {name: f"{matrix}{suffix}" for name, suffix in scheme.suffixes.items()}
            if missing := sorted(set(tensor_keys.values()) - present):
                raise UserError(
                    f"{what}: {key} belongs to {missing[0]}, which is not there: the checkpoint is incomplete"
                )
            matrices[matrix] = tensor_keys
        elif numbers_suffix and key.endswith(numbers_suffix):
            scales = f"{key.removesuffix(numbers_suffix)}{scales_suffix}"
            if scales not in present:
                raise UserError(f"{what}: {key} has no scales {scales}: the checkpoint is incomplete")
    return matrices
