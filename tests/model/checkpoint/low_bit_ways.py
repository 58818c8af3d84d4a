"""Ways to store the weights of a checkpoint in low bits, as other tools write them, in plain torch."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

Json = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A way to store a matrix in low bits, as `quantization_config` names it, and the format that holds its bits."""

    config: Json
    kind: str
    bits: int
    rows: int | None = 1  # of a block with one scale; None: all
    columns: int | None = None
    is_packed: bool = False
    scale: str = "_scale"
    scale_dtype: torch.dtype = torch.bfloat16
    format: str | None = None  # None: its experts are dequantized

    def store(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors, by what follows `weight` in their names, and the matrix that they stand for."""
        num_out, num_in = weight.shape
        rows, columns = self.rows or num_out, self.columns or num_in
        padded = torch.nn.functional.pad(weight, (0, -num_in % columns, 0, -num_out % rows))
        blocks = padded.view(ceil(num_out / rows), rows, -1, columns)
        limit = 448 if self.kind == "float" else 2 ** (self.bits - 1) - 0.5
        scale = (blocks.abs().amax((1, 3)) / limit).to(self.scale_dtype)
        full = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:num_out, :num_in]
        if self.kind == "float":
            numbers = (weight / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            numbers = (weight / full).round().clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1).to(torch.int8)
        dequantized = numbers.float() * full
        if not self.is_packed:
            return {"": numbers, self.scale: scale}, dequantized
        levels, step = numbers.int() + 2 ** (self.bits - 1), 32 // self.bits
        packed = sum(levels[:, i::step] << self.bits * i for i in range(step))
        return {"_packed": packed, self.scale: scale, "_shape": torch.tensor(weight.shape)}, dequantized


def weights(num_bits: int, kind: str, strategy: str, **more: Any) -> Json:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "strategy": strategy, **more}


def compressed(form: str, scheme: Json) -> Json:
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": []}


def fp8(**more: Any) -> Json:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **more}


PACKED, INTS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
F32 = torch.float32
WAYS = {
    "W4A16 groups of 32": Stored(
        compressed(PACKED, weights(4, "int", "group", group_size=32)), "int", 4, 1, 32, True, format="int4_g32"
    ),
    "W4A16 groups of 16": Stored(
        compressed(PACKED, weights(4, "int", "group", group_size=16)), "int", 4, 1, 16, True
    ),
    "W4A16 fp16 scales": Stored(
        compressed(PACKED, weights(4, "int", "group", group_size=32)), "int", 4, 1, 32, True, scale_dtype=torch.float16
    ),
    "W4A16 channels": Stored(
        compressed(PACKED, weights(4, "int", "channel")), "int", 4, is_packed=True, format="int4_g128"
    ),
    "W8A16 channels": Stored(
        compressed(PACKED, weights(8, "int", "channel")), "int", 8, is_packed=True, format="int8"
    ),
    "W8A16 groups": Stored(compressed(PACKED, weights(8, "int", "group", group_size=16)), "int", 8, 1, 16, True),
    "W8A8 channels": Stored(compressed(INTS, weights(8, "int", "channel")), "int", 8, format="int8"),
    "W8A8 tensors": Stored(compressed(INTS, weights(8, "int", "tensor")), "int", 8, rows=None, format="int8"),
    "fp8 channels": Stored(compressed(FLOATS, weights(8, "float", "channel")), "float", 8, format="fp8"),
    "fp8 64 x 32": Stored(
        compressed(FLOATS, weights(8, "float", "block", block_structure=[64, 32])), "float", 8, 64, 32
    ),
    "fp8 tensors": Stored(fp8(), "float", 8, None, scale_dtype=F32, format="fp8"),
    "fp8 128 x 128": Stored(
        fp8(weight_block_size=[128, 128]), "float", 8, 128, 128, False, "_scale_inv", F32, "fp8_g128"
    ),
    "fp8 64 x 64": Stored(fp8(weight_block_size=[64, 64]), "float", 8, 64, 64, False, "_scale_inv", F32, "fp8_g64"),
    "fp8 128 x 64": Stored(fp8(weight_block_size=[128, 64]), "float", 8, 128, 64, False, "_scale_inv", F32, "fp8_g64"),
    "fp8 32 x 256": Stored(
        fp8(weight_block_size=[32, 256]), "float", 8, 32, 256, False, "_scale_inv", F32, "fp8_g128"
    ),
}  # fmt: skip
