"""Quantization schemes of checkpoints: the names under which a matrix is stored, and the weight format of its bits."""

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
    """How a matrix [out, in], or a stack of them, is stored in several tensors."""

    format: str  # name of the weight format
    suffixes: Mapping[str, str]  # tensor -> the suffix of its name after the matrix's; the numbers come first
    parts: Callable[[Mapping[str, Tensor]], Parts]  # of the format, from the tensors of one matrix
    dtype: torch.dtype  # of the numbers
    num_axes: int = 2  # of the numbers of one matrix: output channels, inputs, ...
    inputs_per_element: int = 1  # along the second axis
    is_transposed: bool = False  # the model keeps [in, out] in memory
    unsupported: Mapping[str, str] = field(default_factory=dict)  # suffix of a tensor we cannot read -> its name


def quantization_scheme(config: Mapping[str, Any], what: str) -> QuantizationScheme | None:
    """The scheme of a checkpoint, by its `quantization_config`; None without one.

    Args:
        config: `config.json`.
        what: the checkpoint, for messages.

    Raises:
        UserError: the scheme is not supported; the message names it.
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
    except _Unsupported as reason:
        raise UserError(
            f"{what}: the weights are quantized by {method} in a way that is not supported ({reason}): save a bf16 "
            "copy (from_pretrained with dequantization, then save_pretrained) and use that"
        ) from None


class _Unsupported(Exception):
    """A setting that is not supported."""


def _mxfp4(settings: Mapping[str, Any]) -> QuantizationScheme:
    """mxfp4 as of gpt-oss: all experts of a layer in one stack, [E, O, G, 16] blocks and [E, O, G] scales."""
    return QuantizationScheme(
        format="mxfp4",
        suffixes={"blocks": "_blocks", "scales": "_scales"},
        parts=lambda tensors: {"blocks": tensors["blocks"], "scales": tensors["scales"]},
        dtype=torch.uint8,
        num_axes=3,
        inputs_per_element=32,
        is_transposed=True,
    )


def _fp8(settings: Mapping[str, Any]) -> QuantizationScheme:
    """fp8 as of DeepSeek-V3: e4m3 numbers, and a factor for each block of them."""
    if settings.get("fmt", "e4m3") != "e4m3":
        raise _Unsupported(f"fmt {settings['fmt']!r:.40}")
    return _blocks(settings.get("weight_block_size"), "_scale_inv")


def _compressed(settings: Mapping[str, Any]) -> QuantizationScheme:
    """compressed-tensors: symmetric int8 or fp8 for each channel or tensor, fp8 blocks, and packed int4 groups."""
    groups = [group.get("weights") for group in dict(settings.get("config_groups") or {}).values()]
    kinds = {tuple(sorted((key, str((weights or {}).get(key))) for key in _DECIDING)) for weights in groups}
    if len(kinds) != 1 or not isinstance(groups[0], dict):
        raise _Unsupported(f"{len(kinds)} kinds of weights in config_groups")
    weights = groups[0]
    if not weights.get("symmetric", True):
        raise _Unsupported("weights that are not symmetric")
    kind, strategy = (weights.get("type"), weights.get("num_bits")), weights.get("strategy")
    if kind == ("int", 4) and strategy == "group" and f"int4_g{weights.get('group_size')}" in FORMATS:
        return QuantizationScheme(
            format=f"int4_g{weights['group_size']}",
            suffixes={"packed": "_packed", "scale": "_scale"},
            parts=_packed_int4,
            dtype=torch.int32,
            inputs_per_element=8,
            unsupported=_COMPRESSED_UNSUPPORTED,
        )
    if kind == ("float", 8) and strategy == "block":
        return _blocks(weights.get("block_structure"), "_scale", _COMPRESSED_UNSUPPORTED)
    by_kind = {("int", 8): ("int8", "levels", torch.int8), ("float", 8): ("fp8", "numbers", torch.float8_e4m3fn)}
    if kind not in by_kind or strategy not in ("channel", "tensor"):
        raise _Unsupported(f"{weights.get('type')} of {weights.get('num_bits')} bits, scaled by {strategy}")
    name, numbers, dtype = by_kind[kind]
    return QuantizationScheme(
        format=name,
        suffixes={numbers: "", "scale": "_scale"},
        parts=lambda tensors: {
            numbers: tensors[numbers],
            "scale": tensors["scale"].float().flatten().expand(len(tensors[numbers])).contiguous(),
        },
        dtype=dtype,
        unsupported=_COMPRESSED_UNSUPPORTED,
    )


def _blocks(block: Any, suffix: str, unsupported: Mapping[str, str] | None = None) -> QuantizationScheme:
    if not isinstance(block, list | tuple) or len(block) != 2 or f"fp8_g{block[1]}" not in FORMATS:
        raise _Unsupported(f"fp8 in blocks of {block!r:.40}")
    rows, group = int(block[0]), int(block[1])

    def parts(tensors: Mapping[str, Tensor]) -> Parts:
        numbers = tensors["numbers"]
        scale = tensors["scale"].float().repeat_interleave(rows, dim=0)[: len(numbers)].contiguous()
        return {"numbers": numbers, "scale": scale}

    return QuantizationScheme(
        format=f"fp8_g{group}",
        suffixes={"numbers": "", "scale": suffix},
        parts=parts,
        dtype=torch.float8_e4m3fn,
        unsupported=unsupported or {},
    )


def _packed_int4(tensors: Mapping[str, Tensor]) -> Parts:
    """int4 of compressed-tensors: eight levels plus 8 in an int32, lowest bits first, which are the bytes of `Int4`."""
    scale = tensors["scale"]
    rounded = scale.to(torch.bfloat16)
    if not torch.equal(rounded.to(scale.dtype), scale):
        raise UserError(
            f"scales of int4 weights are {scale.dtype} numbers that bf16 cannot hold: save a bf16 copy of the model"
        )
    return {"codes": tensors["packed"].view(torch.uint8), "scale": rounded}


_DECIDING = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
# Tensors that only matter where activations or the KV cache are quantized, and shapes, which are known.
IGNORED_TENSORS = (r"\.(input|output|k|v)_(scale|zero_point)$", r"\.weight_shape$")
_COMPRESSED_UNSUPPORTED = {"_zero_point": "zero points", "_g_idx": "reordered groups", "_global_scale": "global scales"}
_METHODS: Mapping[str, Callable[[Mapping[str, Any]], QuantizationScheme]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}
