"""Low-bit matrices of a checkpoint, found by the names, dtypes and shapes of its tensors; none is read for it.

What is stored decides which matrices are in low bits. The configuration says what their numbers mean, and must agree.
Axes: O output channels, I inputs, E experts, G groups of inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats.mxfp4 import Mxfp4
from rq_ep.formats.quantized import Parts
from rq_ep.model.checkpoint.quantization_schemes import QuantizationScheme, WeightScheme

# Tensors that only matter where activations or the KV cache are quantized, and shapes, which are known.
IGNORED_TENSORS = (r"\.(input|output|act|q|k|v|kv)_(scale|zero_point)$", r"\.weight_shape$")


class TensorHeader(NamedTuple):
    """What a checkpoint's files say of a tensor in advance."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LowBitMatrix(ABC):
    """A matrix in low bits, or a stack of them, in several tensors of a checkpoint."""

    shape: tuple[int, ...]  # as the model keeps it in memory
    keys: Mapping[str, str]  # numbers and scale -> the tensors' names

    @property
    @abstractmethod
    def format(self) -> str | None:
        """The weight format that holds numbers and scales bit by bit; None: there is none."""

    @abstractmethod
    def parts(self, numbers: Tensor, scale: Tensor) -> Parts:
        """The parts of one matrix in its format."""

    @abstractmethod
    def dequantize(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """One matrix in fp32, as the model keeps it in memory."""


@dataclass(frozen=True)
class ScaledMatrix(LowBitMatrix):
    """A matrix [O, I] of int8, e4m3 or packed integers, and a scale for each block of it."""

    scheme: WeightScheme
    is_packed: bool  # 32 / num_bits integers in an int32, the first in the lowest bits, without a sign
    has_bf16_scales: bool

    @property
    def format(self) -> str | None:
        group = self._held_group
        name = {("int", 8): "int8", ("float", 8): "fp8", ("int", 4): "int4"}[self.scheme.kind, self.scheme.num_bits]
        return None if group is None else f"{name}_g{group}" if group else name

    @property
    def _held_group(self) -> int | None:
        """Inputs that share a scale in the weight format; 0: all of them; None: no format holds this."""
        kind, num_bits, block = self.scheme.kind, self.scheme.num_bits, self.scheme.block
        if (kind, num_bits) == ("int", 8):
            return 0 if block is None else None
        if (kind, num_bits) == ("float", 8):
            return 0 if block is None else next((size for size in (128, 64) if block[1] % size == 0), None)
        if not self.has_bf16_scales:
            return None
        return next((size for size in (128, 64, 32) if block is None or block[1] % size == 0), None)

    def parts(self, numbers: Tensor, scale: Tensor) -> Parts:
        num_in = self.shape[1]
        group, scale_OG = self._held_group, self._scale_of_channels(scale)
        assert group is not None, self
        if group:
            times = num_in if self.scheme.block is None else self.scheme.block[1] // group
            scale_OG = scale_OG.repeat_interleave(times, 1)[:, : -(-num_in // group)]
        if self.scheme.num_bits == 4:
            return {"codes": numbers.view(torch.uint8)[:, : -(-num_in // 2)], "scale": scale_OG.contiguous()}
        scale_OG = scale_OG.float().contiguous()
        name = "levels" if self.scheme.kind == "int" else "numbers"
        return {name: self._numbers(numbers), "scale": scale_OG if group else scale_OG[:, 0].contiguous()}

    def dequantize(self, numbers: Tensor, scale: Tensor) -> Tensor:
        num_in = self.shape[1]
        times = num_in if self.scheme.block is None else self.scheme.block[1]
        scale_OI = self._scale_of_channels(scale).float().repeat_interleave(times, 1)[:, :num_in]
        return self._numbers(numbers).float() * scale_OI

    def _scale_of_channels(self, scale: Tensor) -> Tensor:
        """[O, G] the scales of every output channel."""
        num_out, num_in = self.shape
        if self.scheme.block is None:
            return scale.reshape(-1, 1).expand(num_out, 1)
        rows, columns = self.scheme.block
        return scale.reshape(-1, -(-num_in // columns)).repeat_interleave(rows, 0)[:num_out]

    def _numbers(self, numbers: Tensor) -> Tensor:
        """[O, I] the numbers, unpacked."""
        if not self.is_packed:
            return numbers
        bits = self.scheme.num_bits
        levels = torch.stack([numbers >> shift & 2**bits - 1 for shift in range(0, 32, bits)], 2).flatten(1)
        return levels.sub_(2 ** (bits - 1)).to(torch.int8)[:, : self.shape[1]].contiguous()


@dataclass(frozen=True)
class Mxfp4Stack(LowBitMatrix):
    """mxfp4 as of gpt-oss: a layer's experts, blocks [E, O, G, 16] and scales [E, O, G]; the model keeps [E, I, O]."""

    format: ClassVar[str] = "mxfp4"

    def parts(self, numbers: Tensor, scale: Tensor) -> Parts:
        return {"blocks": numbers, "scales": scale}

    def dequantize(self, numbers: Tensor, scale: Tensor) -> Tensor:
        return Mxfp4().expand(self.parts(numbers, scale), self.shape[1], torch.float32)[0].T


def find_low_bit_matrices(
    headers: Mapping[str, TensorHeader], scheme: QuantizationScheme, what: str
) -> dict[str, LowBitMatrix]:
    """The low-bit matrices of a checkpoint, by the names that they would have without quantization.

    Args:
        headers: of all tensors.
        scheme: the checkpoint's, by its configuration.
        what: the checkpoint, for messages.

    Raises:
        UserError: a scale without numbers, numbers without a scale, a tensor that is not supported, or one that
            contradicts the configuration.
    """
    find = _mxfp4_stack if scheme.method == "mxfp4" else _scaled_matrix
    try:
        found = (find(key, headers, scheme) for key in sorted(headers))
        return dict(matrix for matrix in found if matrix is not None)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _mxfp4_stack(
    key: str, headers: Mapping[str, TensorHeader], scheme: QuantizationScheme
) -> tuple[str, LowBitMatrix] | None:
    """The stack whose blocks, or whose scales, are stored under this name; None if it is another tensor."""
    if not key.endswith(("_blocks", "_scales")):
        return None
    name = key.removesuffix("_blocks").removesuffix("_scales")
    keys = {"numbers": f"{name}_blocks", "scale": f"{name}_scales"}
    _check_together(keys, headers)
    blocks, scales = (headers[tensor] for tensor in keys.values())
    if blocks.dtype != "U8" or scales.dtype != "U8" or blocks.shape != (*scales.shape, 16) or len(blocks.shape) != 4:
        raise UserError(f"{name} is stored as {_shown(blocks)} with scales {_shown(scales)}, which is not mxfp4")
    num_experts, num_out, num_groups = scales.shape
    return name, Mxfp4Stack((num_experts, num_groups * 32, num_out), keys)


def _scaled_matrix(
    key: str, headers: Mapping[str, TensorHeader], scheme: QuantizationScheme
) -> tuple[str, LowBitMatrix] | None:
    """The matrix whose numbers, or whose scales, are stored under this name; None if it is another tensor."""
    for suffix, meaning in _UNSUPPORTED.items():
        if key.endswith(f".weight{suffix}"):
            raise UserError(f"{key}: {meaning} are not supported: save a bf16 copy of the model and use that")
    name, weight, suffix = key.rpartition(".weight")
    if not weight or suffix not in ("", "_packed", *_SCALES):
        return None
    name += weight
    stored = next((f"{name}{part}" for part in ("_packed", "") if f"{name}{part}" in headers), name)
    scale = next((f"{name}{part}" for part in _SCALES if f"{name}{part}" in headers), None)
    if stored in headers and scale is None and headers[stored].dtype not in ("I32", "I8", "F8_E4M3"):
        return None  # as it was before quantization
    if stored != name and name in headers:
        raise UserError(f"{name} and {stored} are both there: the checkpoint is not that of one model")
    keys = {"numbers": stored, "scale": scale or f"{name}{_SCALES[0]}"}
    _check_together(keys, headers)
    numbers, scales, weights = headers[keys["numbers"]], headers[keys["scale"]], scheme.of_module(name[: -len(weight)])
    is_packed = stored != name
    wanted = "I32" if is_packed else {"int": "I8", "float": "F8_E4M3"}[weights.kind]
    if numbers.dtype != wanted or len(numbers.shape) != 2 or (is_packed and weights.kind != "int"):
        raise UserError(
            f"{stored} is stored as {_shown(numbers)} with scales, but config.json says {weights}: the checkpoint is "
            "incomplete, or belongs to another configuration"
        )
    num_out, num_in = numbers.shape
    num_in *= 32 // weights.num_bits if is_packed else 1
    sizes = {(1, 1), (num_out, 1)}
    if weights.block is not None:
        rows, columns = weights.block
        sizes = {(-(-num_out // rows), -(-num_in // columns))}
        if weights.kind == "int" and columns >= num_in:
            weights = replace(weights, block=None)  # one group
    squeezed = {tuple(size for size in shape if size > 1) for shape in sizes}
    if scales.dtype not in _SCALE_DTYPES or tuple(size for size in scales.shape if size > 1) not in squeezed:
        raise UserError(
            f"{keys['scale']} is stored as {_shown(scales)} for weights [{num_out}, {num_in}], but config.json says "
            f"{weights}: the weights belong to another configuration"
        )
    if not is_packed and weights.kind == "int":
        weights = replace(weights, num_bits=8)  # fewer bits, stored in bytes
    return name, ScaledMatrix((num_out, num_in), keys, weights, is_packed, scales.dtype == "BF16")


def _check_together(keys: Mapping[str, str], headers: Mapping[str, TensorHeader]) -> None:
    """Raise a `UserError` unless both numbers and scales are there."""
    numbers, scale = keys["numbers"], keys["scale"]
    if numbers not in headers:
        raise UserError(f"{scale} belongs to {numbers}, which is not there: the checkpoint is incomplete")
    if scale not in headers:
        raise UserError(
            f"{numbers} is stored as {headers[numbers].dtype} and has no scales {scale}: the checkpoint is incomplete"
        )


def _shown(header: TensorHeader) -> str:
    return f"{header.dtype} {list(header.shape)}"


_SCALES = ("_scale", "_scale_inv")  # the second where the field says so: numbers are multiplied by both
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_UNSUPPORTED = {"_zero_point": "zero points", "_g_idx": "reordered groups", "_global_scale": "global scales"}
