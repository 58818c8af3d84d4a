"""How quantized checkpoints store a matrix: under which names, and in which of our formats it is, bit by bit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats import FORMATS
from rq_ep.formats.quantized import Parts


@dataclass(frozen=True)
class QuantizationScheme:
    """One way of storing a matrix [out, in], or a stack of them, in several tensors."""

    format: str  # name of the weight format whose parts these are
    suffixes: Mapping[str, str]  # stored tensor -> what its name has behind the matrix's; the numbers come first
    parts: Callable[[Mapping[str, Tensor]], Parts]  # of the format, out of the stored tensors of one matrix
    dtype: torch.dtype  # of the stored numbers
    num_axes: int = 2  # of the stored numbers of one matrix: output channels, inputs, ...
    inputs_per_element: int = 1  # along the second of these
    is_transposed: bool = False  # the model keeps [in, out] in memory
    refused: Mapping[str, str] = field(default_factory=dict)  # suffix -> why we cannot read it


def scheme_of(config: Mapping[str, Any], what: str) -> QuantizationScheme | None:
    """The scheme of a checkpoint, by its `quantization_config`; None without one.

    Args:
        config: `config.json`.
        what: the checkpoint, for messages.

    Raises:
        UserError: one that we cannot read; the message names it.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    reader = _METHODS.get(str(method))
    if reader is None:
        raise UserError(
            f"{what}: the weights are quantized by {method!r:.40}, which is not supported; supported are "
            f"{', '.join(_METHODS)}: save a bf16 copy (from_pretrained with dequantization, then save_pretrained)"
        )
    try:
        return reader(settings)
    except _Unknown as reason:
        raise UserError(
            f"{what}: the weights are quantized by {method} in a way that is not supported ({reason}): save a bf16 "
            "copy (from_pretrained with dequantization, then save_pretrained) and use that"
        ) from None


class _Unknown(Exception):
    """A setting that we cannot read."""


def _mxfp4(settings: Mapping[str, Any]) -> QuantizationScheme:
    """As gpt-oss: all experts of a layer in one stack, [E, out, groups, 16] blocks and [E, out, groups] scales."""
    return QuantizationScheme(
        format="mxfp4",
        suffixes={"blocks": "_blocks", "scales": "_scales"},
        parts=lambda stored: {"blocks": stored["blocks"], "scales": stored["scales"]},
        dtype=torch.uint8,
        num_axes=3,
        inputs_per_element=32,
        is_transposed=True,
    )


def _fp8(settings: Mapping[str, Any]) -> QuantizationScheme:
    """As DeepSeek-V3: e4m3 numbers, and for each block the factor that they are multiplied by."""
    if settings.get("fmt", "e4m3") != "e4m3":
        raise _Unknown(f"fmt {settings['fmt']!r:.40}")
    return _blocks(settings.get("weight_block_size"), "_scale_inv")


def _compressed(settings: Mapping[str, Any]) -> QuantizationScheme:
    """compressed-tensors: symmetric int8 or fp8 for each channel or tensor, fp8 blocks, and packed int4 groups."""
    groups = [group.get("weights") for group in dict(settings.get("config_groups") or {}).values()]
    kinds = {tuple(sorted((key, str((weights or {}).get(key))) for key in _DECIDING)) for weights in groups}
    if len(kinds) != 1 or not isinstance(groups[0], dict):
        raise _Unknown(f"{len(kinds)} kinds of weights in config_groups")
    weights = groups[0]
    if not weights.get("symmetric", True):
        raise _Unknown("weights that are not symmetric")
    kind, strategy = (weights.get("type"), weights.get("num_bits")), weights.get("strategy")
    if kind == ("int", 4) and strategy == "group" and f"int4_g{weights.get('group_size')}" in FORMATS:
        return QuantizationScheme(
            format=f"int4_g{weights['group_size']}",
            suffixes={"packed": "_packed", "scale": "_scale"},
            parts=_packed_int4,
            dtype=torch.int32,
            inputs_per_element=8,
            refused=_COMPRESSED_REFUSED,
        )
    if kind == ("float", 8) and strategy == "block":
        return _blocks(weights.get("block_structure"), "_scale", _COMPRESSED_REFUSED)
    by_kind = {("int", 8): ("int8", "levels", torch.int8), ("float", 8): ("fp8", "numbers", torch.float8_e4m3fn)}
    if kind not in by_kind or strategy not in ("channel", "tensor"):
        raise _Unknown(f"{weights.get('type')} of {weights.get('num_bits')} bits, scaled by {strategy}")
    name, numbers, dtype = by_kind[kind]
    return QuantizationScheme(
        format=name,
        suffixes={numbers: "", "scale": "_scale"},
        parts=lambda stored: {
            numbers: stored[numbers],
            "scale": stored["scale"].float().flatten().expand(len(stored[numbers])).contiguous(),
        },
        dtype=dtype,
        refused=_COMPRESSED_REFUSED,
    )


def _blocks(block: Any, suffix: str, refused: Mapping[str, str] | None = None) -> QuantizationScheme:
    if not isinstance(block, list | tuple) or len(block) != 2 or f"fp8_g{block[1]}" not in FORMATS:
        raise _Unknown(f"fp8 in blocks of {block!r:.40}")
    rows, group = int(block[0]), int(block[1])

    def parts(stored: Mapping[str, Tensor]) -> Parts:
        numbers = stored["numbers"]
        scale = stored["scale"].float().repeat_interleave(rows, dim=0)[: len(numbers)].contiguous()
        return {"numbers": numbers, "scale": scale}

    return QuantizationScheme(
        format=f"fp8_g{group}",
        suffixes={"numbers": "", "scale": suffix},
        parts=parts,
        dtype=torch.float8_e4m3fn,
        refused=refused or {},
    )


def _packed_int4(stored: Mapping[str, Tensor]) -> Parts:
    """Eight levels plus 8 in an int32, the first in the lowest bits: little-endian, these are our bytes."""
    scale = stored["scale"]
    rounded = scale.to(torch.bfloat16)
    if not torch.equal(rounded.to(scale.dtype), scale):
        raise UserError(
            f"scales of int4 weights are {scale.dtype} numbers that bf16 cannot hold: save a bf16 copy of the model"
        )
    return {"codes": stored["packed"].view(torch.uint8), "scale": rounded}


_DECIDING = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
# Beside the weights: what only matters where activations or the KV cache are quantized, and shapes, which we know.
BESIDE = (r"\.(input|output|k|v)_(scale|zero_point)$", r"\.weight_shape$")
_COMPRESSED_REFUSED = {"_zero_point": "zero points", "_g_idx": "reordered groups", "_global_scale": "global scales"}
_METHODS: Mapping[str, Callable[[Mapping[str, Any]], QuantizationScheme]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}
