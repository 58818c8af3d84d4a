"""The formats that torchao has, too: the same bits."""

import pytest
import torch
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_scale_float8,
    _quantize_affine_float8,
    choose_qparams_affine,
    quantize_affine,
)

from rq_ep.formats import FORMATS
from rq_ep.formats.int4 import OFFSET
from rq_ep.formats.mxfp4 import GROUP
from rq_ep.formats.quantized import Parts
from rq_ep.formats.unpack import nibbles

NUM_OUT, NUM_IN = 48, 256
WEIGHT = torch.randn(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(0)) * 0.02


def parts_of(name: str) -> Parts:
    return FORMATS[name].quantize(WEIGHT)  # type: ignore[attr-defined, no-any-return]


def test_int8_by_output_channel() -> None:
    block, levels = (1, NUM_IN), (torch.int8, -127, 127)
    scale, zero = choose_qparams_affine(WEIGHT, MappingType.SYMMETRIC, block, *levels, scale_dtype=torch.float32)
    parts = parts_of("int8")
    assert torch.equal(parts["scale"], scale.flatten())
    assert torch.equal(parts["levels"], quantize_affine(WEIGHT, block, scale, zero, *levels))


def test_fp8_by_output_channel() -> None:
    scale = _choose_scale_float8(WEIGHT, [1, NUM_IN], torch.float8_e4m3fn)
    numbers = _quantize_affine_float8(WEIGHT, scale, torch.float8_e4m3fn)
    parts = parts_of("fp8")
    assert torch.equal(parts["scale"], scale.flatten())
    assert torch.equal(parts["numbers"].view(torch.uint8), numbers.view(torch.uint8))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_levels_by_our_scales(group: int) -> None:
    """torchao's own scales are for levels up to 7; ours bring the largest weight to -8, whichever its sign."""
    parts = parts_of(f"int4_g{group}")
    zero = torch.zeros(parts["scale"].shape, dtype=torch.int32)
    levels = quantize_affine(WEIGHT, (1, group), parts["scale"].float(), zero, torch.int8, -8, 7)
    assert torch.equal(nibbles(parts["codes"]).to(torch.int8) - OFFSET, levels)


def test_mxfp4_blocks_of_groups_with_the_same_scale() -> None:
    """torchao takes a group's scale from its largest weight alone; ours is the better of two."""
    scales, blocks = to_mx(WEIGHT, torch.float4_e2m1fn_x2, GROUP, ScaleCalculationMode.FLOOR)
    parts = parts_of("mxfp4")
    is_same = parts["scales"] == scales.view(torch.uint8)
    assert is_same.float().mean() > 0.5
    assert torch.equal(parts["blocks"][is_same], blocks.view(parts["blocks"].shape)[is_same])
